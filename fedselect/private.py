"""The private sum of a round: clipped deltas in whole steps of a grid, plus noise, over the goal.

Owns the mechanism of docs/adr/0015-noise-on-fixed-sums.md over any range of elements. Must not know
files, rounds or where keys come from.

Everything is whole numbers until the last division, so the sum does not depend on its order, no
low bits tell anything, and rounding keeps every client within the bound exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from fedselect.aggregate import Contribution, check_part, exact, whole_part
from fedselect.kernels import Part
from fedselect.manifestdocs import ManifestNoise
from fedselect.noise import gaussian
from fedselect.space import FloatVector

MARGIN = 1 + 2.0**-20  # more than rounding can hide in the squares of 2^32 elements


@njit(cache=True, nogil=True)
def _add_squares(total, values):  # type: ignore[no-untyped-def]
    """``total`` plus the squares of ``values``, one after the other: the same bits everywhere."""
    for value in values:
        total += value * value
    return total


def add_squares(squares: float, part: Part, base: FloatVector | None, step: int) -> float:
    """``squares`` plus those of a part's delta, in steps; parts of a client come in order.

    ``base`` (n,) is what its values are measured from, None if they are deltas already.
    """
    _, units = _delta(part, base, step)
    return float(_add_squares(squares, units))


def shrink(squares: float, bound: int) -> float:
    """The factor, at most 1, that brings a delta of this squared length within ``bound`` steps."""
    length = math.sqrt(squares) * MARGIN
    return 1.0 if length <= bound else bound / length


def _delta(
    part: Part, base: FloatVector | None, step: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Which elements of a range a part shares, and by how many steps it moves each."""
    bits = np.unpackbits(part.packed, bitorder="little")
    size = bits.size if base is None else base.size
    shared = np.flatnonzero(bits[:size] == 0)[: part.values.size]
    values = exact(part.values, part.scales, shared)
    if base is not None:
        values = values - base[shared].astype(np.float64)
    return shared, np.ldexp(values, -step)


class PrivateSum:
    """The sum of a range of elements from ``start`` on; ``finish`` as of an ``Accumulator``."""

    def __init__(self, rule: ManifestNoise, key: bytes, span: tuple[int, int]) -> None:
        self._rule, self._key, self._span = rule, key, span
        self._total = np.zeros(span[1] - span[0], dtype=np.int64)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The sum so far (n,), in steps, without noise."""
        return self._total

    def add(self, part: Part, base: FloatVector | None, factor: float) -> None:
        """Add a client's part of the range, shortened by ``factor``.

        Raises:
            MaskError: the number of values is not the number of shared bits.
        """
        check_part(part, self._total.size)
        shared, units = _delta(part, base, self._rule.step)
        self._total[shared] += np.trunc(units * factor).astype(np.int64)

    def finish(self, base: FloatVector, k: int) -> FloatVector:  # noqa: ARG002 - as all sums
        """``base`` (n,) plus the noised mean; no element needs ``k`` clients, for noise hides each.

        What may never travel keeps ``base``. Give zeros to get the mean itself.
        """
        start, stop = self._span
        noised = self._total + gaussian(self._key, start, stop, self._rule.sigma)
        mean = np.ldexp(noised, self._rule.step) / self._rule.goal
        for first, last in self._rule.still:
            mean[max(0, first - start) : max(0, last - start)] = 0.0
        return (base + mean).astype(np.float32)


def noise_alone(rule: ManifestNoise, key: bytes, size: int) -> FloatVector:
    """What a round of nobody would add to a model of ``size`` elements, (D,)."""
    return PrivateSum(rule, key, (0, size)).finish(np.zeros(size, dtype=np.float32), 1)


def private_mean(
    base: FloatVector,
    parts: Sequence[Contribution],
    rule: ManifestNoise,
    key: bytes,
    *,
    deltas: bool,
) -> FloatVector:
    """The specification over whole vectors: the new values (D,), or with ``deltas`` the mean."""
    origin = None if deltas else base
    total = PrivateSum(rule, key, (0, base.size))
    for each in parts:
        part = whole_part(each)
        factor = shrink(add_squares(0.0, part, origin, rule.step), rule.bound)
        total.add(part, origin, factor)
    return total.finish(np.zeros_like(base) if deltas else base, 1)
