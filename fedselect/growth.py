"""How many elements a policy turns personal, and when: the count of a mask, without its elements.

Owns the quota of one step and the course of a client's mask over its participations, which an
estimate needs before anybody has trained. Which elements they are is ``selection``; when a mask
changes is ``Policy.due``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from fedselect.policies import Policy
from fedselect.space import ParameterSpace, Role

MOST_QUOTAS = 200_000  # of one course; beyond that all tensors count as one


@dataclass(frozen=True, slots=True)
class MaskStage:
    """Participations [first, stop), from 0, under masks of ``personal`` elements.

    ``grown`` elements have turned in the first of these participations, which alone sends the mask
    if ``sent``; a stage that sends one has no other participation.
    """

    first: int
    stop: int
    personal: int
    grown: int
    sent: bool


def quota(policy: Policy, *, size: int, shared: int) -> int:
    """How many of ``size`` elements, ``shared`` of them shared, one step turns (ALGORITHM §1.7,
    decisions 2, 5).

    Growth takes ``k = n − round_half_even((1 − p)·n)`` of the n shared ones. Mode ``cap`` stops at
    ``floor(α·size)`` personal elements; ``official`` takes k, or nothing once the personal
    fraction is above α already, so that the last step may overshoot. A ``fraction`` f takes all
    that is missing to ``floor(f·size)``. Release does the same with the personal ones, down to α
    or f.
    """
    releases = policy.direction == "release"
    there = size - shared if releases else shared  # what may turn
    goal = policy.limit if policy.fraction is None else policy.fraction
    most = int(Decimal(str(goal)) * size)  # in floats 0.29 · 100 is below 29
    missing = size - shared - most if releases else most - (size - shared)
    if policy.fraction is not None:
        return max(0, missing)
    count = there - round((1 - policy.growth) * there)
    if policy.limit_mode == "cap":
        return max(0, min(count, missing))
    owned = (size - shared) / size if size else goal
    return 0 if (owned < goal if releases else owned > goal) else count


def bounds(policy: Policy, space: ParameterSpace) -> tuple[int, int]:
    """Elements that are personal in any mask that the policy allows, and at most: the counts of
    ``Policy.bounds``, without masks of a bit for each element.
    """
    never = space.count(Role.PERSONAL, Role.FROZEN)
    most = never + sum(slot.size for slot in policy.may_turn(space))
    return (most if policy.fixed and not policy.late else never), most


def course(policy: Policy, space: ParameterSpace, participations: int) -> list[MaskStage]:
    """The masks of a client's first ``participations``, if every element that may turn does.

    An element without evidence is never taken (``selection``), nor is a row that does not fit: such
    models get fewer personal elements than this. A gate is taken to keep its mask.
    """
    lower, upper = bounds(policy, space)
    releases = policy.direction == "release" and policy.personal == "learned"
    personal = upper if releases else lower
    stages = _stages(0, 1, personal, turned=0, sent=True)
    for number, turned in _turns(policy, space, participations):
        before = stages[-1]
        stages += _stages(before.stop, number + 1, personal, turned=0, sent=False)
        personal += -turned if releases else turned
        stages += _stages(number + 1, number + 2, personal, turned=turned, sent=True)
    stages += _stages(stages[-1].stop, participations, personal, turned=0, sent=False)
    return [stage for stage in stages if stage.first < participations]


def _stages(first: int, stop: int, personal: int, *, turned: int, sent: bool) -> list[MaskStage]:
    return [MaskStage(first, stop, personal, turned, sent)] if first < stop else []


def _turns(policy: Policy, space: ParameterSpace, participations: int) -> list[tuple[int, int]]:
    """(participation after which the mask changes, elements that turn), until it rests."""
    lower, upper = bounds(policy, space)
    if policy.late:
        return [(policy.start_round - 1, upper - lower)]
    if policy.personal != "learned":
        return []
    sizes = Counter(slot.size for slot in policy.may_turn(space) if slot.size)
    due = [number for number in range(participations) if policy.due(number)]
    if policy.scope != "tensor" or len(due) * len(sizes) > MOST_QUOTAS:
        sizes = Counter({upper - lower: 1})
    shared = {size: 0 if policy.direction == "release" else size for size in sizes}
    found = []
    for number in due:
        taken = {size: quota(policy, size=size, shared=left) for size, left in shared.items()}
        turned = sum(taken[size] * count for size, count in sizes.items())
        if turned == 0:  # the quota depends on the counts alone: nothing now is nothing ever
            break
        found.append((number, turned))
        sign = 1 if policy.direction == "release" else -1
        shared = {size: left + sign * taken[size] for size, left in shared.items()}
    return found
