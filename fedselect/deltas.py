"""The encodings of deltas: bfloat16, and int8 with block scales; and their frames (docs/WIRE.md).

Owns the quantiser, which is canonical (equal deltas give equal codes on every machine), and the
cutting of codes into frames of 65,536 elements that can be fetched and decoded by range. Must not
know files or where a delta comes from.

One delta of D elements, end to end::

    codes = quantise(delta, "int8", shared)           # Codes of the shared elements
    lengths, payload = pack(codes, rank)              # what travels; rank as Mask.block_rank()
    frames = Frames("int8", D, rank, lengths)         # at the receiver
    first, last = frames.span(start, stop)            # bytes of the payload to fetch for a range
    codes = frames.decode(payload[first:last], start, stop)
    values = codes.values(counts)                     # float64, exact

Ranges begin at multiples of ``BLOCK`` and end there or at D. Without a mask, everything is shared:
``rank`` is then ``dense_rank(D)`` and ``counts`` may be left out.

For kernels: ``Codes.codes`` are int8, or the 16 bits of a bfloat16 as uint16 (shift left by 16 and
read as float32), compact; ``Codes.scales`` are float32, entry s for the elements
[4,096·s, 4,096·(s + 1)) counted from the start of the range (empty for bf16). A value is
``float64(code) · float64(scale)``, which float64 holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedselect.deflate import expand, shrink
from fedselect.errors import WireError
from fedselect.masks import BLOCK, ByteVector, Mask
from fedselect.space import FloatVector

Encoding = Literal["f32", "bf16", "int8"]
DeltaEncoding = Literal["bf16", "int8"]
Counts = npt.NDArray[np.int64]
CodeVector = npt.NDArray[np.integer[Any]]
Ranks = npt.NDArray[np.unsignedinteger[Any]]
DELTA_ENCODINGS: tuple[DeltaEncoding, ...] = ("bf16", "int8")
SCALE_BLOCK = 4096  # elements that share a scale
LARGEST_CODE = 127  # -128 is never used
RMS_STEPS = 12  # steps of the quantiser in one root mean square
PLANES = {"bf16": 2, "int8": 1}  # separately coded pieces of a frame


@dataclass(frozen=True, slots=True)
class Codes:
    """Quantised deltas of the shared elements of a range of whole blocks.

    ``codes`` of shape (shared,), int8 or uint16; ``scales`` of shape (ceil(range / 4096),),
    float32, or (0,) for bf16.
    """

    encoding: DeltaEncoding
    codes: CodeVector
    scales: FloatVector

    def values(self, counts: Counts | None = None) -> npt.NDArray[np.float64]:
        """What the codes stand for, exactly; shape (shared,).

        ``counts`` are the shared elements of each scale block (:func:`scale_counts`); None: all.
        """
        if self.encoding == "bf16":
            bits = self.codes.astype(np.uint32)
            return np.left_shift(bits, 16, out=bits).view(np.float32).astype(np.float64)
        sizes: Counts | int = SCALE_BLOCK if counts is None else counts
        scales = np.repeat(self.scales.astype(np.float64), sizes)[: self.codes.size]
        return np.multiply(self.codes, scales, out=scales)


def delta_encoding(name: str) -> DeltaEncoding:
    """The encoding of this name.

    Raises:
        WireError: encoding_unknown.
    """
    for encoding in DELTA_ENCODINGS:
        if name == encoding:
            return encoding
    raise WireError(f"{name!r} is no encoding of deltas", code="encoding_unknown")


_NO_SCALES: FloatVector = np.empty(0, np.float32)

# --- quantising --------------------------------------------------------------------------------


def quantise(
    delta: FloatVector,
    encoding: DeltaEncoding,
    mask: Mask | None = None,
    *,
    rest: FloatVector | None = None,
) -> Codes:
    """Quantise the shared elements of ``delta`` (shape (D,), float32); all of them without a mask.

    bf16: to nearest, ties to even. int8: per 4,096 elements of the flat vector one scale, the
    larger of max|d| / 127 and rms(d) / 12, and codes rint(d / scale). The second bound makes
    codes of a bell-shaped block cheap to entropy-code; it costs precision that error feedback gets
    back. Only elements that are shared count for a scale. ``rest`` (D,), float32, if it is given,
    is filled with what the codes lose of the shared elements, and 0 where they are personal.

    Raises:
        WireError: values_not_finite if a shared element is not, or not within bfloat16.
    """
    dim = delta.size
    pieces: list[CodeVector] = []
    scales: list[FloatVector] = []
    scratch = _Scratch()
    for start in range(0, dim, BLOCK):
        stop = min(start + BLOCK, dim)
        block = np.ascontiguousarray(delta[start:stop], dtype=np.float32)
        keep = None if mask is None else _shared_bits(mask, start, stop)
        if keep is not None:
            block = _only(keep, block)
        if not np.isfinite(block).all():
            raise WireError("a delta is NaN or infinite", code="values_not_finite")
        if encoding == "bf16":
            codes: CodeVector = _to_bf16(block)
        else:
            codes, found = _to_int8(block, _counts_of(mask, start, stop), scratch)
            scales.append(found)
        if rest is not None:
            own = Codes(encoding, codes, scales[-1] if scales else _NO_SCALES)
            rest[start:stop] = block - own.values()
        pieces.append(codes if keep is None else np.compress(keep, codes))
    return _joined(encoding, pieces, scales)


def _joined(encoding: DeltaEncoding, pieces: list[CodeVector], scales: list[FloatVector]) -> Codes:
    kind = np.uint16 if encoding == "bf16" else np.int8
    return Codes(
        encoding,
        np.concatenate(pieces) if pieces else np.empty(0, kind),
        np.concatenate(scales) if scales else _NO_SCALES,
    )


def _only(keep: npt.NDArray[np.bool_], block: FloatVector) -> FloatVector:
    """``block`` with 0 where it is not kept; not multiplied, for what is personal may be NaN."""
    ones = np.negative(keep.view(np.int8)).astype(np.int32)  # np.where takes 15 times as long
    return (block.view(np.int32) & ones).view(np.float32)


def _to_bf16(block: FloatVector) -> npt.NDArray[np.uint16]:
    bits = block.view(np.uint32)
    codes = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if ((codes & 0x7F80) == 0x7F80).any():
        raise WireError("a delta is too large for bfloat16", code="values_not_finite")
    return codes


class _Scratch:
    """Memory of one block, used again and again: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        shape = (BLOCK // SCALE_BLOCK, SCALE_BLOCK)
        self.rows = np.empty(shape, dtype=np.float32)
        self.squares = np.empty(shape, dtype=np.float64)


def _to_int8(
    block: FloatVector, counts: Counts, scratch: _Scratch
) -> tuple[npt.NDArray[np.int8], FloatVector]:
    rows = scratch.rows[: counts.size]
    flat = rows.reshape(-1)
    flat[: block.size] = block
    flat[block.size :] = 0
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64)
    mean = _sum_of_squares(rows, scratch.squares[: counts.size]) / np.maximum(counts, 1)
    scales = np.maximum(largest / LARGEST_CODE, np.sqrt(mean) / RMS_STEPS).astype(np.float32)
    rows /= np.where(scales > 0, scales, np.float32(1))[:, None]
    np.rint(rows, out=rows)
    # A scale that was rounded down, a subnormal one above all, may ask for more than 127.
    np.clip(rows, -LARGEST_CODE, LARGEST_CODE, out=rows)
    rows[scales == 0] = 0
    return flat[: block.size].astype(np.int8), scales


def _sum_of_squares(rows: FloatVector, squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Per row; the order of additions is part of the format: the second half onto the first."""
    np.square(rows, out=squares, dtype=np.float64)
    half = SCALE_BLOCK
    while half > 1:
        half //= 2
        squares[:, :half] += squares[:, half : 2 * half]
    return squares[:, 0].copy()


def scale_counts(packed: ByteVector, size: int) -> Counts:
    """Shared elements of every scale block of a range of ``size`` elements.

    ``packed`` are the mask bytes of the range, (ceil(size / 8),).
    """
    bits = np.bitwise_count(packed)
    starts = np.arange(0, packed.size, SCALE_BLOCK // 8)
    personal = np.add.reduceat(bits, starts, dtype=np.int64) if starts.size else starts
    return _sizes(size) - personal


def _sizes(size: int) -> Counts:
    """Elements of every scale block of a range."""
    return np.minimum(SCALE_BLOCK, size - np.arange(0, size, SCALE_BLOCK))


def _shared_bits(mask: Mask, start: int, stop: int) -> npt.NDArray[np.bool_]:
    personal = mask.packed[start // 8 : -(-stop // 8)]
    return np.unpackbits(~personal, count=stop - start, bitorder="little").view(np.bool_)


def _counts_of(mask: Mask | None, start: int, stop: int) -> Counts:
    if mask is None:
        return _sizes(stop - start)
    return scale_counts(mask.packed[start // 8 : -(-stop // 8)], stop - start)


# --- frames ------------------------------------------------------------------------------------


def dense_rank(dim: int) -> npt.NDArray[np.uint64]:
    """The block rank of a mask that shares everything."""
    return np.minimum(np.arange(-(-dim // BLOCK) + 1) * BLOCK, dim).astype(np.uint64)


def pack(codes: Codes, rank: Ranks) -> tuple[npt.NDArray[np.uint32], bytes]:
    """The lengths of all planes, and the frames one behind the other.

    ``codes`` are those of a whole vector, ``rank`` (blocks + 1,) says where each block begins.
    """
    lengths: list[int] = []
    frames: list[bytes] = []
    per_block = BLOCK // SCALE_BLOCK
    for block, (first, last) in enumerate(pairwise(rank)):
        if codes.encoding == "int8" and last > first:
            scales = codes.scales[block * per_block : (block + 1) * per_block]
            frames.append(scales.astype("<f4").tobytes())
        planes = [shrink(plane) for plane in _split(codes.codes[int(first) : int(last)])]
        lengths += map(len, planes)
        frames += planes
    return np.array(lengths, dtype=np.uint32), b"".join(frames)


def _split(codes: CodeVector) -> tuple[ByteVector, ...]:
    """The planes of one block: of bf16 the exponents, then the fractions each with its sign."""
    if codes.dtype == np.int8:
        return (codes.view(np.uint8),)
    turned = (codes << 1) | (codes >> 15)
    return (turned >> 8).astype(np.uint8), turned.astype(np.uint8)


def _join(planes: list[ByteVector]) -> CodeVector:
    if len(planes) == 1:
        return planes[0].view(np.int8)
    turned = (planes[0].astype(np.uint16) << 8) | planes[1]
    return (turned >> 1) | (turned << 15)


def payload_limit(dim: int, encoding: DeltaEncoding) -> int:
    """The most bytes that all frames of a vector can have."""
    scales = 4 * -(-dim // SCALE_BLOCK) if encoding == "int8" else 0
    return PLANES[encoding] * dim + scales


class Frames:
    """Where the frames of one payload lie, and their decoding; all that is read is checked.

    ``rank`` (blocks + 1,) must be true of the mask (check it before), ``lengths`` (planes·blocks,)
    comes from the file. ``size`` is the length of the payload.

    Raises:
        WireError: frames_invalid if the lengths cannot be those of such planes.
    """

    def __init__(
        self, encoding: DeltaEncoding, dim: int, rank: Ranks, lengths: npt.NDArray[np.uint32]
    ) -> None:
        blocks = -(-dim // BLOCK)
        planes = PLANES[encoding]
        if rank.size != blocks + 1 or lengths.size != planes * blocks:
            raise WireError(
                f"{lengths.size} lengths for {blocks} blocks of {planes} planes",
                code="frames_invalid",
            )
        self.encoding = encoding
        self._dim = dim
        self._counts = np.diff(rank.astype(np.int64))
        self._lengths = lengths.astype(np.int64).reshape(blocks, planes)
        plain = self._counts[:, None]
        if (self._counts < 0).any() or ((self._lengths < 1) & (plain > 0)).any():
            raise WireError("a plane has no bytes", code="frames_invalid")
        if (self._lengths > plain).any():
            raise WireError("a plane is longer than its plain form", code="frames_invalid")
        sizes = self._lengths.sum(axis=1) + self._scale_bytes()
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self.size = int(self._starts[-1])

    def _scale_bytes(self) -> Counts:
        per_block = -(-np.minimum(BLOCK, self._dim - self._bounds()) // SCALE_BLOCK)
        wanted = (self._counts > 0) & (self.encoding == "int8")
        return np.where(wanted, 4 * per_block, 0)

    def _bounds(self) -> Counts:
        return np.arange(self._counts.size, dtype=np.int64) * BLOCK

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The bytes [first, last) of the payload that hold the elements [start, stop)."""
        return int(self._starts[start // BLOCK]), int(self._starts[-(-stop // BLOCK)])

    def decode(self, data: bytes | memoryview, start: int, stop: int) -> Codes:
        """The codes of the elements [start, stop); ``data`` are the bytes of their span.

        Raises:
            WireError: frame_invalid, code_invalid or values_not_finite.
        """
        view = memoryview(data)
        first, last = self.span(start, stop)
        if len(view) != last - first:
            raise WireError(f"{len(view)} of {last - first} bytes", code="frame_invalid")
        found = [
            self._block(view[begin - first : end - first], block)
            for block, begin, end in self._frames(start, stop)
        ]
        kind = np.uint16 if self.encoding == "bf16" else np.int8
        return Codes(
            self.encoding,
            np.concatenate([codes for codes, _ in found]) if found else np.empty(0, kind),
            np.concatenate([scales for _, scales in found]) if found else np.empty(0, np.float32),
        )

    def _frames(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            yield block, int(self._starts[block]), int(self._starts[block + 1])

    def _block(self, frame: memoryview, block: int) -> tuple[CodeVector, FloatVector]:
        count = int(self._counts[block])
        scales = np.empty(0, np.float32)
        at = 0
        if self.encoding == "int8":
            number = -(-min(BLOCK, self._dim - block * BLOCK) // SCALE_BLOCK)
            at = 4 * number if count else 0
            scales = _read_scales(frame[:at]) if count else np.zeros(number, np.float32)
        planes = []
        for length in self._lengths[block]:
            planes.append(expand(frame[at : at + int(length)], count))
            at += int(length)
        codes = _join(planes)
        _check_codes(codes)
        return codes, scales


def _read_scales(data: memoryview) -> FloatVector:
    scales = np.frombuffer(data, dtype="<f4")
    if not np.isfinite(scales).all():
        raise WireError("a scale is NaN or infinite", code="values_not_finite")
    if np.signbit(scales).any():
        raise WireError("a scale is negative", code="code_invalid")
    return scales


def _check_codes(codes: CodeVector) -> None:
    if codes.dtype == np.int8:
        if (codes == -LARGEST_CODE - 1).any():
            raise WireError("a code of -128, which is never used", code="code_invalid")
    elif ((codes & 0x7F80) == 0x7F80).any():
        raise WireError("a value is NaN or infinite", code="values_not_finite")


def check_scales(codes: Codes, counts: Counts) -> None:
    """Refuse scales of nothing, and codes that nothing scales: what they say could not be seen.

    Raises:
        WireError: code_invalid.
    """
    if codes.encoding != "int8":
        return
    unused = codes.scales[counts == 0]
    zero = np.repeat(codes.scales == 0, counts)
    if unused.any() or codes.codes[zero].any():
        raise WireError("a scale does not fit its codes", code="code_invalid")
