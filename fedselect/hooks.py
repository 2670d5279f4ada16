"""The documents of webhooks, and how a receiver checks one (Standard Webhooks, version 1).

Owns shapes, the list of events and the signature. Must not know rows or sockets.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field, StringConstraints

from fedselect.protocol import Answer, Request

# Actions of the ledger that a project may be told of.
Event = Literal[
    "round.published",
    "round.abandoned",
    "round.failed",
    "round.cancelled",
    "run.paused",
    "run.finished",
    "run.stopped",
    "assignment.rejected",
    "client.registered",
    "client.suspended",
    "client.revoked",
    "client.harmed",
    "rollout.held",
    "budget.reached",
    "job.failed",
    "key.issued",
    "key.revoked",
]
TESTED = "webhook.tested"  # what a test sends, to the one webhook that is tested
SECRET_PREFIX = "whsec_"  # noqa: S105 - how the standard marks a secret
TOLERANCE = 300  # seconds by which a receiver's clock may differ
Address = Annotated[str, StringConstraints(max_length=500, pattern=r"^https?://[^\s]+$")]


class WebhookCreate(Request):
    """Ask to be told of events of the project from now on."""

    url: Address = Field(examples=["https://example.org/fedselect"])
    events: list[Event] = Field(min_length=1, max_length=30, examples=[["round.published"]])


class WebhookChange(Request):
    """What is to be changed; what is left out stays."""

    url: Address | None = None
    events: list[Event] | None = Field(None, min_length=1, max_length=30)
    state: Literal["active", "disabled"] | None = None


class WebhookInfo(Answer):
    """Whom the project's events are told to."""

    id: UUID
    url: str
    events: list[str]
    state: Literal["active", "disabled"]
    seen: int = Field(description="Ledger entries up to this number have been looked through.")
    waiting: int = Field(description="Deliveries that are due or will be tried again.")
    dead: int = Field(description="Deliveries that were given up; `retryDelivery` revives them.")
    created_at: datetime


class WebhookIssued(Answer):
    """A webhook with its secret, which is shown this one time."""

    webhook: WebhookInfo
    secret: str = Field(repr=False, description="Signs what is sent: see docs/WEBHOOKS.md.")


class DeliveryInfo(Answer):
    """One event on its way to one webhook."""

    id: UUID
    webhook_id: UUID
    seq: int = Field(description="Number of the ledger entry that it tells of.")
    state: Literal["waiting", "delivered", "dead"]
    attempts: int
    status: int | None = Field(description="What the receiver last answered.")
    error: str | None
    due_at: datetime
    created_at: datetime
    finished_at: datetime | None


class Notice(Answer):
    """What is sent: the ledger's entry, as an auditor reads it."""

    seq: int
    at: datetime
    project_id: UUID
    event: str
    actor: str
    subject: str
    body: dict[str, Any]


def sign(secret: str, *, message: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature`` of a message."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    content = f"{message}.{timestamp}.".encode() + body
    digest = hmac.digest(key, content, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def verify(
    secret: str, *, message: str, timestamp: str, signature: str, body: bytes, now: float
) -> bool:
    """Whether a message is genuine and fresh: what a receiver asks before it believes anything.

    ``message``, ``timestamp`` and ``signature`` are the headers ``webhook-id``,
    ``webhook-timestamp`` and ``webhook-signature``; ``now`` is in seconds since the epoch. During a
    rotation the signature holds two, separated by a space.
    """
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 12:
        return False
    if abs(now - int(timestamp)) > TOLERANCE:
        return False
    wanted = sign(secret, message=message, timestamp=int(timestamp), body=body)
    found = [hmac.compare_digest(wanted.encode(), each.encode()) for each in signature.split()]
    return any(found)
