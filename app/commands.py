"""What an administrator orders: start, pause, resume and stop runs, cancel rounds, retry jobs.

Owns the order of the steps of each command. States change in ``rounds`` alone, under the run's
lock. Must not know HTTP.
"""

from __future__ import annotations

from uuid import UUID

from app import arms, jobs, reports, rounds, runs
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict
from app.tables import Job, Round, Run
from fedselect.errors import LifecycleError
from fedselect.lifecycle import AssignmentEvent, RoundEvent, RoundState, RunEvent, RunState
from fedselect.protocol import JobInfo, RoundInfo, RunInfo

ORDERS = frozenset({RunEvent.START, RunEvent.PAUSE, RunEvent.RESUME, RunEvent.STOP})


def command_run(tx: Tx, principal: Principal, run_id: UUID, event: RunEvent) -> RunInfo:
    """Start, pause, resume or stop a run; stopping ends the round or evaluation under way.

    Each is of all arms. A failed round is given up by ``stop`` and by ``resume``, which opens its
    next attempt; to have it published after all, retry its job.

    Raises:
        Missing: no such run in this project.
        LifecycleError: the state does not allow it.
        SettingsError: ``arm_too_small``: too few clients to be split at random among the arms.
    """
    if event not in ORDERS:
        raise LifecycleError(f"{event.value} is not an administrator's command")
    runs.get(tx, principal, run_id)
    run = rounds.lock_run(tx, run_id)
    if event is RunEvent.RESUME and run.state == RunState.PAUSED:
        _give_up_failed(tx, run)
    rounds.move_run(tx, run, event, reason="by an administrator")
    if event is RunEvent.START:
        arms.check_split(tx, run)
    if event in {RunEvent.START, RunEvent.RESUME}:
        rounds.open_idle_arms(tx, run)
    if event is RunEvent.STOP:
        for current in _active_rounds(tx, run):
            rounds.advance(tx, run, current, RoundEvent.CANCEL)
        for assignment in rounds.open_evaluations(tx, run):
            reason = "the run was stopped"
            rounds.move_assignment(tx, assignment, AssignmentEvent.EXPIRE, reason=reason)
    return runs.info(tx, run)


def _active_rounds(tx: Tx, run: Run) -> list[Round]:
    found = [rounds.active_round(tx, arm.id) for arm in arms.of_run(tx, run)]
    return [current for current in found if current is not None]


def _give_up_failed(tx: Tx, run: Run) -> None:
    # While the run is still paused, so that the cancelled round does not pause it again.
    for current in _active_rounds(tx, run):
        if current.state == RoundState.FAILED:
            rounds.advance(tx, run, current, RoundEvent.CANCEL)


def cancel_round(tx: Tx, principal: Principal, round_id: UUID) -> RoundInfo:
    """End a round without a version; the run pauses."""
    runs.get_round(tx, principal, round_id)
    rounds.apply(tx, round_id, RoundEvent.CANCEL)
    return runs.round_detail(tx, principal, round_id)


def retry_job(tx: Tx, principal: Principal, job_id: UUID) -> JobInfo:
    """Have a job done now: a due one at once, a failed one with a fresh count of attempts.

    A failed job of a round takes the round back to ``aggregating``, with the same manifest and
    whatever other jobs of it have failed, and resumes the run.

    Raises:
        Missing: no such job in this project.
        Conflict: it is being worked on, done, or has ended for good.
        LifecycleError: the round has been given up.
    """
    job = reports.job(tx, principal, job_id)
    of_a_round = tx.session.get(Round, job.subject_id) is not None
    run, current = rounds.lock_round(tx, job.subject_id) if of_a_round else (None, None)
    tx.session.refresh(job, with_for_update=True)
    if job.state == "due":
        jobs.hurry(tx, job)
    elif job.state != "failed" or run is None or current is None:
        raise _no_retry(job)
    else:
        rounds.advance(tx, run, current, RoundEvent.RETRY)
        if run.state == RunState.PAUSED:
            rounds.move_run(tx, run, RunEvent.RESUME, reason="a failed job is tried again")
            rounds.open_idle_arms(tx, run)
    tx.session.flush()
    return reports.job_info(job)


def _no_retry(job: Job) -> Conflict:
    if job.state == "done":
        return Conflict("the job is done: there is nothing to retry", code="job_done")
    if job.state == "leased":
        return Conflict(
            f"a worker has the job until {job.lease_until:%H:%M:%S} UTC, longer if it shows "
            "progress; if that worker has died, another one takes over then",
            code="job_leased",
        )
    return Conflict(
        "the upload was rejected when its verification failed, which is final; "
        "its sender may upload again: a client with its next attempt, an owner at once",
        code="job_final",
    )
