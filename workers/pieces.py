"""The pieces that shards leave behind, and the files of a version that they become.

Owns what one shard gives once its updates are summed: the new values and, in a run of deltas, the
frames of its delta; their keys, and joining those of all shards. The step from one version to the
next is ``fedselect.deltafiles``. Must not know jobs or rows.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, NamedTuple, cast
from uuid import UUID

import numpy as np

from app.jobs import Progress
from app.storage import Storage
from fedselect import wire
from fedselect.aggregate import Accumulator
from fedselect.deltafiles import DeltaMeta, advance, delta_head
from fedselect.deltas import PLANES, DeltaEncoding
from fedselect.masks import BLOCK
from fedselect.protocol import Manifest
from fedselect.space import FloatVector

IN_MEMORY = 8 * 1024**2
VALUES, DELTA = "", ".delta"  # how the key of a piece ends


class Joined(NamedTuple):
    """A file that is complete and not yet stored, with its SHA-256 (hex) and its bytes."""

    file: BinaryIO
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of all shards of one round."""

    storage: Storage
    manifest: Manifest
    round_id: UUID

    def store(self, part: int, sums: Accumulator, base: FloatVector) -> tuple[str, list[str]]:
        """Finish one shard from the sums of all its updates and the base's values, (n,), and put
        its pieces into the store; returns their SHA-256 (hex) and their keys.

        Raises:
            WireError: the new values are not finite.
        """
        files = dict(self._finish(sums, base))
        for kind, data in files.items():
            self.storage.put(self._key(part, kind), io.BytesIO(data), len(data))
        digest = hashlib.sha256(b"".join(files.values())).hexdigest()
        return digest, [self._key(part, kind) for kind in files]

    def _finish(self, sums: Accumulator, base: FloatVector) -> Iterator[tuple[str, bytes]]:
        encoding, k = self.manifest.encoding, self.manifest.min_contributors
        if encoding == "f32":
            yield VALUES, sums.finish(base, k).astype("<f4").tobytes()
            return
        mean = sums.finish(np.zeros_like(base), k)
        values, lengths, frames = advance(base, mean, encoding)
        yield VALUES, values.astype("<f4").tobytes()
        yield DELTA, lengths.astype("<u4").tobytes() + frames

    def _key(self, part: int, kind: str) -> str:
        return f"partials/{self.round_id}/{part}{kind}"

    def _read(self, kind: str) -> Iterator[bytes]:
        for part in range(-(-self.manifest.elements // self.manifest.shard)):
            yield self.storage.read(self._key(part, kind))

    @contextmanager
    def version(self, progress: Progress) -> Iterator[Joined]:
        """The version file."""
        head = wire.version_head(self.manifest.space, self.manifest.elements)
        with _joined(chain([head], self._read(VALUES)), progress) as joined:
            yield joined

    @contextmanager
    def delta(self, encoding: DeltaEncoding, result: str, progress: Progress) -> Iterator[Joined]:
        """The delta file that leads from the base to the version file of digest ``result``."""
        tables: list[bytes] = []
        manifest = self.manifest
        digests = manifest.base_sha256, result
        meta = DeltaMeta(manifest.space, *digests, encoding, manifest.elements)
        with _joined(self._frames(encoding, tables), progress) as frames:
            lengths = np.frombuffer(b"".join(tables), dtype="<u4")
            head = delta_head(meta, lengths, frames.size)
            chunks = iter(lambda: frames.file.read(IN_MEMORY), b"")
            with _joined(chain([head], chunks), progress) as joined:
                yield joined

    def _frames(self, encoding: DeltaEncoding, tables: list[bytes]) -> Iterator[bytes]:
        """The frames of every shard; the lengths of their planes go to ``tables``."""
        manifest = self.manifest
        for part, piece in enumerate(self._read(DELTA)):
            size = min(manifest.shard, manifest.elements - part * manifest.shard)
            table = 4 * PLANES[encoding] * -(-size // BLOCK)
            tables.append(piece[:table])
            yield piece[table:]


@contextmanager
def _joined(pieces: Iterable[bytes], progress: Progress) -> Iterator[Joined]:
    digest, size = hashlib.sha256(), 0
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as spool:
        for piece in pieces:
            digest.update(piece)
            size += spool.write(piece)
            progress()
        spool.seek(0)
        yield Joined(cast(BinaryIO, spool), digest.hexdigest(), size)
