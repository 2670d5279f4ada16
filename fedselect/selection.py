"""Which elements turn personal after a participation: GradSelect (ALGORITHM §1.4, §1.7) and kin.

Owns the ranking by scope and the step of a mask. Must not train, hold state or decide when a mask
changes or by how much: the clock is ``Policy.due``, the count ``growth.quota``, what ranks are
``scores``, fixed masks come from ``Policy.bounds``.

The authors' rule (arXiv 2404.02478; github.com/lapisrocks/fedselect) works on each selectable
tensor by itself. With n elements still shared, Δ = |θ − r| (r: the trained model at the last
growth, at first the shared start) and the growth rate p, it keeps the k largest Δ personal:

    k = n − round_half_even((1 − p) · n)

Where we differ on purpose: exactly k even when Δ are equal (the authors take all ties), never an
element that did not move, growth never passes the limit α in mode ``cap``, and k = 0 is no error.

Scopes: ``tensor`` counts and ranks each tensor by itself, ``global`` all of them together, so that
the score decides how much of which tensor is personal. ``row`` ranks whole rows along the first
axis (what makes one output of a layer, one channel, one embedded word) by their mean score; a row
that does not fit into the count any more is passed over: with few or long rows less turns than is
asked for, and nothing if no row fits. Direction ``release`` starts with all of
them personal and gives back those with the smallest score (GradLTN of arXiv 2306.13264, [inferred]
in ALGORITHM §1.5).

``pooled`` β multiplies a score by (1 − agreement)^β, see ``agreement``: elements at which clients
pull apart come first, one on which all agree is never chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import MaskError, TrainingError
from fedselect.growth import quota
from fedselect.masks import BoolVector, Mask
from fedselect.personal import PersonalState
from fedselect.policies import Policy
from fedselect.scores import REFERENCE, SCORES, Ranks, Seen, random_keys
from fedselect.space import FloatVector, ParameterSpace, Slot

Group = tuple[Slot, ...]  # tensors that are counted and ranked together


def next_mask(
    policy: Policy, state: PersonalState, *, theta: FloatVector, space: ParameterSpace, seed: int
) -> tuple[Mask, FloatVector]:
    """Mask and reference (D,) that follow a participation which started from ``state``.

    ``theta`` (D,) is the trained model. When no change is due after this own participation
    (``state.participations``, counted from 0) both stay as they are; otherwise the mask grows, or
    becomes the fixed one, and ``theta`` becomes the reference of the next growth.

    Raises:
        TrainingError: a Δ or a score is not finite.
        MaskError: vectors, mask and space differ in size.
    """
    now = state.participations
    if policy.personal != "learned":
        mask = policy.bounds(space)[1] if policy.due(now) else state.mask
        return mask, theta  # a reference that is theta takes no room
    if not policy.due(now):
        wanted = policy.next_due(now) is not None and REFERENCE in SCORES[policy.score].needs
        return state.mask, state.reference if wanted else theta
    seen = Seen(theta, state.reference, seed, state.evidence)
    return choose(policy, seen, mask=state.mask, space=space), theta


def choose(policy: Policy, seen: Seen, *, mask: Mask, space: ParameterSpace) -> Mask:
    """One step of a learned mask: the ``quota`` best of every group of tensors.

    Vectors of ``seen`` have shape (D,). Only elements with a score above 0 turn personal: that one
    did not move is no evidence that it is (ALGORITHM §1.7, decision 3). Equal scores: the lower
    index first. ``policy.shuffled`` is the control that tells where from which: as many elements of
    each tensor, drawn by chance from the same candidates.

    Raises:
        TrainingError: a Δ or a score is not finite (decision 4).
        MaskError: vectors, mask and space differ in size.
    """
    if not seen.theta.shape == seen.reference.shape == (space.dim,) or mask.dim != space.dim:
        raise MaskError(
            f"vectors of shape {seen.theta.shape} and {seen.reference.shape} and a mask over "
            f"{mask.dim} elements do not fit a space of {space.dim}"
        )
    personal = mask.to_bool()
    slots = tuple(slot for slot in policy.may_turn(space) if slot.size)
    groups: Sequence[Group] = [(slot,) for slot in slots] if policy.scope == "tensor" else [slots]
    for group in filter(None, groups):  # a model may have no tensor of the kind
        _step(policy, seen, group, personal)
    return Mask.from_bool(personal)


def _step(policy: Policy, seen: Seen, group: Group, personal: BoolVector) -> None:
    """Change ``personal`` (D,) where elements of the group turn personal, or shared."""
    own = _joined([personal[slot.offset : slot.stop] for slot in group])
    scores = _joined([_score(policy, seen, slot, personal) for slot in group])
    count = quota(policy, size=own.size, shared=int(np.count_nonzero(~own)))
    if policy.direction == "release":
        candidates, ranks = own, _reversed(scores)
    else:
        candidates, ranks = ~own & (scores > 0), scores
    if policy.scope == "row":
        chosen = _best_rows(group, ranks, candidates, own=own, count=count)
    else:
        chosen = _largest(ranks, candidates, count)
    for slot, part in _parts(group):
        turned = chosen[part]
        if policy.shuffled:
            keys = random_keys(seen.seed, slot)
            turned = _largest(keys, candidates[part], int(np.count_nonzero(turned)))
        personal[slot.offset : slot.stop] ^= turned


def _score(policy: Policy, seen: Seen, slot: Slot, personal: BoolVector) -> Ranks:
    """The tensor's scores, shape (slot.size,); those of elements that may be chosen are finite."""
    found: Ranks = np.asarray(SCORES[policy.score].rule(seen, slot))
    if found.shape != (slot.size,):
        raise TrainingError(
            f"score {policy.score!r} gives shape {found.shape} for tensor {slot.name!r}, which has "
            f"{slot.size} elements; it must give one value for each"
        )
    dissent = None if policy.pooled is None else seen.dissent(slot)
    if dissent is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            found = found * dissent ** np.float32(policy.pooled)
    own = personal[slot.offset : slot.stop]
    asked = own if policy.direction == "release" else ~own
    judged = seen.change(slot) if found.dtype == np.uint64 else found  # chance is always finite
    if not np.isfinite(judged[asked]).all():
        raise TrainingError(f"the score of tensor {slot.name!r} is not finite")
    return found


def _reversed(scores: Ranks) -> Ranks:
    """Ranks in which the smallest score is the largest."""
    return ~scores if scores.dtype == np.uint64 else -scores


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _parts(group: Group) -> Iterator[tuple[Slot, slice]]:
    """Each tensor of a group and where it is in the group's joined vectors."""
    stops = accumulate(slot.size for slot in group)
    return ((slot, slice(stop - slot.size, stop)) for slot, stop in zip(group, stops, strict=True))


def _largest(score: Ranks, candidates: BoolVector, count: int) -> BoolVector:
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


def _best_rows(
    group: Group, ranks: Ranks, candidates: BoolVector, *, own: BoolVector, count: int
) -> BoolVector:
    """Whole rows, the best first, of at most ``count`` elements in all."""
    lengths = np.concatenate([_row_lengths(slot) for slot in group])
    starts = np.cumsum(lengths) - lengths
    evident = np.logical_or.reduceat(candidates, starts)
    # Rows move as one; where a mask of another scope came before, what is left of a row stays.
    mixed = np.logical_or.reduceat(own, starts) & np.logical_or.reduceat(~own, starts)
    if ranks.dtype == np.uint64:  # of chance, a mean would favour short rows: they vary more
        means = ranks[starts]
    else:
        means = np.add.reduceat(ranks, starts, dtype=np.float64) / lengths
    chosen = np.zeros(lengths.size, dtype=np.bool_)
    order = np.argsort(_reversed(means), kind="stable")
    shortest = int(lengths.min(initial=1))
    for row in order[(evident & ~mixed)[order]]:
        if count < shortest:
            break
        if lengths[row] <= count:
            chosen[row] = True
            count -= int(lengths[row])
    return np.repeat(chosen, lengths)


def _row_lengths(slot: Slot) -> npt.NDArray[np.int64]:
    rows = slot.shape[0] if slot.shape else 1
    return np.full(rows, slot.size // rows, dtype=np.int64)
