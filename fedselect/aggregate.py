"""Per-element averaging over the clients that share the element (DESIGN §4, the canonical sum).

Owns the plain reference and the streaming form that the service uses; both give the same bits.
Must not know files, rounds or the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedselect.errors import MaskError
from fedselect.kernels import CountVector, Float64Vector, accumulate
from fedselect.masks import BLOCK, BoolVector, ByteVector, Mask
from fedselect.protocol import GROUP as GROUP
from fedselect.protocol import SHARD as SHARD
from fedselect.space import FloatVector


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part of a round: compact values of shape (mask.shared,) and a weight."""

    mask: Mask
    values: FloatVector
    weight: float = 1.0


def reference(base: FloatVector, parts: Sequence[Contribution], k: int) -> FloatVector:
    """The specification of aggregation in plain numpy, shape (D,) in, shape (D,) out.

    ``g'[j] = Σ w·x[j] / Σ w`` over the clients that share j, ``base[j]`` where fewer than ``k`` do.
    Sums are float64, in groups of 8 in the order given, the groups folded from the left.
    """
    total, weights = np.zeros(base.size), np.zeros(base.size)
    counts = np.zeros(base.size, dtype=np.int64)
    for start in range(0, len(parts), GROUP):
        group_total, group_weights = np.zeros(base.size), np.zeros(base.size)
        for part in parts[start : start + GROUP]:
            shared = np.flatnonzero(~part.mask.to_bool())
            group_total[shared] += part.weight * part.values.astype(np.float64)
            group_weights[shared] += part.weight
            counts[shared] += 1
        total += group_total
        weights += group_weights
    enough = (counts >= k) & (weights > 0)
    mean = np.divide(total, weights, out=np.zeros(base.size), where=enough)
    return np.where(enough, mean, base).astype(np.float32)


class Accumulator:
    """The streaming form over a range of n elements: add updates in order, then finish.

    Memory is six vectors of the range, whatever the number of clients.
    """

    def __init__(self, size: int) -> None:
        self._total, self._weights = np.zeros(size), np.zeros(size)
        self._group_total, self._group_weights = np.zeros(size), np.zeros(size)
        self._counts: CountVector = np.zeros(size, dtype=np.int64)
        self._added = 0

    def add(self, packed: ByteVector, values: FloatVector, weight: float = 1.0) -> None:
        """Add the next update: the mask bytes (ceil(n/8),) and shared values of this range.

        Raises:
            MaskError: the number of values is not the number of shared bits.
        """
        if self._added and self._added % GROUP == 0:
            self._fold()
        sums = (self._group_total, self._group_weights, self._counts)
        shared = self._counts.size - int(np.bitwise_count(packed).sum(dtype=np.int64))
        if values.size != shared:
            raise MaskError(f"{values.size} values for {shared} shared elements")
        accumulate(packed, values, weight=weight, sums=sums)
        self._added += 1

    def finish(self, base: FloatVector, k: int) -> FloatVector:
        """The new values of the range; elements with fewer than ``k`` sharers keep ``base``."""
        self._fold()
        return _divide(self._total, self._weights, self._counts >= k, base)

    def _fold(self) -> None:
        self._total += self._group_total
        self._weights += self._group_weights
        self._group_total[:] = 0
        self._group_weights[:] = 0


def _divide(
    total: Float64Vector, weights: Float64Vector, enough: BoolVector, base: FloatVector
) -> FloatVector:
    enough = enough & (weights > 0)
    mean = np.divide(total, weights, out=np.zeros(base.size), where=enough)
    return np.where(enough, mean, base).astype(np.float32)


def aggregate(
    base: FloatVector, parts: Sequence[Contribution], k: int, *, shard: int = SHARD
) -> FloatVector:
    """The streaming form over whole vectors held in memory; equal to :func:`reference`."""
    out = np.empty_like(base)
    ranks = [part.mask.block_rank() for part in parts]
    for start in range(0, base.size, shard):
        stop = min(start + shard, base.size)
        accumulator = Accumulator(stop - start)
        for part, rank in zip(parts, ranks, strict=True):
            first, last = value_range(rank, start, stop)
            packed = part.mask.packed[start // 8 : -(-stop // 8)]
            accumulator.add(packed, part.values[first:last], part.weight)
        out[start:stop] = accumulator.finish(base[start:stop], k)
    return out


def value_range(block_rank: np.typing.NDArray[np.uint64], start: int, stop: int) -> tuple[int, int]:
    """Where the values of elements [start, stop) lie; both multiples of 65,536, or stop is D."""
    return int(block_rank[start // BLOCK]), int(block_rank[-(-stop // BLOCK)])
