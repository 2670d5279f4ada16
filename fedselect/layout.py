"""The head of an update, version or delta file: what it says of itself, and where its sections lie.

Owns the container of docs/WIRE.md: the length, the one spelling of the header, the closed schema of
every format. Must not know what the sections mean (``wire``).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedselect.errors import WireError

UPDATE_FORMAT = "fedselect-update/1"  # trained values in float32
CODED_FORMAT = "fedselect-update/2"  # encoded deltas in frames
VERSION_FORMAT = "fedselect-version/1"
STEP_FORMAT = "fedselect-delta/1"
HEADER_CAP = 256 * 1024
UPDATE_FIELDS = [
    "assignment",
    "base_version",
    "encoding",
    "examples",
    "format",
    "mask_version",
    "round",
    "run",
    "space",
]
CODED_FIELDS = sorted([*UPDATE_FIELDS, "elements"])
VERSION_FIELDS = ["format", "space"]
STEP_FIELDS = ["base", "elements", "encoding", "format", "result", "space"]
_SIZES = {"F32": 4, "U8": 1, "U32": 4, "U64": 8}


@dataclass(frozen=True, slots=True)
class _Schema:
    """What a format has: the keys of its metadata, its sections in order with their dtypes."""

    fields: list[str]
    sections: Mapping[str, str]
    optional: frozenset[str] = frozenset()


# Widest type first, so that every section is aligned; in a delta file the mask comes before what it
# explains, so that a stream can be judged as it passes.
_MASK = frozenset({"mask"})
_UPDATES = {
    UPDATE_FORMAT: _Schema(
        UPDATE_FIELDS, {"block_rank": "U64", "values": "F32", "mask": "U8"}, _MASK
    ),
    CODED_FORMAT: _Schema(
        CODED_FIELDS, {"block_rank": "U64", "lengths": "U32", "mask": "U8", "values": "U8"}, _MASK
    ),
}
_VERSIONS = {VERSION_FORMAT: _Schema(VERSION_FIELDS, {"values": "F32"})}
_STEPS = {STEP_FORMAT: _Schema(STEP_FIELDS, {"lengths": "U32", "values": "U8"})}


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes ``[start, stop)`` of one tensor inside the file, and its number of elements."""

    start: int
    stop: int
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file's metadata and where its sections lie; ``size`` is the length of the whole file."""

    metadata: Mapping[str, str]
    sections: Mapping[str, Section]
    size: int


def encode_head(metadata: Mapping[str, str], sections: Mapping[str, tuple[str, int]]) -> bytes:
    """The bytes before the sections, which are (dtype, elements) by name, in their order."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, (dtype, count) in sections.items():
        stop = offset + count * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_size(first: bytes) -> int:
    """Length of a file's head (the 8 length bytes and the header), from its first 8 bytes.

    Raises:
        WireError: fewer than 8 bytes, or a header beyond 256 KiB.
    """
    if len(first) < 8:
        raise WireError(f"the file has only {len(first)} bytes", code="file_truncated")
    (length,) = struct.unpack("<Q", first[:8])
    if length > HEADER_CAP:
        raise WireError(
            f"the header claims {length} bytes; at most {HEADER_CAP} are read",
            code="header_oversize",
        )
    return 8 + int(length)


def read_update_layout(head: bytes) -> Layout:
    """Parse an update's head, of either format; only ``mask`` may be missing.

    Raises:
        WireError: not exactly the closed schema of docs/WIRE.md.
    """
    return _layout(head, _UPDATES)


def read_version_layout(head: bytes) -> Layout:
    """Parse a version file's head.

    Raises:
        WireError: not exactly the closed schema of docs/WIRE.md.
    """
    return _layout(head, _VERSIONS)


def read_step_layout(head: bytes) -> Layout:
    """Parse a delta file's head.

    Raises:
        WireError: not exactly the closed schema of docs/WIRE.md.
    """
    return _layout(head, _STEPS)


def _layout(head: bytes, schemas: Mapping[str, _Schema]) -> Layout:
    size = header_size(head)
    if len(head) < size:
        raise WireError(
            f"the file ends inside its header ({len(head)} of {size} bytes)", code="file_truncated"
        )
    header = _parse_json(head[8:size])
    metadata, schema = _metadata(header.pop("__metadata__", None), schemas)
    sections = schema.sections
    unexpected = set(header) - set(sections)
    if unexpected:
        raise WireError(f"unexpected tensor {min(unexpected)[:64]!r}", code="tensor_unexpected")
    missing = set(sections) - set(header) - schema.optional
    if missing:
        raise WireError(f"tensor {min(missing)!r} is missing", code="tensor_missing")
    placed: dict[str, Section] = {}
    offset = 0
    for name, dtype in sections.items():
        if name in header:
            placed[name] = _section(name, header[name], dtype=dtype, offset=offset, base=size)
            offset = placed[name].stop - size
    # One content, one file: spaces, escapes or another order of keys could carry a message.
    if head[:size] != encode_head(metadata, {n: (sections[n], s.count) for n, s in placed.items()}):
        raise WireError("the header is not in the form of docs/WIRE.md", code="header_invalid")
    return Layout(metadata, placed, size + offset)


def _parse_json(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) != len(keys):
            raise WireError("the header names a key twice", code="header_invalid")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WireError(
            f"the header is not JSON: {str(error)[:120]}", code="header_invalid"
        ) from error
    if not isinstance(header, dict):
        raise WireError("the header is not a JSON object", code="header_invalid")
    return header


def _metadata(found: Any, schemas: Mapping[str, _Schema]) -> tuple[Mapping[str, str], _Schema]:
    form = found.get("format") if isinstance(found, dict) else None
    if isinstance(found, dict) and "format" in found and str(form) not in schemas:
        raise WireError(
            f"format {str(form)[:64]!r} is not {' or '.join(map(repr, schemas))}",
            code="format_unknown",
        )
    schema = schemas.get(str(form), next(iter(schemas.values())))
    if not isinstance(found, dict) or set(found) != set(schema.fields):
        names = sorted(found) if isinstance(found, dict) else found
        raise WireError(
            f"metadata must be exactly {schema.fields}, got {str(names)[:200]!r}",
            code="header_invalid",
        )
    for name, value in found.items():
        if not isinstance(value, str) or len(value) > 128:
            raise WireError(
                f"metadata {name!r} must be a string of at most 128 characters",
                code="header_invalid",
            )
    return found, schema


def _section(name: str, entry: Any, *, dtype: str, offset: int, base: int) -> Section:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WireError(
            f"tensor {name!r} needs exactly dtype, shape and data_offsets", code="header_invalid"
        )
    if entry["dtype"] != dtype:
        raise WireError(
            f"tensor {name!r} has dtype {str(entry['dtype'])[:16]!r}, not {dtype}",
            code="header_invalid",
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape, 1) or not _naturals(offsets, 2):
        raise WireError(
            f"tensor {name!r} needs a shape of one and offsets of two whole numbers",
            code="header_invalid",
        )
    stop = offset + shape[0] * _SIZES[dtype]
    if offsets != [offset, stop]:
        raise WireError(
            f"tensor {name!r} must lie at {[offset, stop]}, the file says {offsets}",
            code="header_invalid",
        )
    return Section(base + offset, base + stop, shape[0])


def _naturals(value: Any, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(n) is int and 0 <= n < 2**40 for n in value)
    )


def check_size(layout: Layout, size: int) -> None:
    """Refuse a file that is shorter or longer than its header says.

    Raises:
        WireError: file_truncated or file_trailing.
    """
    if size < layout.size:
        raise WireError(f"{size} of {layout.size} bytes", code="file_truncated")
    if size > layout.size:
        raise WireError(f"{size - layout.size} bytes too many", code="file_trailing")
