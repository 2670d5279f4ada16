"""What an update is held against: the plan of its assignment, and the rules of its values.

Owns every check of a decoded head, mask, rank table, frame table and value that ``wire`` makes on a
whole file and ``inspection`` on a stream. Must not read bytes of a container (``layout``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedselect import maskcoding
from fedselect.deltas import PLANES, DeltaEncoding, Encoding, Frames, payload_limit
from fedselect.errors import MaskError, WireError
from fedselect.layout import CODED_FORMAT, Layout
from fedselect.masks import BLOCK, Mask, packed_size
from fedselect.space import MAX_ELEMENTS, FloatValues

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
    ``max_abs`` bounds every value that is sent (of a delta, the decoded one), ``max_norm`` the L2
    norm of all of them; ``encoding`` is the run's.
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
    encoding: Encoding = "f32"


def check_update_head(layout: Layout, plan: UpdatePlan) -> UpdateMeta:
    """Compare what the file says of itself with what was asked for; no payload is needed.

    Raises:
        WireError: with the code of the first thing that differs.
    """
    meta = _update_meta(layout.metadata)
    coded = layout.metadata["format"] == CODED_FORMAT
    expected = (
        ("space", plan.space, "space_mismatch"),
        ("run", plan.run, "run_mismatch"),
        ("round", plan.round, "round_mismatch"),
        ("assignment", plan.assignment, "assignment_mismatch"),
        ("base_version", plan.base_version, "base_version_mismatch"),
        ("encoding", plan.encoding, "encoding_unknown"),
    )
    for name, wanted, code in expected:
        if getattr(meta, name) != wanted:
            raise WireError(
                f"{name} is {getattr(meta, name)!r}, this assignment needs {wanted!r}", code=code
            )
    if coded == (plan.encoding == "f32"):
        raise WireError(
            f"{layout.metadata['format']} does not carry {plan.encoding}", code="encoding_unknown"
        )
    if coded and elements_of(layout) != plan.lower.dim:
        raise WireError(
            f"the file has {elements_of(layout)} elements, the space {plan.lower.dim}",
            code="space_mismatch",
        )
    _check_sections(layout, plan, meta)
    return meta


def _update_meta(metadata: Mapping[str, str]) -> UpdateMeta:
    limits = {"round": 2**31, "mask_version": 2**31, "examples": MAX_EXAMPLES}
    numbers = {name: _number(metadata, name, most) for name, most in limits.items()}
    if numbers["examples"] < 1:
        raise WireError("an update must come from at least 1 example", code="header_invalid")
    texts = ("space", "run", "assignment", "base_version", "encoding")
    return UpdateMeta(**numbers, **{name: metadata[name] for name in texts})  # type: ignore[arg-type]


def _number(metadata: Mapping[str, str], name: str, most: int) -> int:
    text = metadata[name]
    digits = text.isascii() and text.isdigit() and len(text) < 16
    if not digits or int(text) > most or str(int(text)) != text:
        raise WireError(
            f"metadata {name!r} must be a whole number up to {most}, got {text[:40]!r}",
            code="header_invalid",
        )
    return int(text)


def elements_of(layout: Layout) -> int:
    """D, which only a file of coded deltas says itself.

    Raises:
        WireError: header_invalid.
    """
    return _number(layout.metadata, "elements", MAX_ELEMENTS)


def _check_sections(layout: Layout, plan: UpdatePlan, meta: UpdateMeta) -> None:
    dim = plan.lower.dim
    sent = "mask" in layout.sections
    if sent:
        _check_mask_size(layout.sections["mask"].count, dim, plan.encoding)
    if not sent and plan.known_mask is None:
        raise WireError("the first update of a client must carry its mask", code="mask_missing")
    version = plan.known_mask_version + sent
    if meta.mask_version != version:
        raise WireError(
            f"mask_version is {meta.mask_version}, expected {version} for a mask that was "
            f"{'sent' if sent else 'left out'}",
            code="mask_version_mismatch",
        )
    blocks = -(-dim // BLOCK)
    if layout.sections["block_rank"].count != blocks + 1:
        raise WireError(
            f"block_rank has {layout.sections['block_rank'].count} entries, not {blocks + 1}",
            code="block_rank_invalid",
        )
    if plan.encoding == "f32":
        most = dim
    else:
        planes = PLANES[plan.encoding]
        if layout.sections["lengths"].count != planes * blocks:
            raise WireError(
                f"{layout.sections['lengths'].count} lengths of planes, not {planes * blocks}",
                code="frames_invalid",
            )
        most = payload_limit(dim, plan.encoding)
    if layout.sections["values"].count > most:
        raise WireError("more values than the model has elements", code="values_length")


def _check_mask_size(count: int, dim: int, encoding: Encoding) -> None:
    plain = packed_size(dim)
    if encoding == "f32" and count != plain:
        raise WireError(
            f"the mask has {count} bytes, {dim} elements need {plain}", code="mask_size"
        )
    if count > maskcoding.longest(dim):
        raise WireError(
            f"the mask has {count} bytes, {dim} elements never need them", code="mask_size"
        )


def check_update_mask(layout: Layout, plan: UpdatePlan, *, sent: bytes | None) -> Mask:
    """The mask this update counts under, checked against the policy's bounds and the length.

    ``sent`` are the bytes of the mask section, None when it was left out.

    Raises:
        WireError: padding bits, a coding that cannot be read, a mask the policy does not allow, or
            ``len(values)`` other than the number of shared bits: such a file could carry a personal
            value. (Of deltas, :func:`check_frames` sees to that.)
    """
    mask = plan.known_mask if sent is None else _read_mask(plan, sent)
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
    if plan.encoding == "f32" and layout.sections["values"].count != mask.shared:
        raise WireError(
            f"{layout.sections['values'].count} values for {mask.shared} shared elements",
            code="values_length",
        )
    return mask


def _read_mask(plan: UpdatePlan, sent: bytes) -> Mask:
    if plan.encoding != "f32":
        return maskcoding.decode_mask(plan.lower.dim, sent, plan.known_mask)
    try:
        return Mask.from_bytes(plan.lower.dim, sent)
    except MaskError as error:
        raise WireError(str(error), code=error.code) from error


def check_block_rank(data: bytes | memoryview, mask: Mask) -> None:
    """Refuse a rank table that does not follow from the mask.

    Raises:
        WireError: block_rank_invalid.
    """
    if data != mask.block_rank().astype("<u8").tobytes():
        raise WireError("block_rank does not follow from the mask", code="block_rank_invalid")


def check_frames(layout: Layout, mask: Mask, encoding: DeltaEncoding, lengths: bytes) -> Frames:
    """The frames of a delta file, each of exactly one code per shared element of its block.

    ``mask`` is the one this update counts under, ``lengths`` are the bytes of that section.

    Raises:
        WireError: frames_invalid, or values_length if they are not the section of values.
    """
    table = np.frombuffer(lengths, dtype="<u4")
    frames = Frames(encoding, mask.dim, mask.block_rank(), table)
    found = layout.sections["values"].count
    if frames.size != found:
        raise WireError(
            f"{found} bytes of values, the frames have {frames.size}", code="values_length"
        )
    return frames


def check_finite(values: FloatValues) -> None:
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

    def add(self, values: FloatValues) -> None:
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
