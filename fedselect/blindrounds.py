"""Blinded rounds of a run: its units, and the mean of updates that no one sees singly.

Owns how masks by rows or whole tensors become the public index sets of ``blinding``, and the mean
over those who share a unit. A prototype, for ``simulate`` alone. Must not know files or rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedselect.blinding import Draw, Terms, Values, rehearse
from fedselect.errors import BlindingError
from fedselect.masks import Mask
from fedselect.policies import RunSettings
from fedselect.policy import Policy
from fedselect.space import FloatVector, ParameterSpace, Role

Span = tuple[int, int]


def units(policy: Policy, space: ParameterSpace) -> list[Span]:
    """What is personal as a whole: rows of what a policy chooses by rows, else tensors; in order.

    Raises:
        SpaceError: the policy does not fit the model.
    """
    rows = set(policy.may_turn(space)) if policy.personal == "learned" else set()
    found: list[Span] = []
    for slot in space.slots:
        if slot.role in {Role.PERSONAL, Role.FROZEN}:
            continue
        pieces = slot.shape[0] if slot in rows and slot.shape else 1
        size = slot.size // pieces
        found += [(slot.offset + n * size, slot.offset + (n + 1) * size) for n in range(pieces)]
    return found


def shared(mask: Mask, spans: Sequence[Span]) -> frozenset[int]:
    """The units that a mask shares.

    Raises:
        BlindingError: a unit is neither shared nor personal as a whole.
    """
    personal = mask.to_bool()
    found = []
    for number, (start, stop) in enumerate(spans):
        own = np.count_nonzero(personal[start:stop])
        if 0 < own < stop - start:
            raise BlindingError(f"elements {start} to {stop} are personal in part")
        if not own:
            found.append(number)
    return frozenset(found)


def blinded_mean(
    base: FloatVector,
    updates: Sequence[tuple[Mask, FloatVector | Values]],
    settings: RunSettings,
    space: ParameterSpace,
    draw: Draw,
) -> FloatVector:
    """The new values (D,) of a round: ``base`` plus the mean change of those who share a unit.

    ``updates`` are masks and shared values, compact, in order. Where fewer than
    ``min_contributors`` share, ``base`` stays.

    Raises:
        BlindingError: a value is beyond the bound, or a mask is not by units.
        ValueError: the settings have no ``privacy.secure``.
    """
    if settings.privacy.secure is None:
        raise ValueError("the run has no privacy.secure")
    spans = units(settings.policy, space)
    secure, least = settings.privacy.secure, settings.round.min_contributors
    terms = Terms(
        context=b"",
        units=tuple(stop - start for start, stop in spans),
        threshold=secure.needed(len(updates)),
        least=least,
        bound=secure.bound,
    )
    changes = {
        number: _changes(base, mask, values, spans)
        for number, (mask, values) in enumerate(updates, start=1)
    }
    found = rehearse(terms, changes, draw)
    result = base.copy()
    for unit, total in found.totals.items():
        place = slice(*spans[unit])
        result[place] = (base[place] + total / found.sharers[unit]).astype(np.float32)
    return result


def _changes(
    base: FloatVector, mask: Mask, values: FloatVector | Values, spans: Sequence[Span]
) -> dict[int, Values]:
    change = np.zeros(base.size)
    at = ~mask.to_bool()
    change[at] = values.astype(np.float64) - base[at]
    return {unit: change[slice(*spans[unit])] for unit in shared(mask, spans)}
