"""How long things are kept: the rules as pure functions, and the reports of what went.

Owns which version's files must stay, and the documents of collections and erasures. Must not read
rows, clocks or the store: the coordinator collects the facts (``app.holds``) and acts on the answer
(``app.retention``).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from pydantic import Field

from fedselect.protocol import Answer


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Ages after which things may go; None keeps them for good.

    ``recompute_window`` counts from the publication of a version and protects the update files and
    masks of its manifest. ``unpublished`` counts from the end of a round without a version.
    ``orphans`` is how old something must be that no row names: longer than any work under way.
    """

    recompute_window: timedelta = timedelta(days=90)
    unpublished: timedelta = timedelta(days=7)
    quarantine: timedelta = timedelta(days=30)
    orphans: timedelta = timedelta(days=1)
    answers: timedelta = timedelta(days=7)
    evaluations: timedelta | None = None
    versions: timedelta | None = None


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What the rule may look at."""

    id: UUID
    number: int
    published_at: datetime
    mask_days: float | None = None  # ``Disclosure.mask_days`` of its run


def protected(
    version: VersionFacts, now: datetime, policy: RetentionPolicy, pinned: Container[UUID]
) -> bool:
    """Whether a version must stay recomputable, with every file that its manifest names.

    ``pinned`` are the versions that somebody points at: the newest of each arm, and what channels
    name. Number 0, from which a run starts, is never released. Where the run has promised its sites
    that masks go after some days, they do.
    """
    if version.number == 0:
        return True
    if version.mask_days is not None and now - version.published_at >= timedelta(version.mask_days):
        return False
    return version.id in pinned or now - version.published_at < policy.recompute_window


def expired(since: datetime, now: datetime, age: timedelta | None) -> bool:
    """Whether something from ``since`` has reached the age at which it may go."""
    return age is not None and now - since >= age


# --- documents -----------------------------------------------------------------------------------


class Collected(Answer):
    """How much of one kind went, or would go."""

    kind: str
    count: int
    bytes: int
    oldest: datetime


class Collection(Answer):
    """What a collection deleted, or with ``dry_run`` would delete now."""

    dry_run: bool
    kinds: list[Collected]


class ErasedFrom(Answer):
    """A published version whose sum holds an erased client's contribution, and always will."""

    id: UUID
    run_id: UUID
    number: int


class Erasure(Answer):
    """What a client's withdrawal deleted, and what remains of it and why.

    Counts are of all time, so that asking again gives the same answer.
    """

    client_id: UUID
    pseudonym: str = Field(description="What its name and tags were replaced with.")
    erased_at: datetime
    updates: int = Field(description="Accepted update files that are gone.")
    masks: int = Field(description="Masks that are gone.")
    evaluations: int = Field(description="Reports of scores that were deleted.")
    waiting: int = Field(
        description="Files that an open round or a mask of another client still holds; "
        "`fedselect gc` deletes them as soon as nothing does."
    )
    open_rounds: list[UUID] = Field(
        description="Rounds whose frozen manifest names an update of this client and will use it."
    )
    versions: list[ErasedFrom] = Field(
        description="Published versions that hold its contribution inside a sum; none of them can "
        "be recomputed any more."
    )
    ledger_entries: int = Field(description="Ledger entries that name its id; they stay.")
    stays: list[str] = Field(description="What stays, and why, in words.")
