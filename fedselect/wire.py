"""Update and version files: safetensors with a closed schema (docs/WIRE.md).

Owns every byte of both formats, encoding and strict decoding. A file that could carry a personal
value is refused here. Must not read files, sockets or clocks.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import MaskError, WireError
from fedselect.masks import BLOCK, Mask, packed_size
from fedselect.space import FloatVector

UPDATE_FORMAT = "fedselect-update/1"
VERSION_FORMAT = "fedselect-version/1"
HEADER_CAP = 256 * 1024
MAX_EXAMPLES = 10**12
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
VERSION_FIELDS = ["format", "space"]
_SIZES = {"F32": 4, "U8": 1, "U64": 8}
# Section order on the wire: widest type first, so that every section is aligned.
_UPDATE_SECTIONS = {"block_rank": "U64", "values": "F32", "mask": "U8"}
_VERSION_SECTIONS = {"values": "F32"}


@dataclass(frozen=True, slots=True)
class UpdateMeta:
    """What an update says of itself; all of it is checked against the round's plan.

    ``space`` and ``base_version`` are SHA-256 digests (hex), ``mask_version`` counts the masks this
    client has sent in this arm from 1, ``examples`` is the number of local training examples.
    """

    space: str
    run: str
    round: int
    assignment: str
    base_version: str
    mask_version: int
    examples: int
    encoding: str = "f32"


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


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """What the coordinator expects of one update; anything else is refused.

    ``known_mask`` is the mask the coordinator holds under ``known_mask_version`` (None and 0 before
    the first). ``lower`` and ``upper`` bound the mask: what must and what may be personal.
    """

    space: str
    run: str
    round: int
    assignment: str
    base_version: str
    lower: Mask
    upper: Mask
    known_mask: Mask | None = None
    known_mask_version: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """A decoded, fully checked update: ``values`` of shape (mask.shared,), float32."""

    meta: UpdateMeta
    mask: Mask
    mask_sent: bool
    values: FloatVector


# --- encoding ----------------------------------------------------------------------------------


def encode_update(meta: UpdateMeta, theta: FloatVector, *, mask: Mask, send_mask: bool) -> bytes:
    """Write the shared elements of ``theta`` (shape (D,)), and the mask if it is to be sent.

    Raises:
        WireError: a shared value is not finite (ALGORITHM §1.7, decision 4).
    """
    values = np.ascontiguousarray(theta[~mask.to_bool()], dtype="<f4")
    if not np.isfinite(values).all():
        raise WireError("shared values contain NaN or infinity", code="values_not_finite")
    arrays: dict[str, npt.NDArray[Any]] = {
        "block_rank": mask.block_rank().astype("<u8"),
        "values": values,
    }
    if send_mask:
        arrays["mask"] = mask.packed
    metadata = {name: str(getattr(meta, name)) for name in UPDATE_FIELDS if name != "format"}
    return _encode({"format": UPDATE_FORMAT, **metadata}, arrays)


def encode_version(space_digest: str, values: FloatVector) -> bytes:
    """Write a whole model version: a pure function of the space and the (D,) vector.

    Raises:
        WireError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise WireError("the version contains NaN or infinity", code="values_not_finite")
    return version_head(space_digest, values.size) + values.astype("<f4").tobytes()


def version_head(space_digest: str, dim: int) -> bytes:
    """The bytes of a version file before its values, so that shards can be streamed behind it."""
    return _head({"format": VERSION_FORMAT, "space": space_digest}, {"values": ("F32", dim)})


def _encode(metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    names = {np.dtype("<u8"): "U64", np.dtype("<f4"): "F32", np.dtype("u1"): "U8"}
    head = _head(metadata, {n: (names[a.dtype], a.size) for n, a in arrays.items()})
    return b"".join((head, *(a.tobytes() for a in arrays.values())))


def _head(metadata: Mapping[str, str], sections: Mapping[str, tuple[str, int]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, (dtype, count) in sections.items():
        stop = offset + count * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# --- decoding ----------------------------------------------------------------------------------


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
    """Parse an update's head; ``mask`` is the only section that may be missing.

    Raises:
        WireError: not exactly the closed schema of docs/WIRE.md.
    """
    return _layout(head, UPDATE_FORMAT, UPDATE_FIELDS, _UPDATE_SECTIONS, {"mask"})


def read_version_layout(head: bytes) -> Layout:
    """Parse a version file's head.

    Raises:
        WireError: not exactly the closed schema of docs/WIRE.md.
    """
    return _layout(head, VERSION_FORMAT, VERSION_FIELDS, _VERSION_SECTIONS, set())


def _layout(
    head: bytes, form: str, fields: list[str], sections: Mapping[str, str], optional: set[str]
) -> Layout:
    size = header_size(head)
    if len(head) < size:
        raise WireError(
            f"the file ends inside its header ({len(head)} of {size} bytes)", code="file_truncated"
        )
    header = _parse_json(head[8:size])
    metadata = _metadata(header.pop("__metadata__", None), form, fields)
    unexpected = set(header) - set(sections)
    if unexpected:
        raise WireError(f"unexpected tensor {min(unexpected)[:64]!r}", code="tensor_unexpected")
    missing = set(sections) - set(header) - optional
    if missing:
        raise WireError(f"tensor {min(missing)!r} is missing", code="tensor_missing")
    placed: dict[str, Section] = {}
    offset = 0
    for name, dtype in sections.items():
        if name in header:
            placed[name] = _section(name, header[name], dtype=dtype, offset=offset, base=size)
            offset = placed[name].stop - size
    # One content, one file: spaces, escapes or another order of keys could carry a message.
    if head[:size] != _head(metadata, {n: (sections[n], s.count) for n, s in placed.items()}):
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


def _metadata(found: Any, form: str, fields: list[str]) -> Mapping[str, str]:
    if isinstance(found, dict) and "format" in found and found["format"] != form:
        raise WireError(
            f"format {str(found['format'])[:64]!r} is not {form!r}", code="format_unknown"
        )
    if not isinstance(found, dict) or set(found) != set(fields):
        names = sorted(found) if isinstance(found, dict) else found
        raise WireError(
            f"metadata must be exactly {fields}, got {str(names)[:200]!r}", code="header_invalid"
        )
    for name, value in found.items():
        if not isinstance(value, str) or len(value) > 128:
            raise WireError(
                f"metadata {name!r} must be a string of at most 128 characters",
                code="header_invalid",
            )
    return found


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


# --- checking an update against its plan -------------------------------------------------------


def check_update_head(layout: Layout, plan: UpdatePlan) -> UpdateMeta:
    """Compare what the file says of itself with what was asked for; no payload is needed.

    Raises:
        WireError: with the code of the first thing that differs.
    """
    meta = _update_meta(layout.metadata)
    expected = (
        ("space", plan.space, "space_mismatch"),
        ("run", plan.run, "run_mismatch"),
        ("round", plan.round, "round_mismatch"),
        ("assignment", plan.assignment, "assignment_mismatch"),
        ("base_version", plan.base_version, "base_version_mismatch"),
        ("encoding", "f32", "encoding_unknown"),
    )
    for name, wanted, code in expected:
        if getattr(meta, name) != wanted:
            raise WireError(
                f"{name} is {getattr(meta, name)!r}, this assignment needs {wanted!r}", code=code
            )
    _check_sections(layout, plan, meta)
    return meta


def _update_meta(metadata: Mapping[str, str]) -> UpdateMeta:
    numbers = {}
    for name, most in (("round", 2**31), ("mask_version", 2**31), ("examples", MAX_EXAMPLES)):
        text = metadata[name]
        digits = text.isascii() and text.isdigit() and len(text) < 16
        if not digits or int(text) > most or str(int(text)) != text:
            raise WireError(
                f"metadata {name!r} must be a whole number up to {most}, got {text[:40]!r}",
                code="header_invalid",
            )
        numbers[name] = int(text)
    if numbers["examples"] < 1:
        raise WireError("an update must come from at least 1 example", code="header_invalid")
    rest = {k: v for k, v in metadata.items() if k not in numbers and k != "format"}
    return UpdateMeta(**numbers, **rest)  # type: ignore[arg-type]  # keys checked by _metadata


def _check_sections(layout: Layout, plan: UpdatePlan, meta: UpdateMeta) -> None:
    dim = plan.lower.dim
    sent = "mask" in layout.sections
    if sent and layout.sections["mask"].count != packed_size(dim):
        raise WireError(
            f"the mask has {layout.sections['mask'].count} bytes, {dim} elements need "
            f"{packed_size(dim)}",
            code="mask_size",
        )
    if not sent and plan.known_mask is None:
        raise WireError("the first update of a client must carry its mask", code="mask_missing")
    version = plan.known_mask_version + sent
    if meta.mask_version != version:
        raise WireError(
            f"mask_version is {meta.mask_version}, expected {version} for a mask that was "
            f"{'sent' if sent else 'left out'}",
            code="mask_version_mismatch",
        )
    blocks = -(-dim // BLOCK) + 1
    if layout.sections["block_rank"].count != blocks:
        raise WireError(
            f"block_rank has {layout.sections['block_rank'].count} entries, not {blocks}",
            code="block_rank_invalid",
        )
    if layout.sections["values"].count > dim:
        raise WireError("more values than the model has elements", code="values_length")


def check_update_mask(layout: Layout, plan: UpdatePlan, *, sent: bytes | None) -> Mask:
    """The mask this update counts under, checked against the policy's bounds and the length.

    ``sent`` are the bytes of the mask section, None when it was left out.

    Raises:
        WireError: padding bits, a mask the policy does not allow, or ``len(values)`` other than
            the number of shared bits: such a file could carry a personal value.
    """
    dim = plan.lower.dim
    try:
        mask = plan.known_mask if sent is None else Mask.from_bytes(dim, sent)
    except MaskError as error:
        raise WireError(str(error), code=error.code) from error
    if mask is None:
        raise WireError("the first update of a client must carry its mask", code="mask_missing")
    if not plan.lower <= mask:
        raise WireError(
            f"{(plan.lower - mask).personal} elements that must stay personal are marked shared",
            code="mask_not_allowed",
        )
    if not mask <= plan.upper:
        raise WireError(
            f"{(mask - plan.upper).personal} elements are personal that the policy keeps shared",
            code="mask_not_allowed",
        )
    if layout.sections["values"].count != mask.shared:
        raise WireError(
            f"{layout.sections['values'].count} values for {mask.shared} shared elements",
            code="values_length",
        )
    return mask


def check_block_rank(data: bytes, mask: Mask) -> None:
    """Refuse a rank table that does not follow from the mask.

    Raises:
        WireError: block_rank_invalid.
    """
    if data != mask.block_rank().astype("<u8").tobytes():
        raise WireError("block_rank does not follow from the mask", code="block_rank_invalid")


def check_finite(values: FloatVector) -> None:
    """Refuse NaN and infinity.

    Raises:
        WireError: values_not_finite, with the first bad position.
    """
    finite = np.isfinite(values)
    if not finite.all():
        raise WireError(
            f"value {int(np.argmin(finite))} of the block is not finite", code="values_not_finite"
        )


def decode_update(data: bytes, plan: UpdatePlan) -> Update:
    """Decode a whole update held in memory, with every check.

    Raises:
        WireError: with the code of the first thing that is wrong.
    """
    layout = read_update_layout(data[: header_size(data)])
    check_size(layout, len(data))
    meta = check_update_head(layout, plan)
    sent = _bytes(data, layout, "mask") if "mask" in layout.sections else None
    mask = check_update_mask(layout, plan, sent=sent)
    check_block_rank(_bytes(data, layout, "block_rank"), mask)
    values = np.frombuffer(_bytes(data, layout, "values"), dtype="<f4")
    check_finite(values)
    return Update(meta, mask, sent is not None, values)


def update_values(data: bytes) -> FloatVector:
    """The compact values of an update that was verified before, shape (mask.shared,).

    Raises:
        WireError: not an update file.
    """
    layout = read_update_layout(data[: header_size(data)])
    check_size(layout, len(data))
    return np.frombuffer(_bytes(data, layout, "values"), dtype="<f4")


def decode_version(data: bytes, *, space_digest: str, dim: int) -> FloatVector:
    """Decode a version file to its (D,) vector.

    Raises:
        WireError: another space, another length, or a value that is not finite.
    """
    layout = read_version_layout(data[: header_size(data)])
    check_version_head(layout, space_digest=space_digest, dim=dim)
    check_size(layout, len(data))
    values = np.frombuffer(_bytes(data, layout, "values"), dtype="<f4")
    check_finite(values)
    return values


def check_version_head(layout: Layout, *, space_digest: str, dim: int) -> None:
    """Compare a version file's head with the space it must belong to.

    Raises:
        WireError: space_mismatch or values_length.
    """
    if layout.metadata["space"] != space_digest:
        raise WireError(
            f"the file belongs to space {layout.metadata['space'][:12]!r}…, not "
            f"{space_digest[:12]!r}…",
            code="space_mismatch",
        )
    if layout.sections["values"].count != dim:
        raise WireError(
            f"{layout.sections['values'].count} values for a space of {dim} elements",
            code="values_length",
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


def file_digest(data: bytes) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(data).hexdigest()


def _bytes(data: bytes, layout: Layout, name: str) -> bytes:
    section = layout.sections[name]
    return data[section.start : section.stop]
