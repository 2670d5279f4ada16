"""Partial sums: how far the shards of gathering rounds have been added up.

Owns the ``partial_sums`` rows and the jobs that let them grow and go. A row is a cache: a sum that
is not what its round's updates begin with is not used (``fedselect.folding``). Must not add
anything, nor reach for the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, func, select

from app import jobs, manifests
from app.db import Tx
from app.tables import ManifestRecord, Model, PartialSum, Round, Run, Update
from fedselect import folding
from fedselect.manifestdocs import GROUP, SHARD, ManifestUpdate
from fedselect.policies import RunSettings

FOLD, DISCARD = "fold", "discard"


@dataclass(frozen=True, slots=True)
class Plan:
    """One shard of a round that gathers: ``updates`` fill whole groups; ``known`` is a sum of the
    first of them, None if there is none that fits.
    """

    elements: int
    shard: int
    updates: Sequence[ManifestUpdate]
    known: PartialSum | None

    @property
    def groups(self) -> int:
        """How many groups there are to add up."""
        return folding.whole_groups(len(self.updates))


def grown(tx: Tx, run: Run, current: Round, *, at_least: int) -> None:
    """After an acceptance: make the folding of every shard due if that completed a group."""
    accepted = _accepted(tx, current.id)
    if accepted % GROUP:
        return
    settings = RunSettings.model_validate(run.settings)
    if settings.privacy.dp is not None or settings.influence is not None:
        return  # what an update counts for is known when the round closes
    goal = settings.round.goal
    elements = tx.session.get_one(Model, run.model_id).elements
    if folding.due(accepted, elements=elements, goal=goal, at_least=at_least):
        parts = range(-(-elements // SHARD))
        jobs.require(tx, FOLD, current.id, project=current.project_id, parts=parts)


def plan(tx: Tx, round_id: UUID, part: int) -> Plan:
    """What the sum of a shard should hold by now."""
    current = tx.session.get_one(Round, round_id)
    run = tx.session.get_one(Run, current.run_id)
    elements = tx.session.get_one(Model, run.model_id).elements
    policy = RunSettings.model_validate(run.settings).round
    updates = manifests.accepted(tx, current.id, policy)
    whole = updates[: GROUP * folding.whole_groups(len(updates))]
    return Plan(elements, SHARD, whole, fitting(tx, round_id, part, whole, shard=SHARD))


def fitting(
    tx: Tx, round_id: UUID, part: int, updates: Sequence[ManifestUpdate], *, shard: int
) -> PartialSum | None:
    """The shard's sum, if it is what the sum of these updates begins with."""
    row = tx.session.get(PartialSum, (round_id, part))
    if row is None or not folding.fits(row.digest, row.groups, updates, shard=shard, part=part):
        return None
    return row


def keep(tx: Tx, lease: jobs.Lease, done: Plan, *, key: str) -> str | None:
    """The fenced end of folding a shard; returns the key of the sum that was there before.

    Raises:
        LeaseLost: another worker holds the job, or the round has closed.
    """
    jobs.finish(tx, lease)
    row = tx.session.get(PartialSum, (lease.subject_id, lease.part))
    before = None if row is None else row.object_key
    if row is None:
        row = PartialSum(
            round_id=lease.subject_id, part=lease.part, project_id=lease.project_id, groups=0
        )
        tx.session.add(row)
    row.groups, row.object_key, row.created_at = done.groups, key, tx.now
    row.digest = folding.prefix_digest(done.updates, done.groups, shard=done.shard, part=lease.part)
    _go_on(tx, lease, done)
    return before


def nothing_new(tx: Tx, lease: jobs.Lease, done: Plan) -> None:
    """The end of folding a shard whose sum holds all there is.

    Raises:
        LeaseLost: another worker holds the job, or the round has closed.
    """
    jobs.finish(tx, lease)
    _go_on(tx, lease, done)


def _go_on(tx: Tx, lease: jobs.Lease, done: Plan) -> None:
    # Whoever accepts an update makes the job due under the lock of its row, which we hold: what was
    # accepted while we worked is seen either here or there.
    tx.session.flush()
    if folding.whole_groups(_accepted(tx, lease.subject_id)) > done.groups:
        parts = [lease.part]
        jobs.require(tx, FOLD, lease.subject_id, project=lease.project_id, parts=parts)


def withdrawn(tx: Tx, run: Run, current: Round) -> list[str]:
    """After a withdrawal: forget the sums that hold it, and form them anew; whoever is forming one
    loses its lease. Returns the keys of what is forgotten.
    """
    policy = RunSettings.model_validate(run.settings).round
    updates = manifests.accepted(tx, current.id, policy)
    doomed = []
    for row in tx.session.scalars(select(PartialSum).where(PartialSum.round_id == current.id)):
        if not folding.fits(row.digest, row.groups, updates, shard=SHARD, part=row.part):
            doomed.append(row.object_key)
            tx.session.delete(row)
    jobs.restart(tx, FOLD, current.id)
    return doomed


def discard(tx: Tx, ended: Round) -> None:
    """Have everything deleted that was summed for a round which has ended."""
    query = delete(PartialSum).where(PartialSum.round_id == ended.id)
    tx.session.execute(query)
    frozen = tx.session.get(ManifestRecord, ended.id) is not None
    if frozen or jobs.known(tx, FOLD, ended.id):
        jobs.enqueue(tx, DISCARD, ended.id, project=ended.project_id)


def _accepted(tx: Tx, round_id: UUID) -> int:
    counts = (Update.round_id == round_id) & Update.withdrawn_at.is_(None)
    return tx.session.scalar(select(func.count()).where(counts)) or 0
