"""Hostile delta files (``fedselect-update/2``) by name, written without the product's help.

Like ``corpus``, whose space and mask they use: every file is meant for :data:`PLAN` (int8), or for
:data:`KNOWN` or :data:`WIDE` (bf16) where its table says so, and differs from an honest one in what
its name says.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np

from fedselect.masks import Mask

from . import corpus
from .corpus import COUNT, DIM, METADATA, PERSONAL, SHARED_IN_FIRST, Json, framed, packed, ranks

PLAN = replace(corpus.PLAN, encoding="int8", max_abs=50, max_norm=100)
KNOWN = replace(PLAN, known_mask=Mask.from_bool(PERSONAL), known_mask_version=1)
WIDE = replace(PLAN, encoding="bf16")
ORDER = {"block_rank": 8, "lengths": 4, "mask": 1, "values": 1}  # bytes of an element
TYPES = {8: "U64", 4: "U32", 1: "U8"}
FIRST, SECOND = SHARED_IN_FIRST, COUNT - SHARED_IN_FIRST
RNG = np.random.default_rng(5)
CODES = RNG.integers(-127, 128, COUNT).astype(np.int8)
SCALES = np.full(17, 0.0078125, dtype="<f4")  # 16 in the first block, 1 in the second
BFLOATS = (RNG.normal(size=COUNT).astype("<f4").view("<u4") >> 16).astype("<u2")
BITMAP = packed(PERSONAL)
BOMB = bytes(50_000_000)


def stream(data: bytes, level: int = 9) -> bytes:
    """A raw DEFLATE stream; level 0 stores."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def chunk(kind: int, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<BI", kind, len(body) if length is None else length) + body


def gaps(kind: int, low_bits: int, count: int, spelled: int, rest: bytes) -> bytes:
    return chunk(kind, struct.pack("<BII", low_bits, count, spelled) + rest)


def table(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<u4").tobytes()


def frames(codes: Any = CODES, scales: Any = SCALES) -> bytes:
    """Both frames of int8, plain."""
    data = codes.tobytes()
    parts = (scales[:16].tobytes(), data[:FIRST], scales[16:].tobytes(), data[FIRST:])
    return b"".join(parts)


def turned(codes: Any = BFLOATS) -> bytes:
    """Both frames of bf16, plain."""
    both = (codes << 1) | (codes >> 15)
    high, low = (both >> 8).astype(np.uint8).tobytes(), both.astype(np.uint8).tobytes()
    return b"".join(part[s] for s in (slice(FIRST), slice(FIRST, None)) for part in (high, low))


def honest(metadata: Json | None = None, **changes: bytes | None) -> bytes:
    parts: dict[str, bytes | None] = {
        "block_rank": ranks(0, FIRST, COUNT),
        "lengths": table(FIRST, SECOND),
        "mask": chunk(0, BITMAP),
        "values": frames(),
    }
    given = {name: data for name, data in (parts | changes).items() if data is not None}
    told = METADATA | {"encoding": "int8", "format": "fedselect-update/2", "elements": str(DIM)}
    document: Json = {"__metadata__": dict(sorted((told | (metadata or {})).items()))}
    offset = 0
    for name, data in given.items():
        width = ORDER.get(name, 1)
        entry = {"dtype": TYPES[width], "shape": [len(data) // width]}
        document[name] = entry | {"data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return framed(document, b"".join(given.values()))


def wide(**changes: bytes | None) -> bytes:
    lengths = table(FIRST, FIRST, SECOND, SECOND)
    return honest({"encoding": "bf16"}, **{"lengths": lengths, "values": turned(), **changes})


def plane(data: bytes) -> bytes:
    """The first plane is these bytes, and its length says so."""
    rest = frames()[64 + FIRST :]
    return honest(lengths=table(len(data), SECOND), values=SCALES[:16].tobytes() + data + rest)


def scaled(at: int, scale: float) -> bytes:
    scales = SCALES.copy()
    scales[at] = scale
    return honest(values=frames(scales=scales))


def coded(at: int, code: int) -> bytes:
    codes = CODES.copy()
    codes[at] = code
    return honest(values=frames(codes))


def bfloat(at: int, bits: int) -> bytes:
    codes = BFLOATS.copy()
    codes[at] = bits
    return wide(values=turned(codes))


def masked(data: bytes) -> bytes:
    return honest(mask=data)


def changed_mask(place: int) -> bytes:
    """Another mask of as many shared elements, with a rank table and frames that follow."""
    bits = PERSONAL.copy()
    bits[place] = not bits[place]
    shared = ~bits
    first, count = int(shared[:65_536].sum()), int(shared.sum())
    data = bytes(count)
    values = b"".join((bytes(64), data[:first], bytes(4), data[first:]))
    return honest(
        mask=chunk(0, packed(bits)),
        block_rank=ranks(0, first, count),
        lengths=table(first, count - first),
        values=values,
    )


def unused_scale() -> bytes:
    """A scale block that shares nothing says something all the same."""
    bits = PERSONAL.copy()
    bits[:4096] = True
    shared = ~bits
    first, count = int(shared[:65_536].sum()), int(shared.sum())
    codes = np.ones(count, dtype=np.int8).tobytes()
    values = b"".join((SCALES[:16].tobytes(), codes[:first], SCALES[16:].tobytes(), codes[first:]))
    return honest(
        mask=chunk(0, packed(bits)),
        block_rank=ranks(0, first, count),
        lengths=table(first, count - first),
        values=values,
    )


GOOD = honest()
GOOD_WIDE = wide()
WITHOUT_MASK = honest(mask=None)
STREAMED = honest(  # the same file with every piece through DEFLATE
    mask=chunk(1, stream(BITMAP)),
    values=SCALES[:16].tobytes()
    + stream(bytes(FIRST))
    + SCALES[16:].tobytes()
    + stream(bytes(SECOND)),
    lengths=table(len(stream(bytes(FIRST))), len(stream(bytes(SECOND)))),
)
PLAIN_FIRST = CODES[:FIRST].tobytes()
EVEN = bytes(FIRST)  # a plane of zeros, whose streams are short
(N,) = struct.unpack("<Q", GOOD[:8])
PADDED = bytearray(BITMAP)
PADDED[-1] |= 0x80

HOSTILE: dict[str, tuple[str, bytes]] = {
    # what it says it is
    "the format of values": ("encoding_unknown", corpus.GOOD),
    "another encoding": ("encoding_unknown", GOOD_WIDE),
    "an encoding that nobody knows": ("encoding_unknown", honest({"encoding": "int4"})),
    "f32 in the format of deltas": ("encoding_unknown", honest({"encoding": "f32"})),
    "one element less": ("space_mismatch", honest({"elements": str(DIM - 1)})),
    "2^33 elements": ("space_mismatch", honest({"elements": str(2**33)})),
    "more elements than there can be": ("header_invalid", honest({"elements": str(2**34)})),
    "elements that are no number": ("header_invalid", honest({"elements": "66,011"})),
    "no elements": ("header_invalid", honest({"elements": "-1"})),
    "a section of scales": ("tensor_unexpected", honest(scales=bytes(68))),
    "no lengths": ("tensor_missing", honest(lengths=None)),
    "lengths of 64 bits": (
        "header_invalid",
        framed(
            json.dumps(json.loads(GOOD[8 : 8 + N]), separators=(",", ":"))
            .replace('"U32"', '"U64"')
            .encode(),
            GOOD[8 + N :],
        ),
    ),
    # the table of frames
    "lengths of one block": ("frames_invalid", honest(lengths=table(FIRST))),
    "lengths of three blocks": ("frames_invalid", honest(lengths=table(FIRST, SECOND, 0))),
    "lengths of two planes each": ("frames_invalid", honest(lengths=table(*[FIRST] * 4))),
    "no lengths at all": ("frames_invalid", honest(lengths=b"")),
    "a plane of no bytes": ("frames_invalid", honest(lengths=table(0, SECOND))),
    "a plane longer than plain": ("frames_invalid", honest(lengths=table(FIRST + 1, SECOND))),
    "a plane of 2^32 - 1 bytes": ("frames_invalid", honest(lengths=table(2**32 - 1, SECOND))),
    "lengths in the wrong byte order": (
        "frames_invalid",
        honest(lengths=np.array([FIRST, SECOND], dtype=">u4").tobytes()),
    ),
    "frames that overlap": ("values_length", honest(lengths=table(FIRST - 1, SECOND))),
    "a frame too many": ("values_length", honest(values=frames() + frames())),
    "a code too many": ("values_length", honest(values=frames() + b"\0")),
    "a code too few": ("values_length", honest(values=frames()[:-1])),
    "no frames": ("values_length", honest(values=b"")),
    "frames without scales": ("values_length", honest(values=CODES.tobytes())),
    "more bytes than a whole model": ("values_length", honest(values=bytes(DIM + 4 * 17 + 1))),
    "a rank table of another mask": ("block_rank_invalid", honest(block_rank=ranks(0, 9, COUNT))),
    "a rank table of 2^64 - 1": ("block_rank_invalid", honest(block_rank=b"\xff" * 24)),
    # the streams
    "a bomb": ("frame_invalid", plane(stream(BOMB)[: FIRST - 1])),
    "a bomb that fits": ("frame_invalid", plane(stream(bytes(500_000)))),
    "a stream of one code less": ("frame_invalid", plane(stream(EVEN[:-1]))),
    "a stream of one code more": ("frame_invalid", plane(stream(EVEN + b"\0"))),
    "a stream that does not end": ("frame_invalid", plane(stream(EVEN)[:-1])),
    "a byte behind the stream": ("frame_invalid", plane(stream(EVEN) + b"\0")),
    "two streams": ("frame_invalid", plane(stream(EVEN) + stream(EVEN))),
    "a stream with the header of zlib": ("frame_invalid", plane(zlib.compress(EVEN))),
    "plain codes cut short": ("frame_invalid", plane(PLAIN_FIRST[:-1])),
    "a reserved kind of block": ("frame_invalid", plane(b"\x07")),
    "a distance before the beginning": ("frame_invalid", plane(b"\x4b\x04\x12\x00")),
    "empty blocks without end": ("frame_invalid", plane((b"\0\0\0\xff\xff" * 300)[: FIRST - 1])),
    # codes and scales
    "a code of -128": ("code_invalid", coded(0, -128)),
    "the last code is -128": ("code_invalid", coded(-1, -128)),
    "a scale of NaN": ("values_not_finite", scaled(0, np.nan)),
    "an infinite scale": ("values_not_finite", scaled(16, np.inf)),
    "a negative scale": ("code_invalid", scaled(3, -0.5)),
    "a scale of -0": ("code_invalid", scaled(3, -0.0)),
    "codes that nothing scales": ("code_invalid", scaled(5, 0.0)),
    "a scale of nothing": ("code_invalid", unused_scale()),
    "the largest scale": ("value_too_large", scaled(7, 3.4e38)),
    "a delta just above the bound": ("value_too_large", scaled(7, 0.5)),
    "all deltas grown tenfold": ("norm_too_large", honest(values=frames(scales=SCALES * 10))),
    # the mask
    "no mask": ("mask_missing", WITHOUT_MASK),
    "an empty mask": ("mask_coding_invalid", masked(b"")),
    "a mask that is not coded": ("mask_coding_invalid", masked(BITMAP[:2000])),
    "a difference to nothing": ("mask_missing", masked(chunk(4, BITMAP))),
    "a mask longer than any": ("mask_size", masked(chunk(0, BITMAP) + b"\0")),
    "a mask too short": ("mask_coding_invalid", masked(chunk(0, BITMAP[:-1]))),
    "a chunk that says too much": (
        "mask_coding_invalid",
        masked(chunk(0, BITMAP, len(BITMAP) + 1)),
    ),
    "a chunk of 2^32 - 1 bytes": ("mask_coding_invalid", masked(chunk(0, BITMAP, 2**32 - 1))),
    "half a chunk's head": ("mask_coding_invalid", masked(b"\0\0\0")),
    "two chunks": ("mask_coding_invalid", masked(chunk(1, stream(BITMAP)) * 2)),
    "a chunk of an unknown kind": ("mask_coding_invalid", masked(chunk(8, BITMAP))),
    "a chunk of kind 255": ("mask_coding_invalid", masked(chunk(255, BITMAP))),
    "a bomb for a mask": ("mask_coding_invalid", masked(chunk(1, stream(BOMB)[:8000]))),
    "a mask that inflates too far": ("mask_coding_invalid", masked(chunk(1, stream(bytes(9000))))),
    "gaps of 2^32 - 1 bits": ("mask_coding_invalid", masked(gaps(2, 0, 2**32 - 1, 2**32 - 1, b""))),
    "gaps that are too wide": ("mask_coding_invalid", masked(gaps(2, 22, 1, 1, b"\x10\0\0\0"))),
    "gaps of 255 low bits": ("mask_coding_invalid", masked(gaps(2, 255, 1, 1, bytes(33)))),
    "gaps without bytes": ("mask_coding_invalid", masked(gaps(3, 0, 1, 1, b""))),
    "gaps beyond the chunk": ("mask_coding_invalid", masked(gaps(2, 10, 1, 1, b"\xfe\0\0"))),
    "a gap that never ends": ("mask_coding_invalid", masked(gaps(2, 0, 1, 200, b"\xff" * 200))),
    "bits behind the gaps": ("mask_coding_invalid", masked(gaps(3, 1, 1, 1, b"\0\xfe"))),
    "a bomb for gaps": ("mask_coding_invalid", masked(gaps(2, 0, 9, 9, stream(BOMB)[:8]))),
    "padding bits": ("mask_padding", masked(chunk(0, bytes(PADDED)))),
    "shares a running mean": ("mask_not_allowed", changed_mask(66_008)),
    "keeps a bias": ("mask_not_allowed", changed_mask(66_003)),
    "a mask of more than the values": (
        "block_rank_invalid",
        masked(chunk(0, b"\0" + BITMAP[1:])),
    ),
}
FOR_KNOWN: dict[str, tuple[str, bytes]] = {  # the coordinator has the mask already
    "the old mask again": ("mask_version_mismatch", GOOD),
    "a difference under the old number": ("mask_version_mismatch", masked(chunk(4, BITMAP))),
    "a difference that shares everything": (
        "mask_not_allowed",
        honest({"mask_version": "2"}, mask=chunk(4, BITMAP)),
    ),
    "a difference with padding bits": (
        "mask_padding",
        honest({"mask_version": "2"}, mask=chunk(4, bytes(len(BITMAP) - 1) + b"\x80")),
    ),
    "a code too many for the known mask": (
        "block_rank_invalid",
        honest(mask=None, block_rank=ranks(0, FIRST, COUNT + 1), values=frames() + b"\0"),
    ),
}
FOR_WIDE: dict[str, tuple[str, bytes]] = {
    "int8 where bf16 was agreed": ("encoding_unknown", GOOD),
    "one plane a block": ("frames_invalid", wide(lengths=table(FIRST, SECOND))),
    "a quiet NaN": ("values_not_finite", bfloat(3, 0x7FC0)),
    "a signalling NaN": ("values_not_finite", bfloat(3, 0x7F81)),
    "minus infinity": ("values_not_finite", bfloat(COUNT - 1, 0xFF80)),
    "the largest bfloat": ("value_too_large", bfloat(0, 0x7F7F)),
    "planes of 32 bits": ("values_length", wide(values=bytes(4 * COUNT))),
}
CASES = [  # name, plan, code, file
    (name, plan, *case)
    for plan, cases in ((PLAN, HOSTILE), (KNOWN, FOR_KNOWN), (WIDE, FOR_WIDE))
    for name, case in cases.items()
]
