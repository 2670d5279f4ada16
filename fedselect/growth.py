"""How many elements a policy turns personal, and when: the count of a mask, without its elements.

Owns the quota of one growth step and the course of a client's mask over its participations, which
an estimate needs before anybody has trained. Which elements they are is ``selection``; when a mask
grows is ``Policy.due``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from fedselect.policies import FIXED, Policy
from fedselect.space import ParameterSpace, Role

MOST_QUOTAS = 200_000  # of one course; beyond that all tensors count as one


@dataclass(frozen=True, slots=True)
class MaskStage:
    """Participations [first, stop), from 0, under masks of ``personal`` elements.

    ``grown`` of them are new in the first of these participations, which alone sends the mask if
    ``sent``; a stage that sends one has no other participation.
    """

    first: int
    stop: int
    personal: int
    grown: int
    sent: bool


def quota(policy: Policy, *, size: int, shared: int) -> int:
    """How many of a tensor's elements one growth step may take (ALGORITHM §1.7, decisions 2, 5).

    ``k = n − round_half_even((1 − p)·n)`` of the n ``shared`` elements. Mode ``cap`` stops at
    ``floor(α·size)`` personal elements; ``official`` takes k, or nothing once the personal
    fraction is above α already, so that the last step may overshoot.
    """
    count = shared - round((1 - policy.growth) * shared)
    owned = size - shared
    if policy.limit_mode == "official":
        return 0 if size and owned / size > policy.limit else count
    most = int(Decimal(str(policy.limit)) * size)  # in floats 0.29 · 100 is below 29
    return max(0, min(count, most - owned))


def bounds(policy: Policy, space: ParameterSpace) -> tuple[int, int]:
    """Elements that are personal in any mask that the policy allows, and at most: the counts of
    ``Policy.bounds``, without masks of a bit for each element.
    """
    never = space.count(Role.PERSONAL, Role.FROZEN)
    most = never + sum(slot.size for slot in policy.may_turn(space))
    return (most if policy.personal in FIXED and not policy.late else never), most


def course(policy: Policy, space: ParameterSpace, participations: int) -> list[MaskStage]:
    """The masks of a client's first ``participations``, if every element that may grow moves.

    An element that never moves is never taken (``selection.grow``): a model with many of them gets
    fewer personal elements than this.
    """
    personal, _ = bounds(policy, space)
    stages = _stages(0, 1, personal, grown=0, sent=True)
    for number, grown in _growths(policy, space, participations):
        before = stages[-1]
        stages += _stages(before.stop, number + 1, personal, grown=0, sent=False)
        personal += grown
        stages += _stages(number + 1, number + 2, personal, grown=grown, sent=True)
    stages += _stages(stages[-1].stop, participations, personal, grown=0, sent=False)
    return [stage for stage in stages if stage.first < participations]


def _stages(first: int, stop: int, personal: int, *, grown: int, sent: bool) -> list[MaskStage]:
    return [MaskStage(first, stop, personal, grown, sent)] if first < stop else []


def _growths(policy: Policy, space: ParameterSpace, participations: int) -> list[tuple[int, int]]:
    """(participation after which the mask grows, elements that it takes), until it rests."""
    if policy.late:
        never, most = bounds(policy, space)
        return [(policy.start_round - 1, most - never)]
    if policy.personal != "learned":
        return []
    sizes = Counter(slot.size for slot in space.with_role(Role.SELECTABLE) if slot.size)
    due = [number for number in range(participations) if policy.due(number)]
    if len(due) * len(sizes) > MOST_QUOTAS:
        sizes = Counter({sum(size * count for size, count in sizes.items()): 1})
    shared = {size: size for size in sizes}
    found = []
    for number in due:
        taken = {size: quota(policy, size=size, shared=left) for size, left in shared.items()}
        grown = sum(taken[size] * count for size, count in sizes.items())
        if grown == 0:  # the quota depends on the counts alone: nothing now is nothing ever
            break
        found.append((number, grown))
        shared = {size: left - taken[size] for size, left in shared.items()}
    return found
