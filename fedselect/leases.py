"""The rules of a job's lease as pure functions: who may take it, who holds it, when it comes back.

Owns decisions alone; time is an argument. Must not know rows: the coordinator and the simulation
ask the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

RETRY_AFTER = 2.0  # seconds until a failed job is tried again, doubled with every attempt


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
