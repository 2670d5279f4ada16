"""Hostile files by name, each with the code of its refusal, written without the product's help.

Every file is meant for :data:`PLAN` (or for :data:`KNOWN`, where the coordinator has the client's
mask already) and differs from an honest one in what its name says.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fedselect import wire
from fedselect.masks import Mask
from fedselect.space import Kind, ParameterSpace, Role

Json = dict[str, Any]
SPACE = ParameterSpace.of(
    [
        ("body.weight", (66_000,), Kind.WEIGHT, Role.SELECTABLE),  # the second block has begun
        ("body.bias", (7,), Kind.BIAS, Role.SHARED),
        ("norm.running_mean", (4,), Kind.BUFFER, Role.PERSONAL),
    ]
)
DIM = SPACE.dim  # 66,011: five padding bits
FLOOR = np.zeros(DIM, dtype=bool)
FLOOR[66_007:] = True
CEILING = FLOOR.copy()
CEILING[:66_000] = True
PERSONAL = CEILING.copy()
PERSONAL[::66] = False  # 1,001 elements of body.weight stay shared
PERSONAL[66_000:66_007] = False
PERSONAL[66_007:] = True
COUNT = int((~PERSONAL).sum())
SHARED_IN_FIRST = int((~PERSONAL[:65_536]).sum())
VALUES = np.random.default_rng(3).normal(size=COUNT).astype("<f4")
METADATA = {
    "assignment": "0198f5a0-0000-7000-8000-000000000002",
    "base_version": "ab" * 32,
    "encoding": "f32",
    "examples": "120",
    "format": "fedselect-update/1",
    "mask_version": "1",
    "round": "3",
    "run": "0198f5a0-0000-7000-8000-000000000001",
    "space": SPACE.digest,
}
PLAN = wire.UpdatePlan(
    space=SPACE.digest,
    run=METADATA["run"],
    round=3,
    assignment=METADATA["assignment"],
    base_version=METADATA["base_version"],
    lower=Mask.from_bool(FLOOR),
    upper=Mask.from_bool(CEILING),
    max_abs=50,
    max_norm=100,
)
KNOWN = replace(PLAN, known_mask=Mask.from_bool(PERSONAL), known_mask_version=1)
WIDTH = {"U64": 8, "F32": 4, "U8": 1}


def packed(bits: Any) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def ranks(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<u8").tobytes()


def sections(**changes: bytes | None) -> dict[str, bytes]:
    """The payload of an honest file, by section; None leaves one out."""
    honest: dict[str, bytes | None] = {
        "block_rank": ranks(0, SHARED_IN_FIRST, COUNT),
        "values": VALUES.tobytes(),
        "mask": packed(PERSONAL),
    }
    return {name: data for name, data in (honest | changes).items() if data is not None}


def header(parts: dict[str, bytes], **metadata: Any) -> Json:
    found: Json = {"__metadata__": dict(sorted((METADATA | metadata).items()))}
    offset = 0
    for name, data in parts.items():
        dtype = {"block_rank": "U64", "values": "F32"}.get(name, "U8")
        stop = offset + len(data)
        shape = [len(data) // WIDTH[dtype]]
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    return found


def framed(text: Json | bytes, payload: bytes, *, length: int | None = None) -> bytes:
    if not isinstance(text, bytes):
        text = json.dumps(text, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def honest(**changes: bytes | None) -> bytes:
    parts = sections(**changes)
    return framed(header(parts), b"".join(parts.values()))


def says(**metadata: Any) -> bytes:
    parts = sections()
    return framed(header(parts, **metadata), b"".join(parts.values()))


def entry(name: str, **changes: Any) -> bytes:
    """One entry of the header says something else than the payload."""
    parts = sections()
    document = header(parts)
    document[name] |= changes
    return framed(document, b"".join(parts.values()))


def header_text(change: Callable[[bytes], bytes]) -> bytes:
    parts = sections()
    text = json.dumps(header(parts), separators=(",", ":")).encode()
    return framed(change(text), b"".join(parts.values()))


def values(change: Callable[[Any], None]) -> bytes:
    array = VALUES.copy()
    change(array)
    return honest(values=array.tobytes())


def value(bits: int, *, at: int = 500) -> bytes:
    """One value with exactly these bits."""

    def set_bits(array: Any) -> None:
        array.view("<u4")[at] = bits

    return values(set_bits)


def masked(change: Callable[[Any], None], *, follow: bool = True) -> bytes:
    """Another mask, and (if ``follow``) all that follows from it."""
    bits = PERSONAL.copy()
    change(bits)
    if not follow:
        return honest(mask=packed(bits))
    count, first = int((~bits).sum()), int((~bits[:65_536]).sum())
    data = np.zeros(count, dtype="<f4").tobytes()
    return honest(mask=packed(bits), values=data, block_rank=ranks(0, first, count))


def flip(place: int, *, follow: bool = True) -> bytes:
    def change(bits: Any) -> None:
        bits[place] = not bits[place]

    return masked(change, follow=follow)


def padding(bit: int) -> bytes:
    data = bytearray(packed(PERSONAL))
    data[-1] |= 1 << bit
    return honest(mask=bytes(data))


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../etc/passwd", data)
    return buffer.getvalue()


class Exploit:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return (SystemExit, (66,))


GOOD = honest()
(N,) = struct.unpack("<Q", GOOD[:8])
RANK_AT, VALUES_AT = 8 + N, 8 + N + 24
MASK_AT = VALUES_AT + 4 * COUNT
BOMB = bytes(50_000_000)
EXTRA = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


def with_entry(name: str, document: Any = EXTRA) -> bytes:
    parts = sections()
    return framed({**header(parts), name: document}, b"".join(parts.values()))


HOSTILE: dict[str, tuple[str, bytes]] = {
    # the length
    "empty": ("file_truncated", b""),
    "seven bytes": ("file_truncated", GOOD[:7]),
    "length alone": ("file_truncated", GOOD[:8]),
    "length 0": ("header_invalid", bytes(8) + GOOD[8:]),
    "length 1": ("header_invalid", struct.pack("<Q", 1) + GOOD[8:]),
    "length one more than the cap": ("header_oversize", framed(b"{}", b"", length=2**18 + 1)),
    "length 2^63": ("header_oversize", framed(b"{}", b"", length=2**63)),
    "length 2^64 - 1": ("header_oversize", framed(b"{}", b"", length=2**64 - 1)),
    "length in the wrong byte order": ("header_oversize", struct.pack(">Q", N) + GOOD[8:]),
    "length beyond the file": ("file_truncated", framed(b"{}", b"", length=4096)),
    "header ends in its middle": ("file_truncated", GOOD[: 8 + N // 2]),
    # JSON
    "arrays 131,000 deep": ("header_invalid", framed(b"[" * 131_000, b"")),
    "objects 40,000 deep": ("header_invalid", framed(b'{"a":' * 40_000, b"")),
    "balanced arrays 100,000 deep": ("header_invalid", framed(b"[" * 10**5 + b"]" * 10**5, b"")),
    "a number of 200,000 digits": ("header_invalid", framed(b'{"a":' + b"9" * 200_000 + b"}", b"")),
    "an exponent of 10^9": (
        "header_invalid",
        header_text(lambda t: t.replace(b"[0,24]", b"[0,1e999999999]", 1)),
    ),
    "20,000 keys": (
        "header_invalid",
        framed(json.dumps({f"k{i}": 0 for i in range(20_000)}).encode(), b""),
    ),
    "a key of 200,000 letters": ("header_invalid", framed({"a" * 200_000: 0}, b"")),
    "a list": ("header_invalid", framed(b"[1,2,3]", b"")),
    "a byte order mark": ("header_invalid", header_text(lambda t: b"\xef\xbb\xbf" + t)),
    "UTF-16": ("header_invalid", header_text(lambda t: t.decode().encode("utf-16"))),
    "bytes that are not UTF-8": (
        "header_invalid",
        header_text(lambda t: t.replace(b"f32", b"f\xff2")),
    ),
    "NaN in the header": (
        "header_invalid",
        header_text(lambda t: t.replace(b"[0,24]", b"[0,NaN]")),
    ),
    "a comment": ("header_invalid", header_text(lambda t: t.replace(b"{", b"{/*x*/", 1))),
    "a section named twice": (
        "header_invalid",
        header_text(lambda t: t[:-1] + b',"mask":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    ),
    "metadata given twice": (
        "header_invalid",
        header_text(lambda t: t.replace(b"{", b'{"__metadata__":{},', 1)),
    ),
    "a field given twice": (
        "header_invalid",
        header_text(lambda t: t.replace(b'"run":', b'"run":"x","run":', 1)),
    ),
    "a dtype given twice": (
        "header_invalid",
        header_text(lambda t: t.replace(b'"dtype":"U8"', b'"dtype":"F64","dtype":"U8"', 1)),
    ),
    "another order of keys": (
        "header_invalid",
        header_text(lambda t: json.dumps(dict(reversed(json.loads(t).items()))).encode()),
    ),
    "a message in white space": (
        "header_invalid",
        header_text(lambda t: t.replace(b",", b",\t ", 9)),
    ),
    "a message in escapes": (
        "header_invalid",
        header_text(lambda t: t.replace(b"f32", b"f3\\u0032")),
    ),
    "a message in the padding": ("header_invalid", header_text(lambda t: t + b" " * 64)),
    # metadata
    "a field too many": ("header_invalid", says(note="hello")),
    "a field of a megabyte's worth of depth": ("header_invalid", says(run=[[[[]]]])),
    "a field that is a number": ("header_invalid", says(round=3)),
    "a field of 129 letters": ("header_invalid", says(run="x" * 129)),
    "another format": ("format_unknown", says(format="fedselect-update/3")),
    "a format that is a list": ("format_unknown", says(format=["fedselect-update/1"])),
    "another space": ("space_mismatch", says(space="0" * 64)),
    "a lone surrogate": ("space_mismatch", says(space="\ud800\0")),
    "a path as run": ("run_mismatch", says(run="../../../etc/passwd")),
    "another assignment": ("assignment_mismatch", says(assignment="'; DROP TABLE updates; --")),
    "another round": ("round_mismatch", says(round="4")),
    "another base version": ("base_version_mismatch", says(base_version="cd" * 32)),
    "another encoding": ("encoding_unknown", says(encoding="pickle")),
    "10^12 + 1 examples": ("header_invalid", says(examples=str(10**12 + 1))),
    "minus one example": ("header_invalid", says(examples="-1")),
    "examples in Arabic digits": ("header_invalid", says(examples="١٢")),
    "a mask version of the future": ("mask_version_mismatch", says(mask_version="2")),
    # tensors
    "an extra tensor": ("tensor_unexpected", with_entry("theta_personal")),
    "a tensor with a path as its name": ("tensor_unexpected", with_entry("../../mask")),
    "a tensor that looks like mask": ("tensor_unexpected", with_entry("m\u0430sk")),
    "a tensor without a name": ("tensor_unexpected", with_entry("")),
    "a tensor called __proto__": ("tensor_unexpected", with_entry("__proto__")),
    "no values": ("tensor_missing", honest(values=None)),
    "no block_rank": ("tensor_missing", honest(block_rank=None)),
    "no mask at first": ("mask_missing", honest(mask=None)),
    "a mask of BOOL": ("header_invalid", entry("mask", dtype="BOOL", shape=[DIM])),
    "values of F64": ("header_invalid", entry("values", dtype="F64", shape=[COUNT // 2])),
    "values of F16": ("header_invalid", entry("values", dtype="F16", shape=[2 * COUNT])),
    "a dtype of the future": ("header_invalid", entry("values", dtype="F8_E4M3")),
    "a shape of two": ("header_invalid", entry("values", shape=[1, COUNT])),
    "a shape of 10,000 ones": ("header_invalid", entry("values", shape=[1] * 10_000)),
    "a shape of 2^63": ("header_invalid", entry("values", shape=[2**63])),
    "a shape that overflows": ("header_invalid", entry("values", shape=[2**62 + COUNT])),
    "a negative shape": ("header_invalid", entry("values", shape=[-1])),
    "a shape of true": ("header_invalid", entry("values", shape=[True])),
    "a shape of 1.0": ("header_invalid", entry("values", shape=[1.0])),
    "overlapping sections": ("header_invalid", entry("values", data_offsets=[0, 4 * COUNT])),
    "a hole": ("header_invalid", entry("values", data_offsets=[32, 32 + 4 * COUNT])),
    "an offset below 0": ("header_invalid", entry("values", data_offsets=[-8, 4 * COUNT - 8])),
    "offsets the wrong way round": (
        "header_invalid",
        entry("values", data_offsets=[4 * COUNT, 24]),
    ),
    "an offset of 10^30": ("header_invalid", entry("mask", data_offsets=[0, 10**30])),
    # length of the file
    "ends before block_rank": ("file_truncated", GOOD[:RANK_AT]),
    "ends in block_rank": ("file_truncated", GOOD[: RANK_AT + 9]),
    "ends before values": ("file_truncated", GOOD[:VALUES_AT]),
    "ends in a value": ("file_truncated", GOOD[: VALUES_AT + 4 * 77 + 2]),
    "ends before mask": ("file_truncated", GOOD[:MASK_AT]),
    "ends one byte early": ("file_truncated", GOOD[:-1]),
    "one byte behind": ("file_trailing", GOOD + b"\0"),
    "a second file behind": ("file_trailing", GOOD + GOOD),
    "a zip behind": ("file_trailing", GOOD + zipped(b"x" * 1000)),
    # the mask
    "the lowest padding bit": ("mask_padding", padding(3)),
    "the highest padding bit": ("mask_padding", padding(7)),
    "a mask one byte too long": ("mask_size", honest(mask=packed(PERSONAL) + b"\0")),
    "a mask one byte too short": ("mask_size", honest(mask=packed(PERSONAL)[:-1])),
    "an empty mask": ("mask_size", honest(mask=b"")),
    "shares a running mean": ("mask_not_allowed", flip(66_008)),
    "keeps a bias": ("mask_not_allowed", flip(66_003)),
    "everything shared": ("mask_not_allowed", masked(lambda bits: bits.fill(False))),
    "everything personal": ("mask_not_allowed", masked(lambda bits: bits.fill(True))),
    "a bit more personal than values say": ("values_length", flip(66, follow=False)),
    "a bit less personal than values say": ("values_length", flip(67, follow=False)),
    # the rank table
    "a rank table that is off by one": (
        "block_rank_invalid",
        honest(block_rank=ranks(0, SHARED_IN_FIRST + 1, COUNT)),
    ),
    "a rank table that begins at 1": (
        "block_rank_invalid",
        honest(block_rank=ranks(1, SHARED_IN_FIRST, COUNT)),
    ),
    "a rank table that runs backwards": (
        "block_rank_invalid",
        honest(block_rank=ranks(0, COUNT, SHARED_IN_FIRST)),
    ),
    "a rank table of 2^64 - 1": ("block_rank_invalid", honest(block_rank=b"\xff" * 24)),
    "a rank table too short": ("block_rank_invalid", honest(block_rank=ranks(0, COUNT))),
    "a rank table too long": (
        "block_rank_invalid",
        honest(block_rank=ranks(0, SHARED_IN_FIRST, COUNT, COUNT)),
    ),
    "a rank table in the wrong byte order": (
        "block_rank_invalid",
        honest(block_rank=np.array([0, SHARED_IN_FIRST, COUNT], dtype=">u8").tobytes()),
    ),
    # the values
    "one value too many": ("values_length", honest(values=VALUES.tobytes() + bytes(4))),
    "one value too few": ("values_length", honest(values=VALUES[:-1].tobytes())),
    "a personal value smuggled in": (
        "values_length",
        honest(values=VALUES.tobytes() + struct.pack("<f", 0.5)),
    ),
    "no value at all": ("values_length", honest(values=b"")),
    "more values than elements": ("values_length", honest(values=bytes(4 * (DIM + 1)))),
    "quiet NaN": ("values_not_finite", value(0x7FC00000)),
    "signalling NaN": ("values_not_finite", value(0x7F800001)),
    "NaN with a payload": ("values_not_finite", value(0xFFC0BEEF, at=COUNT - 1)),
    "infinity": ("values_not_finite", value(0x7F800000, at=0)),
    "minus infinity": ("values_not_finite", value(0xFF800000)),
    "the largest float": ("value_too_large", value(0x7F7FFFFF)),
    "a value just above the bound": ("value_too_large", value(0x42480001)),
    "all values grown tenfold": ("norm_too_large", values(lambda v: np.multiply(v, 10, out=v))),
    "a norm just above the bound": (
        "norm_too_large",
        values(lambda v: v.fill(100.001 / COUNT**0.5)),
    ),
    # something else altogether
    "zeros": ("header_invalid", bytes(100_000)),
    "a version file": (
        "format_unknown",
        framed(
            {
                "__metadata__": {"format": "fedselect-version/1", "space": SPACE.digest},
                "values": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            bytes(4),
        ),
    ),
    "a pickle": ("header_oversize", pickle.dumps(Exploit(), protocol=5) + bytes(8)),
    "a pickle of protocol 0": ("header_oversize", pickle.dumps(Exploit(), protocol=0)),
    "a zip bomb": ("header_oversize", zipped(BOMB)),
    "a gzip bomb": ("header_oversize", gzip.compress(BOMB)),
    "a gzip of an honest file": ("header_oversize", gzip.compress(GOOD)),
    "a zlib stream": ("header_oversize", zlib.compress(GOOD)),
    "an ELF program": ("header_oversize", b"\x7fELF\x02\x01\x01" + bytes(500)),
    "a script": ("header_oversize", b"#!/bin/sh\nrm -rf /\n"),
    "a numpy array of objects": (
        "header_oversize",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}" + bytes(99),
    ),
    "HTML": ("header_oversize", b"<script>alert(1)</script>"),
}
FOR_KNOWN: dict[str, tuple[str, bytes]] = {  # the coordinator has the mask already
    "the old mask again": ("mask_version_mismatch", GOOD),
    "left out with a new number": (
        "mask_version_mismatch",
        framed(
            header(sections(mask=None), mask_version="2"), b"".join(sections(mask=None).values())
        ),
    ),
    "one value too many for the known mask": (
        "values_length",
        honest(
            mask=None,
            values=VALUES.tobytes() + bytes(4),
            block_rank=ranks(0, SHARED_IN_FIRST, COUNT + 1),
        ),
    ),
    "a rank table of another mask": (
        "block_rank_invalid",
        honest(mask=None, block_rank=ranks(0, SHARED_IN_FIRST - 1, COUNT)),
    ),
}
