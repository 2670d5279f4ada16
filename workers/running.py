"""Running one job: claim it, do it, give it back if that fails.

Owns the table of job kinds and what the end of all attempts means. Must not know how a job does
its work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from uuid import UUID

from app import conduct, jobs, ledger, logs, metrics, rounds, sums, tracing, updates
from app.db import Tx
from app.errors import Unavailable
from app.jobs import Lease, Progress
from app.wiring import Coordinator
from fedselect.errors import LifecycleError
from fedselect.lifecycle import RoundEvent
from workers import aggregation, folding, verify

log = logging.getLogger(__name__)
Handler = Callable[[Coordinator, Lease, Progress], None]
HANDLERS: dict[str, Handler] = {
    updates.VERIFY: verify.verify,
    sums.FOLD: folding.fold,
    "aggregate": aggregation.aggregate_part,
    "publish": aggregation.publish,
    sums.DISCARD: folding.discard,
    conduct.CONDUCT: lambda core, lease, _: judge_conduct(core, lease),
}
# What a worker goes on with by itself, before it hears the next bell; the first of them first.
ROUNDS_OWN = ("publish", "aggregate", sums.FOLD, sums.DISCARD)
SPARED = frozenset({sums.FOLD, sums.DISCARD})  # a round does without these
ACTOR = "worker"


def judge_conduct(core: Coordinator, lease: Lease) -> None:
    """Look at a client's refusals, and suspend it if the rules say so."""
    with core.db.transaction(ACTOR, "conduct.judge") as tx:
        conduct.judge(tx, lease)


class Renewal:
    """A handler's sign of life. No thread beats for it: a handler that hangs loses its job.

    At most one transaction per quarter of a lease; raises :class:`jobs.LeaseLost`.
    """

    def __init__(
        self, core: Coordinator, lease: Lease, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._core = core
        self._clock = clock
        self._lease = lease
        self._every = core.settings.lease / 4
        self._due = clock() + self._every

    def __call__(self) -> None:
        """Renew the lease if that is due."""
        if self._clock() < self._due:
            return
        with self._core.db.transaction(ACTOR, "job.renew") as tx:
            jobs.renew(tx, self._lease, seconds=self._core.settings.lease)
        self._due = self._clock() + self._every


def answer(core: Coordinator, job_id: UUID, cause: Mapping[str, str] | None = None) -> None:
    """Do a job if it is still due, and then what is due of its project's rounds.

    Behind a bell wait all that rang before. What a round needs must not wait there: sums keep step
    with what is verified, and the shards of a closing round follow each other at once. ``cause``:
    the ids and the trace of what made the job due, if the ring tells.
    """
    lease = run_job(core, job_id, cause)
    trace = {"traceparent": (cause or {}).get("traceparent", "")}
    while lease is not None:
        with core.db.transaction(ACTOR, "job.claim") as tx:
            seconds = core.settings.lease
            lease = jobs.claim_next(tx, lease.project_id, kinds=ROUNDS_OWN, seconds=seconds)
        if lease is not None:
            _work(core, lease, trace)


def run_job(
    core: Coordinator, job_id: UUID, cause: Mapping[str, str] | None = None
) -> Lease | None:
    """Do a job if it is still due; whoever rings twice is answered once (the second time, None)."""
    with core.db.transaction(ACTOR, "job.claim") as tx:
        lease = jobs.claim(tx, job_id, seconds=core.settings.lease)
    if lease is not None:
        _work(core, lease, cause or {})
    return lease


def _work(core: Coordinator, lease: Lease, cause: Mapping[str, str]) -> None:
    """Attempt a job, and write down what became of it."""
    ids = {name: cause.get(name) for name in logs.FIELDS}
    own = {"job": lease.job_id, "project": lease.project_id}
    with (
        logs.about(**{**ids, **own}),
        tracing.span(f"job {lease.kind}", kind="consumer", parent=cause) as span,
    ):
        begun = time.perf_counter()
        outcome = _attempt(core, lease)
        seconds = time.perf_counter() - begun
        span.say(**own, attempt=lease.attempt, outcome=outcome)
        metrics.JOBS.labels(lease.kind, outcome).observe(seconds)
        log.info("job %s, attempt %d: %s in %.3f s", lease.kind, lease.attempt, outcome, seconds)


def _attempt(core: Coordinator, lease: Lease) -> str:
    """Do the job's work; what became of it, as the metrics call it."""
    try:
        _check_attempts(lease, core.settings.job_attempts)
        HANDLERS[lease.kind](core, lease, Renewal(core, lease))
    except jobs.LeaseLost:
        log.warning("job %s %s: the lease was lost", lease.kind, lease.job_id)
        return "lost"
    except Exception as error:
        log.exception("job %s %s, attempt %d", lease.kind, lease.job_id, lease.attempt)
        return _give_back(core, lease, error)
    return "done"


def _check_attempts(lease: Lease, most: int) -> None:
    # Only a worker that dies leaves an attempt uncounted by give_back: this stops a poison job.
    if lease.attempt > most:
        raise RuntimeError("every attempt ended with the death of its worker")


def _give_back(core: Coordinator, lease: Lease, error: Exception) -> str:
    try:
        with core.db.transaction(ACTOR, "job.give_back") as tx:
            _lock_subject(tx, lease)
            text = f"{type(error).__name__}: {error}"
            most, away = core.settings.job_attempts, isinstance(error, Unavailable)
            failed = jobs.give_back(tx, lease, text, attempts=most, away=away)
            if failed:
                _after_failure(tx, lease, type(error).__name__)
    except jobs.LeaseLost:
        log.warning("job %s %s: the lease was lost", lease.kind, lease.job_id)
        return "lost"
    return "failed" if failed else "given_back"


def _lock_subject(tx: Tx, lease: Lease) -> None:
    # Locks are taken in one order everywhere: run, round, assignment, job.
    if lease.kind == updates.VERIFY:
        updates.lock(tx, lease.subject_id)
    elif lease.kind != conduct.CONDUCT:  # whose subject is a client, of no round
        rounds.lock_round(tx, lease.subject_id)


def _after_failure(tx: Tx, lease: Lease, error: str) -> None:
    body = {"kind": lease.kind, "attempts": lease.attempt, "error": error}
    ledger.append(tx, "job.failed", f"job:{lease.job_id}", project=lease.project_id, body=body)
    if lease.kind == updates.VERIFY:
        updates.give_up(tx, lease)
    if lease.kind in {updates.VERIFY, conduct.CONDUCT, *SPARED}:
        return
    try:
        rounds.apply(tx, lease.subject_id, RoundEvent.FAIL)
    except LifecycleError:
        log.info("round %s had ended before its job failed", lease.subject_id)
