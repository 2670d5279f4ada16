"""The documents about versions: where one comes from, what changed, and its model card.

Owns their shape. Numbers of tensors are about shared parameters alone; of clients there are counts
and averages, never names. The card's words are ``cards``'.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from fedselect.deltas import Encoding
from fedselect.policies import RunSettings
from fedselect.protocol import Answer, PrivacyAccount, VersionInfo


class SpaceDocument(Answer):
    """A model's parameter space, as it was registered."""

    digest: str
    elements: int
    tensors: list[dict[str, Any]] = Field(description="name, shape, kind and role, in order.")


# --- lineage -----------------------------------------------------------------------------------


class LineageStep(Answer):
    """A version and how it came about; nothing of a round for one that was imported."""

    id: UUID
    number: int
    parent_id: UUID | None
    arm_id: UUID | None
    run_id: UUID | None
    run_name: str | None
    round_id: UUID | None
    round_number: int | None
    attempt: int | None
    updates: int | None = Field(description="That were averaged.")
    encoding: Encoding
    sha256: str
    manifest_sha256: str | None
    code_version: str
    recomputable: bool
    created_at: datetime


class Lineage(Answer):
    """A version's ancestors, itself first, and what was made from it."""

    format: Literal["fedselect-lineage/1"] = "fedselect-lineage/1"
    version_id: UUID
    steps: list[LineageStep]
    next_id: UUID | None = Field(description="The ancestor at which the lineage goes on.")
    children: list[UUID] = Field(description="Versions that begin with this one, at most 100.")


# --- differences -------------------------------------------------------------------------------


class Change(Answer):
    """How far some elements moved."""

    elements: int
    changed: int = Field(description="That are not bit for bit the same value.")
    l2: float = Field(description="Euclidean length of the change.")
    relative: float | None = Field(description="`l2` against the length before.")
    largest: float = Field(description="The largest change of one element, without its sign.")
    cosine: float | None = Field(description="Between before and after; null where one is 0.")


class TensorChange(Change):
    """How far a tensor moved."""

    name: str
    kind: str
    role: str


class VersionDifference(Answer):
    """What changed from one version to another."""

    format: Literal["fedselect-diff/1"] = "fedselect-diff/1"
    version_id: UUID
    base_id: UUID
    total: Change
    tensors: list[TensorChange] = Field(description="Those that moved furthest first.")
    omitted: int = Field(description="Tensors beyond `limit`; `total` counts them, too.")


# --- the card ----------------------------------------------------------------------------------


class ParameterCounts(Answer):
    """A model's elements by what may happen to them."""

    tensors: int
    elements: int
    selectable: int
    shared: int
    personal: int
    frozen: int


class CardOrigin(Answer):
    """The run that a version belongs to and the round that published it."""

    run_id: UUID
    run_name: str
    run_state: str
    settings: RunSettings
    round_number: int | None
    attempt: int | None
    opened_at: datetime | None
    closed_at: datetime | None
    updates: int | None = Field(description="That were averaged.")
    examples: int | None = Field(
        description="That are behind them at least, as the clients say, in steps no smaller than "
        "what the largest clients have, as many as a figure is formed over; null of too few."
    )


class CardScore(Answer):
    """Accuracies from 0 to 1 on the clients' own held-out data."""

    pooled: float = Field(description="Over all examples of all clients.")
    mean: float = Field(description="Over clients.")
    worst: float = Field(
        description="Of the worst clients, in the mean: as many as a figure is formed over."
    )


class CardEvaluation(Answer):
    """What clients have measured of a version, together; by whole groups of as many as a figure is
    formed over, in the order in which they reported.
    """

    clients: int
    examples: int
    personal_share: float = Field(description="Of a client's mask, on average.")
    scores: dict[str, CardScore]


class VersionCard(Answer):
    """A version's model card: what it is, why it exists, how good it is, what it is not."""

    format: Literal["fedselect-card/1"] = "fedselect-card/1"
    version: VersionInfo
    model_name: str
    parameters: ParameterCounts
    origin: CardOrigin | None = Field(description="None for a model's registered weights.")
    evaluation: CardEvaluation | None = Field(
        description="None if fewer clients than the run's `report.min_clients`, or its "
        "`min_contributors`, have reported."
    )
    privacy: PrivacyAccount | None = Field(
        None, description="Of a run with differential privacy, up to and with this version."
    )
    limitations: list[str]
    markdown: str = Field(description="The same for people.")
