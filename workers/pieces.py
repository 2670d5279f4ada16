"""The pieces that shards leave behind, and the files of a version that they become.

Owns what one shard gives once its updates are summed: the new values and, in a run of deltas, the
frames of its delta; their keys, and joining those of all shards. The step from one version to the
next is ``fedselect.deltafiles``. Must not know jobs or rows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol
from uuid import UUID

import numpy as np

from app.storage import Storage
from fedselect import wire
from fedselect.deltafiles import DeltaMeta, advance, delta_head
from fedselect.deltas import PLANES, DeltaEncoding
from fedselect.manifestdocs import Manifest
from fedselect.masks import BLOCK
from fedselect.space import FloatVector

VALUES, DELTA = "", ".delta"  # how the key of a piece ends


class Shard(Protocol):
    """All updates of one shard, ready to be averaged: running sums, bounded or noised ones."""

    def finish(self, base: FloatVector, k: int) -> FloatVector:
        """The new values of the range, or with zeros for ``base`` their mean delta; where fewer
        than ``k`` share an element it keeps ``base``.
        """


class Joined(NamedTuple):
    """A file that is joined while it is read: its length, and its bytes piece by piece."""

    size: int
    pieces: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of all shards of one round."""

    storage: Storage
    manifest: Manifest
    round_id: UUID

    def store(self, part: int, sums: Shard, base: FloatVector) -> tuple[str, list[str]]:
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

    def _finish(self, sums: Shard, base: FloatVector) -> Iterator[tuple[str, bytes]]:
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

    def version(self) -> Joined:
        """The version file."""
        head = wire.version_head(self.manifest.space, self.manifest.elements)
        values = (self.storage.read(self._key(part, VALUES)) for part in self._parts())
        return Joined(len(head) + 4 * self.manifest.elements, chain([head], values))

    def delta(self, encoding: DeltaEncoding, result: str) -> Joined:
        """The delta file that leads from the base to the version file of digest ``result``.

        The lengths of all planes come before the first frame, so they are read first.
        """
        manifest, places = self.manifest, []
        for part in self._parts():
            size = min(manifest.shard, manifest.elements - part * manifest.shard)
            places.append((self._key(part, DELTA), 4 * PLANES[encoding] * -(-size // BLOCK)))
        tables = b"".join(self.storage.read(key, 0, table) for key, table in places)
        total = sum((self.storage.size(key) or 0) - table for key, table in places)
        meta = DeltaMeta(manifest.space, manifest.base_sha256, result, encoding, manifest.elements)
        head = delta_head(meta, np.frombuffer(tables, dtype="<u4"), total)
        frames = (self.storage.read(key, table) for key, table in places)
        return Joined(len(head) + total, chain([head], frames))

    def _parts(self) -> range:
        return range(-(-self.manifest.elements // self.manifest.shard))
