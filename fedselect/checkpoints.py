"""Checkpoints of a simulation: all that it needs to go on to the same bits, in one file.

Owns the file, a safetensors one with JSON in its head, and the check that it belongs to the
simulation. It is replaced in one step, so that whoever ends a simulation at any moment finds the
last whole one. Must not run anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from fedselect.downloads import DeltaFacts
from fedselect.errors import FedSelectError
from fedselect.personal import PersonalState, write_atomically
from fedselect.space import FloatVector, ParameterSpace

FORMAT = "fedselect-simulation/1"
FILE = "simulation.safetensors"
_AGREED = "agreed."


@dataclass(frozen=True)
class ClientPart:
    """What a simulation knows of a client; ``held`` are digests of version files."""

    state: PersonalState | None
    mask_version: int
    bytes_up: int
    bytes_down: int
    held: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """A simulation between two rounds: digests of its versions, the newest one's file, the steps
    that deltas lead from one to the next, the norms of the newest round's changes where influence
    is bounded, its clients by name, and how much clients agreed (D,) in the last rounds.
    """

    versions: tuple[str, ...]
    file: bytes
    steps: tuple[DeltaFacts, ...]
    norms: tuple[float, ...]
    clients: Mapping[str, ClientPart]
    agreed: tuple[FloatVector, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Where a simulation keeps its state: after each ``every``-th round, and after the last.

    ``about`` is plain JSON that says what is simulated besides the settings (the data, who takes
    part): a checkpoint is only gone on from if it is the same.
    """

    folder: Path
    every: int = 1
    about: Mapping[str, Any] | None = None

    def due(self, number: int, rounds: int) -> bool:
        """Whether to write one after this round of so many."""
        return number % self.every == 0 or number == rounds

    def write(self, snapshot: Snapshot, space: ParameterSpace, facts: Mapping[str, Any]) -> None:
        """Replace the checkpoint; ``facts`` are those of the simulation, as plain JSON."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "version": np.frombuffer(snapshot.file, dtype=np.uint8)
        }
        tensors |= {f"{_AGREED}{n:04}": each for n, each in enumerate(snapshot.agreed)}
        rows = {}
        for number, (name, part) in enumerate(snapshot.clients.items()):
            row = {key: getattr(part, key) for key in ("mask_version", "bytes_up", "bytes_down")}
            rows[name] = {**row, "held": part.held, "state": None}
            if part.state is not None:
                rows[name]["state"] = key = f"client.{number:06}"
                tensors[key] = np.frombuffer(part.state.to_bytes(space), dtype=np.uint8)
        document = {
            "format": FORMAT,
            "facts": self._facts(facts),
            "versions": snapshot.versions,
            "steps": [asdict(each) for each in snapshot.steps],
            "norms": snapshot.norms,
            "clients": rows,
        }
        data = safetensors.numpy.save(tensors, {"simulation": json.dumps(document)})
        write_atomically(self._path(), data)

    def read(self, space: ParameterSpace, facts: Mapping[str, Any]) -> Snapshot | None:
        """The checkpoint; None if there is none yet.

        Raises:
            FedSelectError: ``checkpoint_invalid``, the file is damaged, or there can be no such
                folder; ``checkpoint_mismatch``, it is of another simulation.
        """
        path = self._path()
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "numpy") as file:
                document = json.loads((file.metadata() or {})["simulation"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self._check(document, facts)
            return _snapshot(document, tensors, space)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FedSelectError(
                f"{path} is no checkpoint of a simulation, or damaged: {error}; delete it to begin "
                "again",
                code="checkpoint_invalid",
            ) from error

    def _path(self) -> Path:
        """The file, in a folder that is there: better said before the first round than after it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FedSelectError(
                f"checkpoints are kept in a folder, and {self.folder} can be none: "
                f"{error.strerror}",
                code="checkpoint_invalid",
            ) from error
        return self.folder / FILE

    def _facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = json.loads(json.dumps({**facts, "about": self.about}))
        return whole

    def _check(self, document: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        mine, found = self._facts(facts), document["facts"]
        differ = [key for key in mine if mine[key] != found.get(key)]
        if differ:
            raise FedSelectError(
                f"the checkpoint in {self.folder} is of another simulation: other "
                f"{', '.join(differ)}; give another folder, or delete it",
                code="checkpoint_mismatch",
            )


def _snapshot(
    document: Mapping[str, Any], tensors: Mapping[str, Any], space: ParameterSpace
) -> Snapshot:
    clients = {}
    for name, row in document["clients"].items():
        key = row["state"]
        state = None if key is None else PersonalState.from_bytes(tensors[key].tobytes(), space)
        counts = (row["mask_version"], row["bytes_up"], row["bytes_down"])
        clients[name] = ClientPart(state, *counts, tuple(row["held"]))
    steps = tuple(DeltaFacts(**each) for each in document["steps"])
    norms = tuple(float(each) for each in document["norms"])
    version = tensors["version"].tobytes()
    agreed = tuple(tensors[key] for key in sorted(tensors) if key.startswith(_AGREED))
    return Snapshot(tuple(document["versions"]), version, steps, norms, clients, agreed)
