"""Files for the wire tests: valid ones built by plain functions, and tools to take them apart."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedselect import wire
from fedselect.deltas import quantise
from fedselect.masks import Mask
from fedselect.space import Kind, ParameterSpace, Role

GOLDEN = Path(__file__).parents[1] / "golden" / "wire"
SPACE = ParameterSpace.of(
    [
        ("conv.weight", (2, 3), Kind.WEIGHT, Role.SELECTABLE),
        ("conv.bias", (2,), Kind.BIAS, Role.SHARED),
        ("bn.running_mean", (2,), Kind.BUFFER, Role.PERSONAL),
        ("head.weight", (2, 4), Kind.WEIGHT, Role.SELECTABLE),
        ("head.bias", (1,), Kind.BIAS, Role.SHARED),
    ]
)
DIM = SPACE.dim  # 19: five padding bits
LOWER = Mask.initial(SPACE)
UPPER = LOWER | Mask.over(SPACE, tuple(SPACE.with_role(Role.SELECTABLE)))
META = wire.UpdateMeta(
    space=SPACE.digest,
    run="0198f5a0-0000-7000-8000-000000000001",
    round=3,
    assignment="0198f5a0-0000-7000-8000-000000000002",
    base_version="ab" * 32,
    mask_version=1,
    examples=120,
)


def mask_of(*personal: int) -> Mask:
    """The smallest allowed mask and these elements."""
    bits = LOWER.to_bool()
    bits[list(personal)] = True
    return Mask.from_bool(bits)


MASK = mask_of(0, 4, 10, 17)
THETA = (np.arange(DIM, dtype=np.float32) - 9) / 8


def plan(meta: wire.UpdateMeta = META, **changes: Any) -> wire.UpdatePlan:
    """What the coordinator expects of an update with this metadata."""
    expected = wire.UpdatePlan(
        space=meta.space,
        run=meta.run,
        round=meta.round,
        assignment=meta.assignment,
        base_version=meta.base_version,
        lower=LOWER,
        upper=UPPER,
    )
    return replace(expected, **changes)


def known(mask: Mask = MASK, version: int = 1, **changes: Any) -> wire.UpdatePlan:
    """A plan of a client whose mask the coordinator already holds."""
    return plan(known_mask=mask, known_mask_version=version, **changes)


def update(*, mask: Mask = MASK, theta: Any = THETA, send_mask: bool = True, **meta: Any) -> bytes:
    """A valid update; keywords change its metadata."""
    return wire.encode_update(replace(META, **meta), theta, mask=mask, send_mask=send_mask)


def coded(
    encoding: Any = "int8",
    *,
    mask: Mask = MASK,
    delta: Any = THETA,
    send_mask: bool = True,
    old: Mask | None = None,
    **meta: Any,
) -> bytes:
    """A valid delta file; keywords change its metadata."""
    told = replace(META, **{"encoding": encoding, **meta})
    codes = quantise(delta, encoding, mask)
    return wire.encode_delta(told, codes, mask=mask, send_mask=send_mask, known=old)


def take_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header as JSON, and the payload."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: dict[str, Any] | bytes, payload: bytes) -> bytes:
    """A file with this header, written as docs/WIRE.md says; bytes are taken as they are."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + payload


def again(found: wire.Update) -> bytes:
    """Encode a decoded update once more."""
    theta = np.zeros(found.mask.dim, dtype=np.float32)
    theta[~found.mask.to_bool()] = found.values
    return wire.encode_update(found.meta, theta, mask=found.mask, send_mask=found.mask_sent)
