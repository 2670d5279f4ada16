"""Partial sums: what of a round may be added up before it closes, and what such a sum stands for.

A group of the canonical sum (docs/WIRE.md) is final as soon as its eight updates are accepted, so a
running sum of whole groups can be kept for each shard. It is never more than a cache: its digest
says which updates it holds, and a round that begins with others does without it. Must not know rows
or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedselect.manifestdocs import GROUP, ManifestUpdate

FORMAT = "fedselect-partial/1"


def due(accepted: int, *, elements: int, goal: int, at_least: int) -> bool:
    """Whether the latest accepted update has completed a group that is worth adding at once.

    A round is worth it from ``at_least`` values on, its elements times its goal: below that, all of
    it is summed when it closes before anybody notices.
    """
    return accepted > 0 and accepted % GROUP == 0 and elements * goal >= at_least


def whole_groups(accepted: int) -> int:
    """How many groups are complete."""
    return accepted // GROUP


def prefix_digest(updates: Sequence[ManifestUpdate], groups: int, *, shard: int, part: int) -> str:
    """SHA-256 (hex) over what the sum of the first ``groups`` groups of a shard depends on."""
    lines = [f"{FORMAT} {GROUP} {shard} {part}"]
    lines += [f"{u.sha256} {u.mask_sha256} {u.weight}" for u in updates[: GROUP * groups]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fits(
    digest: str, groups: int, updates: Sequence[ManifestUpdate], *, shard: int, part: int
) -> bool:
    """Whether a sum of ``groups`` groups with this digest is what the sum of ``updates`` begins
    with.
    """
    whole = groups <= whole_groups(len(updates))
    return whole and digest == prefix_digest(updates, groups, shard=shard, part=part)
