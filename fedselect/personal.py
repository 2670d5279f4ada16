"""A client's personal state: what never leaves it, how it is saved, and who changes it.

Owns the state between two participations, its file form and the contract of a learner. Must not
train or talk to anyone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from fedselect.choices import Choices
from fedselect.errors import FedSelectError
from fedselect.evidence import NOTHING, Evidence
from fedselect.masks import Mask
from fedselect.policies import RunSettings
from fedselect.space import FloatVector, ParameterSpace

if TYPE_CHECKING:
    from fedselect.explaindocs import AblationReport

STATE_FORMAT = "fedselect-personal/1"
Pieces = list[bytes | memoryview]
_KINDS = {"<f8": "F64", "<f4": "F32", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8"}
_KINDS |= {"|u1": "U8", "|b1": "BOOL", "<u2": "U16", "<u4": "U32", "<u8": "U64"}


@dataclass(frozen=True)
class PersonalState:
    """State of one client in one arm after ``participations`` rounds of its own.

    ``theta`` and ``reference`` have shape (D,); ``merge_mask`` is the mask the last upload was made
    with, ``mask`` the one the next training uses (ALGORITHM §1.7, decision 9); ``buffers`` are
    integer buffers by name, which are no part of the parameter space; ``residual`` (D,) is what the
    encoding of the last update lost (``feedback``), None where values travel as they are;
    ``evidence`` is what the next choice of a mask will be judged by; ``gated`` says whether the
    gate has turned the mask down, None before it has judged; ``own`` (D,) is the second local model
    of a policy that has one, which is then the personalized one; ``choices`` (2, T, 4) say how the
    elements of both masks were chosen (``choices``).
    """

    participations: int
    theta: FloatVector
    reference: FloatVector
    merge_mask: Mask
    mask: Mask
    buffers: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    residual: FloatVector | None = None
    evidence: Evidence = NOTHING
    gated: bool | None = None
    own: FloatVector | None = None
    choices: Choices | None = None

    @classmethod
    def start(cls, base: FloatVector, mask: Mask) -> PersonalState:
        """A client that has not taken part yet: it starts from the shared model."""
        return cls(0, base, base, mask, mask)

    def merge(self, base: FloatVector) -> FloatVector:
        """The shared model with this client's personal elements in it, shape (D,)."""
        if self.merge_mask.personal == 0:
            return base
        merged = base.astype(np.float32)
        np.copyto(merged, self.theta, where=self.merge_mask.to_bool())
        return merged

    def personalized(self, base: FloatVector) -> FloatVector:
        """This client's model on the shared one, before it trains on it; shape (D,)."""
        return self.merge(base) if self.own is None else self.own

    def pieces(self, space: ParameterSpace) -> Pieces:
        """The state as a safetensors file, in pieces that need not be copied together.

        A reference that is theta itself is left out. Equal states give equal bytes.
        """
        tensors: dict[str, npt.NDArray[Any]] = {"theta": self.theta}
        if self.reference is not self.theta:
            tensors["reference"] = self.reference
        if self.residual is not None:
            tensors["residual"] = self.residual
        if self.own is not None:
            tensors["own"] = self.own
        tensors |= self.evidence.tensors()
        if self.choices is not None:
            tensors["choices"] = self.choices
        tensors |= {f"buffer.{name}": array for name, array in sorted(self.buffers.items())}
        tensors |= {"merge_mask": self.merge_mask.packed, "mask": self.mask.packed}
        # Widest first, so that each is aligned for whoever maps the file into memory.
        ordered = sorted(tensors, key=lambda name: -tensors[name].itemsize)
        arrays = [np.ascontiguousarray(tensors[name]) for name in ordered]
        facts: dict[str, Any] = {
            "format": STATE_FORMAT,
            "space": space.digest,
            "participations": self.participations,
        }
        gathered = self.evidence.facts()
        if gathered:  # states without are as they always were
            facts["evidence"] = gathered
        if self.gated is not None:
            facts["gated"] = self.gated
        head = _head(dict(zip(ordered, arrays, strict=True)), {"state": json.dumps(facts)})
        return [head, *(array.reshape(-1).view(np.uint8).data for array in arrays)]

    def to_bytes(self, space: ParameterSpace) -> bytes:
        """:meth:`pieces` in one."""
        return b"".join(self.pieces(space))

    @classmethod
    def from_bytes(cls, data: bytes, space: ParameterSpace) -> PersonalState:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            FedSelectError: another format or another parameter space.
        """
        tensors = safetensors.numpy.load(data)
        metadata = _metadata(data)
        if metadata.get("format") != STATE_FORMAT or metadata.get("space") != space.digest:
            raise FedSelectError(
                f"the saved state is {metadata.get('format')!r} of space "
                f"{str(metadata.get('space'))[:12]}…, this model's space is {space.digest[:12]}…; "
                "the model was changed: use a new state folder",
                code="state_mismatch",
            )
        prefix = "buffer."
        return cls(
            metadata["participations"],
            tensors["theta"],
            tensors.get("reference", tensors["theta"]),
            Mask(space.dim, tensors["merge_mask"]),
            Mask(space.dim, tensors["mask"]),
            {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)},
            tensors.get("residual"),
            Evidence.read(tensors, metadata.get("evidence", {})),
            metadata.get("gated"),
            tensors.get("own"),
            tensors.get("choices"),
        )


def _head(tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file before its tensors, which follow in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        kind, shape = _KINDS[array.dtype.str], list(array.shape)
        stop = offset + array.nbytes
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    found: dict[str, Any] = json.loads(entries.get("state", "{}"))
    return found


def write_atomically(path: Path, *pieces: bytes | memoryview, durable: bool = True) -> None:
    """Replace a file so that a reader, or a restart after ``kill -9``, sees the old or the new.

    ``pieces`` follow each other in it.

    ``durable``: a loss of power does not undo or tear it, once this has returned.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Score:
    """A model's result on a client's own held-out examples; numbers only, never data."""

    correct: int
    total: int
    loss: float
    both: int | None = None  # of the correct ones, those that ``post`` got right, too

    @property
    def accuracy(self) -> float:
        """Fraction of the held-out examples that were classified correctly."""
        return self.correct / self.total if self.total else 0.0


@dataclass(frozen=True)
class Participation:
    """What one round of local work gives: what to upload and the state that follows.

    ``theta`` (D,) is the trained model, ``mask`` the one it was trained with; only ``theta`` where
    ``mask`` is 0 may leave the client. ``state`` is tentative until the round is published.
    """

    theta: FloatVector
    mask: Mask
    examples: int
    state: PersonalState


class Learner(Protocol):
    """What the agent and the simulator need of the training side (``training`` implements it)."""

    space: ParameterSpace

    def participate(
        self, state: PersonalState | None, base: FloatVector, *, settings: RunSettings, seed: int
    ) -> Participation:
        """Merge, train one budget, grow the mask if it is due; ``state`` None means a newcomer."""

    def evaluate(
        self, state: PersonalState, base: FloatVector, *, settings: RunSettings, origin: FloatVector
    ) -> dict[str, Score]:
        """Score ``local_only``, ``start``, ``global``, ``pre`` and ``post`` on its held-out data.

        ``origin`` (D,) is the arm's version 0, where the local-only baseline starts from.
        """

    def scores(
        self, models: Iterable[tuple[str, FloatVector]], *, own: str, settings: RunSettings
    ) -> dict[str, Score]:
        """Score models (D,) on its held-out data; ``both`` counts what ``own`` got right, too."""


class Explainer(Protocol):
    """What the agent needs to tell what its personal part is worth (``explain`` implements it)."""

    def ablate(
        self, state: PersonalState, base: FloatVector, *, settings: RunSettings
    ) -> AblationReport:
        """Score ``base`` with the client's part merged in, and without each tensor's."""

    def labels(self) -> dict[str, int] | None:
        """Training examples by label, None unless the site agreed to tell them."""


def derive_seed(settings: RunSettings, client: str, round_number: int) -> int:
    """The seed of one client's local work in one round: the same in the service and in simulation.

    Derived from the run's seed, the client's name and the round's number, never from an id that a
    server draws, so that a retried round and a simulated one repeat the very same batches.
    """
    text = f"{settings.seed}\0{client}\0{round_number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
