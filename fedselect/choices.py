"""How the elements of a mask came to be chosen: a few numbers per tensor, kept beside the mask.

A growth compares Δ = |θ − r| of the shared elements, and r is then replaced: afterwards nobody
could say why an element was taken. So each growth adds to a record of four numbers per tensor. Owns
that record alone; what is chosen is ``selection``. Must not hold values or numbers of elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedselect.masks import Mask
from fedselect.space import FloatVector, ParameterSpace, Role

if TYPE_CHECKING:
    from fedselect.personal import PersonalState

Record = npt.NDArray[np.float64]  # (T, 4) over the T tensors of a space: the fields of Choice
Choices = npt.NDArray[np.float64]  # (2, T, 4): of the mask of the last upload, and of the next


@dataclass(frozen=True, slots=True)
class Choice:
    """One tensor: elements that growths have chosen and the sum of their Δ at that moment; of the
    last growth that chose any, the smallest Δ taken and the mean Δ of those that stayed shared.
    """

    chosen: float
    delta: float
    threshold: float
    left: float


def following(
    state: PersonalState, after: Mask, *, theta: FloatVector, space: ParameterSpace
) -> Choices | None:
    """The record after a participation from ``state`` to ``theta`` (D,), whose next mask is
    ``after``.

    None: nothing was chosen yet, or the mask comes from elsewhere: a policy that fixes it, or an
    agent that kept no record.
    """
    earlier, before = state.choices, state.mask
    if before == Mask.initial(space):  # also what a gate leaves of a mask
        last = np.zeros((len(space.slots), 4))
    elif earlier is not None:
        last = earlier[1]
    else:
        return None
    if after == before:
        return np.stack([last, last]) if last.any() else None
    grown, left, record = (after - before).to_bool(), ~after.to_bool(), last.copy()
    for number, slot in enumerate(space.slots):
        part = slice(slot.offset, slot.stop)
        if slot.role is Role.SELECTABLE and grown[part].any():
            delta = np.abs(theta[part] - state.reference[part])
            _add(record[number], delta[grown[part]], delta[left[part]])
    return np.stack([last, record])


def _add(row: Record, chosen: FloatVector, left: FloatVector) -> None:
    row[0] += chosen.size
    row[1] += chosen.sum(dtype=np.float64)
    row[2] = chosen.min()
    row[3] = left.mean(dtype=np.float64) if left.size else 0.0


def of_upload(choices: Choices | None, space: ParameterSpace) -> dict[str, Choice]:
    """By tensor, how the elements of the last upload's mask were chosen; only where any were."""
    if choices is None:
        return {}
    rows = zip(space.slots, choices[0], strict=True)
    return {slot.name: Choice(*map(float, row)) for slot, row in rows if row[0]}
