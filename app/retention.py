"""Retention: what is too old is deleted, its intent in the ledger before, the outcome after.

Owns the only deletions of registered objects, of quarantined files and of partial sums left behind.
A deletion has three steps: rows and ledger say what goes (one transaction), the store deletes, rows
and ledger say that it is gone. Whoever finds a deletion that was begun ends it. What may go is
decided in ``fedselect.retention`` and ``app.holds``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID, uuid4

from sqlalchemy import delete, func, or_, select, tuple_
from sqlalchemy.dialects.postgresql import insert

from app import holds, ledger, objects
from app.db import Tx
from app.errors import Unavailable
from app.settings import AppSettings
from app.storage import StoredObject
from app.tables import (
    AblationRecord,
    EvaluationRecord,
    IdempotentAnswer,
    Object,
    Round,
    Run,
    Version,
)
from app.wiring import Coordinator
from fedselect.retention import (
    Collected,
    Collection,
    RetentionPolicy,
    VersionFacts,
    expired,
    protected,
)

COLLECTOR = 0x5EED_0003  # advisory lock: one deletes, or one backs up
STORE_BATCH = 1000  # keys of one request to the store
ACTOR = "retention"
Item = TypeVar("Item")


def policy_of(settings: AppSettings) -> RetentionPolicy:
    """The operator's settings, given in days."""

    def days(value: float | None) -> timedelta | None:
        return None if value is None else timedelta(days=value)

    return RetentionPolicy(
        recompute_window=timedelta(days=settings.recompute_window),
        unpublished=timedelta(days=settings.retain_unpublished),
        quarantine=timedelta(days=settings.retain_quarantine),
        orphans=timedelta(days=settings.retain_orphans),
        answers=timedelta(days=settings.retain_answers),
        evaluations=days(settings.retain_evaluations),
        versions=days(settings.retain_versions),
    )


@contextmanager
def alone(core: Coordinator) -> Iterator[None]:
    """Let nobody else delete meanwhile; what others have left unfinished is finished first.

    Raises:
        Unavailable: somebody deletes or backs up at this moment (``retention_busy``).
    """
    with core.db.singleton(COLLECTOR) as mine:
        if not mine:
            raise Unavailable(
                "a deletion or a backup is under way; try again", code="retention_busy"
            )
        for deletion in _begun(core):
            carry_out(core, deletion)
        yield


def finish_begun(core: Coordinator) -> None:
    """End deletions that somebody has begun and not ended; almost always there are none."""
    if _begun(core):
        with core.db.singleton(COLLECTOR) as mine:
            for deletion in _begun(core) if mine else []:
                carry_out(core, deletion)


def collect(core: Coordinator, *, batches: int | None = None, strays: bool = False) -> Collection:
    """Delete what the policy lets go, in bounded batches; at most ``batches`` of them.

    ``strays`` also lists the whole store for objects that no row knows.

    Raises:
        Unavailable: somebody else deletes or backs up (``retention_busy``).
    """
    report = _Report()
    with alone(core):
        size = core.settings.gc_batch
        found = list(_listed(core, strays=strays))
        while batches is None or batches > 0:
            with core.db.transaction(ACTOR, "deletion.begin") as tx:
                deletion, part = _begin(tx, core.settings, found[:size], limit=size)
            found = found[size:]
            report.add(part)
            if deletion is not None:
                carry_out(core, deletion)
            batches = None if batches is None else batches - 1
            if not part and not found:
                break
    return report.document(dry_run=False)


def rehearse(core: Coordinator, *, strays: bool = False) -> Collection:
    """What :func:`collect` would delete now: the same steps, taken back before anything happens."""
    report = _Report()
    found = list(_listed(core, strays=strays))
    with core.db.transaction(ACTOR, "retention.rehearse") as tx:
        report.add(_begin(tx, core.settings, found, limit=None)[1])
        tx.session.rollback()
    return report.document(dry_run=True)


# --- the first step: decide, and write it down --------------------------------------------------

Part = list[tuple[str, int, datetime]]  # kind, bytes, since when


def _begin(
    tx: Tx, settings: AppSettings, found: list[StoredObject], *, limit: int | None
) -> tuple[UUID | None, Part]:
    policy = policy_of(settings)
    part = _retire(tx, policy, limit)
    tx.session.flush()
    old = (Object.claimed_at < tx.now - policy.orphans) & ~holds.needed(tx.now, policy)
    doomed = [*lock(tx, old, limit=limit), *register(tx, found)]
    part += [(_kind(row.key), row.size, row.claimed_at) for row in doomed]
    rows = _forget_evaluations(tx, policy, limit)
    deletion = doom(tx, doomed, cause="age", more={"evaluations": len(rows)})
    return deletion, part + rows + _forget_answers(tx, policy, limit)


def lock(tx: Tx, condition: holds.Condition, *, limit: int | None) -> list[Object]:
    """Live rows of the register that meet a condition, locked against who claims or keeps them.

    The condition is asked again under the lock: it may have been untrue since the first look.
    """
    live = Object.deletion_id.is_(None) & condition
    query = select(Object).where(live).order_by(Object.claimed_at).limit(limit)
    rows = tx.session.scalars(query.with_for_update(skip_locked=True)).all()
    again = select(Object.key).where(Object.key.in_([row.key for row in rows]), live)
    sure = set(tx.session.scalars(again))
    return [row for row in rows if row.key in sure]


def doom(
    tx: Tx,
    rows: Sequence[Object],
    *,
    cause: str,
    project: UUID | None = None,
    more: dict[str, int] | None = None,
) -> UUID | None:
    """Note in rows and ledger that these objects go; returns the deletion, None if nothing goes."""
    counts = {name: count for name, count in (more or {}).items() if count}
    if not rows and not counts:
        return None
    deletion = uuid4()
    for row in rows:
        row.deletion_id = deletion
    body = {"reason": cause, **_summary(rows), **counts}
    ledger.append(tx, "deletion.begun", f"deletion:{deletion}", project=project, body=body)
    if not rows:  # rows of the database alone: this transaction is the whole deletion
        ledger.append(tx, "deletion.done", f"deletion:{deletion}", project=project, body=counts)
    return deletion if rows else None


def _summary(rows: Sequence[Object]) -> dict[str, object]:
    keys = "\n".join(sorted(row.key for row in rows))
    return {
        "objects": len(rows),
        "bytes": sum(row.size for row in rows),
        "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(),
    }


def retire(tx: Tx, version: Version, *, cause: str) -> None:
    """Mark a version as no longer recomputable, for good."""
    version.recomputable = False
    body = {"number": version.number, "reason": cause, "manifest": version.manifest_sha256}
    subject = f"version:{version.id}"
    ledger.append(tx, "version.unrecomputable", subject, project=version.project_id, body=body)


def _retire(tx: Tx, policy: RetentionPolicy, limit: int | None) -> Part:
    days = Run.settings["disclosure"]["mask_days"].as_float()
    life = func.make_interval(0, 0, 0, 0, 0, 0, days * 86_400)  # seconds
    promised = Version.created_at + life <= tx.now
    query = (
        select(Version, days)
        .join(Round, Round.id == Version.round_id)
        .join(Run, Run.id == Round.run_id)
        .where(
            Version.recomputable,
            or_(Version.created_at <= tx.now - policy.recompute_window, promised),
        )
        .order_by(Version.created_at)
        .with_for_update(of=Version, skip_locked=True)
    )
    pinned = holds.pinned_versions(tx)
    released: Part = []
    for version, mask_days in tx.session.execute(query):
        facts = VersionFacts(version.id, version.number, version.created_at, mask_days)
        if len(released) == limit:
            break
        if not protected(facts, tx.now, policy, pinned):
            retire(tx, version, cause="window" if mask_days is None else "mask_days")
            released.append(("recomputability", 0, version.created_at))
    return released


def _forget_evaluations(tx: Tx, policy: RetentionPolicy, limit: int | None) -> Part:
    if policy.evaluations is None:
        return []
    found: list[EvaluationRecord | AblationRecord] = []
    for table in (EvaluationRecord, AblationRecord):
        query = (
            select(table)
            .join(Run, Run.id == table.run_id)
            .where(Run.state.in_(holds.ENDED_RUNS), table.created_at <= tx.now - policy.evaluations)
            .limit(limit)
        )
        found += tx.session.scalars(query)
    for record in found:
        tx.session.delete(record)
    return [("evaluations", 0, record.created_at) for record in found]


def _forget_answers(tx: Tx, policy: RetentionPolicy, limit: int | None) -> Part:
    """Idempotent answers are a cache, not a record: no ledger entry."""
    place = (IdempotentAnswer.caller, IdempotentAnswer.route, IdempotentAnswer.key)
    old = select(*place).where(IdempotentAnswer.created_at < tx.now - policy.answers).limit(limit)
    query = (
        delete(IdempotentAnswer)
        .where(tuple_(*place).in_(old))
        .returning(IdempotentAnswer.created_at)
    )
    return [("answers", 0, created) for created in tx.session.scalars(query)]


# --- what only the store knows of ----------------------------------------------------------------


def _listed(core: Coordinator, *, strays: bool) -> Iterator[StoredObject]:
    """Old quarantined files, partial sums of rounds that have ended, objects without a row."""
    policy = policy_of(core.settings)
    with core.db.transaction(ACTOR, "retention.listed") as tx:
        now = tx.now
    for entry in core.storage.entries("quarantine/"):
        if expired(entry.modified, now, policy.quarantine):
            yield entry
    partials = [
        e for e in core.storage.entries("partials/") if expired(e.modified, now, policy.orphans)
    ]
    yield from _of_ended_rounds(core, partials)
    for prefix in objects.PREFIXES if strays else ():
        old = (e for e in core.storage.entries(prefix) if expired(e.modified, now, policy.orphans))
        yield from _unknown(core, old)


def _of_ended_rounds(core: Coordinator, partials: list[StoredObject]) -> list[StoredObject]:
    if not partials:
        return []
    with core.db.transaction(ACTOR, "retention.of_ended_rounds") as tx:
        query = select(Round.id).where(Round.state.in_(holds.OPEN_ROUNDS))
        busy = {str(id) for id in tx.session.scalars(query)}
    return [entry for entry in partials if entry.key.split("/")[1] not in busy]


def _unknown(core: Coordinator, entries: Iterable[StoredObject]) -> Iterator[StoredObject]:
    for some in _batches(list(entries), STORE_BATCH):
        with core.db.transaction(ACTOR, "retention.unknown") as tx:
            live = Object.deleted_at.is_(None)
            query = select(Object.key).where(Object.key.in_([e.key for e in some]), live)
            known = set(tx.session.scalars(query))
        yield from (entry for entry in some if entry.key not in known)


def register(tx: Tx, found: Iterable[StoredObject]) -> list[Object]:
    """Rows for objects that have none, so that a crash forgets none of them either."""
    rows: list[Object] = []
    for entry in found:
        values = {"key": entry.key, "size": entry.size, "claimed_at": entry.modified}
        gone = {"deleted_at": None, "deletion_id": None, **values}
        query = (
            insert(Object)
            .values(values)
            .on_conflict_do_update(
                index_elements=["key"], set_=gone, where=Object.deleted_at.is_not(None)
            )
            .returning(Object)
        )
        rows += tx.session.scalars(query, execution_options={"populate_existing": True})
    return rows


# --- the other steps: do it, and write that down -------------------------------------------------


def _begun(core: Coordinator) -> list[UUID]:
    with core.db.transaction(ACTOR, "retention.begun") as tx:
        open_ones = Object.deletion_id.is_not(None) & Object.deleted_at.is_(None)
        query = select(Object.deletion_id).where(open_ones).distinct()
        return [id for id in tx.session.scalars(query) if id is not None]


def carry_out(core: Coordinator, deletion: UUID) -> None:
    """Delete what a deletion names and write down that it is gone; repeating it is harmless."""
    mine = (Object.deletion_id == deletion) & Object.deleted_at.is_(None)
    with core.db.transaction(ACTOR, "retention.carry_out") as tx:
        keys = list(tx.session.scalars(select(Object.key).where(mine)))
    for some in _batches(keys, STORE_BATCH):
        core.storage.delete(some)
    with core.db.transaction(ACTOR, "deletion.finish") as tx:
        rows = tx.session.scalars(select(Object).where(mine).with_for_update()).all()
        if not rows:
            return
        body = _summary(rows)
        named = objects.named_among(tx, [row.key for row in rows])
        for row in rows:  # a row that nothing names has no more to say
            if row.key in named:
                row.deleted_at = tx.now
            else:
                tx.session.delete(row)
        owners = {row.project_id for row in rows}
        owner = owners.pop() if len(owners) == 1 else None
        ledger.append(tx, "deletion.done", f"deletion:{deletion}", project=owner, body=body)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# --- the report ----------------------------------------------------------------------------------


def _kind(key: str) -> str:
    return key.partition("/")[0]


class _Report:
    def __init__(self) -> None:
        self._parts: dict[str, Part] = defaultdict(list)

    def add(self, part: Part) -> None:
        for item in part:
            self._parts[item[0]].append(item)

    def document(self, *, dry_run: bool) -> Collection:
        kinds = [
            Collected(
                kind=kind,
                count=len(items),
                bytes=sum(item[1] for item in items),
                oldest=min(item[2] for item in items),
            )
            for kind, items in sorted(self._parts.items())
        ]
        return Collection(dry_run=dry_run, kinds=kinds)
