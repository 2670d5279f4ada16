"""What files weigh before they exist: a formula of the very layouts of docs/WIRE.md.

Owns the sizes of update, version and delta files from counts alone. Heads, tables, masks and
float32 values are exact. Entropy coding decides the rest: a coded mask is taken at its entropy,
coded deltas at what the real coder makes of a block of independent normal deltas, than which
nothing is harder to code, or at what a dry run has measured. Must not know policies or rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedselect.deltafiles import DeltaMeta, delta_head
from fedselect.deltas import PLANES, DeltaEncoding, Encoding, pack, quantise
from fedselect.layout import CODED_FIELDS, CODED_FORMAT, UPDATE_FIELDS, UPDATE_FORMAT, encode_head
from fedselect.maskcoding import CHUNK, longest
from fedselect.masks import BLOCK, Mask, packed_size
from fedselect.wire import version_head

GRID = 64  # steps of a block's share
_DIGEST = "0" * 64
_ID = "0" * 36


@dataclass(frozen=True, slots=True)
class Coding:
    """Bytes that coded deltas take: per shared element of an update, per element of a version's
    delta; scales included, tables and heads not. None: as independent normal deltas would.
    """

    up: float | None = None
    down: float | None = None


NORMAL = Coding()


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """One update file: of ``dim`` elements it keeps ``personal`` back, and ``grown`` of them since
    the mask before; ``mask`` is sent or not; ``round`` and ``examples`` count for their digits.
    """

    dim: int
    personal: int
    mask: bool
    grown: int = 0
    masks_sent: int = 1
    round: int = 1
    examples: int = 100

    @property
    def shared(self) -> int:
        """Number of values in the file."""
        return self.dim - self.personal


def update_size(facts: UpdateFacts, encoding: Encoding, coding: Coding = NORMAL) -> int:
    """Bytes of an update file."""
    blocks = -(-facts.dim // BLOCK)
    sections: dict[str, tuple[str, int]] = {"block_rank": ("U64", blocks + 1)}
    if encoding == "f32":
        sections["values"] = ("F32", facts.shared)
        body = 4 * facts.shared
    else:
        sections["lengths"] = ("U32", PLANES[encoding] * blocks)
        body = 4 * PLANES[encoding] * blocks
    mask = mask_size(facts, encoding) if facts.mask else 0
    if facts.mask:
        sections["mask"] = ("U8", mask)
    if encoding != "f32":
        values = round(facts.shared * value_bytes(facts, encoding, coding))
        sections["values"] = ("U8", values)
        body += values
    head = len(encode_head(_update_metadata(facts, encoding), sections))
    return head + 8 * (blocks + 1) + mask + body


def _update_metadata(facts: UpdateFacts, encoding: Encoding) -> dict[str, str]:
    coded = encoding != "f32"
    known = {
        "assignment": _ID,
        "base_version": _DIGEST,
        "elements": str(facts.dim),
        "encoding": encoding,
        "examples": str(facts.examples),
        "format": CODED_FORMAT if coded else UPDATE_FORMAT,
        "mask_version": str(facts.masks_sent),
        "round": str(facts.round),
        "run": _ID,
        "space": _DIGEST,
    }
    return {name: known[name] for name in (CODED_FIELDS if coded else UPDATE_FIELDS)}


def version_size(dim: int) -> int:
    """Bytes of a version file."""
    return len(version_head(_DIGEST, dim)) + 4 * dim


@lru_cache(maxsize=1024)
def delta_size(dim: int, encoding: DeltaEncoding, *, still: float, coding: Coding = NORMAL) -> int:
    """Bytes of the delta file of a version in which the share ``still`` of the elements does not
    move: too few clients share them.
    """
    per_element = coding.down
    if per_element is None:
        elements = min(dim, BLOCK)
        per_element = _between(1 - still, lambda moved: _frame(encoding, elements, 1, moved))
        per_element /= elements
    size = round(per_element * dim)
    lengths = np.zeros(PLANES[encoding] * -(-dim // BLOCK), dtype=np.uint32)
    meta = DeltaMeta(_DIGEST, _DIGEST, _DIGEST, encoding, dim)
    return len(delta_head(meta, lengths, size)) + size


# --- what is coded -----------------------------------------------------------------------------


def value_bytes(facts: UpdateFacts, encoding: DeltaEncoding, coding: Coding) -> float:
    """Bytes that one shared element takes in an update of coded deltas, its scale included."""
    if coding.up is not None or not facts.shared:
        return coding.up or 0.0
    elements = min(facts.dim, BLOCK)
    share = facts.shared / facts.dim
    frame = _between(share, lambda shared: _frame(encoding, elements, shared, shared))
    return frame / (share * elements)


def mask_size(facts: UpdateFacts, encoding: Encoding) -> int:
    """Bytes of the mask section: packed bits, or the entropy of the mask or of its difference to
    the one before, whichever is less.
    """
    if encoding == "f32":
        return packed_size(facts.dim)
    least = entropy(facts.dim, facts.personal)
    if facts.grown and facts.masks_sent > 1:
        least = min(least, entropy(facts.dim, facts.grown))
    heads = longest(CHUNK) - packed_size(CHUNK)
    return min(longest(facts.dim), math.ceil(least) + heads * -(-facts.dim // CHUNK))


def entropy(dim: int, ones: int) -> float:
    """Bytes that codes of ``dim`` independent bits, ``ones`` of them 1, need on average."""
    if ones in {0, dim}:
        return 0.0
    share = ones / dim
    return -dim / 8 * sum(p * math.log2(p) for p in (share, 1 - share))


def _between(share: float, size: Callable[[float], int]) -> float:
    """``size`` at a share, between its neighbours of 64 steps: so few blocks have to be coded."""
    below = min(int(share * GRID), GRID - 1)
    part = share * GRID - below
    return (1 - part) * size(below / GRID) + part * size((below + 1) / GRID)


@lru_cache(maxsize=1024)
def _frame(encoding: DeltaEncoding, elements: int, shared: float, moved: float) -> int:
    """Bytes of the real frame of a block of normal deltas: the share ``shared`` of its elements is
    sent, ``moved`` of all is not 0.
    """
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(elements, dtype=np.float32)
    places = rng.permutation(elements)
    delta[places[round(moved * elements) :]] = 0
    personal = np.zeros(elements, dtype=np.bool_)
    personal[places[round(shared * elements) :]] = True
    mask = Mask.from_bool(personal)
    _, payload = pack(quantise(delta, encoding, mask), mask.block_rank())
    return len(payload)
