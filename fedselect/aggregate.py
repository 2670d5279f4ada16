"""Per-element averaging over the clients that share the element (DESIGN §4, the canonical sum).

Owns the plain reference and the streaming form that the service uses; both give the same bits.
Must not know files, rounds or the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedselect import kernels
from fedselect.deltas import SCALE_BLOCK
from fedselect.errors import MaskError
from fedselect.kernels import LANES, Part, Sums, ValueVector, add_group, divide
from fedselect.lanes import WORDS
from fedselect.manifestdocs import GROUP as GROUP
from fedselect.manifestdocs import SHARD as SHARD
from fedselect.masks import BLOCK, ByteVector, Mask, packed_size
from fedselect.space import FloatVector

TILE = 4  # blocks whose sums are held at a time: they stay in the nearest caches


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part of a round: compact values of shape (mask.shared,) and a weight.

    ``values`` are float32, float16, bfloat16 as uint16, or int8 with ``scales`` of shape
    (ceil(D / 4096),), float32: entry s belongs to the elements [4096·s, 4096·(s + 1)). Decoded
    deltas may be float64.
    """

    mask: Mask
    values: ValueVector
    weight: float = 1.0
    scales: FloatVector | None = None


def reference(base: FloatVector, parts: Sequence[Contribution], k: int) -> FloatVector:
    """The specification of aggregation in plain numpy, shape (D,) in, shape (D,) out.

    ``g'[j] = Σ w·x[j] / Σ w`` over the clients that share j, ``base[j]`` where fewer than ``k`` do.
    Sums are float64, in groups of 8 in the order given, the groups folded from the left. For
    values that are deltas ``base`` is zeros: what nobody moves does not move.
    """
    total, weights = np.zeros(base.size), np.zeros(base.size)
    counts = np.zeros(base.size, dtype=np.int64)
    for start in range(0, len(parts), GROUP):
        group_total, group_weights = np.zeros(base.size), np.zeros(base.size)
        for part in parts[start : start + GROUP]:
            shared = np.flatnonzero(~part.mask.to_bool())
            group_total[shared] += part.weight * exact(part.values, part.scales, shared)
            group_weights[shared] += part.weight
            counts[shared] += 1
        total += group_total
        weights += group_weights
    enough = (counts >= k) & (weights > 0)
    mean = np.divide(total, weights, out=np.zeros(base.size), where=enough)
    return np.where(enough, mean, base).astype(np.float32)


def exact(
    values: ValueVector, scales: FloatVector | None, elements: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The numbers that values of any format stand for; ``elements`` says where each belongs."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if values.dtype == np.int8 and scales is not None:
        return values * scales.astype(np.float64)[elements // SCALE_BLOCK]
    return values.astype(np.float64)


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

    def add(
        self,
        packed: ByteVector,
        values: ValueVector,
        weight: float = 1.0,
        scales: FloatVector | None = None,
    ) -> None:
        """Add the next update: the mask bytes (ceil(n/8),) and shared values of this range.

        For int8 the range begins at a multiple of 4096, and ``scales`` are its own.

        Raises:
            MaskError: the number of values is not the number of shared bits.
            ValueError: another format than that of the open group, or scales that do not fit it.
        """
        size = self._sums.total.size
        part = Part(np.ascontiguousarray(packed), np.ascontiguousarray(values), weight, scales)
        check_part(part, size)
        kernels.format_of([*self._group[:1], part], size)
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
        base = np.ascontiguousarray(base, "<f4")
        divide((sums.total, sums.counts, weights), base, k, out)
        sums.clear()
        return out

    def _fold(self) -> None:
        if self._group:
            add_group(self._group, self._sums, lanes=self._lanes)
            self._group.clear()


def warm() -> None:
    """Compile, or load, what the formats on the wire need, before anybody waits for it.

    The first time on a machine this takes seconds: a worker that did so in the middle of a job
    might lose its lease, or be ended before anything was kept, each time anew.
    """
    base = np.frombuffer(bytes(4 * SCALE_BLOCK), dtype="<f4")  # read-only, as what was fetched is
    mask = np.zeros(SCALE_BLOCK // 8, dtype=np.uint8)
    for kind in (np.float32, np.uint16, np.int8):
        scales = np.ones(1, dtype=np.float32) if kind is np.int8 else None
        accumulator = Accumulator(SCALE_BLOCK)
        accumulator.add(mask, np.zeros(SCALE_BLOCK, dtype=kind), 1.0, scales)
        accumulator.finish(base, 1)


def check_part(part: Part, size: int) -> None:
    """See that a part of a range of ``size`` elements has exactly one value per shared element.

    Raises:
        MaskError: it has not, or the mask is of another size.
    """
    if part.packed.size != packed_size(size):
        raise MaskError(f"{part.packed.size} mask bytes for {size} elements")
    shared = kernels.shared_bits(part.packed, size)
    if part.values.size != shared:
        raise MaskError(f"{part.values.size} values for {shared} shared elements")


def aggregate(
    base: FloatVector,
    parts: Sequence[Contribution],
    k: int,
    *,
    lanes: int = LANES,
    threads: int = 1,
    out: FloatVector | None = None,
) -> FloatVector:
    """The mean of whole vectors held in memory; equal to :func:`reference`, bit for bit.

    ``threads`` share the range between them, which changes no bit. The result is written to ``out``
    (D,), float32, if that is given: memory that is new costs more than the sums.

    Raises:
        MaskError, ValueError: as :meth:`Accumulator.add`.
    """
    size = base.size
    own = [whole_part(part) for part in parts]
    for part in own:
        check_part(part, size)
    base = np.ascontiguousarray(base, "<f4")
    found = np.empty(size, dtype=np.float32) if out is None else out
    sources = kernels.Sources(own, size)

    def work(first: int, last: int) -> None:
        before = first * kernels.BLOCK
        taken = [kernels.shared_bits(part.packed[: before // 8], before) for part in own]
        clients = sources.clients(np.array(taken, np.uint64), weighted=sources.weighted)
        span, rule = (first, last, size // kernels.BLOCK), (GROUP, k, TILE)
        kernels.average(sources.kind, WORDS[lanes], clients, span, rule, (base, found))

    blocks = -(-size // kernels.BLOCK)
    cuts = [blocks * number // threads for number in range(threads + 1)]
    if threads == 1:
        work(0, blocks)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, cuts, cuts[1:]))
    return found


def whole_part(part: Contribution) -> Part:
    """A contribution as the part of a range that is everything."""
    values = np.ascontiguousarray(part.values)
    return Part(part.mask.packed, values, part.weight, part.scales)


def value_range(block_rank: npt.NDArray[np.uint64], start: int, stop: int) -> tuple[int, int]:
    """Where the values of elements [start, stop) lie; both multiples of 65,536, or stop is D."""
    return int(block_rank[start // BLOCK]), int(block_rank[-(-stop // BLOCK)])
