"""The parameter space: a model's tensors laid out in one flat vector.

Owns names, shapes, kinds, roles, offsets and the digest that keys masks, updates and versions.
Must not know torch, files or the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import SpaceError

FloatVector = npt.NDArray[np.float32]
FloatValues = npt.NDArray[np.float32] | npt.NDArray[np.float64]

MAX_ELEMENTS = 2**33
MAX_TENSORS = 20_000
MAX_NAME = 255


class Kind(StrEnum):
    """What a tensor is in its layer."""

    WEIGHT = "weight"
    BIAS = "bias"
    NORM = "norm"
    BUFFER = "buffer"


class Role(StrEnum):
    """What may happen to a tensor's elements.

    ``frozen`` tensors are neither trained nor sent; like ``personal`` ones they stay where they
    are, but they do not count as personalized (docs/adr/0002).
    """

    SELECTABLE = "selectable"
    SHARED = "shared"
    PERSONAL = "personal"
    FROZEN = "frozen"


# ALGORITHM §1.6: only weights (norm scales included) may turn personal, shifts are always shared,
# running statistics never leave the client.
DEFAULT_ROLES = {
    Kind.WEIGHT: Role.SELECTABLE,
    Kind.NORM: Role.SELECTABLE,
    Kind.BIAS: Role.SHARED,
    Kind.BUFFER: Role.PERSONAL,
}


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place ``[offset, offset + size)`` in the flat vector."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    role: Role
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """First index behind the slot."""
        return self.offset + self.size

    @property
    def module(self) -> str:
        """Dotted name of the module that owns the tensor ('' for the root)."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class ParameterSpace:
    """The canonical, ordered list of a model's floating tensors (D elements in all)."""

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], Kind, Role]]) -> ParameterSpace:
        """Lay tensors out one behind the other, in the order given.

        Raises:
            SpaceError: a name twice, too long or empty; a negative size; nothing to share.
        """
        slots: list[Slot] = []
        seen: set[str] = set()
        offset = 0
        for name, shape, kind, role in tensors:
            _check_tensor(name, shape, seen)
            seen.add(name)
            slots.append(Slot(name, tuple(shape), Kind(kind), Role(role), offset))
            offset = slots[-1].stop
        space = cls(tuple(slots))
        _check_space(space)
        return space

    @classmethod
    def from_json(cls, document: Any) -> ParameterSpace:
        """Read what :meth:`to_json` wrote.

        Raises:
            SpaceError: not such a document.
        """
        try:
            rows = [
                (t["name"], _read_shape(t["shape"]), Kind(t["kind"]), Role(t["role"]))
                for t in document["tensors"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise SpaceError(
                f"not a parameter space: {error}; expected "
                '{"tensors": [{"name", "shape", "kind", "role"}, …]}'
            ) from error
        return cls.of(rows)

    def to_json(self) -> dict[str, Any]:
        """The space as plain JSON, the form that the digest is taken of."""
        return {
            "tensors": [
                {"name": s.name, "shape": list(s.shape), "kind": s.kind.value, "role": s.role.value}
                for s in self.slots
            ]
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: same digest, same meaning of every bit."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def dim(self) -> int:
        """D, the number of elements."""
        return self.slots[-1].stop if self.slots else 0

    @cached_property
    def by_name(self) -> Mapping[str, Slot]:
        """Slots by tensor name."""
        return {s.name: s for s in self.slots}

    def with_role(self, *roles: Role) -> Iterator[Slot]:
        """The slots of these roles, in order."""
        return (s for s in self.slots if s.role in roles)

    def count(self, *roles: Role) -> int:
        """Number of elements with these roles."""
        return sum(s.size for s in self.with_role(*roles))

    def head(self) -> tuple[Slot, ...]:
        """The trainable tensors of the last module that has a selectable one (FedPer's head).

        Raises:
            SpaceError: nothing is selectable.
        """
        last = max(self.with_role(Role.SELECTABLE), key=lambda s: s.offset, default=None)
        if last is None:
            raise SpaceError(
                "the model has no selectable tensor, so it has no head to keep personal"
            )
        trainable = self.with_role(Role.SELECTABLE, Role.SHARED)
        return tuple(s for s in trainable if s.module == last.module)

    def body(self) -> tuple[Slot, ...]:
        """The trainable tensors that are not the head (LG-FedAvg's local part).

        Raises:
            SpaceError: there is no head, or nothing else.
        """
        head = self.head()
        found = (s for s in self.with_role(Role.SELECTABLE, Role.SHARED) if s not in head)
        return _some(found, "the model has a single module, so it has no body to keep personal")

    def norms(self) -> tuple[Slot, ...]:
        """The trainable tensors of norm layers (FedBN's local part).

        Raises:
            SpaceError: there are none.
        """
        layers = {s.module for s in self.slots if s.kind is Kind.NORM}
        found = (s for s in self.with_role(Role.SELECTABLE, Role.SHARED) if s.module in layers)
        return _some(
            found,
            "the model has no norm layer with parameters to keep personal; its running statistics, "
            "if it has any, stay personal under every policy",
        )

    def flatten(self, tensors: Mapping[str, npt.ArrayLike]) -> FloatVector:
        """Copy tensors by name into one float32 vector of shape (D,).

        Raises:
            SpaceError: a tensor is missing or has another shape.
        """
        flat = np.empty(self.dim, dtype=np.float32)
        for slot in self.slots:
            if slot.name not in tensors:
                raise SpaceError(f"tensor {slot.name!r} is missing")
            array = np.asarray(tensors[slot.name])
            if array.shape != slot.shape:
                raise SpaceError(f"tensor {slot.name!r} has shape {array.shape}, not {slot.shape}")
            flat[slot.offset : slot.stop] = array.reshape(-1)
        return flat

    def unflatten(self, flat: FloatVector) -> dict[str, FloatVector]:
        """Views of a (D,) vector by tensor name, in their own shapes.

        Raises:
            SpaceError: the vector has another length.
        """
        if flat.shape != (self.dim,):
            raise SpaceError(f"a vector of shape {flat.shape} is not one of {self.dim} elements")
        return {s.name: flat[s.offset : s.stop].reshape(s.shape) for s in self.slots}


def _some(slots: Iterator[Slot], otherwise: str) -> tuple[Slot, ...]:
    found = tuple(slots)
    if not any(slot.size for slot in found):
        raise SpaceError(otherwise)
    return found


def _read_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise TypeError("a shape is a list of whole numbers")
    return tuple(shape)


def _check_tensor(name: str, shape: tuple[int, ...], seen: set[str]) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_NAME:
        raise SpaceError(
            f"tensor name {str(name)[:40]!r} must be 1 to {MAX_NAME} printable characters"
        )
    if name in seen:
        raise SpaceError(f"tensor {name!r} is listed twice")
    if len(shape) > 16 or not all(0 <= n <= MAX_ELEMENTS for n in shape):
        raise SpaceError(f"tensor {name!r} has the impossible shape {tuple(shape)}")


def _check_space(space: ParameterSpace) -> None:
    if len(space.slots) > MAX_TENSORS or space.dim > MAX_ELEMENTS:
        raise SpaceError(
            f"{len(space.slots)} tensors with {space.dim} elements are beyond the limits of "
            f"{MAX_TENSORS} tensors and {MAX_ELEMENTS} elements"
        )
    if space.count(Role.SELECTABLE, Role.SHARED) == 0:
        raise SpaceError("no tensor may be shared, so there is nothing to federate")
