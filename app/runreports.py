"""What a report of a run is made of: its rows in a fixed number of statements, and stored masks.

Owns these queries and how much of the store one report may read. What follows from it is
``fedselect.reporting``. Must not write. The store is read when the transaction is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from threading import BoundedSemaphore
from typing import Any
from uuid import UUID

from sqlalchemy import Select, extract, func, select

from app import runs
from app.auth import Principal
from app.db import Tx
from app.errors import Invalid, Missing, Unavailable
from app.storage import Storage
from app.tables import (
    Assignment,
    Client,
    EvaluationRecord,
    MaskRecord,
    Model,
    Round,
    Transition,
    Update,
    Upload,
    Version,
)
from app.wiring import Coordinator
from fedselect.errors import MaskError
from fedselect.evaluations import EvaluationReport
from fedselect.lifecycle import AssignmentState, RoundState
from fedselect.masks import Mask, packed_size
from fedselect.overlap import History, Stage, wanted
from fedselect.policies import RunSettings
from fedselect.protocol import ArmInfo, RunInfo
from fedselect.reportdoc import MaskReading, RunPart, RunReport
from fedselect.reporting import (
    Evaluated,
    Measured,
    Repeated,
    Stored,
    Work,
    assemble,
    budget,
    unlike,
    unlike_rerun,
)
from fedselect.space import ParameterSpace

MOST_CLIENTS = 100  # whose masks one report looks at, the first by name
MOST_ROUNDS = 100  # of each of them, evenly spread
MOST_MASKS = 500  # objects that one report reads
AT_ONCE = 2  # reports that a process makes at a time
PATIENCE = 5.0  # seconds that another one waits
_ROOM = BoundedSemaphore(AT_ONCE)
FAILED = [s.value for s in (RoundState.ABANDONED, RoundState.CANCELLED, RoundState.FAILED)]


@dataclass(frozen=True, slots=True)
class Found:
    """The rows of one run; ``keys`` are the objects of its masks, by digest."""

    run: RunPart
    settings: RunSettings
    space: ParameterSpace
    evaluations: list[Evaluated]
    work: Work
    every: int
    clients_known: int
    histories: list[History]
    keys: dict[str, str]
    now: datetime
    fedavg: UUID | None = None
    rerun: Repeated | None = None


@dataclass(frozen=True, slots=True)
class Others:
    """Runs to compare with: a FedAvg run, if not the run's own arm, and the same run with another
    seed.
    """

    fedavg: UUID | None = None
    rerun: UUID | None = None


NONE = Others()


def report(core: Coordinator, found: Found) -> RunReport:
    """The report of what :func:`find` has found, with the masks that may be read.

    Raises:
        Unavailable: the store is away, or as many reports are being made as there may be
            (``report_busy``): the masks of each are in memory.
    """
    with room():
        again = list(found.rerun.masks.values()) if found.rerun else []
        order = wanted(found.histories, besides=again)
        read, reading = read_masks(
            core.storage,
            order,
            found.keys,
            dim=found.space.dim,
            limit=core.settings.report_mask_bytes,
        )
        stored = Stored(found.every, found.clients_known, found.histories, read, reading)
        rows = (found.space, found.evaluations, found.work, stored, found.fedavg, found.rerun)
        measured = Measured(*rows)
        return assemble(found.run, found.settings, measured, made_at=found.now)


@contextmanager
def room() -> Iterator[None]:
    """Keep others from making too many reports at once.

    Raises:
        Unavailable: as many are being made as there may be (``report_busy``).
    """
    if not _ROOM.acquire(timeout=PATIENCE):
        raise Unavailable("other reports are being made; ask again", code="report_busy")
    try:
        yield
    finally:
        _ROOM.release()


def find(
    tx: Tx,
    principal: Principal,
    run_id: UUID,
    *,
    arm: str | None = None,
    others: Others = NONE,
) -> Found:
    """All rows that a report of an arm of this run (by default the first) is made of.

    Raises:
        Missing: there is no such run in the principal's project.
        Invalid: ``arm_unknown``; ``baseline_unfit``: the other one is not FedAvg at equal gradient
            steps; ``rerun_unfit``: or differs in more than its seed.
    """
    run = runs.get(tx, principal, run_id)
    whole = runs.info(tx, run)
    info = runs.of_arm(whole, arm)
    model = tx.session.get_one(Model, run.model_id)
    evaluations, version = _evaluations(tx, info.arm_id)
    fedavg = others.fedavg or _own_fedavg(info, whole)
    tuned = _tuned(tx, info, _named(tx, principal, fedavg))
    evaluations = [replace(each, tuned=tuned.get(each.client_id)) for each in evaluations]
    every = max(1, math.ceil(info.published / MOST_ROUNDS))
    rows = tx.session.execute(_masks(info.arm_id, info.published, every)).all()
    repeated, more = _repeated(tx, info, _named(tx, principal, others.rerun))
    return Found(
        run=_part(info, model, version),
        settings=info.settings,
        space=ParameterSpace.from_json(model.space),
        evaluations=evaluations,
        work=_work(tx, info.arm_id),
        every=every,
        clients_known=rows[0].known if rows else 0,
        histories=_histories(rows),
        keys={row.sha256: row.object_key for row in rows} | more,
        now=tx.now,
        fedavg=fedavg,
        rerun=repeated,
    )


def _named(tx: Tx, principal: Principal, run_id: UUID | None) -> RunInfo | None:
    """A run to compare with, if one is named."""
    return None if run_id is None else runs.info(tx, runs.get(tx, principal, run_id))


def _part(run: RunInfo, model: Model, version: int | None) -> RunPart:
    settings = run.settings
    return RunPart(
        id=run.id,
        name=run.name,
        model=model.name,
        policy=settings.policy.name,
        state=run.state,
        rounds=settings.rounds,
        published=run.published,
        version=version,
        elements=model.elements,
        seed=settings.seed,
        wire=settings.wire.encoding,
        budget=budget(settings.training),
    )


def _evaluations(tx: Tx, arm_id: UUID) -> tuple[list[Evaluated], int | None]:
    """The evaluations of the newest version that has any, and its number."""
    newest = (
        select(Version.id)
        .join(EvaluationRecord, EvaluationRecord.version_id == Version.id)
        .where(Version.arm_id == arm_id, EvaluationRecord.rollout_id.is_(None))
        .order_by(Version.number.desc())
        .limit(1)
        .scalar_subquery()
    )
    query = (
        select(EvaluationRecord.report, Client.id, Client.name, Version.number)
        .join(Client, Client.id == EvaluationRecord.client_id)
        .join(Version, Version.id == EvaluationRecord.version_id)
        .where(EvaluationRecord.version_id == newest, EvaluationRecord.rollout_id.is_(None))
        .order_by(Client.name)
    )
    rows = tx.session.execute(query).all()
    found = [Evaluated(r.id, r.name, EvaluationReport.model_validate(r.report)) for r in rows]
    return found, rows[0].number if rows else None


def _fedavg_arm(run: RunInfo, other: RunInfo) -> ArmInfo | None:
    """The arm of a run that is FedAvg at this one's gradient steps, if there is one."""
    return next(
        (
            arm
            for arm in other.arms
            if arm.id != run.arm_id
            and unlike(run.settings, other.settings.of_arm(arm.name)) is None
        ),
        None,
    )


def _own_fedavg(arm: RunInfo, run: RunInfo) -> UUID | None:
    """The run itself, if its clients also did FedAvg, in another arm."""
    return run.id if run.settings.parallel > 1 and _fedavg_arm(arm, run) else None


def _tuned(tx: Tx, run: RunInfo, other: RunInfo | None) -> dict[UUID, EvaluationReport]:
    """What the clients of a FedAvg run, or of the FedAvg arm of one, have reported of it."""
    if other is None:
        return {}
    arm = _fedavg_arm(run, other)
    why = unlike(run.settings, other.settings.of_arm(other.arms[0].name))
    if other.model_id != run.model_id:
        arm, why = None, "it is of another model"
    if arm is None:
        why = why or "it is this very arm"
        raise Invalid(f"run {other.name} is no baseline: {why}", code="baseline_unfit")
    return {each.client_id: each.report for each in _evaluations(tx, arm.id)[0]}


def _repeated(
    tx: Tx, arm: RunInfo, other: RunInfo | None
) -> tuple[Repeated | None, dict[str, str]]:
    """The clients' last masks in another run's arm of this name, and their objects by digest."""
    if other is None:
        return None, {}
    named = arm.settings.policy.name
    found = next((each for each in other.arms if each.name == named), None)
    why = f"it has no arm {named}"
    if other.model_id != arm.model_id:
        found, why = None, "it is of another model"
    if found is not None:
        why = unlike_rerun(arm.settings, other.settings.of_arm(found.name)) or ""
    if found is None or why:
        raise Invalid(f"run {other.name} is no rerun: {why}", code="rerun_unfit")
    rows = tx.session.execute(last_masks(found.id)).all()
    masks = {row.id: row.sha256 for row in rows}
    keys = {row.sha256: row.object_key for row in rows}
    return Repeated(other.id, other.name, other.settings.seed, masks), keys


def last_masks(arm_id: UUID, first: UUID | None = None) -> Select[Any]:
    """The last mask of an arm's clients in published rounds; that of the client ``first`` first."""
    latest = func.row_number().over(partition_by=Client.id, order_by=Round.number.desc())
    newest = (
        select(Client.id, Client.name, Round.number, MaskRecord.sha256, MaskRecord.object_key)
        .add_columns(latest.label("place"))
        .join(Update, Update.client_id == Client.id)
        .join(Round, Round.id == Update.round_id)
        .join(Version, Version.round_id == Round.id)
        .join(MaskRecord, MaskRecord.id == Update.mask_id)
        .where(Round.arm_id == arm_id, Update.withdrawn_at.is_(None), Client.erased_at.is_(None))
        .subquery()
    )
    order = [(newest.c.id == first).desc()] if first is not None else []
    query = select(newest).where(newest.c.place == 1)
    return query.order_by(*order, newest.c.name).limit(MOST_CLIENTS)


def _masks(arm_id: UUID, published: int, every: int) -> Select[Any]:
    """The masks of the chosen clients in every so many rounds; erased clients have none."""
    counted = (
        select(Update.client_id)
        .join(Version, Version.round_id == Update.round_id)
        .join(Round, Round.id == Update.round_id)
        .where(Round.arm_id == arm_id, Update.withdrawn_at.is_(None))
    )
    chosen = (
        select(Client.id, Client.name, func.count().over().label("known"))
        .where(Client.id.in_(counted), Client.erased_at.is_(None))
        .order_by(Client.name)
        .limit(MOST_CLIENTS)
        .subquery()
    )
    return (
        select(chosen.c.id, chosen.c.name, chosen.c.known, Round.number, MaskRecord.personal)
        .add_columns(MaskRecord.sha256, MaskRecord.object_key)
        .join(Update, Update.client_id == chosen.c.id)
        .join(Round, Round.id == Update.round_id)
        .join(Version, Version.round_id == Round.id)
        .join(MaskRecord, MaskRecord.id == Update.mask_id)
        .where(Round.arm_id == arm_id, Update.withdrawn_at.is_(None))
        .where((published - Round.number) % every == 0)
        .order_by(chosen.c.name, Round.number)
    )


def _histories(rows: Any) -> list[History]:
    stages: dict[tuple[UUID, str], list[Stage]] = {}
    for row in rows:
        stage = Stage(row.number, row.personal, row.sha256)
        stages.setdefault((row.id, row.name), []).append(stage)
    return [History(*client, each) for client, each in stages.items()]


# --- seconds and counts ------------------------------------------------------------------------


def _seconds(span: Any) -> Any:
    return extract("epoch", span)


def _work(tx: Tx, arm_id: UUID) -> Work:
    rounds = tx.session.execute(_rounds(arm_id)).one()
    clients = tx.session.execute(_deliveries(arm_id)).all()
    return Work(
        elapsed=None if rounds.elapsed is None else float(rounds.elapsed),
        collecting=float(rounds.collecting or 0),
        aggregating=float(rounds.aggregating or 0),
        rounds_timed=rounds.published,
        unpublished=rounds.failed,
        delivered=sum(row.delivered for row in clients),
        rejected=sum(row.rejected for row in clients),
        seconds={row.client_id: float(row.seconds) for row in clients},
    )


def _rounds(arm_id: UUID) -> Select[Any]:
    """How many rounds ended how, and where the time of the published ones went."""
    frozen = (  # a round that was taken up again froze once, the first time
        select(Transition.subject_id, func.min(Transition.created_at).label("at"))
        .join(Round, Round.id == Transition.subject_id)
        .where(Round.arm_id == arm_id, Transition.to_state == RoundState.AGGREGATING.value)
        .group_by(Transition.subject_id)
        .subquery()
    )
    good = Round.state == RoundState.PUBLISHED.value
    whole = func.max(Round.closed_at).filter(good) - func.min(Round.opened_at)
    return (
        select(
            func.count().filter(good).label("published"),
            func.count().filter(Round.state.in_(FAILED)).label("failed"),
            func.sum(_seconds(frozen.c.at - Round.opened_at)).filter(good).label("collecting"),
            func.sum(_seconds(Round.closed_at - frozen.c.at)).filter(good).label("aggregating"),
            _seconds(whole).label("elapsed"),
        )
        .select_from(Round)
        .outerjoin(frozen, frozen.c.subject_id == Round.id)
        .where(Round.arm_id == arm_id)
    )


def _deliveries(arm_id: UUID) -> Select[Any]:
    """What every client has delivered, and the time from being asked to a complete upload."""
    refused = Assignment.state == AssignmentState.REJECTED.value
    return (
        select(
            Assignment.client_id,
            func.count().label("delivered"),
            func.count().filter(refused).label("rejected"),
            func.sum(_seconds(Upload.completed_at - Assignment.created_at)).label("seconds"),
        )
        .join(Upload, Upload.assignment_id == Assignment.id)
        .where(Assignment.arm_id == arm_id, Upload.completed_at.is_not(None))
        .group_by(Assignment.client_id)
    )


# --- the store ---------------------------------------------------------------------------------


def read_masks(
    storage: Storage, order: Sequence[str], keys: Mapping[str, str], *, dim: int, limit: int
) -> tuple[dict[str, Mask], MaskReading]:
    """Masks over ``dim`` elements by digest, in this order of digests, until ``limit`` bytes are
    read; ``keys`` are their objects.
    """
    size = packed_size(dim)
    chosen = order[: min(MOST_MASKS, limit // size)]
    read: dict[str, Mask] = {}
    for digest in chosen:
        mask = _mask(storage, keys[digest], dim)
        if mask is not None and mask.digest == digest:
            read[digest] = mask
    return read, MaskReading(
        wanted=len(order),
        read=len(read),
        missing=len(chosen) - len(read),
        left_out=len(order) - len(chosen),
        read_bytes=size * len(read),
        limit_bytes=limit,
    )


def _mask(storage: Storage, key: str, dim: int) -> Mask | None:
    """A stored mask; None if it is gone, or is none."""
    try:
        return Mask.from_bytes(dim, storage.read(key, length=packed_size(dim) + 1))
    except (Missing, MaskError):
        return None
