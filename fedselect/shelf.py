"""What a client serves: versions of a model, each with the personal part that went with it.

Owns the folder ``serving/`` in the agent's folder. A version file and a personal state are kept as
a pair, so that who goes back to a version gets both halves of that time back::

    serving.json             the pairs, the served one first
    <sha256>.version         a version file
    <sha256>.<arm>.state     the personal state beside it

Every change is one atomic replacement of ``serving.json`` after the files that it names are on the
disk; files that it does not name are leftovers and are swept. Must not train or talk to anyone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal
from uuid import UUID

from fedselect.agentdocs import DIGEST, Document, StoredFile, read_document
from fedselect.errors import FedSelectError
from fedselect.personal import PersonalState, Pieces, sync_folder, write_atomically
from fedselect.space import ParameterSpace

FOLDER, RECORD = "serving", "serving.json"
KEPT = 3  # pairs: the served one, the one before it, and the one before a candidate


class Pair(Document):
    """A version and the personal part that is merged into it; ``round`` is the last one of its own
    that this part comes from, 0 if it was trained for serving alone.
    """

    channel: str
    arm: UUID
    number: int
    version: StoredFile
    state: StoredFile
    participations: int
    round: int

    def is_of(self, arm: UUID, sha256: str) -> bool:
        """Whether it is of this version in this arm."""
        return (self.arm, self.version.sha256) == (arm, sha256)


class Shown(Document):
    """The pairs that are kept, the served one first."""

    format: Literal["fedselect-serving/1"] = "fedselect-serving/1"
    pairs: tuple[Pair, ...] = ()


def read_shown(folder: Path) -> Shown:
    """What an agent's folder serves, read without touching anything."""
    return read_document(folder / FOLDER / RECORD, Shown) or Shown()


def read_file(folder: Path, file: StoredFile) -> bytes | None:
    """A file of a pair; None if it was replaced meanwhile, or is damaged."""
    path = folder / FOLDER / file.name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == file.sha256 else None


class Shelf:
    """The pairs in an agent's folder; the agent holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        self._root, self._path = folder, folder / FOLDER
        self._shown = read_shown(folder)
        if self._path.exists():
            self._sweep()

    @property
    def served(self) -> Pair | None:
        """What is served now."""
        return self._shown.pairs[0] if self._shown.pairs else None

    def find(self, arm: UUID, sha256: str) -> Pair | None:
        """A kept pair of this version, if both of its files are whole."""
        for pair in self._shown.pairs:
            if pair.is_of(arm, sha256) and self._whole(pair):
                return pair
        return None

    def state(self, pair: Pair, space: ParameterSpace) -> PersonalState:
        """The personal part of a pair.

        Raises:
            FedSelectError: ``state_corrupt``, or ``state_mismatch`` if it is of another model.
        """
        data = read_file(self._root, pair.state)
        if data is None:
            raise FedSelectError(f"{self._path / pair.state.name} is damaged", code="state_corrupt")
        return PersonalState.from_bytes(data, space)

    def store(self, arm: UUID, version: bytes, state: Pieces) -> tuple[StoredFile, StoredFile]:
        """Put a version file and the state beside it on the disk; nothing is served by that."""
        if not self._path.exists():
            self._path.mkdir(mode=0o700)
            sync_folder(self._root)
        sha256 = hashlib.sha256(version).hexdigest()
        return (
            self._save(f"{sha256}.version", version),
            self._save(f"{sha256}.{arm}.state", *state),
        )

    def serve(self, pair: Pair) -> None:
        """Serve a pair from now on, both of its halves in one step; the oldest are forgotten."""
        mine = (pair.arm, pair.version.sha256)
        others = [each for each in self._shown.pairs if not each.is_of(*mine)]
        shown = Shown(pairs=(pair, *others)[:KEPT])
        write_atomically(self._path / RECORD, shown.model_dump_json(indent=1).encode())
        self._shown = shown
        self._sweep()

    def _whole(self, pair: Pair) -> bool:
        return all(read_file(self._root, each) is not None for each in (pair.version, pair.state))

    def _save(self, name: str, *pieces: bytes | memoryview) -> StoredFile:
        write_atomically(self._path / name, *pieces)
        return StoredFile.of(name, *pieces)

    def _sweep(self) -> None:
        named = {file.name for pair in self._shown.pairs for file in (pair.version, pair.state)}
        for path in self._path.iterdir():
            ours = path.name.startswith(".") or DIGEST.match(path.name)
            if path.is_file() and ours and path.name not in named:
                path.unlink()
