"""Which shared elements turn personal after a participation (GradSelect, ALGORITHM §1.4, §1.7).

Owns the ranking and the growth of a mask. Must not train, hold state or decide when a mask grows or
by how much: the clock is ``Policy.due``, the count ``growth.quota``, fixed masks come from
``Policy.bounds``.

The authors' rule (arXiv 2404.02478; github.com/lapisrocks/fedselect) works on each selectable
tensor by itself. With n elements still shared, Δ = |θ − r| (r: the trained model at the last
growth, at first the shared start) and the growth rate p, it keeps the k largest Δ personal:

    k = n − round_half_even((1 − p) · n)

Where we differ on purpose: exactly k even when Δ are equal (the authors take all ties), never an
element that did not move, the limit α is never passed in mode ``cap``, and k = 0 is no error.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import MaskError, TrainingError
from fedselect.growth import quota
from fedselect.masks import BoolVector, Mask
from fedselect.personal import PersonalState
from fedselect.policies import Policy
from fedselect.space import FloatVector, ParameterSpace, Role


def next_mask(
    policy: Policy, state: PersonalState, *, theta: FloatVector, space: ParameterSpace, seed: int
) -> tuple[Mask, FloatVector]:
    """Mask and reference (D,) that follow a participation which started from ``state``.

    ``theta`` (D,) is the trained model. When no change is due after this own participation
    (``state.participations``, counted from 0) both stay as they are; otherwise the mask grows, or
    becomes the fixed one, and ``theta`` becomes the reference of the next growth.

    Raises:
        TrainingError: a Δ is not finite.
        MaskError: vectors, mask and space differ in size.
    """
    due = policy.due(state.participations)
    if policy.personal != "learned":
        mask = policy.bounds(space)[1] if due else state.mask
        return mask, theta  # nothing will grow; a reference that is theta takes no room
    if not due:
        return state.mask, state.reference
    grown = grow(policy, theta, reference=state.reference, mask=state.mask, space=space, seed=seed)
    return grown, theta


def grow(
    policy: Policy,
    theta: FloatVector,
    *,
    reference: FloatVector,
    mask: Mask,
    space: ParameterSpace,
    seed: int,
) -> Mask:
    """One growth step: ``mask`` plus, in each selectable tensor, the ``quota`` best elements.

    ``theta`` and ``reference`` have shape (D,). Elements with Δ = 0 are never taken: that they
    did not move is no evidence that they are personal (ALGORITHM §1.7, decision 3). Score
    ``delta`` ranks by Δ, the lower index first where Δ is equal. Score ``random`` is the control:
    it takes as many elements from the same candidates (shared, Δ > 0), ranked by random bits of a
    generator seeded with ``seed`` and the tensor's name, so that chance instead of Δ's order is
    the one difference; ``seed`` does not matter for ``delta``.

    Raises:
        TrainingError: a Δ of a shared element is not finite (decision 4).
        MaskError: vectors, mask and space differ in size.
    """
    if not theta.shape == reference.shape == (space.dim,) or mask.dim != space.dim:
        raise MaskError(
            f"vectors of shape {theta.shape} and {reference.shape} and a mask over {mask.dim} "
            f"elements do not fit a space of {space.dim}"
        )
    personal = mask.to_bool()
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the tensor's name
        delta = np.abs(theta - reference)
    for slot in space.with_role(Role.SELECTABLE):
        own, moved = personal[slot.offset : slot.stop], delta[slot.offset : slot.stop]
        if not np.isfinite(moved[~own]).all():
            raise TrainingError(f"the change of tensor {slot.name!r} is not finite")
        count = quota(policy, size=slot.size, shared=int(np.count_nonzero(~own)))
        score = moved if policy.score == "delta" else _random_keys(seed, slot.name, slot.size)
        own |= _largest(score, ~own & (moved > 0), count)
    return Mask.from_bool(personal)


def _largest(score: npt.NDArray[Any], candidates: BoolVector, count: int) -> BoolVector:
    """The ``count`` candidates with the largest score, the lower index first among equals."""
    pool = score[candidates]
    if count >= pool.size:
        return candidates
    if count == 0:
        return np.zeros_like(candidates)
    cut = np.partition(pool, pool.size - count)[pool.size - count]
    chosen: BoolVector = candidates & (score > cut)
    level = np.flatnonzero(candidates & (score == cut))
    chosen[level[: count - int(np.count_nonzero(chosen))]] = True
    return chosen


def _random_keys(seed: int, name: str, size: int) -> npt.NDArray[np.uint64]:
    # Raw bits of a bit generator: numpy keeps these stable between releases, ``Generator`` not.
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.random.PCG64(int.from_bytes(digest, "little")).random_raw(size)
