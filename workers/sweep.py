"""What has to happen as time passes: deadlines, dropped doorbells, unsealed ledger entries.

Owns no state: every step looks at the rows, and acts after looking again under a lock. Each sweep
runs in one process at a time.
"""

from __future__ import annotations

import logging

from app import heads, jobs, ledger, logs, retention, rollouts, rounds
from app.errors import Unavailable
from app.ledger import BATCH
from app.wiring import Coordinator

SWEEPER, SEALER = 0x5EED_0001, 0x5EED_0002  # advisory locks
GRACE = 2.0  # seconds a doorbell gets before it is rung again
BATCHES = 20  # of one collection; the next one goes on
ACTOR = "scheduler"
log = logging.getLogger(__name__)


def sweep(core: Coordinator) -> None:
    """Tick rounds, end evaluations and ablations, judge rollouts, ring for jobs nobody took."""
    with core.db.singleton(SWEEPER) as mine:
        if not mine:
            return
        with core.db.transaction(ACTOR, "sweep.look") as tx:
            gathering, evaluating = rounds.overdue(tx)
            ablating = {each.run_id for each in rounds.overdue_ablations(tx)}
            forgotten = jobs.overdue(tx, grace=GRACE, limit=1000)
            rolling = rollouts.due(tx)
        for round_id in gathering:
            with logs.about(round=round_id), core.db.transaction(ACTOR, "sweep.tick") as tx:
                rounds.tick(tx, round_id)
        for run_id in evaluating:
            with (
                logs.about(run=run_id),
                core.db.transaction(ACTOR, "sweep.finish_evaluation") as tx,
            ):
                rounds.finish_evaluation(tx, run_id)
        for run_id in sorted(ablating):
            with logs.about(run=run_id), core.db.transaction(ACTOR, "sweep.ablations") as tx:
                rounds.expire_ablations(tx, run_id)
        if forgotten:
            core.bell.ring(forgotten)
        retention.finish_begun(core)
        for rollout_id in rolling:
            with core.db.transaction(ACTOR, "sweep.step_rollout") as tx:
                rollouts.step(tx, rollout_id)
        if forgotten:
            log.info("rang again for %d jobs", len(forgotten))


def seal(core: Coordinator) -> None:
    """Seal all entries that are waiting, and keep each signed head in the object store.

    Raises:
        LedgerError: the database is not the one whose heads were signed; nothing is sealed.
        Unavailable: the object store does not answer; nothing is sealed until it does.
    """
    with core.db.singleton(SEALER) as mine:
        if not mine:
            return
        head = _checked_head(core)
        sealed = BATCH
        while sealed == BATCH:
            with core.db.transaction(ACTOR, "seal") as tx:
                sealed = core.sealer.seal(tx)
                newest = ledger.newest_checkpoint(tx)
                head = newest.text if newest else head
            if head is not None:
                core.heads.keep(head)


def _checked_head(core: Coordinator) -> str | None:
    """The newest head, after comparing it with the stored one: none is signed behind that."""
    with core.db.transaction(ACTOR, "seal_look") as tx:
        newest = ledger.newest_checkpoint(tx)
    head = newest.text if newest else None
    stored = core.heads.latest(head)
    if stored is not None and stored != head:
        with core.db.transaction(ACTOR, "seal_compare") as tx:
            heads.check(tx, stored, ours=core.sealer.public_key)
    return head


def collect(core: Coordinator) -> None:
    """Delete what the retention rules let go, unless somebody else is at it."""
    try:
        found = retention.collect(core, batches=BATCHES)
    except Unavailable as error:
        log.info("nothing is collected now: %s", error)
        return
    for kind in found.kinds:
        log.info("collected %d %s, %d bytes", kind.count, kind.kind, kind.bytes)
