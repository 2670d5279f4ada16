"""Jobs as rows, and the doorbell that tells a worker to look.

Owns enqueueing, leases, attempts and the Celery client (sending by name). A lost message loses
nothing, a repeated one changes nothing. Who may take a job and who holds it is decided in
``fedselect.leases``. Must not know what a job does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

from celery import Celery
from sqlalchemy import ColumnElement, case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from app import logs, metrics, tracing
from app.db import Tx
from app.errors import Refusal
from app.tables import Job
from fedselect import leases

RUN_JOB = "fedselect.run_job"
CAUSE = "fedselect-cause"  # header of a ring: the ids and the trace of what made the job due
RING_AGAIN = 5.0  # seconds between two rings for the same job
# A handler calls it while it works: it renews the lease now and then, and raises LeaseLost when
# another worker has the job. Calling it often costs nothing.
Progress = Callable[[], None]
log = logging.getLogger(__name__)


class LeaseLost(Refusal):
    """Another worker holds this job by now: whatever was computed must not be written."""

    code = "lease_lost"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a job until ``lease`` seconds have passed without renewal."""

    job_id: UUID
    project_id: UUID
    kind: str
    subject_id: UUID
    part: int
    token: UUID
    epoch: int
    attempt: int


def broker(redis_url: str) -> Celery:
    """The Celery application of both sides: JSON only, no results, quick to notice a dead Redis."""
    celery = Celery("fedselect", broker=redis_url, set_as_current=False)
    celery.conf.update(
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_soft_shutdown_timeout=10,  # a task that is cut off is done again after its lease
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=2,
        broker_transport_options={
            "visibility_timeout": 3600,  # far above the longest task
            # Look for messages of a dead worker each second, not every tenth time in ten seconds.
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "socket_timeout": 10,
            "socket_connect_timeout": 2,
        },
        timezone="UTC",
    )
    return celery


class Doorbell:
    """Rings over Redis."""

    def __init__(self, redis_url: str) -> None:
        self._celery = broker(redis_url)

    def ring(self, job_ids: Sequence[UUID]) -> None:
        """Send each id; if Redis is away the sweeper rings again later, for all that are left."""
        try:
            cause = {CAUSE: {**logs.current(), **tracing.carried()}}
            with self._celery.producer_pool.acquire(block=True) as producer:
                options = {"producer": producer, "ignore_result": True, "retry": False}
                for job_id in job_ids:
                    self._celery.send_task(RUN_JOB, args=[str(job_id)], headers=cause, **options)
        except Exception as error:  # vendor errors of three libraries; the row stays due
            metrics.BELL_ERRORS.inc()
            log.warning("doorbell unreachable: %s", type(error).__name__)

    def answers(self) -> bool:
        """Whether Redis takes rings at this moment."""
        try:
            with self._celery.connection_for_write(connect_timeout=2) as connection:
                connection.ensure_connection(max_retries=1, timeout=2)
        except Exception:  # as above
            return False
        return True


# --- rows --------------------------------------------------------------------------------------


def enqueue(tx: Tx, kind: str, subject: UUID, *, project: UUID, part: int = 0) -> None:
    """Write a job that is due now, and ring once the transaction is committed."""
    job = Job(
        id=uuid4(),
        project_id=project,
        kind=kind,
        subject_id=subject,
        part=part,
        run_after=tx.now,
        created_at=tx.now,
    )
    tx.session.add(job)
    tx.ring(job.id)


def require(tx: Tx, kind: str, subject: UUID, *, project: UUID, parts: Iterable[int]) -> None:
    """Have each part of a job done from now on: by a new row, or anew by one that is done.

    One that is due or leased stays as it is: before its handler ends, it looks under the lock of
    the row whether there is more to do. One that has failed stays failed.
    """
    place = {"project_id": project, "kind": kind, "subject_id": subject}
    fresh = {"state": "due", "attempts": 0, "run_after": tx.now}
    rows = [{"id": uuid4(), "part": p, "created_at": tx.now, **place, **fresh} for p in parts]
    query = insert(Job).values(rows)
    again = query.on_conflict_do_update(
        index_elements=["kind", "subject_id", "part"],
        set_={**fresh, "finished_at": None, "error": None},
        where=Job.state == "done",
    )
    for job_id in tx.session.scalars(again.returning(Job.id)):
        tx.ring(job_id)


def restart(tx: Tx, kind: str, subject: UUID) -> None:
    """Have all parts of a job done anew, whatever became of them; who holds one loses its lease."""
    anew = {"attempts": 0, "run_after": tx.now, "lease_token": None, "lease_until": None}
    mine = (Job.kind == kind) & (Job.subject_id == subject)
    query = update(Job).where(mine).values(state="due", finished_at=None, **anew)
    for job_id in tx.session.scalars(query.returning(Job.id)):
        tx.ring(job_id)


def claim(tx: Tx, job_id: UUID, *, seconds: float) -> Lease | None:
    """Take a due job, or one whose lease has run out; None if somebody else has it."""
    query = select(Job).where(Job.id == job_id).with_for_update(skip_locked=True)
    job = tx.session.scalars(query).first()
    if job is None or not leases.claimable(
        job.state, run_after=job.run_after, lease_until=job.lease_until, now=tx.now
    ):
        return None
    return _taken(tx, job, seconds)


def claim_next(tx: Tx, project: UUID, *, kinds: Sequence[str], seconds: float) -> Lease | None:
    """Take a due job of a project, the earlier kinds first; None if there is none."""
    due = (Job.state == "due") & (Job.run_after <= tx.now)
    order = case({kind: place for place, kind in enumerate(kinds)}, value=Job.kind)
    query = (
        select(Job)
        .where(due, Job.project_id == project, Job.kind.in_(kinds))
        .order_by(order, Job.run_after, Job.part)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job = tx.session.scalars(query).first()
    return None if job is None else _taken(tx, job, seconds)


def _taken(tx: Tx, job: Job, seconds: float) -> Lease:
    until = tx.now + timedelta(seconds=seconds)
    hold = leases.claim(job.lease_epoch, job.attempts, token=uuid4(), until=until)
    job.state, job.lease_token, job.lease_epoch = "leased", hold.token, hold.epoch
    job.attempts, job.lease_until = hold.attempt, hold.until
    place = (job.project_id, job.kind, job.subject_id, job.part)
    return Lease(job.id, *place, job.lease_token, job.lease_epoch, job.attempts)


def renew(tx: Tx, lease: Lease, *, seconds: float) -> None:
    """Hold the job for another lease.

    Raises:
        LeaseLost: somebody else holds it.
    """
    _held(tx, lease).lease_until = tx.now + timedelta(seconds=seconds)


def finish(tx: Tx, lease: Lease) -> None:
    """Mark the job done, in the very transaction that writes its result.

    Raises:
        LeaseLost: somebody else holds it, so nothing may be written.
    """
    job = _held(tx, lease)
    job.state, job.finished_at, job.lease_until = "done", tx.now, None
    seconds = (tx.now - job.created_at).total_seconds()
    tx.after_commit(partial(metrics.TURNAROUND.labels(job.kind).observe, seconds))


def give_back(tx: Tx, lease: Lease, error: str, *, attempts: int, away: bool = False) -> bool:
    """Return a job after an error; True if that was its last attempt and it has failed.

    ``away``: a server behind the service did not answer, which costs no attempt for a while.
    """
    job = _held(tx, lease)
    job.error, job.lease_until = error[:500], None
    later = leases.after_absence(job.created_at, now=tx.now) if away else None
    if later is not None:
        job.state, job.run_after, job.attempts = "due", later, lease.attempt - 1
        return False
    again = leases.after_error(lease.attempt, attempts=attempts, now=tx.now)
    if again is None:
        job.state, job.finished_at = "failed", tx.now
        return True
    job.state, job.run_after = "due", again
    return False


def overdue(tx: Tx, *, grace: float, limit: int) -> Sequence[UUID]:
    """Jobs that have been due for ``grace`` seconds, or orphaned: the bell must ring again.

    They are marked as rung: while the workers are busy or away, no heap of messages piles up.
    """
    quiet = or_(Job.rung_at.is_(None), Job.rung_at <= tx.now - timedelta(seconds=RING_AGAIN))
    query = select(Job.id).where(_open_since(tx, grace), quiet).order_by(Job.run_after)
    chosen = query.limit(limit).with_for_update(skip_locked=True)
    ring = update(Job).where(Job.id.in_(chosen)).values(rung_at=tx.now).returning(Job.id)
    return tx.session.scalars(ring).all()


def _open_since(tx: Tx, seconds: float) -> ColumnElement[bool]:
    """Due, and nobody took it for so long; or a lease has run out without a renewal."""
    due = (Job.state == "due") & (Job.run_after <= tx.now - timedelta(seconds=seconds))
    orphaned = (Job.state == "leased") & (Job.lease_until < tx.now)
    return or_(due, orphaned)


def stalled(tx: Tx, *, seconds: float) -> Job | None:
    """The oldest job that has been open for so long while no worker did anything; None if all is
    well: whoever works holds a lease, and whoever has just worked has finished something.
    """
    query = select(Job).where(_open_since(tx, seconds)).order_by(Job.run_after).limit(1)
    oldest = tx.session.scalars(query).first()
    if oldest is None:
        return None
    since = tx.now - timedelta(seconds=seconds)
    working = (Job.state == "leased") & (Job.lease_until >= since)
    active = select(Job.id).where(working | (Job.finished_at >= since)).limit(1)
    return None if tx.session.scalar(active) else oldest


def remaining(tx: Tx, kind: str, subject: UUID) -> int:
    """Parts of a job that are not done yet."""
    query = select(func.count()).where(
        Job.kind == kind, Job.subject_id == subject, Job.state != "done"
    )
    return tx.session.scalar(query) or 0


def hurry(tx: Tx, job: Job) -> None:
    """Have a due job done now, although it was to wait; its row must be locked."""
    job.run_after = tx.now
    tx.ring(job.id)


def known(tx: Tx, kind: str, subject: UUID) -> bool:
    """Whether there has ever been such a job."""
    query = select(Job.id).where(Job.kind == kind, Job.subject_id == subject).limit(1)
    return tx.session.scalar(query) is not None


def revive(tx: Tx, subject: UUID, *, kinds: Sequence[str]) -> None:
    """Make a subject's failed jobs due again, with a fresh count of attempts."""
    fresh = {"attempts": 0, "run_after": tx.now, "finished_at": None}
    failed = (Job.subject_id == subject) & (Job.state == "failed") & Job.kind.in_(kinds)
    query = update(Job).where(failed).values(state="due", **fresh).returning(Job.id)
    for job_id in tx.session.scalars(query):
        tx.ring(job_id)


def drop(tx: Tx, subject: UUID) -> None:
    """Finish what is still open for a subject that needs it no more (a cancelled round)."""
    tx.session.execute(
        update(Job)
        .where(Job.subject_id == subject, Job.state.in_(["due", "leased"]))
        .values(state="done", finished_at=tx.now, error="no longer needed", lease_until=None)
    )


def _held(tx: Tx, lease: Lease) -> Job:
    job = tx.session.scalars(select(Job).where(Job.id == lease.job_id).with_for_update()).one()
    present = (job.lease_token, job.lease_epoch)
    if not leases.held(job.state, present, (lease.token, lease.epoch)):
        raise LeaseLost(f"job {lease.job_id} is held by another worker")
    return job
