"""Masked accumulation, compiled with numba: the loops around the rows of ``fedselect.lanes``.

Owns running sums, and the walk of a group of clients over a range in blocks of 4,096 elements: few
enough that sums stay in the processor's cache. Must not know files, rounds or clients.

However the rows spread values, the bits are those of the plain reference: the additions of one
element happen in the same order, and an element that a client does not share gets +0.0 added to a
sum that began as +0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fedselect.deltas import SCALE_BLOCK
from fedselect.lanes import OVERREAD, WORDS, add_row, personal_in, processor_lanes, row_width
from fedselect.masks import ByteVector
from fedselect.space import FloatVector

Float64Vector = npt.NDArray[np.float64]
CountVector = npt.NDArray[np.int32]
ValueVector = npt.NDArray[Any]  # one of FORMATS
# float32, float16, the upper 16 bits of float32 (bfloat16), int8 with scales; and decoded deltas
FORMATS = (np.float32, np.float16, np.uint16, np.int8, np.float64)
BLOCK = SCALE_BLOCK  # elements between two looks at where clients' values end
LARGEST_GROUP = 255  # clients of a group: a row counts sharers in bytes
LANES = processor_lanes()
_NEVER = np.iinfo(np.uint64).max


@dataclass(frozen=True, slots=True)
class Part:
    """One client's part of a range of n elements.

    ``packed`` (ceil(n/8),) is the mask of the range, ``values`` (shared bits of the mask,) are its
    shared elements in order, in one of ``FORMATS``; nothing is read beyond either. With int8,
    ``scales`` (ceil(n/4096),) float32 stretch the elements [4096·s, 4096·(s + 1)) of the range.
    """

    packed: ByteVector
    values: ValueVector
    weight: float = 1.0
    scales: FloatVector | None = None


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


class Sources:
    """Where compiled code reads the parts of clients over a range of n elements.

    Rows are read whole, so what lies at an end is read from a padded copy: the mask bytes of the
    last block if it is not whole, and the last values of every client.

    Raises:
        ValueError: parts in different formats, or in none; scales missing, or too many.
    """

    def __init__(self, parts: Sequence[Part], size: int) -> None:
        self._parts = parts  # keeps what the addresses point to
        self.kind = format_of(parts, size)
        self.weighted = any(part.weight != 1 for part in parts)
        self._masks = _addresses([part.packed for part in parts])
        self._starts = _addresses([part.values for part in parts])
        self._tails = _mask_tails(parts, size)
        self._ends, self._spares = self._value_ends()
        scaled = [part.scales for part in parts if self.kind == np.int8]
        self._scales = np.array(scaled, dtype=np.float64).reshape(len(parts), -1 if scaled else 0)

    def _value_ends(self) -> tuple[npt.NDArray[np.uint64], ByteVector]:
        """Addresses behind which values are read from copies, and the copies."""
        width = np.dtype(self.kind).itemsize
        kept = BLOCK + OVERREAD // width
        spares = np.zeros((len(self._parts), kept * width + OVERREAD), dtype=np.uint8)
        ends = self._starts.copy()
        for row, part in enumerate(self._parts):
            last = part.values[-kept:].view(np.uint8)
            spares[row, : last.size] = last
            ends[row] += np.uint64(part.values.nbytes - last.size)
        return ends, spares

    def clients(self, taken: npt.NDArray[np.uint64], *, weighted: bool) -> tuple[Any, ...]:
        """The arrays for compiled code to start after ``taken`` values of each client."""
        width = np.uint64(np.dtype(self.kind).itemsize)
        weights = [part.weight for part in self._parts] if weighted else []
        return (
            self._masks,
            _addresses(self._tails),
            self._starts + taken * width,
            self._ends.copy(),
            _addresses(self._spares),
            self._scales,
            np.array(weights, dtype=np.float64),
        )


def format_of(parts: Sequence[Part], size: int) -> type[Any]:
    """The one format of parts of a range of ``size`` elements; float32 if there are none.

    Raises:
        ValueError: more than one, an unknown one, or scales that do not fit it.
    """
    kinds = {part.values.dtype.type for part in parts} or {np.float32}
    if len(kinds) > 1 or not kinds <= set(FORMATS):
        known = ", ".join(kind.__name__ for kind in FORMATS)
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"values must be of one type ({known}), not {names}")
    kind: type[Any] = kinds.pop()
    wanted = -(-size // SCALE_BLOCK) if kind == np.int8 else 0
    if any((0 if part.scales is None else part.scales.size) != wanted for part in parts):
        raise ValueError(f"{kind.__name__} needs {wanted} scales for {size} elements")
    return kind


def _addresses(arrays: Sequence[npt.NDArray[Any]] | npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


def _mask_tails(parts: Sequence[Part], size: int) -> ByteVector:
    """The masks of the last block if it is not whole, with everything behind it personal."""
    tails = np.full((len(parts), BLOCK // 8), 0xFF, dtype=np.uint8)
    for tail, part in zip(tails, parts, strict=True):
        last = part.packed[size // BLOCK * (BLOCK // 8) :]
        tail[: last.size] = last
        if size % 8:
            tail[last.size - 1] |= 0xFF & (0xFF << size % 8)
    return tails


def add_group(parts: Sequence[Part], sums: Sums, *, lanes: int = LANES) -> None:
    """Add one group of clients to the running sums of a range, in place.

    For every element the group's values are summed in the order of ``parts``, and that sum is added
    to ``sums``: the canonical sum (docs/WIRE.md). The arithmetic is float64, one multiplication and
    one addition per element, never fused; values and scales are exact in it.

    Raises:
        ValueError: no parts, more than 255, or parts that :class:`Sources` refuses.
    """
    if not 0 < len(parts) <= LARGEST_GROUP:
        raise ValueError(f"a group has 1 to {LARGEST_GROUP} clients, not {len(parts)}")
    size = sums.total.size
    sources = Sources(parts, size)
    if sums.weights is None and sources.weighted:
        sums.weights = sums.counts.astype(np.float64)
    clients = sources.clients(np.zeros(len(parts), np.uint64), weighted=sums.weights is not None)
    weights = sums.total[:0] if sums.weights is None else sums.weights
    span = (0, -(-size // BLOCK), size // BLOCK)
    add_blocks(sources.kind, WORDS[lanes], clients, span, (sums.total, sums.counts, weights))


@njit(cache=True, nogil=True)
def add_blocks(kind, word, clients, span, sums):  # type: ignore[no-untyped-def]
    """Add a group of clients to ``sums``, which begin at the first block of ``span``.

    ``span``: the first block, the one behind the last, and the number of whole blocks in the range.
    """
    _, _, heads, _, _, scales, weights = clients
    places, factors = np.empty(heads.size, np.uint64), np.empty(heads.size)
    elements = sums[0].size
    for block in range(span[0], span[1]):
        _go_to(block, span[2], clients, places)
        if scales.shape[1]:
            factors[:] = scales[:, block]
        begin = (block - span[0]) * BLOCK
        if begin + BLOCK <= elements:
            _add_rows(kind, word, (places, heads), (factors, weights), sums, begin)
            continue
        last = (_padded(sums[0], begin), _padded(sums[1], begin), _padded(sums[2], begin))
        _add_rows(kind, word, (places, heads), (factors, weights), last, 0)
        sums[0][begin:] = last[0][: elements - begin]
        sums[1][begin:] = last[1][: elements - begin]
        if sums[2].size:
            sums[2][begin:] = last[2][: elements - begin]


@njit(cache=True, nogil=True)
def _padded(running, begin):  # type: ignore[no-untyped-def]
    """The running sums from ``begin`` on, as those of a whole block."""
    block = np.zeros(BLOCK, running.dtype)
    if running.size:
        block[: running.size - begin] = running[begin:]
    return block


@njit(cache=True, nogil=True)
def _go_to(block, whole, clients, places):  # type: ignore[no-untyped-def]
    """Say where the masks of a block lie, and turn to the copies of values that near their end."""
    masks, tails, heads, ends, spares, _, _ = clients
    for client in range(heads.size):
        if block < whole:
            places[client] = masks[client] + np.uint64(block * (BLOCK // 8))
        else:
            places[client] = tails[client]
        if heads[client] >= ends[client]:
            heads[client] += spares[client] - ends[client]
            ends[client] = _NEVER


@njit(cache=True, nogil=True)
def _add_rows(kind, word, clients, factors, sums, begin):  # type: ignore[no-untyped-def]
    """All rows of one block, added to ``sums`` from element ``begin`` on."""
    places, heads = clients
    scales, weights = factors
    total, counts, weighed = sums
    who = (heads.size, places.ctypes.data, heads.ctypes.data)
    where = (
        total.ctypes.data + 8 * begin,
        counts.ctypes.data + 4 * begin,
        weighed.ctypes.data + 8 * begin,
    )
    scale, weight = scales.ctypes.data, weights.ctypes.data
    rows = BLOCK // row_width(word)  # type: ignore[call-arg]
    for row in range(rows):
        if weights.size:
            add_row(kind, word, who, (scale, weight), (row, *where))
        else:
            add_row(kind, word, who, (scale, None), (row, *where))


@njit(cache=True, nogil=True, error_model="numpy")
def divide(sums, base, k, out):  # type: ignore[no-untyped-def]
    """``out = Σ w·x / Σ w`` as float32, ``base`` where fewer than ``k`` share or nothing weighs.

    All of shape (n,); weights of shape (0,) stand for the counts.
    """
    total, counts, weights = sums
    if weights.size:
        for j in range(out.size):
            enough = counts[j] >= k and weights[j] > 0
            mean = total[j] / (weights[j] if enough else 1.0)
            out[j] = np.float32(mean) if enough else base[j]
    else:
        least = max(k, 1)
        for j in range(out.size):
            mean = total[j] / np.float64(max(counts[j], 1))
            out[j] = np.float32(mean) if counts[j] >= least else base[j]


@njit(cache=True, nogil=True)
def average(kind, word, clients, span, rule, vectors):  # type: ignore[no-untyped-def]
    """The canonical mean over the blocks of ``span``, a few blocks at a time.

    ``rule``: the size of a group, k, and the number of blocks whose sums are held at a time.
    ``vectors``: base and out, of the whole range.
    """
    masks, tails, heads, ends, spares, scales, weights = clients
    group, k, tile = rule
    base, out = vectors
    size = tile * BLOCK
    sums = (np.empty(size), np.empty(size, np.int32), np.empty(size if weights.size else 0))
    for first in range(span[0], span[1], tile):
        sums[0][:], sums[1][:], sums[2][:] = 0, 0, 0
        last = min(first + tile, span[1])
        for left in range(0, masks.size, group):
            to = min(left + group, masks.size)
            some = (masks[left:to], tails[left:to], heads[left:to], ends[left:to])
            rest = (spares[left:to], scales[left:to], weights[left:to])
            add_blocks(kind, word, (*some, *rest), (first, last, span[2]), sums)
        start, stop = first * BLOCK, min(last * BLOCK, out.size)
        divide(sums, base[start:stop], k, out[start:stop])


def shared_bits(packed: ByteVector, size: int) -> int:
    """Shared elements of a range of ``size``, whose mask bytes are ``packed``; padding is 0."""
    words = packed.size // 8
    personal = int(_personal_in(np.uint64(packed.ctypes.data), words))
    return size - personal - int(np.bitwise_count(packed[8 * words :]).sum())


@njit(cache=True, nogil=True)
def _personal_in(address, words):  # type: ignore[no-untyped-def]
    personal = 0
    for word in range(words):
        personal += personal_in(address + np.uint64(8 * word))  # type: ignore[call-arg]
    return personal
