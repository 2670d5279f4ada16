"""Bounded influence: averages that no single client moves far, element by element.

Owns the rule and its arithmetic on a range; the service, the simulator and whoever recomputes a
version run these very lines. Must not know files, rounds or where bounds come from.

A client's change of an element is its value less the base (deltas have a base of zeros). It is
multiplied by the client's factor (``clipping``) and kept within ``max_change``; then comes the rule
over the clients that share the element. Sums are float64, in the order of the clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedselect.aggregate import Contribution, check_part, exact, whole_part
from fedselect.clipping import Changes, SquareSum, clip_factor
from fedselect.deltas import SCALE_BLOCK
from fedselect.influence import Influence
from fedselect.kernels import Part, shared_bits
from fedselect.likeness import Sketch, cosine
from fedselect.manifestdocs import Manifest
from fedselect.robust import Trim
from fedselect.space import FloatVector

Rule = Literal["mean", "trimmed_mean", "median"]
TILE = 65_536  # elements that are spread out at a time, at most; a multiple of SCALE_BLOCK
CELLS = 2**22  # elements × clients that are spread out at a time
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How one round is averaged.

    ``share_cap``: no client weighs more than 1/k of an element. ``movers``: only clients whose
    value is not the base's count towards k. ``rule`` trims ``trim`` of the values at each end from
    five present values on, but leaves k of them; weights play no part in it, unless it is the mean.
    """

    rule: Rule = "mean"
    trim: float = 0.2
    max_change: float | None = None
    share_cap: bool = True
    movers: bool = False

    @property
    def trimming(self) -> Trim | None:
        """What is left out at the ends; None for the mean."""
        if self.rule == "mean":
            return None
        return Trim(0.5 if self.rule == "median" else self.trim)


def frozen(manifest: Manifest) -> tuple[Bounds, list[float]]:
    """The rule of a round whose manifest has bounds, and the factor of each of its updates.

    Raises:
        ValueError: it has none.
    """
    found = manifest.bounds
    if found is None:
        raise ValueError("this manifest bounds nothing")
    bounds = Bounds(
        rule=found.rule,
        trim=float(found.trim),
        max_change=None if found.max_change is None else float(found.max_change),
        share_cap=found.share_cap,
        movers=found.movers,
    )
    clip = None if found.clip is None else float(found.clip)
    lengths = [None if each.norm is None else float(each.norm) for each in manifest.updates]
    return bounds, [1.0 if each is None else clip_factor(each, clip) for each in lengths]


def bounded(
    base: FloatVector,
    parts: Sequence[Contribution],
    factors: Sequence[float],
    bounds: Bounds,
    k: int,
) -> FloatVector:
    """Whole vectors held in memory, shape (D,) in, shape (D,) out.

    Raises:
        MaskError: the number of a client's values is not that of its shared elements.
    """
    own = [whole_part(part) for part in parts]
    for part in own:
        check_part(part, base.size)
    return bounded_range(base, own, factors, bounds, k)


def bounded_range(
    base: FloatVector, parts: Sequence[Part], factors: Sequence[float], bounds: Bounds, k: int
) -> FloatVector:
    """The new values of a range of n elements, shape (n,), float32; parts are of that range.

    An element that fewer than ``k`` clients share (or, with ``movers``, move) keeps ``base``. How a
    model is cut into ranges, at multiples of 4,096, changes no bit.
    """
    out = np.empty(base.size, dtype=np.float32)
    for start, stop, pieces in _tiles(parts, base.size):
        out[start:stop] = _averaged(base[start:stop], pieces, factors, bounds, k)
    return out


def norm_of(base: FloatVector, part: Contribution) -> float:
    """The length of one client's change of the base (D,), before anything is done about it."""
    total = SquareSum()
    for start, stop, (piece,) in _tiles([whole_part(part)], base.size):
        total.add(changes(base[start:stop], piece))
    return total.norm()


def changes(base: FloatVector, part: Part) -> Changes:
    """A client's change of a range (n,), in float64; 0 where the element is personal."""
    found = np.zeros(base.size)
    shared = np.flatnonzero(_shared(part, base.size))
    values = exact(part.values, part.scales, shared)
    found[shared] = values - base[shared].astype(np.float64)
    return found


def _shared(part: Part, size: int) -> Flags:
    personal: Flags = np.unpackbits(part.packed, count=size, bitorder="little").view(np.bool_)
    return ~personal


def _tiles(parts: Sequence[Part], size: int) -> Iterator[tuple[int, int, list[Part]]]:
    wide = CELLS // max(len(parts), 1) // SCALE_BLOCK * SCALE_BLOCK
    step = min(max(wide, SCALE_BLOCK), TILE)
    taken = [0] * len(parts)
    for start in range(0, size, step):
        stop = min(start + step, size)
        pieces = []
        for number, part in enumerate(parts):
            packed = part.packed[start // 8 : -(-stop // 8)]
            first = taken[number]
            taken[number] += shared_bits(packed, stop - start)
            scales = None if part.scales is None else part.scales[start // SCALE_BLOCK :]
            pieces.append(Part(packed, part.values[first : taken[number]], part.weight, scales))
        yield start, stop, pieces


def _averaged(
    base: FloatVector, parts: Sequence[Part], factors: Sequence[float], bounds: Bounds, k: int
) -> FloatVector:
    present = np.zeros((len(parts), base.size), dtype=bool)
    rows = np.zeros((len(parts), base.size))
    movers = np.zeros(base.size, dtype=np.int64)
    for number, part in enumerate(parts):
        present[number] = _shared(part, base.size)
        change = changes(base, part)
        movers += change != 0
        change *= factors[number]
        if bounds.max_change is not None:
            np.clip(change, -bounds.max_change, bounds.max_change, out=change)
        rows[number] = change
    counts = present.sum(axis=0)
    if bounds.trimming is None:
        weights = [part.weight for part in parts]
        total, weight = _weighted(rows, present, weights, k if bounds.share_cap else None)
    else:
        total, weight, movers = _trimmed(rows, present, bounds.trimming, k)
    enough = ((movers if bounds.movers else counts) >= max(k, 1)) & (weight > 0)
    mean = np.divide(total, weight, out=np.zeros(base.size), where=enough)
    return np.where(enough, base.astype(np.float64) + mean, base).astype(np.float32)


def _weighted(
    rows: Changes, present: Flags, weights: Sequence[float], k: int | None
) -> tuple[Changes, Changes]:
    """Σ w·d and Σ w of each element."""
    total, weight = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    equal = len(set(weights)) < 2  # then nobody weighs more than one of those who share
    most = None if k is None or equal else weight_cap(present, weights, k)
    for row, here, own in zip(rows, present, weights, strict=True):
        counts = own if most is None else np.minimum(own, most)
        weight += np.where(here, counts, 0.0)
        total += np.where(here, counts * row, 0.0)
    return total, weight


def weight_cap(present: Flags, weights: Sequence[float], k: int) -> Changes:
    """The weight that no client may exceed at an element, so that it has at most 1/k of the sum.

    ``present`` is (clients, n). The heaviest are capped one after the other, each while it would
    exceed its share of what they and all the lighter ones then weigh; infinite where none has to
    be. At least k clients share an element that moves, so a cap is always found there.
    """
    rest = np.zeros(present.shape[1])
    for here, own in zip(present, weights, strict=True):
        rest += np.where(here, own, 0.0)
    capped, going = np.zeros(present.shape[1]), np.ones(present.shape[1], dtype=bool)
    for number in sorted(range(len(weights)), key=lambda each: (-weights[each], each)):
        here = present[number]
        over = going & here & (weights[number] * (k - capped) > rest)
        going &= over | ~here
        rest -= np.where(over, weights[number], 0.0)
        capped += over
    found: Changes = np.full(rest.size, np.inf)
    np.divide(rest, k - capped, out=found, where=capped > 0)
    return found


def _trimmed(
    rows: Changes, present: Flags, rule: Trim, k: int
) -> tuple[Changes, Changes, npt.NDArray[np.int64]]:
    """The sum of the values that count, in ascending order, how many they are, and how many of
    them are of clients that moved the element.

    ``k`` values count at least, where so many are there: a median would be one client's value.
    """
    ranked = np.where(present, rows + 0.0, np.inf)  # -0.0 is 0.0
    ranked.sort(axis=0)
    counts = present.sum(axis=0)
    cut = np.minimum(rule.windows(len(rows))[0][counts], np.maximum(counts - k, 0) // 2)
    total, movers = np.zeros(rows.shape[1]), np.zeros(rows.shape[1], dtype=np.int64)
    for rank, row in enumerate(ranked):
        inside = (cut <= rank) & (rank < counts - cut)
        total += np.where(inside, row, 0.0)
        movers += inside & (row != 0)
    return total, (counts - 2 * cut).astype(np.float64), movers


# --- a whole round, without a service ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sifted:
    """Which of a round's updates count, by their places, and the norms of their changes."""

    kept: list[int]
    norms: list[float]


def sift(base: FloatVector, parts: Sequence[Contribution], rules: Influence) -> Sifted:
    """What the service does when updates are verified, in the order of their acceptance."""
    kept: list[int] = []
    norms: list[float] = []
    sketches: list[bytes] = []
    for place, part in enumerate(parts):
        length, sketch = _measured(base, part)
        still = rules.refuse_unchanged and length == 0 and part.mask.shared > 0
        alike = rules.likeness is not None and any(
            cosine(sketch, other) >= rules.likeness for other in sketches
        )
        if not still and not alike:
            kept.append(place)
            norms.append(length)
            sketches.append(sketch)
    return Sifted(kept, norms)


def _measured(base: FloatVector, part: Contribution) -> tuple[float, bytes]:
    total, sketch = SquareSum(), Sketch()
    for start, stop, (piece,) in _tiles([whole_part(part)], base.size):
        found = changes(base[start:stop], piece)
        total.add(found)
        sketch.add(found)
    return total.norm(), sketch.to_bytes()


def bounds_of(rules: Influence) -> Bounds:
    """The rule of a run's rounds; the bound of the norm is each round's own (``clipping``)."""
    return Bounds(rules.rule, rules.trim, rules.max_change, rules.share_cap, rules.movers)
