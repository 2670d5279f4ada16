"""Erasure: a client withdraws, and what it has sent is deleted.

Owns the order of the steps and the report. Deleting itself is ``app.retention``; what a sum already
holds cannot be taken out of it, and the report says so.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, update

from app import clients, holds, ledger, retention, rounds, updates
from app.db import Tx
from app.encrypted import either
from app.storage import StoredObject
from app.tables import (
    AblationRecord,
    Assignment,
    Client,
    Enrolment,
    Entry,
    EvaluationRecord,
    IdempotentAnswer,
    MaskRecord,
    Object,
    Round,
    Update,
    Upload,
    Version,
)
from app.wiring import Coordinator
from fedselect.lifecycle import GATHERING_ROUNDS, AssignmentEvent, AssignmentState
from fedselect.retention import ErasedFrom, Erasure, RetentionPolicy

STAYS = [
    "Ledger entries, transitions and manifests hold its id and the digests of its files: they are "
    "what makes every other client's history verifiable, and name nobody.",
    "Reasons that it gave for declining an assignment are part of the ledger's entries.",
    "Sums cannot be undone: the versions listed hold its contribution, added to that of others.",
    "Backups made before keep its files until they are destroyed.",
]


def erase(core: Coordinator, client_id: UUID, *, project: UUID, actor: str) -> Erasure:
    """Revoke a client and delete its files, masks, evaluations and ablations; repeat it at will.

    Raises:
        Missing: no such client in this project.
        Unavailable: somebody else deletes or backs up (``retention_busy``), or the store is away;
            what was begun is ended by the scheduler, or by asking again.
    """
    with core.db.transaction(actor, "erasure.find") as tx:
        clients.of_project(tx, project, client_id)  # 404 before anybody waits
    with retention.alone(core):
        with core.db.transaction(actor, "erasure.revoke") as tx:
            client = clients.of_project(tx, project, client_id, lock=True)
            clients.revoke(tx, client)
            runs = _open_runs(tx, client)  # under its lock: from here on it takes no more work
        sums: list[str] = []
        for run_id in runs:
            with core.db.transaction(actor, "erasure.end_work") as tx:
                sums += _end_work(tx, run_id, client_id)
        files = _unregistered(core, client_id, sums)
        with core.db.transaction(actor, "erasure.forget") as tx:
            client = clients.of_project(tx, project, client_id, lock=True)
            deletion = _forget(tx, client, files, retention.policy_of(core.settings))
        if deletion is not None:
            retention.carry_out(core, deletion)
    with core.db.transaction(actor, "erasure.report") as tx:
        return _report(tx, clients.of_project(tx, project, client_id))


def _open_runs(tx: Tx, client: Client) -> list[UUID]:
    query = select(Assignment.run_id).where(_under_way(client.id))
    return sorted(set(tx.session.scalars(query)))


def _under_way(client_id: UUID) -> ColumnElement[bool]:
    """What the client still has to do, and what it has done for a round that gathers."""
    gathering = select(Round.id).where(Round.state.in_([s.value for s in GATHERING_ROUNDS]))
    accepted = Assignment.state == AssignmentState.ACCEPTED.value
    counts = accepted & Assignment.round_id.in_(gathering)
    return (Assignment.client_id == client_id) & or_(Assignment.state.in_(holds.OPEN_WORK), counts)


def _end_work(tx: Tx, run_id: UUID, client_id: UUID) -> list[str]:
    """End what the client has under way in a run, as if it had never answered; returns the keys of
    partial sums that its updates are part of.
    """
    rounds.lock_run(tx, run_id)
    sums: list[str] = []
    query = select(Assignment).where(Assignment.run_id == run_id, _under_way(client_id))
    for assignment in tx.session.scalars(query).all():
        tx.session.refresh(assignment)  # ending the one before may have ended this one
        if assignment.state == AssignmentState.UPLOADED:
            rounds.reject(tx, assignment, reason="client_erased")
        elif assignment.state in holds.OPEN_WORK:
            rounds.move_assignment(tx, assignment, AssignmentEvent.EXPIRE, reason="client_erased")
        elif assignment.state == AssignmentState.ACCEPTED:
            sums += rounds.withdraw(tx, assignment, reason="client_erased")
        rounds.settle(tx, assignment)
    return sums


def _forget(
    tx: Tx, client: Client, files: list[StoredObject], policy: RetentionPolicy
) -> UUID | None:
    """Rows first: what is left then needs none of the client's objects, unless a round is open."""
    first = client.erased_at is None
    if first:
        client.erased_at, client.name, client.tags = tx.now, f"erased-{client.id}", []
        client.last_seen_at = None
    for version in tx.session.scalars(_versions(client).where(Version.recomputable)):
        retention.retire(tx, version, cause="client_erased")
    _forget_rows(tx, client)
    tx.session.flush()
    doomed = retention.lock(tx, _releasable(tx, client, policy), limit=None)
    doomed += retention.register(tx, files)
    if first:
        ledger.append(tx, "client.erased", f"client:{client.id}", project=client.project_id)
    return retention.doom(tx, doomed, cause="client_erased", project=client.project_id)


def _forget_rows(tx: Tx, client: Client) -> None:
    mine = Assignment.client_id == client.id
    enrolments = tx.session.scalars(select(Enrolment.id).where(Enrolment.client_id == client.id))
    callers = [f"client:{client.id}", *(f"enrolment:{id}" for id in enrolments)]
    own_uploads = Upload.assignment_id.in_(select(Assignment.id).where(mine))
    steps = (
        delete(EvaluationRecord).where(EvaluationRecord.client_id == client.id),
        delete(AblationRecord).where(AblationRecord.client_id == client.id),
        delete(IdempotentAnswer).where(IdempotentAnswer.caller.in_(callers)),
        update(Upload).where(own_uploads).values(detail=None),
        update(Update).where(Update.client_id == client.id).values(sketch=None),
        update(Assignment)
        .where(mine, Assignment.state == AssignmentState.DECLINED.value)
        .values(reason=None),
    )
    for step in steps:
        tx.session.execute(step, execution_options={"synchronize_session": False})


def _versions(client: Client) -> Select[Version]:
    query = select(Version).join(Update, Update.round_id == Version.round_id)
    counted = (Update.client_id == client.id) & Update.withdrawn_at.is_(None)
    return query.where(counted).order_by(Version.created_at)


def _releasable(tx: Tx, client: Client, policy: RetentionPolicy) -> holds.Condition:
    """The client's objects that nothing needs.

    While a file of the project is being verified, its mask may be the same bytes as one of these:
    masks are then left to the next collection, which waits longer than any verification.
    """
    masks = _keys(MaskRecord, client) & ~holds.verifying(client.project_id)
    return or_(_keys(Update, client), masks) & ~holds.needed(tx.now, policy)


def _unregistered(core: Coordinator, client_id: UUID, sums: list[str]) -> list[StoredObject]:
    """What lies in the store of the client's staged and refused files, and of partial ``sums`` that
    hold its updates; no register knows them.
    """
    query = (
        select(Upload)
        .join(Assignment, Assignment.id == Upload.assignment_id)
        .where(Assignment.client_id == client_id, Upload.state != "accepted")
    )
    with core.db.transaction("erasure", "erasure.unregistered") as tx:
        uploads = tx.session.scalars(query).all()
        keys = dict.fromkeys(sums, tx.now)
    for upload in uploads:
        for key in (upload.staging_key, *either(updates.quarantine_key(upload))):
            keys[key] = upload.created_at
    sizes = {key: core.storage.size(key) for key in keys}
    return [StoredObject(key, size, keys[key]) for key, size in sizes.items() if size is not None]


def _report(tx: Tx, client: Client) -> Erasure:
    if client.erased_at is None:
        raise RuntimeError("a report of an erasure that did not happen")
    updates, masks = _keys(Update, client), _keys(MaskRecord, client)
    name = f"client:{client.id}"
    versions = [
        ErasedFrom(id=version.id, run_id=run_id, number=version.number)
        for version, run_id in tx.session.execute(
            _versions(client).join(Round, Round.id == Version.round_id).add_columns(Round.run_id)
        )
    ]
    open_rounds = (
        select(Round.id)
        .join(Update, Update.round_id == Round.id)
        .where(
            Update.client_id == client.id,
            Update.withdrawn_at.is_(None),
            Round.state.in_(holds.OPEN_ROUNDS),
        )
    )
    scores = (Assignment.client_id == client.id) & (Assignment.kind != "train")
    reported = Assignment.state == AssignmentState.ACCEPTED.value
    return Erasure(
        client_id=client.id,
        pseudonym=client.name,
        erased_at=client.erased_at,
        updates=_count(tx, updates, Object.deleted_at.is_not(None)),
        masks=_count(tx, masks, Object.deleted_at.is_not(None)),
        evaluations=tx.session.scalar(select(func.count()).where(scores, reported)) or 0,
        waiting=_count(tx, or_(updates, masks), Object.deleted_at.is_(None)),
        open_rounds=list(tx.session.scalars(open_rounds)),
        versions=versions,
        ledger_entries=tx.session.scalar(
            select(func.count()).where(or_(Entry.actor == name, Entry.subject == name))
        )
        or 0,
        stays=STAYS,
    )


def _keys(table: type[Update | MaskRecord], client: Client) -> ColumnElement[bool]:
    return Object.key.in_(select(table.object_key).where(table.client_id == client.id))


def _count(tx: Tx, *conditions: ColumnElement[bool]) -> int:
    return tx.session.scalar(select(func.count()).select_from(Object).where(*conditions)) or 0
