"""Update and version files: safetensors with a closed schema (docs/WIRE.md).

Owns what both formats say, encoding and strict decoding; their heads are in ``layout``, and
``inspection`` makes the same checks on a stream. A file that could carry a personal value is
refused here. Must not read files, sockets or clocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import MaskError, WireError
from fedselect.layout import (
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
from fedselect.masks import BLOCK, Mask, packed_size
from fedselect.space import FloatVector

__all__ = [
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
    "check_size",
    "check_update_head",
    "check_update_mask",
    "check_version_head",
    "decode_update",
    "decode_version",
    "encode_update",
    "encode_version",
    "file_digest",
    "header_size",
    "read_update_layout",
    "read_version_layout",
    "update_values",
    "version_head",
]
MAX_EXAMPLES = 10**12


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
class UpdatePlan:
    """What the coordinator expects of one update; anything else is refused.

    ``known_mask`` is the mask the coordinator holds under ``known_mask_version`` (None and 0 before
    the first). ``lower`` and ``upper`` bound the mask: what must and what may be personal;
    ``max_abs`` bounds every value, ``max_norm`` the L2 norm of all that are sent.
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
    max_abs: float = math.inf
    max_norm: float = math.inf


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
    return encode_head({"format": VERSION_FORMAT, "space": space_digest}, {"values": ("F32", dim)})


def _encode(metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    names = {np.dtype("<u8"): "U64", np.dtype("<f4"): "F32", np.dtype("u1"): "U8"}
    head = encode_head(metadata, {n: (names[a.dtype], a.size) for n, a in arrays.items()})
    return b"".join((head, *(a.tobytes() for a in arrays.values())))


# --- decoding ----------------------------------------------------------------------------------


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


class ValueCheck:
    """The values of one file, block by block: all finite, none too large, nor all together.

    Give blocks of ``BLOCK`` values, the last one may be shorter: the sum of squares (float64) then
    has the same bits whether a file comes at once or as a stream.
    """

    def __init__(self, *, max_abs: float = math.inf, max_norm: float = math.inf) -> None:
        self._max_abs, self._max_norm = max_abs, max_norm
        self._count = 0
        self._bad: int | None = None
        self._largest = 0.0
        self._squares = 0.0

    def add(self, values: FloatVector) -> None:
        """Take the next block; what is wrong with it is told by :meth:`finish`."""
        finite = np.isfinite(values)
        if self._bad is None and not finite.all():
            self._bad = self._count + int(np.argmin(finite))
        self._count += values.size
        if self._bad is None and values.size:
            wide = values.astype(np.float64)
            self._largest = max(self._largest, float(np.abs(wide).max()))
            self._squares += float(np.square(wide).sum())

    def finish(self) -> None:
        """Judge all that was given.

        Raises:
            WireError: values_not_finite, value_too_large or norm_too_large.
        """
        if self._bad is not None:
            raise WireError(f"value {self._bad} is not finite", code="values_not_finite")
        if self._largest > self._max_abs:
            raise WireError(
                f"a value of magnitude {self._largest:.6g}, the run allows {self._max_abs:g}",
                code="value_too_large",
            )
        norm = math.sqrt(self._squares)
        if norm > self._max_norm:
            raise WireError(
                f"the values have the norm {norm:.6g}, the run allows {self._max_norm:g}",
                code="norm_too_large",
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
    check = ValueCheck(max_abs=plan.max_abs, max_norm=plan.max_norm)
    for start in range(0, values.size, BLOCK):
        check.add(values[start : start + BLOCK])
    check.finish()
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


def file_digest(data: bytes) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(data).hexdigest()


def _bytes(data: bytes, layout: Layout, name: str) -> bytes:
    section = layout.sections[name]
    return data[section.start : section.stop]
