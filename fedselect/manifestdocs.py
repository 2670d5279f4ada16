"""Manifest documents: all that a round's aggregation depends on, frozen when it closes.

Owns their shape, for the coordinator and whoever recomputes a version. Must not know how anything
is averaged.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from fedselect.deltas import Encoding
from fedselect.masks import BLOCK
from fedselect.protocol import Answer, FileDownload

GROUP = 8  # updates summed together before the group sums are folded from the left
SHARD = 32 * BLOCK  # elements one aggregation job takes at a time


class ManifestUpdate(Answer):
    """One update of a manifest: where its verified file lies and how it counts."""

    number: int
    client: str = Field(description="The client's id; names are not frozen.")
    object: str
    sha256: str
    mask_object: str
    mask_sha256: str
    examples: int
    weight: int
    norm: str | None = Field(
        None, description="Length of its change, where influence is bounded; as `ManifestBounds`."
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        document: dict[str, Any] = handler(self)
        if self.norm is None:
            del document["norm"]
        return document


class ManifestBounds(Answer):
    """How the influence of single updates is bounded, frozen with the round.

    Fractions are texts, the shortest decimal that reads back as the same float64: canonical JSON
    is for whole numbers. ``clip`` is the bound of this round, wherever it came from.
    """

    rule: Literal["mean", "trimmed_mean", "median"]
    trim: str
    clip: str | None
    max_change: str | None
    share_cap: bool
    movers: bool


class ManifestNoise(Answer):
    """Differential privacy of a round in whole numbers; a step is 2**``step``."""

    step: int
    bound: int = Field(description="Steps that a client's delta is long at most.")
    sigma: int = Field(description="Standard deviation of the noise on the sum, in steps.")
    goal: int = Field(description="What the sum is divided by, however many clients there are.")
    still: list[tuple[int, int]] = Field(
        description="Ranges [first, last) of elements that never travel, and get no noise."
    )
    commitment: str = Field(description="Of the run's secret, which its noise is drawn with.")


ManifestFormat = Literal[
    "fedselect-manifest/1", "fedselect-manifest/2", "fedselect-manifest/3", "fedselect-manifest/4"
]


class Manifest(Answer):
    """Everything a round's aggregation depends on, frozen when the round closed.

    Its digest is SHA-256 over canonical JSON (RFC 8785). The updates stand in the order of
    acceptance; they are summed in groups of ``group`` and the group sums folded from the left.
    Format 1 is of runs that exchange float32 values, and says nothing of an encoding. Only format 3
    has ``bounds``, its rounds are averaged by ``fedselect.bounded``; only format 4 has ``noise``,
    its rounds are summed by ``fedselect.private``.
    """

    format: ManifestFormat = "fedselect-manifest/1"
    encoding: Encoding = "f32"
    run: str
    arm: str
    round: int
    attempt: int
    space: str
    elements: int
    base_object: str
    base_sha256: str
    min_contributors: int
    group: int
    shard: int
    noise: ManifestNoise | None = None
    bounds: ManifestBounds | None = None
    updates: list[ManifestUpdate]

    # Not annotated: pydantic then describes the fields in OpenAPI, and not what this returns.
    @model_serializer(mode="wrap")
    def _as_its_format_says(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        document: dict[str, Any] = handler(self)
        if self.format == "fedselect-manifest/1":
            del document["encoding"]
        for name in ("noise", "bounds"):
            if getattr(self, name) is None:
                del document[name]
        return document


class ManifestDocument(Answer):
    """A round's manifest with its digest and the files it names, as signed addresses."""

    sha256: str
    manifest: Manifest
    downloads: dict[str, FileDownload]
