"""How a mask travels: entropy-coded in chunks, itself or its difference to the one known before.

Owns the bytes of the ``mask`` section of ``fedselect-update/2`` (docs/WIRE.md). Every chunk takes
the form that is shortest: packed bytes, those through DEFLATE, or the gaps between its rarer bits.
Must not know policies or files.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from fedselect.deflate import expand, inflate, shrink
from fedselect.errors import WireError
from fedselect.masks import ByteVector, Mask, packed_size

CHUNK = 2**22  # elements that are coded on their own
PLAIN, DEFLATED, ONES, ZEROS = range(4)
DIFFERENCE = 4  # added to the kind: of the bits that changed
ESCAPE = 255  # a byte of a quotient that goes on in the next one
MOST_LOW_BITS = 22
GAPS_BELOW = 1 / 4  # density of the rarer bit from which gaps cannot be the shortest form
_CHUNK_HEAD = struct.Struct("<BI")  # kind, bytes behind this head
_GAPS_HEAD = struct.Struct("<BII")  # low bits of a gap, gaps, bytes of all quotients

Bits = npt.NDArray[np.bool_]


def encode_mask(mask: Mask, known: Mask | None = None) -> bytes:
    """The mask as it travels; ``known`` is the one the receiver holds, if any."""
    chunks = []
    for first, last, size in _chunks(mask.dim):
        packed = mask.packed[first:last]
        forms = [_shortest(packed, size)]
        if known is not None:
            kind, body = _shortest(packed ^ known.packed[first:last], size)
            forms.append((kind + DIFFERENCE, body))
        kind, body = min(forms, key=lambda form: len(form[1]))
        chunks.append(_CHUNK_HEAD.pack(kind, len(body)) + body)
    return b"".join(chunks)


def decode_mask(dim: int, data: bytes, known: Mask | None = None) -> Mask:
    """Undo :func:`encode_mask`, with every check.

    Raises:
        WireError: mask_coding_invalid, mask_padding, or mask_missing for a difference to a mask
            that is not known.
    """
    packed = np.empty(packed_size(dim), dtype=np.uint8)
    view, at = memoryview(data), 0
    for first, last, size in _chunks(dim):
        if at + _CHUNK_HEAD.size > len(view):
            raise _invalid("it ends too soon")
        kind, length = _CHUNK_HEAD.unpack_from(view, at)
        at += _CHUNK_HEAD.size
        if at + length > len(view):
            raise _invalid("it ends too soon")
        chunk = _decode_chunk(kind & ~DIFFERENCE, view[at : at + length], size)
        if kind & DIFFERENCE:
            if known is None:
                raise WireError("a difference to a mask that is not known", code="mask_missing")
            chunk = chunk ^ known.packed[first:last]
        packed[first:last] = chunk
        at += length
    if at != len(view):
        raise _invalid(f"{len(view) - at} bytes too many")
    if dim % 8 and int(packed[-1]) >> (dim % 8):
        raise WireError(f"bits behind element {dim} must be 0", code="mask_padding")
    return Mask(dim, packed)


def longest(dim: int) -> int:
    """The most bytes that a coded mask can have."""
    return packed_size(dim) + _CHUNK_HEAD.size * -(-dim // CHUNK)


def _chunks(dim: int) -> list[tuple[int, int, int]]:
    """(first byte, behind the last byte, elements) of every chunk."""
    starts = range(0, dim, CHUNK)
    return [(s // 8, -(-min(s + CHUNK, dim) // 8), min(CHUNK, dim - s)) for s in starts]


def _invalid(why: str) -> WireError:
    return WireError(f"the coded mask cannot be read: {why}", code="mask_coding_invalid")


# --- one chunk ---------------------------------------------------------------------------------


def _shortest(packed: ByteVector, size: int) -> tuple[int, bytes]:
    body = shrink(packed)
    kind = PLAIN if len(body) == packed.size else DEFLATED
    ones = int(np.bitwise_count(packed).sum(dtype=np.int64))
    rarer = min(ones, size - ones)
    if rarer < GAPS_BELOW * size:
        which = ONES if rarer == ones else ZEROS
        gaps = _encode_gaps(_bits(packed, size, which))
        if len(gaps) < len(body):
            return which, gaps
    return kind, body


def _bits(packed: ByteVector, size: int, which: int) -> Bits:
    bits = np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
    return ~bits if which == ZEROS else bits


def _encode_gaps(bits: Bits) -> bytes:
    """Each gap's quotient by 2^s as bytes through DEFLATE, its s low bits as they are.

    s is such that quotients are small numbers, whose Huffman codes cost little, while the low bits
    of a random mask have nothing that could be saved.
    """
    gaps = np.diff(np.flatnonzero(bits), prepend=-1) - 1
    typical = int(np.median(gaps)) if gaps.size else 0
    low_bits = max(0, (typical + 1).bit_length() - 2)
    quotients = gaps >> low_bits
    ends = np.cumsum(quotients // ESCAPE + 1) - 1
    spelled = np.full(int(ends[-1]) + 1 if gaps.size else 0, ESCAPE, dtype=np.uint8)
    spelled[ends] = quotients % ESCAPE
    low = (gaps[:, None] >> np.arange(low_bits)) & 1
    head = _GAPS_HEAD.pack(low_bits, gaps.size, spelled.size)
    tail = np.packbits(low.astype(np.uint8), bitorder="little").tobytes()
    return head + shrink(spelled) + tail


def _decode_chunk(kind: int, body: memoryview, size: int) -> ByteVector:
    plain = packed_size(size)
    try:
        if kind == PLAIN and len(body) == plain:
            return np.frombuffer(body, dtype=np.uint8)
        if kind == DEFLATED and len(body) < plain:
            return inflate(body, plain)
        if kind in {ONES, ZEROS} and _GAPS_HEAD.size <= len(body) < plain + _GAPS_HEAD.size:
            bits = np.zeros(size, dtype=np.bool_)
            bits[_decode_gaps(body, size)] = True
            return np.packbits(~bits if kind == ZEROS else bits, bitorder="little")
    except WireError as error:
        raise _invalid(str(error)) from error
    raise _invalid(f"{len(body)} bytes of kind {kind} for {size} elements")


def _decode_gaps(body: memoryview, size: int) -> npt.NDArray[np.int64]:
    """Where the bits are; sizes are judged before anything is made of them."""
    low_bits, count, spelled_size = _GAPS_HEAD.unpack_from(body)
    low_size = packed_size(count * low_bits)
    spelled_end = len(body) - low_size
    most = count + (size >> low_bits) // ESCAPE
    if low_bits > MOST_LOW_BITS or count > size // 2 or not count <= spelled_size <= most:
        raise _invalid(f"{count} gaps of {low_bits} low bits in {spelled_size} bytes")
    if spelled_end < _GAPS_HEAD.size:
        raise _invalid("it ends too soon")
    spelled = expand(body[_GAPS_HEAD.size : spelled_end], spelled_size)
    ends = np.flatnonzero(spelled != ESCAPE)
    if ends.size != count or (spelled.size and spelled[-1] == ESCAPE):
        raise _invalid(f"{ends.size} gaps, {count} were announced")
    escapes = np.diff(ends, prepend=-1) - 1
    quotients = escapes * ESCAPE + spelled[ends]
    tail = np.frombuffer(body[spelled_end:], dtype=np.uint8)
    places = np.cumsum(((quotients << low_bits) | _low(tail, count, low_bits)) + 1) - 1
    if places.size and places[-1] >= size:
        raise _invalid("a bit lies behind its chunk")
    return places


def _low(tail: ByteVector, count: int, low_bits: int) -> npt.NDArray[np.int64]:
    used = count * low_bits
    bits = np.unpackbits(tail, bitorder="little")
    if bits[used:].any():
        raise _invalid("bits behind the last gap must be 0")
    found = np.zeros(count, dtype=np.int64)
    for place in range(low_bits):
        found |= bits[place:used:low_bits].astype(np.int64) << place
    return found
