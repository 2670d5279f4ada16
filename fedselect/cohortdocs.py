"""The documents of cohorts and channels.

Owns their shape and limits, for the coordinator and the client SDK alike. Must not know HTTP, rows
or storage.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from fedselect.protocol import Answer, Name, Request, Tag, VersionInfo
from fedselect.scalars import Real

ChannelName = Literal["stable", "pilot"]
Why = Annotated[
    str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")
]


class CohortRule(Request):
    """Who belongs to a cohort: clients by name, all with a tag, or a share of all."""

    model_config = ConfigDict(json_schema_extra={"example": {"percent": 5}})

    clients: list[Name] | None = Field(None, min_length=1, max_length=10_000)
    tag: Tag | None = None
    percent: Real | None = Field(
        None,
        gt=0,
        le=100,
        description="Of all clients, chosen by a stable hash of the cohort's salt and their ids.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name in ("clients", "tag", "percent") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of clients, tag and percent, not {len(given)} of them")
        return self


class CohortCreate(Request):
    """A named set of clients."""

    name: Name = Field(examples=["pilot-wards"])
    rule: CohortRule


class CohortInfo(Answer):
    """A named set of clients; ``members`` are those that the rule meets now."""

    id: UUID
    name: str
    rule: CohortRule
    salt: str = Field(description="With a client's id it decides its place.")
    members: int = Field(description="Active clients that belong to it now.")
    created_at: datetime


class ChannelMove(Request):
    """Point a channel at a version."""

    version_id: UUID
    reason: Why = Field(examples=["first version for everybody"])
    cohort_id: UUID | None = Field(
        None, description="Whose members the channel `pilot` serves; `stable` serves all others."
    )


class Justified(Request):
    """An order that the ledger keeps with its reason."""

    reason: Why = Field(examples=["agreed in the meeting of 12 May"])


class ChannelInfo(Answer):
    """A named pointer to a version."""

    model_id: UUID
    name: ChannelName
    version: VersionInfo
    previous_id: UUID | None = Field(description="The version that `roll-back` leads to.")
    cohort_id: UUID | None
    reason: str
    moved_at: datetime
