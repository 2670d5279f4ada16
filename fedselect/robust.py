"""Robust averages: the median and the trimmed mean of each element over the clients that share it.

Owns the rule, its plain reference and the compiled form; both give the same bits. Must not know
files, rounds or the network. Weights play no part: a client must not buy influence with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fedselect.aggregate import Contribution, check_part, exact, whole_part
from fedselect.deltas import SCALE_BLOCK
from fedselect.kernels import Part, shared_bits
from fedselect.space import FloatVector

TILE = 65_536  # elements of all clients that are spread out at a time; whole bytes, whole scales
CHUNK = 256  # elements sorted at a time: those of all clients stay in the nearest cache


@dataclass(frozen=True, slots=True)
class Trim:
    """Leave out the share ``cut`` of the values at each end, and average the others.

    Of m values floor(cut·m) go at each end, though one stays, or two if m is even: 0.5 is the
    median. Below ``least`` values nothing is left out, because then there are no ends to speak of.
    Values count as float32, and -0.0 as 0.0.
    """

    cut: float
    least: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.cut <= 0.5:
            raise ValueError(f"a cut is between 0 and 0.5, not {self.cut}")

    def windows(self, clients: int) -> npt.NDArray[np.int64]:
        """Which ranks count when m = 0 … ``clients`` values are there: rows first and stop."""
        present = np.arange(clients + 1)
        most = np.maximum(present - 1, 0) // 2
        cut = np.minimum(np.floor(self.cut * present).astype(np.int64), most)
        cut[present < self.least] = 0
        return np.stack([cut, present - cut])


MEDIAN = Trim(0.5)


def robust_reference(
    base: FloatVector, parts: Sequence[Contribution], rule: Trim, k: int
) -> FloatVector:
    """The specification in plain numpy, shape (D,) in, shape (D,) out.

    The values that count are added in ascending order in float64, and their mean is rounded to
    float32; ``base[j]`` where fewer than ``k`` clients share j.
    """
    rows = np.full((len(parts), base.size), np.inf, dtype=np.float32)
    for row, part in zip(rows, parts, strict=True):
        shared = np.flatnonzero(~part.mask.to_bool())
        row[shared] = exact(part.values, part.scales, shared).astype(np.float32) + np.float32(0)
    present = (rows < np.inf).sum(axis=0)
    rows.sort(axis=0)
    first, stop = rule.windows(len(parts))[:, present]
    total = np.zeros(base.size)
    for rank, row in enumerate(rows):
        total += np.where((first <= rank) & (rank < stop), row, 0.0)
    enough = present >= max(k, 1)
    mean = total / np.maximum(stop - first, 1)
    return np.where(enough, mean, base).astype(np.float32)


def robust(base: FloatVector, parts: Sequence[Contribution], rule: Trim, k: int) -> FloatVector:
    """The same, a range at a time: memory is one tile of all clients, whatever the model.

    Raises:
        MaskError: the number of a client's values is not that of its shared elements.
    """
    own = [whole_part(part) for part in parts]
    for part in own:
        check_part(part, base.size)
    out = np.empty(base.size, dtype=np.float32)
    taken = [0] * len(own)
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        pieces = []
        for number, part in enumerate(own):
            packed = part.packed[start // 8 : -(-stop // 8)]
            first = taken[number]
            taken[number] += shared_bits(packed, stop - start)
            pieces.append(
                Part(packed, part.values[first : taken[number]], 1.0, _scales(part, start))
            )
        robust_range(base[start:stop], pieces, rule, k, out=out[start:stop])
    return out


def _scales(part: Part, start: int) -> FloatVector | None:
    return None if part.scales is None else part.scales[start // SCALE_BLOCK :]


def robust_range(
    base: FloatVector, parts: Sequence[Part], rule: Trim, k: int, *, out: FloatVector
) -> None:
    """One range of n elements into ``out`` (n,); all parts are of that range, as in ``Part``."""
    rows = np.empty((len(parts), base.size), dtype=np.float32)
    for row, part in zip(rows, parts, strict=True):
        _spread(part.packed, _as_float32(part, base.size), row)
    pairs = np.array(list(_network(len(parts))), dtype=np.int64).reshape(-1, 2)
    base = np.ascontiguousarray(base, "<f4")
    _pick(rows, pairs, rule.windows(len(parts)), k, (base, out))


def _as_float32(part: Part, size: int) -> FloatVector:
    if part.values.dtype == np.float32:
        return part.values
    elements = np.empty(0, np.int64)
    if part.values.dtype == np.int8:
        personal = np.unpackbits(part.packed, count=size, bitorder="little")
        elements = np.flatnonzero(personal == 0)
    return exact(part.values, part.scales, elements).astype(np.float32)


def _network(size: int) -> Iterator[tuple[int, int]]:
    """Batcher's odd-even merge sort: whom to compare and exchange, whatever the values."""
    for span, step in _passes(size):
        for low in range(step % span, size - step):
            first_half = (low - step % span) // step % 2 == 0
            if first_half and low // (2 * span) == (low + step) // (2 * span):
                yield low, low + step


def _passes(size: int) -> Iterator[tuple[int, int]]:
    """Runs of ``span`` are merged in pairs, at ever smaller steps."""
    span = 1
    while span < size:
        step = span
        while step:
            yield span, step
            step //= 2
        span *= 2


@njit(cache=True, nogil=True)
def _spread(packed, values, row):  # type: ignore[no-untyped-def]
    """Values to their elements, infinity to the others; without a branch that bits would decide."""
    if not values.size:
        row[:] = np.inf
        return
    position, last = 0, values.size - 1
    for j in range(row.size):
        personal = (packed[j >> 3] >> (j & 7)) & 1
        value = values[min(position, last)] + np.float32(0)
        row[j] = np.float32(np.inf) if personal else value
        position += 1 - personal


@njit(cache=True, nogil=True, error_model="numpy")
def _pick(rows, pairs, windows, k, vectors):  # type: ignore[no-untyped-def]
    """Sort every element's values, and average those that its window names."""
    base, out = vectors
    total, present = np.empty(CHUNK), np.empty(CHUNK, np.int64)
    first, stop = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    for start in range(0, out.size, CHUNK):
        size = min(CHUNK, out.size - start)
        chunk = rows[:, start : start + size]
        total[:], present[:] = 0, 0
        for pair in range(pairs.shape[0]):
            _exchange(chunk[pairs[pair, 0]], chunk[pairs[pair, 1]])
        for rank in range(rows.shape[0]):
            _count(chunk[rank], present)
        for j in range(size):
            first[j], stop[j] = windows[0, present[j]], windows[1, present[j]]
        for rank in range(rows.shape[0]):
            _add(chunk[rank], rank, (first, stop), total)
        for j in range(size):
            mean = total[j] / max(stop[j] - first[j], 1)
            out[start + j] = np.float32(mean) if present[j] >= max(k, 1) else base[start + j]


@njit(cache=True, nogil=True)
def _exchange(low, high):  # type: ignore[no-untyped-def]
    for j in range(low.size):
        a, b = low[j], high[j]
        low[j] = a if a < b else b
        high[j] = b if a < b else a


@njit(cache=True, nogil=True)
def _count(row, present):  # type: ignore[no-untyped-def]
    for j in range(row.size):
        present[j] += row[j] < np.float32(np.inf)


@njit(cache=True, nogil=True)
def _add(row, rank, window, total):  # type: ignore[no-untyped-def]
    first, stop = window
    for j in range(row.size):
        counts = first[j] <= rank and rank < stop[j]
        total[j] += np.float64(row[j]) if counts else 0.0
