"""Read-only views: evaluations, jobs and the ledger as the interface shows them.

Owns queries that change nothing. Must not write.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Select, select

from app import checkins, ledger, runs
from app.auth import Principal
from app.db import Tx
from app.errors import Missing
from app.tables import Client, EvaluationRecord, Job, Version
from fedselect.protocol import Checkpoint, Evaluation, JobInfo, LedgerEntry


def evaluations(tx: Tx, principal: Principal, run_id: UUID) -> list[Evaluation]:
    """All evaluations of a run's last version, by client name."""
    run = runs.get(tx, principal, run_id)
    query = (
        select(EvaluationRecord, Client.name, Version.number)
        .join(Client, Client.id == EvaluationRecord.client_id)
        .join(Version, Version.id == EvaluationRecord.version_id)
        .where(EvaluationRecord.run_id == run.id)
        .order_by(Client.name)
    )
    return [checkins.evaluation_document(*row) for row in tx.session.execute(query)]


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


def entries(tx: Tx, *, start: int, limit: int) -> list[LedgerEntry]:
    """Sealed ledger entries from ``seq`` start on.

    The ledger is one tree for the whole service; only an auditor's scope leads here.
    """
    rows = ledger.sealed_entries(tx, start=start, limit=limit)
    return [_entry(seal.seq, seal.leaf, ledger.document(seal.seq, entry)) for seal, entry in rows]


def _entry(seq: int, leaf: bytes, entry: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(seq=seq, leaf=leaf.hex(), entry=entry)


def checkpoint(tx: Tx, *, public_key: str) -> Checkpoint:
    """The newest signed head.

    Raises:
        Missing: nothing has been sealed yet.
    """
    found = ledger.newest_checkpoint(tx)
    if found is None:
        raise Missing("nothing has been sealed yet; ask again in a second", code="ledger_empty")
    return Checkpoint(text=found.text, public_key=public_key)
