"""Per-element averaging over the clients that share the element (DESIGN §4, the canonical sum).

Owns the plain reference and the streaming form that the service uses; both give the same bits.
Must not know files, rounds or the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedselect.errors import MaskError
from fedselect.kernels import LANES, Part, Sums, add_group, divide
from fedselect.masks import BLOCK, ByteVector, Mask, packed_size
from fedselect.protocol import GROUP as GROUP
from fedselect.protocol import SHARD as SHARD
from fedselect.space import FloatValues, FloatVector


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part of a round: compact values of shape (mask.shared,) and a weight.

    Trained values are float32, decoded deltas float64.
    """

    mask: Mask
    values: FloatValues
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

    A group is added when it is complete, so the updates of at most one group are held: memory is
    three vectors of the range and one group's files, whatever the number of clients.
    """

    def __init__(self, size: int, *, lanes: int = LANES) -> None:
        self._sums = Sums.zeros(size)
        self._group: list[Part] = []
        self._lanes = lanes

    @classmethod
    def resume(cls, sums: Sums, *, lanes: int = LANES) -> Accumulator:
        """Go on from the sums of whole groups, to the same bits as if all were added in one go.

        The accumulator owns ``sums`` from now on: it adds to these very arrays.

        Raises:
            ValueError: the arrays are not of one shape (n,) or not of the types of ``Sums``.
        """
        sums.check()
        accumulator = cls(0, lanes=lanes)
        accumulator._sums = sums
        return accumulator

    @property
    def sums(self) -> Sums:
        """The running sums of the groups added so far: these themselves, which go on changing.

        Raises:
            ValueError: a group is open, so they would not say how to go on.
        """
        if self._group:
            raise ValueError(f"{len(self._group)} updates of an open group are not in the sums")
        return self._sums

    def add(self, packed: ByteVector, values: FloatValues, weight: float = 1.0) -> None:
        """Add the next update: the mask bytes (ceil(n/8),) and shared values of this range.

        Raises:
            MaskError: the number of values is not the number of shared bits.
        """
        size = self._sums.total.size
        if packed.size != packed_size(size):
            raise MaskError(f"{packed.size} mask bytes for {size} elements")
        shared = size - int(np.bitwise_count(packed).sum(dtype=np.int64))
        if values.size != shared:
            raise MaskError(f"{values.size} values for {shared} shared elements")
        own = values if values.flags.c_contiguous else values.copy()
        part = Part(np.ascontiguousarray(packed), own, weight)
        self._group.append(part)
        if len(self._group) == GROUP:
            self._fold()

    def finish(self, base: FloatVector, k: int, *, out: FloatVector | None = None) -> FloatVector:
        """The new values of the range; elements with fewer than ``k`` sharers keep ``base``.

        They are written to ``out`` if that is given. The accumulator is empty again afterwards, so
        that its memory, which the processor's cache holds by then, serves the next range.
        """
        self._fold()
        sums = self._sums
        out = np.empty(base.size, dtype=np.float32) if out is None else out
        weights = sums.total[:0] if sums.weights is None else sums.weights
        divide(sums.total, sums.counts, weights, np.ascontiguousarray(base, "<f4"), k, out)
        sums.clear()
        return out

    def _fold(self) -> None:
        if self._group:
            add_group(self._group, self._sums, lanes=self._lanes)
            self._group.clear()


def aggregate(
    base: FloatVector,
    parts: Sequence[Contribution],
    k: int,
    *,
    shard: int = 2 * BLOCK,
    lanes: int = LANES,
) -> FloatVector:
    """The streaming form over whole vectors held in memory; equal to :func:`reference`.

    ``shard`` elements are worked on at a time: few enough that their sums stay in the cache.
    """
    out = np.empty_like(base)
    ranks = [part.mask.block_rank() for part in parts]
    accumulator = Accumulator(min(shard, base.size), lanes=lanes)
    for start in range(0, base.size, shard):
        stop = min(start + shard, base.size)
        if stop - start < shard <= base.size:  # the last one
            accumulator = Accumulator(stop - start, lanes=lanes)
        for part, rank in zip(parts, ranks, strict=True):
            first, last = value_range(rank, start, stop)
            packed = part.mask.packed[start // 8 : -(-stop // 8)]
            accumulator.add(packed, part.values[first:last], part.weight)
        accumulator.finish(base[start:stop], k, out=out[start:stop])
    return out


def value_range(block_rank: np.typing.NDArray[np.uint64], start: int, stop: int) -> tuple[int, int]:
    """Where the values of elements [start, stop) lie; both multiples of 65,536, or stop is D."""
    return int(block_rank[start // BLOCK]), int(block_rank[-(-stop // BLOCK)])
