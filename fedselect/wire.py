"""Update and version files: safetensors with a closed schema (docs/WIRE.md).

Owns the writing and the strict decoding of whole files. Their heads are in ``layout``, what they
must say in ``checks``, the coding of deltas and masks in ``deltas`` and ``maskcoding``;
``inspection`` makes the same checks on a stream. A file that could carry a personal value is
refused here. Must not read files, sockets or clocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.checks import (
    MAX_EXAMPLES,
    UpdateMeta,
    UpdatePlan,
    ValueCheck,
    check_block_rank,
    check_finite,
    check_frames,
    check_update_head,
    check_update_mask,
    check_version_head,
    elements_of,
)
from fedselect.deltas import (
    SCALE_BLOCK,
    Codes,
    check_scales,
    delta_encoding,
    pack,
    scale_counts,
)
from fedselect.errors import WireError
from fedselect.layout import (
    CODED_FORMAT,
    HEADER_CAP,
    UPDATE_FIELDS,
    UPDATE_FORMAT,
    VERSION_FIELDS,
    VERSION_FORMAT,
    Layout,
    Section,
    check_size,
    encode_head,
    header_size,
    read_update_layout,
    read_version_layout,
)
from fedselect.maskcoding import encode_mask
from fedselect.masks import BLOCK, Mask
from fedselect.space import FloatValues, FloatVector

__all__ = [
    "CODED_FORMAT",
    "HEADER_CAP",
    "MAX_EXAMPLES",
    "UPDATE_FIELDS",
    "UPDATE_FORMAT",
    "VERSION_FIELDS",
    "VERSION_FORMAT",
    "Layout",
    "Section",
    "Update",
    "UpdateMeta",
    "UpdatePlan",
    "ValueCheck",
    "check_block_rank",
    "check_finite",
    "check_frames",
    "check_size",
    "check_update_head",
    "check_update_mask",
    "check_version_head",
    "decode_update",
    "decode_version",
    "elements_of",
    "encode_delta",
    "encode_update",
    "encode_version",
    "file_digest",
    "header_size",
    "read_update_layout",
    "read_version_layout",
    "update_values",
    "version_head",
]


@dataclass(frozen=True, slots=True)
class Update:
    """A decoded, fully checked update.

    ``values`` (mask.shared,) are the trained values, float32, or the decoded deltas, float64 and
    exact; ``codes`` are what the latter were decoded from.
    """

    meta: UpdateMeta
    mask: Mask
    mask_sent: bool
    values: FloatValues
    codes: Codes | None = None


# --- encoding ----------------------------------------------------------------------------------


def encode_update(meta: UpdateMeta, theta: FloatVector, *, mask: Mask, send_mask: bool) -> bytes:
    """Write the shared elements of ``theta`` (shape (D,)), and the mask if it is to be sent.

    Raises:
        WireError: a shared value is not finite (ALGORITHM §1.7, decision 4).
    """
    shared = np.compress(~mask.to_bool(), theta) if mask.personal else theta
    values = np.ascontiguousarray(shared, dtype="<f4")
    if not np.isfinite(values).all():
        raise WireError("shared values contain NaN or infinity", code="values_not_finite")
    arrays: dict[str, npt.NDArray[Any]] = {
        "block_rank": mask.block_rank().astype("<u8"),
        "values": values,
    }
    if send_mask:
        arrays["mask"] = mask.packed
    return _encode(_metadata(UPDATE_FORMAT, meta), arrays)


def encode_delta(
    meta: UpdateMeta, codes: Codes, *, mask: Mask, send_mask: bool, known: Mask | None = None
) -> bytes:
    """Write quantised deltas of the shared elements, and the mask if it is to be sent.

    ``codes`` are what ``deltas.quantise`` makes of a (D,) delta, in ``meta.encoding``, with this
    mask. The mask goes as its difference to ``known``, which the receiver holds, where shorter.
    """
    if codes.encoding != meta.encoding:
        raise ValueError(f"codes of {codes.encoding} are not {meta.encoding}")
    rank = mask.block_rank()
    lengths, payload = pack(codes, rank)
    arrays: dict[str, npt.NDArray[Any]] = {
        "block_rank": rank.astype("<u8"),
        "lengths": lengths.astype("<u4"),
    }
    if send_mask:
        arrays["mask"] = np.frombuffer(encode_mask(mask, known), dtype=np.uint8)
    arrays["values"] = np.frombuffer(payload, dtype=np.uint8)
    metadata = {"elements": str(mask.dim), **_metadata(CODED_FORMAT, meta)}
    return _encode(metadata, arrays)


def _metadata(form: str, meta: UpdateMeta) -> dict[str, str]:
    metadata = {name: str(getattr(meta, name)) for name in UPDATE_FIELDS if name != "format"}
    return {"format": form, **metadata}


def encode_version(space_digest: str, values: FloatVector) -> bytes:
    """Write a whole model version: a pure function of the space and the (D,) vector.

    Raises:
        WireError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise WireError("the version contains NaN or infinity", code="values_not_finite")
    plain = np.ascontiguousarray(values, dtype="<f4")
    return b"".join((version_head(space_digest, values.size), plain.data))


def version_head(space_digest: str, dim: int) -> bytes:
    """The bytes of a version file before its values, so that shards can be streamed behind it."""
    return encode_head({"format": VERSION_FORMAT, "space": space_digest}, {"values": ("F32", dim)})


def _encode(metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    dtypes = {"U64": "<u8", "U32": "<u4", "F32": "<f4", "U8": "u1"}
    names = {np.dtype(code): name for name, code in dtypes.items()}
    head = encode_head(metadata, {n: (names[a.dtype], a.size) for n, a in arrays.items()})
    return b"".join((head, *(np.ascontiguousarray(a).data for a in arrays.values())))


# --- decoding ----------------------------------------------------------------------------------


def decode_update(data: bytes, plan: UpdatePlan) -> Update:
    """Decode a whole update held in memory, with every check.

    Raises:
        WireError: with the code of the first thing that is wrong.
    """
    layout = read_update_layout(data[: header_size(data)])
    check_size(layout, len(data))
    meta = check_update_head(layout, plan)
    sent = bytes(_bytes(data, layout, "mask")) if "mask" in layout.sections else None
    mask = check_update_mask(layout, plan, sent=sent)
    check_block_rank(_bytes(data, layout, "block_rank"), mask)
    check = ValueCheck(max_abs=plan.max_abs, max_norm=plan.max_norm)
    if layout.metadata["format"] == CODED_FORMAT:
        codes = _decode_frames(data, layout, mask, check)
        check.finish()
        values = codes.values(scale_counts(mask.packed, mask.dim))
        return Update(meta, mask, sent is not None, values, codes)
    plain = np.frombuffer(_bytes(data, layout, "values"), dtype="<f4")
    for start in range(0, plain.size, BLOCK):
        check.add(plain[start : start + BLOCK])
    check.finish()
    return Update(meta, mask, sent is not None, plain)


def _decode_frames(data: bytes, layout: Layout, mask: Mask, check: ValueCheck) -> Codes:
    encoding = delta_encoding(layout.metadata["encoding"])
    lengths = bytes(_bytes(data, layout, "lengths"))
    frames = check_frames(layout, mask, encoding, lengths)
    payload = _bytes(data, layout, "values")
    counts = scale_counts(mask.packed, mask.dim)
    found = []
    for start in range(0, mask.dim, BLOCK):
        stop = min(start + BLOCK, mask.dim)
        first, last = frames.span(start, stop)
        codes = frames.decode(payload[first:last], start, stop)
        own = counts[start // SCALE_BLOCK : -(-stop // SCALE_BLOCK)]
        check_scales(codes, own)
        check.add(codes.values(own))
        found.append(codes)
    return Codes(
        encoding,
        np.concatenate([codes.codes for codes in found]),
        np.concatenate([codes.scales for codes in found]),
    )


def update_values(data: bytes, mask: Mask) -> FloatValues:
    """The compact values of an update that was verified before, shape (mask.shared,).

    As :class:`Update` has them: trained values in float32, or exact deltas in float64.

    Raises:
        WireError: not an update file.
    """
    layout = read_update_layout(data[: header_size(data)])
    check_size(layout, len(data))
    if layout.metadata["format"] == CODED_FORMAT:
        codes = _decode_frames(data, layout, mask, ValueCheck())
        return codes.values(scale_counts(mask.packed, mask.dim))
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


def file_digest(data: bytes) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(data).hexdigest()


def _bytes(data: bytes, layout: Layout, name: str) -> memoryview:
    section = layout.sections[name]
    return memoryview(data)[section.start : section.stop]
