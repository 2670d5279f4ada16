"""The documents of organisations, projects and keys.

Owns their shape and limits. Must not know HTTP, rows or what a scope allows.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, StringConstraints

from fedselect.protocol import Answer, Name, Request, Sha256, Tag
from fedselect.scalars import Flag, Whole

DAY = 86_400  # seconds
Title = Annotated[str, StringConstraints(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
Subject = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")
]
StaffRole = Literal["owner", "operator", "auditor", "viewer"]
ClientLimit = Annotated[Whole, Field(ge=0, le=1_000_000)]


class Identity(Answer):
    """Who a key stands for, and what it may do."""

    kind: Literal["key", "person", "client"]
    id: str = Field(description="Of the key, the person or the client.")
    role: str
    scopes: list[str]
    organisation_id: UUID
    project_id: UUID | None = Field(
        description="None for a key of the whole organisation that names no project."
    )
    expires_at: datetime | None


class ProjectCreate(Request):
    """A new project of the organisation."""

    name: Name = Field(examples=["cardiology"])
    client_limit: ClientLimit | None = Field(
        None, description="Most clients that are not revoked; none: the organisation's limit alone."
    )


class ProjectChange(Request):
    """What is to be changed; what is left out stays."""

    name: Name | None = Field(None, examples=["cardiology-2"])
    client_limit: ClientLimit | None = Field(None, description="null takes the limit away.")


class ProjectInfo(Answer):
    """A project: who owns models, clients and runs."""

    id: UUID
    organisation_id: UUID
    organisation: str
    name: str
    client_limit: int | None
    clients: int = Field(description="Those that are not revoked.")
    created_at: datetime


class ClientChange(Request):
    """What is to be changed; what is left out stays."""

    name: Name | None = Field(None, examples=["ward-7"])
    tags: list[Tag] | None = Field(None, max_length=20)


class KeyCreate(Request):
    """A key for a person or a program."""

    name: Title = Field("", description="What it is for.", examples=["nightly export"])
    role: StaffRole
    scopes: list[str] | None = Field(
        None, max_length=40, description="Only these of the role's scopes; none given: all of them."
    )
    expires_in: Whole | None = Field(
        None, ge=60, le=3660 * DAY, description="Seconds until it ends; none: until revoked."
    )
    organisation: Flag = Field(
        False, description="For all projects of the organisation, present and future."
    )
    certificate: Sha256 | None = Field(
        None,
        description="SHA-256 of the only client certificate with which it works (MTLS_HEADER).",
    )


class MemberCreate(Request):
    """Let a person in who signs in with the identity provider."""

    subject: Subject = Field(description="The claim `sub` of their tokens.")
    name: Title = Field("", description="For people to read.", examples=["Dr. Sato"])
    role: StaffRole
    organisation: Flag = Field(
        False, description="In all projects of the organisation, present and future."
    )


class MemberInfo(Answer):
    """A person and their role."""

    id: UUID
    subject: str
    name: str
    role: str
    project_id: UUID | None = Field(description="None: in the whole organisation.")
    created_at: datetime
    ended_at: datetime | None


class KeyRotate(Request):
    """Ask for a key's successor."""

    grace: Whole = Field(
        DAY, ge=0, le=30 * DAY, description="Seconds that the old key still works."
    )


class KeyInfo(Answer):
    """A key, without its secret."""

    id: str
    name: str
    role: str
    scopes: list[str] | None = Field(description="None: all of its role's.")
    project_id: UUID | None = Field(description="None: for the whole organisation.")
    client_id: UUID | None
    predecessor_id: str | None = Field(description="The key that this one replaces.")
    certificate: str | None = Field(
        None, description="SHA-256 of the client certificate that must be shown with it."
    )
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None


class KeyIssued(Answer):
    """A new key; ``key`` is shown this one time."""

    key: str = Field(repr=False)
    info: KeyInfo
