"""The rules of a job's lease as pure functions: who may take it, who holds it, when it comes back.

Owns decisions alone; time is an argument. Must not know rows: the coordinator and the simulation
ask the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

RETRY_AFTER = 2.0  # seconds until a failed job is tried again, doubled with every attempt
RETRY_WHEN_AWAY = 5.0  # seconds until a job is tried again that found a server away
PATIENCE = 3600.0  # seconds of a job's life in which a server's absence costs it no attempt


@dataclass(frozen=True, slots=True)
class Hold:
    """What taking a job writes: an older ``token`` and ``epoch`` may not write any more."""

    token: UUID
    epoch: int
    attempt: int
    until: datetime


def claimable(
    state: str, *, run_after: datetime, lease_until: datetime | None, now: datetime
) -> bool:
    """Whether a worker may take the job: it is due, or the lease of its holder has run out."""
    if state == "leased":
        return lease_until is not None and lease_until < now
    return state == "due" and run_after <= now


def claim(epoch: int, attempts: int, *, token: UUID, until: datetime) -> Hold:
    """Take a job whose row says ``epoch`` and ``attempts``."""
    return Hold(token, epoch + 1, attempts + 1, until)


def held(state: str, present: tuple[UUID | None, int], mine: tuple[UUID, int]) -> bool:
    """The fence: whether the (token, epoch) of the row is still that of the one who asks."""
    return state == "leased" and present == mine


def after_error(attempt: int, *, attempts: int, now: datetime) -> datetime | None:
    """When a job that failed is due again; None if that was the last of its ``attempts``."""
    if attempt >= attempts:
        return None
    return now + timedelta(seconds=RETRY_AFTER * 2 ** (attempt - 1))


def after_absence(created: datetime, *, now: datetime) -> datetime | None:
    """When a job is due again that found a server away, which is not its fault: the attempt does
    not count. None if it has been patient for too long: then it counts as an error.
    """
    if now >= created + timedelta(seconds=PATIENCE):
        return None
    return now + timedelta(seconds=RETRY_WHEN_AWAY)
