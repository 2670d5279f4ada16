"""Entropy coding: raw DEFLATE streams (RFC 1951) whose decoded size is known beforehand.

Owns when a piece of bytes is worth coding, and decoding that cannot be made to give more than was
declared. Must not know what the bytes mean.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from fedselect.errors import WireError

ByteVector = npt.NDArray[np.uint8]
SAMPLE = 4096  # bytes that tell whether the rest is worth the time
INCOMPRESSIBLE = 7.85  # bits a byte, measured on a sample; what is left does not pay
LARGE_BLOCKS = 9  # zlib's memory level with the fewest tables of codes
REPETITIVE = 0.6  # share of one byte from which runs of it are frequent


def shrink(data: ByteVector) -> bytes:
    """The shorter of the bytes themselves and a DEFLATE stream of them; (n,) uint8.

    Which of the two it is follows from the length: a stream is always shorter than n.
    """
    plain = data.tobytes()
    if not data.size:
        return plain
    step = max(1, data.size // SAMPLE)
    counts = np.bincount(data[::step], minlength=256)
    share = counts[counts > 0] / counts.sum()
    if -(share * np.log2(share)).sum() > INCOMPRESSIBLE:
        return plain
    coded = deflate(data, runs=bool(share.max() >= REPETITIVE))
    return coded if len(coded) < len(plain) else plain


def deflate(data: ByteVector, *, runs: bool = False) -> bytes:
    """A raw DEFLATE stream: Huffman codes alone, with ``runs`` also repetitions of one byte."""
    strategy = zlib.Z_RLE if runs else zlib.Z_HUFFMAN_ONLY
    stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, LARGE_BLOCKS, strategy)
    return stream.compress(data.tobytes()) + stream.flush()


def expand(data: bytes | memoryview, size: int) -> ByteVector:
    """Undo :func:`shrink`: exactly ``size`` bytes, whatever the stream would give.

    Raises:
        WireError: frame_invalid if ``data`` is longer than ``size``, or as :func:`inflate`.
    """
    if len(data) > size:
        raise WireError(f"{len(data)} bytes for what has {size}", code="frame_invalid")
    if len(data) == size:
        return np.frombuffer(data, dtype=np.uint8)
    return inflate(data, size)


def inflate(data: bytes | memoryview, size: int) -> ByteVector:
    """Decode a raw DEFLATE stream of exactly ``size`` bytes; no more memory than that is used.

    Raises:
        WireError: frame_invalid if it is damaged, gives another size, or does not end exactly
            where ``data`` ends.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than is due: the end of the stream lies behind the last one.
        plain = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise WireError(f"not a DEFLATE stream: {error}", code="frame_invalid") from error
    if len(plain) != size or not stream.eof or stream.unused_data:
        raise WireError(f"not a DEFLATE stream of exactly {size} bytes", code="frame_invalid")
    return np.frombuffer(plain, dtype=np.uint8)
