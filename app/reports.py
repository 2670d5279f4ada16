"""Read-only views: evaluations, jobs and the ledger as the interface shows them.

Owns queries that change nothing. Must not write.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Select, select

from app import evaluations, ledger, runs
from app.auth import Principal
from app.db import Tx
from app.errors import Missing
from app.tables import Arm, Client, Entry, EvaluationRecord, Job, Seal, Version
from fedselect.audit import KEY_ROTATED
from fedselect.evaluations import Evaluation
from fedselect.ledgerdocs import Checkpoint, LedgerEntry, LedgerKeys
from fedselect.protocol import JobInfo


def evaluations_of(tx: Tx, principal: Principal, run_id: UUID) -> Select[EvaluationRecord]:
    """A run's evaluations of its last version.

    Raises:
        Missing: there is no such run.
    """
    run = runs.get(tx, principal, run_id)
    return select(EvaluationRecord).where(
        EvaluationRecord.run_id == run.id, EvaluationRecord.rollout_id.is_(None)
    )


def evaluation_infos(tx: Tx, rows: Sequence[EvaluationRecord]) -> list[Evaluation]:
    """Evaluations as the interface shows them."""
    query = (
        select(EvaluationRecord, Client.name, Version, Arm.name)
        .join(Client, Client.id == EvaluationRecord.client_id)
        .join(Version, Version.id == EvaluationRecord.version_id)
        .outerjoin(Arm, Arm.id == Version.arm_id)
        .where(EvaluationRecord.assignment_id.in_([row.assignment_id for row in rows]))
        .order_by(EvaluationRecord.created_at, EvaluationRecord.assignment_id)
    )
    return [evaluations.document(*row) for row in tx.session.execute(query)]


def jobs(principal: Principal, state: str | None) -> Select[Job]:
    """The principal's jobs, of one state or all."""
    query = select(Job).where(Job.project_id == principal.project_id)
    return query.where(Job.state == state) if state else query


def job(tx: Tx, principal: Principal, job_id: UUID) -> Job:
    """A job of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = select(Job).where(Job.id == job_id, Job.project_id == principal.project_id)
    found = tx.session.scalars(query).first()
    if found is None:
        raise Missing(f"there is no job {job_id} in this project")
    return found


def job_info(job: Job) -> JobInfo:
    """The job as the interface shows it."""
    return JobInfo.model_validate(job, from_attributes=True)


def entries(tx: Tx, principal: Principal, *, start: int, limit: int) -> list[LedgerEntry]:
    """Sealed ledger entries from ``seq`` start on.

    The ledger is one tree for the whole service. Of what is not the principal's project's (nor
    about the ledger itself) only the leaf hash is shown, so that the tree still verifies.
    """
    rows = ledger.sealed_entries(tx, start=start, limit=limit)
    return [_entry(principal, seal, entry) for seal, entry in rows]


def _entry(principal: Principal, seal: Seal, entry: Entry) -> LedgerEntry:
    own = entry.project_id == principal.project_id or entry.action == KEY_ROTATED
    shown = ledger.document(seal.seq, entry) if own else None
    return LedgerEntry(seq=seal.seq, leaf=seal.leaf.hex(), entry=shown)


def checkpoint(tx: Tx, *, public_key: str) -> Checkpoint:
    """The newest signed head; ``public_key`` is the service's own.

    Raises:
        Missing: nothing has been sealed yet.
    """
    found = ledger.newest_checkpoint(tx)
    if found is None:
        raise Missing("nothing has been sealed yet; ask again in a second", code="ledger_empty")
    return Checkpoint(text=found.text, public_key=ledger.key_of(tx, found, public_key))


def ledger_keys(tx: Tx, *, public_key: str) -> LedgerKeys:
    """The key that signs the ledger, and how it came to that."""
    known = ledger.rotations(tx)
    key = known[-1]["new"] if known else public_key
    return LedgerKeys(public_key=key, statements=[body["statement"] for body in known])
