"""Ablations: asking clients what their personal parts are worth, and keeping what they say.

Owns the ``ablations`` rows and who is asked. States change in ``rounds`` alone. What follows from
the numbers is ``fedselect.explaining``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Select, select

from app import catalog, checkins, rounds
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Invalid, Missing
from app.tables import AblationRecord, Assignment, Client, MaskRecord, Model, Run, Version
from fedselect.explaindocs import AblationCreate, AblationInfo, AblationReport, AblationsAsked
from fedselect.lifecycle import OPEN_ASSIGNMENTS, AssignmentEvent
from fedselect.policies import RunSettings
from fedselect.space import ParameterSpace


def ask(tx: Tx, principal: Principal, version_id: UUID, body: AblationCreate) -> AblationsAsked:
    """Give each client an assignment to ablate a version; one that is still open is not doubled.

    Raises:
        Missing: no such version, or no active client of that name.
        Conflict: ``ablation_unfit``: nothing of this version can be anybody's own.
        Gone: its file was deleted.
    """
    version = catalog.get_version(tx, principal, version_id)
    run = rounds.lock_run(tx, _run_of(tx, version))
    catalog.check_there(tx, version)
    clients = _clients(tx, version, body.clients)
    last = _last(tx, version.id)
    open_ones = {client for client, each in last.items() if each.state in OPEN_ASSIGNMENTS}
    deadline = tx.now + timedelta(seconds=body.deadline)
    asked = [client for client in clients if client not in open_ones]
    attempts = {client: last[client].attempt + 1 if client in last else 1 for client in asked}
    for attempt in sorted(set(attempts.values())):
        errand = rounds.Errand("ablate", deadline, f"ablate version {version.number}", attempt)
        mine = [client for client in asked if attempts[client] == attempt]
        rounds.send(tx, run, version, mine, errand)
    waiting = len(clients) - len(asked)
    return AblationsAsked(version_id=version.id, run_id=run.id, asked=len(asked), waiting=waiting)


def _run_of(tx: Tx, version: Version) -> UUID:
    if version.arm_id is None or version.number == 0:
        raise Conflict(
            "nobody has trained this version: nothing of it is anybody's own",
            code="ablation_unfit",
        )
    return catalog.run_of(tx, version.arm_id)


def _clients(tx: Tx, version: Version, names: list[str] | None) -> list[UUID]:
    """The active clients that have a mask of the version's arm, all or those of these names."""
    owned = select(MaskRecord.client_id).where(MaskRecord.arm_id == version.arm_id)
    query = select(Client.id, Client.name, Client.id.in_(owned).label("own")).where(
        Client.project_id == version.project_id, Client.state == "active"
    )
    query = query.where(Client.id.in_(owned) if names is None else Client.name.in_(names))
    found = tx.session.execute(query.order_by(Client.name)).all()
    unknown = sorted(set(names or ()) - {row.name for row in found})
    if unknown:
        raise Missing(f"there is no active client {unknown[0]!r} in this project")
    bare = [row.name for row in found if not row.own]
    if bare or not found:
        who = f"client {bare[0]!r}" if bare else "any active client"
        raise Conflict(f"nothing of this version is {who}'s own", code="ablation_unfit")
    return [row.id for row in found]


def _last(tx: Tx, version_id: UUID) -> dict[UUID, Assignment]:
    """The newest ablation of each client that was asked before."""
    query = listed(version_id).order_by(Assignment.attempt)
    return {each.client_id: each for each in tx.session.scalars(query)}


def listed(version_id: UUID) -> Select[Assignment]:
    """All that was asked of a version."""
    return select(Assignment).where(
        Assignment.version_id == version_id, Assignment.kind == "ablate"
    )


def infos(tx: Tx, rows: Sequence[Assignment]) -> list[AblationInfo]:
    """Ablations as the interface shows them."""
    query = (
        select(Assignment, Client.name, Version.number)
        .join(Client, Client.id == Assignment.client_id)
        .join(Version, Version.id == Assignment.version_id)
        .where(Assignment.id.in_([row.id for row in rows]))
        .order_by(Assignment.created_at, Assignment.id)
    )
    return [_info(*row) for row in tx.session.execute(query)]


def _info(row: Assignment, client: str, number: int) -> AblationInfo:
    names = set(AblationInfo.model_fields) - {"client_name", "version_number"}
    own = {name: getattr(row, name) for name in names}
    return AblationInfo(client_name=client, version_number=number, **own)


def report(tx: Tx, principal: Principal, assignment_id: UUID, body: AblationReport) -> AblationInfo:
    """Take what a client found; a repeated report changes nothing.

    Raises:
        Conflict: the assignment is not an ablation.
        Invalid: it names a tensor that the model has not.
        LifecycleError: the assignment is over.
    """
    assignment = checkins.locked(tx, principal, assignment_id)
    if assignment.kind != "ablate":
        raise Conflict(f"this assignment is to {assignment.kind}", code="assignment_kind")
    if tx.session.get(AblationRecord, assignment.id) is None:
        run = tx.session.get_one(Run, assignment.run_id)
        _check_names(tx, run, body)
        rounds.move_assignment(tx, assignment, AssignmentEvent.REPORT)
        settings = RunSettings.model_validate(run.settings)
        record = AblationRecord(
            assignment_id=assignment.id,
            project_id=assignment.project_id,
            run_id=assignment.run_id,
            client_id=assignment.client_id,
            version_id=assignment.version_id,
            report=body.disclosed(settings).model_dump(mode="json"),
            created_at=tx.now,
        )
        tx.session.add(record)
        tx.session.flush()
    (info,) = infos(tx, [assignment])
    return info


def _check_names(tx: Tx, run: Run, body: AblationReport) -> None:
    space = ParameterSpace.from_json(tx.session.get_one(Model, run.model_id).space)
    unknown = [tensor.name for tensor in body.tensors if tensor.name not in space.by_name]
    if unknown:
        raise Invalid(f"the model has no tensor {unknown[0]!r}", code="tensor_unknown")
