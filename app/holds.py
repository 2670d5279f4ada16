"""What still needs an object: the protection rules as SQL over the register.

Owns the conditions under which an update file, a mask or a version file must stay. Whether a
*version* is protected is decided by ``fedselect.retention`` and noted in ``versions.recomputable``;
here that mark is read. Must not delete.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, and_, exists, or_, select, true
from sqlalchemy.orm import aliased

from app.db import Tx
from app.tables import (
    Arm,
    Assignment,
    Channel,
    Client,
    MaskRecord,
    Object,
    Rollout,
    Round,
    Run,
    Update,
    Upload,
    Version,
)
from fedselect.lifecycle import OPEN_ASSIGNMENTS, AssignmentState, RoundState, RunState
from fedselect.retention import RetentionPolicy
from fedselect.rollout import ACTIVE_ROLLOUTS

Condition = ColumnElement[bool]
# A failed round rests: an administrator may let it be aggregated again, from the same manifest.
OPEN_ROUNDS = [
    s.value
    for s in (
        RoundState.SELECTING,
        RoundState.COLLECTING,
        RoundState.AGGREGATING,
        RoundState.FAILED,
    )
]
OPEN_WORK = [s.value for s in (*OPEN_ASSIGNMENTS, AssignmentState.UPLOADED)]
ENDED_RUNS = [RunState.FINISHED.value, RunState.STOPPED.value]


def pinned_versions(tx: Tx) -> set[UUID]:
    """Versions that somebody points at: the ends of lines, channels and rollouts."""
    query = select(Version.id).where(or_(_newest(Version), _pointed_at()))
    return set(tx.session.scalars(query))


def _pointed_at() -> Condition:
    """That a channel points at the ``Version`` or can go back to it, or a rollout moves it."""
    channel = or_(Channel.version_id == Version.id, Channel.previous_id == Version.id)
    rollout = or_(Rollout.version_id == Version.id, Rollout.old_version_id == Version.id)
    active = Rollout.state.in_([state.value for state in ACTIVE_ROLLOUTS])
    return or_(exists().where(channel), exists().where(rollout, active))


def _newest(version: type[Version]) -> Condition:
    later = aliased(Version)
    follows = (later.arm_id == version.arm_id) & (later.number > version.number)
    return or_(version.number == 0, ~exists().where(follows))


def needed(now: datetime, policy: RetentionPolicy) -> Condition:
    """That some row which counts still needs the object of an ``objects`` row."""
    return or_(_by_an_update(now, policy), _by_a_mask(now, policy), _by_a_version(now, policy))


def _round_holds(now: datetime, policy: RetentionPolicy) -> Condition:
    """That a round still needs its updates; ``Round``, ``Update`` and ``Client`` are in the query.

    The erasure of a client ends it, except while the round is open: its sum is being made.
    """
    version = aliased(Version)
    published = exists().where(version.round_id == Round.id, version.recomputable)
    recent = Round.closed_at >= now - policy.unpublished
    unpublished = Round.state.in_([RoundState.ABANDONED.value, RoundState.CANCELLED.value])
    return or_(
        Round.state.in_(OPEN_ROUNDS),
        published,
        and_(unpublished, recent, Client.erased_at.is_(None)),
    )


def _by_an_update(now: datetime, policy: RetentionPolicy) -> Condition:
    query = (
        select(Update.id)
        .join(Round, Round.id == Update.round_id)
        .join(Client, Client.id == Update.client_id)
        .where(
            Update.object_key == Object.key,
            Update.withdrawn_at.is_(None),
            _round_holds(now, policy),
        )
    )
    return query.correlate(Object).exists()


def _by_a_mask(now: datetime, policy: RetentionPolicy) -> Condition:
    """The masks of updates that are needed, of open assignments, and the newest of each client."""
    later = aliased(MaskRecord)
    update = (
        select(Update.id)
        .join(Round, Round.id == Update.round_id)
        .join(Client, Client.id == Update.client_id)
        .where(
            Update.mask_id == MaskRecord.id,
            Update.withdrawn_at.is_(None),
            _round_holds(now, policy),
        )
    )
    work = exists().where(Assignment.mask_id == MaskRecord.id, Assignment.state.in_(OPEN_WORK))
    newest = ~exists().where(
        later.arm_id == MaskRecord.arm_id,
        later.client_id == MaskRecord.client_id,
        later.number > MaskRecord.number,
    )
    held = and_(
        newest,
        exists().where(
            Arm.id == MaskRecord.arm_id, Run.id == Arm.run_id, Run.state.not_in(ENDED_RUNS)
        ),
        exists().where(Client.id == MaskRecord.client_id, Client.erased_at.is_(None)),
    )
    any_of = or_(update.correlate(MaskRecord).exists(), work, held)
    return exists().where(MaskRecord.object_key == Object.key, any_of)


def _by_a_version(now: datetime, policy: RetentionPolicy) -> Condition:
    """Version files: pinned ones, bases of what must be recomputable, and what is not yet old.

    A version's delta file stays as long as the version's own.
    """
    child, work = aliased(Version), aliased(Assignment)
    base = or_(
        exists().where(Round.base_version_id == Version.id, Round.state.in_(OPEN_ROUNDS)),
        exists().where(
            Round.base_version_id == Version.id, child.round_id == Round.id, child.recomputable
        ),
    )
    in_use = exists().where(work.version_id == Version.id, work.state.in_(OPEN_WORK))
    young = Version.created_at >= now - policy.versions if policy.versions else true()
    any_of = or_(_newest(Version), _pointed_at(), Version.recomputable, base, in_use, young)
    mine = or_(Version.object_key == Object.key, Version.delta_key == Object.key)
    return exists().where(mine, any_of)


def verifying(project_id: UUID) -> Condition:
    """That a file of this project is being verified: its mask may be any of the project's."""
    return exists().where(Upload.project_id == project_id, Upload.state == "uploaded")
