"""How far two versions are apart, tensor by tensor, piece by piece.

Owns the sums of a comparison; pieces come in order and are forgotten, so that memory does not grow
with the model. Must not know where versions come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedselect.errors import WireError
from fedselect.space import FloatVector, ParameterSpace, Slot
from fedselect.versiondocs import Change, TensorChange


@dataclass(slots=True)
class _Sums:
    """Over the elements seen so far, in float64."""

    elements: int = 0
    changed: int = 0
    moved: float = 0.0
    before: float = 0.0
    after: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, base: FloatVector, other: FloatVector) -> None:
        one, two = base.astype(np.float64), other.astype(np.float64)
        step = two - one
        self.elements += one.size
        self.changed += int(np.count_nonzero(step))
        self.moved += float(step @ step)
        self.before += float(one @ one)
        self.after += float(two @ two)
        self.product += float(one @ two)
        self.largest = max(self.largest, float(np.abs(step).max(initial=0)))

    def join(self, other: _Sums) -> None:
        for name in ("elements", "changed", "moved", "before", "after", "product"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)

    def figures(self) -> dict[str, float | int | None]:
        length = math.sqrt(self.before) * math.sqrt(self.after)
        return {
            "elements": self.elements,
            "changed": self.changed,
            "l2": math.sqrt(self.moved),
            "relative": math.sqrt(self.moved / self.before) if self.before else None,
            "largest": self.largest,
            "cosine": max(-1.0, min(1.0, self.product / length)) if length else None,
        }


class Comparison:
    """Two versions of one space; :meth:`add` pieces from the first element to the last."""

    def __init__(self, space: ParameterSpace) -> None:
        self._space = space
        self._sums = [_Sums() for _ in space.slots]
        self._slot = 0
        self.position = 0  # the element that comes next

    def add(self, base: bytes, other: bytes) -> None:
        """The next values of both, little-endian float32.

        Raises:
            WireError: values_length if they are not as many, or more than the space has.
        """
        one, two = np.frombuffer(base, dtype="<f4"), np.frombuffer(other, dtype="<f4")
        if one.size != two.size or self.position + one.size > self._space.dim:
            raise WireError("the pieces are not of one place", code="values_length")
        begin = self.position
        self.position += one.size
        while self._slot < len(self._sums):
            slot = self._space.slots[self._slot]
            first, last = max(slot.offset, begin) - begin, min(slot.stop, self.position) - begin
            self._sums[self._slot].add(one[first:last], two[first:last])
            if slot.stop > self.position:
                return
            self._slot += 1

    def total(self) -> Change:
        """How far all elements moved together."""
        total = _Sums()
        for sums in self._sums:
            total.join(sums)
        return Change.model_validate(total.figures())

    def tensors(self) -> list[TensorChange]:
        """How far each tensor moved, the furthest first, by name where it is the same."""
        pairs = zip(self._space.slots, self._sums, strict=True)
        found = [_tensor(slot, sums) for slot, sums in pairs]
        return sorted(found, key=lambda change: (-change.l2, change.name))


def _tensor(slot: Slot, sums: _Sums) -> TensorChange:
    about = {"name": slot.name, "kind": slot.kind.value, "role": slot.role.value}
    return TensorChange.model_validate({**sums.figures(), **about})
