"""Masked accumulation, compiled with numba; nothing else is compiled in this project.

Owns the inner loops over packed masks and compact values. Must not know files, rounds or clients.

Where the processor can, a group of clients is added column by column (``fedselect.lanes``); the
plain loop does the same element by element, and all that columns leave over. Both give the same
bits: the additions of one element happen in the same order, and a lane that does not share adds
+0.0 to a sum that began as +0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fedselect.lanes import ORDER, add_columns, processor_lanes
from fedselect.masks import ByteVector
from fedselect.space import FloatValues

Float64Vector = npt.NDArray[np.float64]
CountVector = npt.NDArray[np.int32]
LARGEST_GROUP = 64  # clients of a group: the code for a column is unrolled over them


@dataclass(frozen=True, slots=True)
class Part:
    """One client's part of a range of n elements.

    ``packed`` (ceil(n/8),) is the mask of the range, ``values`` (shared bits of the mask,) are its
    shared elements in order; nothing is read beyond either.
    """

    packed: ByteVector
    values: FloatValues
    weight: float = 1.0


@dataclass(slots=True)
class Sums:
    """Running sums of a range of n elements: Σ w·x, the number of sharers, and Σ w.

    ``weights`` is None as long as every weight was 1: then it would equal ``counts``.
    """

    total: Float64Vector
    counts: CountVector
    weights: Float64Vector | None = None

    @classmethod
    def zeros(cls, size: int) -> Sums:
        """Sums of nothing."""
        return cls(np.zeros(size), np.zeros(size, dtype=np.int32))

    def check(self) -> None:
        """See that compiled code may write to the arrays.

        Raises:
            ValueError: a wrong type, different shapes, or an array that is read-only or has gaps.
        """
        wanted = ((self.total, np.float64), (self.counts, np.int32), (self.weights, np.float64))
        for array, dtype in wanted:
            if array is None:
                continue
            if array.dtype != dtype or array.shape != (self.total.size,):
                raise ValueError(f"sums are of {dtype.__name__} and one shape (n,)")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError("sums must be contiguous and writeable")

    def clear(self) -> None:
        """Make them sums of nothing again."""
        self.total.fill(0)
        self.counts.fill(0)
        self.weights = None


LANES = processor_lanes()


def add_group(parts: Sequence[Part], sums: Sums, *, lanes: int = LANES) -> None:
    """Add one group of clients to the running sums of a range, in place.

    For every element the group's values are summed in the order of ``parts``, and that sum is added
    to ``sums``: the canonical sum (docs/WIRE.md). The arithmetic is float64, one multiplication and
    one addition per element, never fused.
    """
    if not 0 < len(parts) <= LARGEST_GROUP:
        raise ValueError(f"a group has 1 to {LARGEST_GROUP} clients, not {len(parts)}")
    if sums.weights is None and any(part.weight != 1 for part in parts):
        sums.weights = sums.counts.astype(np.float64)
    narrow = all(part.values.dtype == np.float32 for part in parts)
    columns = sums.total.size // lanes if lanes > 1 and narrow else 0
    left = [part.values for part in parts]
    if columns:
        ends = _run_columns(parts, sums, columns=columns, lanes=lanes)
        left = [part.values[end:] for part, end in zip(parts, ends, strict=True)]
    start = columns * lanes
    if start < sums.total.size:
        _add_plainly(parts, left, sums, start=start)


def _run_columns(parts: Sequence[Part], sums: Sums, *, columns: int, lanes: int) -> list[int]:
    """Add whole columns; returns how many values of each client that took."""
    begin = tuple(part.values.ctypes.data for part in parts)
    weights = sums.weights
    end = add_columns(
        tuple(part.packed.ctypes.data for part in parts),
        begin,
        () if weights is None else tuple(float(part.weight) for part in parts),
        None if lanes == 16 else ORDER.ctypes.data,
        columns,
        (sums.total, sums.counts, sums.total[:0] if weights is None else weights),
    )
    return [(after - before) // 4 for before, after in zip(begin, end, strict=True)]


def _add_plainly(
    parts: Sequence[Part], values: Sequence[FloatValues], sums: Sums, *, start: int
) -> None:
    size = sums.total.size - start
    total, counts, weights = np.zeros(size), np.zeros(size, dtype=np.int32), np.zeros(size)
    for part, own in zip(parts, values, strict=True):
        _add_part(part.packed, own, float(part.weight), start, (total, counts, weights))
    sums.total[start:] += total
    sums.counts[start:] += counts
    if sums.weights is not None:
        sums.weights[start:] += weights


@njit(cache=True, nogil=True)
def _add_part(packed, values, weight, start, sums):  # type: ignore[no-untyped-def]
    total, counts, weights = sums
    position = 0
    for j in range(total.size):
        if not (packed[(start + j) >> 3] >> ((start + j) & 7)) & 1:
            total[j] += weight * np.float64(values[position])
            counts[j] += 1
            weights[j] += weight
            position += 1


@njit(cache=True, nogil=True)
def divide(total, counts, weights, base, k, out):  # type: ignore[no-untyped-def]
    """``out = Σ w·x / Σ w`` as float32, ``base`` where fewer than ``k`` share or nothing weighs.

    All of shape (n,); ``weights`` of shape (0,) stands for ``counts``.
    """
    for j in range(total.size):
        weight = weights[j] if weights.size else np.float64(counts[j])
        enough = counts[j] >= k and weight > 0
        mean = total[j] / (weight if enough else 1.0)
        out[j] = np.float32(mean) if enough else base[j]
