"""Delta files: what a version adds to the one before it (docs/WIRE.md).

Owns the step from one version to the next in a run whose encoding is not f32, which is
``base + Q(mean delta)``, and the file that carries it to clients. The service, the simulation, the
check of a manifest and the agent all take the step with :func:`apply`, so all hold the same bytes.
Must not know where files come from or what was averaged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from fedselect import wire
from fedselect.deltas import (
    Codes,
    DeltaEncoding,
    Frames,
    delta_encoding,
    dense_rank,
    pack,
    quantise,
)
from fedselect.errors import WireError
from fedselect.layout import (
    STEP_FORMAT,
    Layout,
    check_size,
    encode_head,
    header_size,
    read_step_layout,
)
from fedselect.masks import BLOCK
from fedselect.space import FloatVector

Lengths = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class DeltaMeta:
    """What a delta file says of itself: SHA-256 digests (hex) of the space and of both versions,
    the encoding, and the number of elements.
    """

    space: str
    base: str
    result: str
    encoding: DeltaEncoding
    elements: int


# --- the step ----------------------------------------------------------------------------------


def apply(base: FloatVector, codes: Codes) -> FloatVector:
    """``base`` plus the decoded deltas, of shape (n,): summed in float64, rounded to float32.

    Raises:
        WireError: values_not_finite.
    """
    total: npt.NDArray[np.float64] = codes.values()
    total += base
    with np.errstate(over="ignore"):
        values = total.astype(np.float32)
    wire.check_finite(values)
    return values


def advance(
    base: FloatVector, mean: FloatVector, encoding: DeltaEncoding
) -> tuple[FloatVector, Lengths, bytes]:
    """The new values, and the frames of the quantised ``mean`` with the lengths of their planes.

    ``mean`` (n,) are the mean deltas, 0 where too few share. Any range of whole blocks, or a whole
    vector: the results of neighbouring ranges, one behind the other, are those of both together.

    Raises:
        WireError: values_not_finite if a mean cannot be encoded or a new value is not finite.
    """
    codes = quantise(mean, encoding)
    values = apply(base, codes)
    lengths, frames = pack(codes, dense_rank(base.size))
    return values, lengths, frames


# --- the file ----------------------------------------------------------------------------------


def delta_head(meta: DeltaMeta, lengths: Lengths, size: int) -> bytes:
    """The bytes of a delta file before its ``size`` bytes of frames, which may be streamed."""
    sections = {"lengths": ("U32", lengths.size), "values": ("U8", size)}
    metadata = {name: str(value) for name, value in asdict(meta).items()}
    head = encode_head({"format": STEP_FORMAT, **metadata}, sections)
    return head + lengths.astype("<u4").tobytes()


def step(
    version: bytes, mean: FloatVector, *, space: str, encoding: DeltaEncoding
) -> tuple[bytes, bytes]:
    """The version file that follows from one and a mean delta (D,), and the delta file between.

    Raises:
        WireError: ``version`` is no version file of ``space``, or see :func:`advance`.
    """
    base = wire.decode_version(version, space_digest=space, dim=mean.size)
    values, lengths, frames = advance(base, mean, encoding)
    result = wire.encode_version(space, values)
    digests = wire.file_digest(version), wire.file_digest(result)
    meta = DeltaMeta(space, *digests, encoding, mean.size)
    return result, delta_head(meta, lengths, len(frames)) + frames


def patch(
    version: bytes, delta: bytes, *, space: str, dim: int, digest: str | None = None
) -> bytes:
    """The version file that a delta file makes of the one that it names as its base.

    ``digest``: that of ``version``, for whoever knows it already.

    Raises:
        WireError: it is no delta file of ``space``, is meant for another version, or leads to
            other bytes than it says (``delta_mismatch``).
    """
    layout = read_step_layout(delta[: header_size(delta)])
    check_size(layout, len(delta))
    meta = check_delta_head(layout, space=space, dim=dim)
    if (digest or wire.file_digest(version)) != meta.base:
        raise WireError("the delta belongs to another version", code="base_version_mismatch")
    base = wire.decode_version(version, space_digest=space, dim=dim)
    frames = read_frames(delta, layout, meta)
    payload = memoryview(delta)[layout.sections["values"].start :]
    values = np.empty(dim, dtype=np.float32)
    for start in range(0, dim, BLOCK):
        stop = min(start + BLOCK, dim)
        first, last = frames.span(start, stop)
        codes = frames.decode(payload[first:last], start, stop)
        values[start:stop] = apply(base[start:stop], codes)
    result = wire.encode_version(space, values)
    if wire.file_digest(result) != meta.result:
        raise WireError("the delta does not lead where it says", code="delta_mismatch")
    return result


def check_delta_head(layout: Layout, *, space: str, dim: int) -> DeltaMeta:
    """What a delta file says of itself, compared with the space that it must belong to.

    Raises:
        WireError: space_mismatch, values_length or encoding_unknown.
    """
    facts = layout.metadata
    if facts["space"] != space:
        raise WireError(
            f"the file belongs to space {facts['space'][:12]!r}…, not {space[:12]!r}…",
            code="space_mismatch",
        )
    elements = wire.elements_of(layout)
    if elements != dim:
        raise WireError(f"deltas of {elements} elements for {dim}", code="values_length")
    encoding = delta_encoding(facts["encoding"])
    return DeltaMeta(space, facts["base"], facts["result"], encoding, elements)


def read_frames(delta: bytes, layout: Layout, meta: DeltaMeta) -> Frames:
    """Where the frames of a delta file lie.

    Raises:
        WireError: frames_invalid.
    """
    section = layout.sections["lengths"]
    lengths = np.frombuffer(delta[section.start : section.stop], dtype="<u4")
    frames = Frames(meta.encoding, meta.elements, dense_rank(meta.elements), lengths)
    if frames.size != layout.sections["values"].count:
        raise WireError(
            f"frames of {frames.size} bytes in {layout.sections['values'].count}",
            code="frames_invalid",
        )
    return frames
