"""Runs: creating them and looking at them.

Owns creation and reading of runs, arms and rounds; their states change in ``rounds`` alone, and
what an administrator orders is in ``commands``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Select, func, select

from app import arms, catalog, cohorts, ledger
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Invalid, Missing
from app.tables import Arm, Assignment, Client, ManifestRecord, Model, Round, Run, Upload, Version
from fedselect import __version__, accounting, growth
from fedselect.errors import SettingsError
from fedselect.lifecycle import RunState
from fedselect.noise import commitment, run_secret
from fedselect.policies import RunSettings
from fedselect.protocol import (
    ArmInfo,
    AssignmentInfo,
    RoundDetail,
    RoundInfo,
    RunCreate,
    RunInfo,
)
from fedselect.space import ParameterSpace


def create(tx: Tx, principal: Principal, body: RunCreate, *, noise: bytes | None = None) -> RunInfo:
    """Create a run with its arms, whose versions 0 are the model's initial weights.

    ``noise`` is the coordinator's secret that a run with differential privacy needs.

    Raises:
        Missing: no such model.
        Conflict: the name is taken, or the model has no weights yet.
        SpaceError: the policy does not fit the model.
        SettingsError: secure_prototype, pooled_prototype, privacy_useless, accountant_missing or
            noise_key_missing.
    """
    model = catalog.get_model(tx, principal, body.model_id)
    space = ParameterSpace.from_json(model.space)
    for policy in body.settings.policies:
        growth.bounds(policy, space)
    _refuse_prototype(body.settings)
    accounting.check_useful(body.settings, space)
    initial = catalog.initial_version(tx, model.id)
    if initial is None:
        raise Conflict(
            "the model has no verified initial weights yet; upload them first",
            code="model_without_weights",
        )
    if body.cohort_id is not None:
        cohorts.get(tx, principal, body.cohort_id)
    settings = _settled(tx, principal, body)
    run_id = uuid4()
    run = Run(
        id=run_id,
        noise_commitment=_commitment(settings, run_id, noise),
        project_id=principal.project_id,
        model_id=model.id,
        cohort_id=body.cohort_id,
        name=body.name,
        settings=settings.model_dump(mode="json"),
        state=RunState.CREATED.value,
        created_at=tx.now,
    )
    taken = Conflict(f"there is already a run named {body.name!r}", code="run_name_taken")
    tx.insert(run, taken=taken)
    for policy in settings.policies:
        _add_arm(tx, run, policy.name, initial)
    ledger.append(
        tx,
        "run.created",
        f"run:{run.id}",
        project=run.project_id,
        body={
            "name": run.name,
            "model": str(model.id),
            "base": initial.sha256,
            # Ledger entries hold no floats: their text form depends on who writes them.
            "settings": settings.model_dump_json(),
            **({"cohort": str(body.cohort_id)} if body.cohort_id else {}),
            **({"noise": run.noise_commitment} if run.noise_commitment else {}),
        },
    )
    return info(tx, run)


def _settled(tx: Tx, principal: Principal, body: RunCreate) -> RunSettings:
    """The settings with the mode of their arms, which may depend on how many clients there are."""
    settings = body.settings
    if settings.arms is None:
        return settings
    clients = len(arms.clients_in(tx, principal.project_id, body.cohort_id))
    return settings.model_copy(update={"arms": settings.arms.settled(clients)})


def _refuse_prototype(settings: RunSettings) -> None:
    if settings.privacy.secure is not None:
        raise SettingsError(
            "secure aggregation is a prototype that only simulations run "
            "(docs/SECURE-AGGREGATION.md): leave out privacy.secure",
            code="secure_prototype",
        )
    if any(policy.pooled is not None for policy in settings.policies):
        raise SettingsError(
            "agreement over clients is measured by simulations only, the service sums no movements "
            "(docs/POLICIES.md): leave out policy.pooled",
            code="pooled_prototype",
        )


def _commitment(settings: RunSettings, run_id: UUID, noise: bytes | None) -> str | None:
    if settings.privacy.dp is None:
        return None
    if noise is None:
        raise SettingsError(
            "noise must come from a secret that only the coordinator has: set NOISE_KEY "
            "(docs/DEPLOY.md), then create the run again",
            code="noise_key_missing",
        )
    return commitment(run_secret(noise, str(run_id)))


def _add_arm(tx: Tx, run: Run, name: str, base: Version) -> None:
    arm = Arm(id=uuid4(), run_id=run.id, name=name, created_at=tx.now)
    tx.session.add(arm)
    tx.session.flush()
    version = Version(
        id=uuid4(),
        project_id=run.project_id,
        model_id=run.model_id,
        arm_id=arm.id,
        parent_id=base.id,
        number=0,
        object_key=base.object_key,
        sha256=base.sha256,
        size=base.size,
        code_version=__version__,
        created_at=tx.now,
    )
    tx.session.add(version)
    tx.session.flush()


def get(tx: Tx, principal: Principal, run_id: UUID) -> Run:
    """A run of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = select(Run).where(Run.id == run_id, Run.project_id == principal.project_id)
    run = tx.session.scalars(query).first()
    if run is None:
        raise Missing(f"there is no run {run_id} in this project")
    return run


def get_round(tx: Tx, principal: Principal, round_id: UUID) -> Round:
    """A round of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = select(Round).where(Round.id == round_id, Round.project_id == principal.project_id)
    found = tx.session.scalars(query).first()
    if found is None:
        raise Missing(f"there is no round {round_id} in this project")
    return found


def info(tx: Tx, run: Run) -> RunInfo:
    """The run as the interface shows it."""
    return infos(tx, [run])[0]


def infos(tx: Tx, found: list[Run]) -> list[RunInfo]:
    """Runs as the interface shows them, with one query for all of them."""
    tx.session.flush()
    query = (
        select(Arm.run_id, Arm.name, Arm.id, func.max(Version.number))
        .join(Version, Version.arm_id == Arm.id)
        .where(Arm.run_id.in_([r.id for r in found]))
        .group_by(Arm.run_id, Arm.id)
    )
    arms = {(run, name): (arm, last) for run, name, arm, last in tx.session.execute(query)}
    clients = _clients(tx, {run.project_id for run in found})
    return [_accounted(tx, run, _info(run, arms, clients[run.project_id])) for run in found]


def _accounted(tx: Tx, run: Run, shown: RunInfo) -> RunInfo:
    if shown.settings.privacy.dp is None:
        return shown
    space = ParameterSpace.from_json(tx.session.get_one(Model, run.model_id).space)
    account = accounting.account(shown.settings, space, published=shown.published)
    return shown.model_copy(update={"privacy": account})


def _clients(tx: Tx, projects: set[UUID]) -> Counter[UUID]:
    """How many clients of each project may take part."""
    query = (
        select(Client.project_id, func.count())
        .where(Client.project_id.in_(projects), Client.state == "active")
        .group_by(Client.project_id)
    )
    return Counter({row[0]: row[1] for row in tx.session.execute(query)})


def _info(run: Run, found: dict[tuple[UUID, str], tuple[UUID, int]], clients: int) -> RunInfo:
    settings = RunSettings.model_validate(run.settings)
    arms = [
        ArmInfo(id=arm_id, name=policy.name, policy=policy, published=published)
        for policy in settings.policies
        for arm_id, published in [found[run.id, policy.name]]
    ]
    return RunInfo(
        id=run.id,
        name=run.name,
        model_id=run.model_id,
        cohort_id=run.cohort_id,
        arm_id=arms[0].id,
        arms=arms,
        state=RunState(run.state),
        reason=run.reason,
        settings=settings,
        warnings=settings.warnings(clients),
        published=min(arm.published for arm in arms),
        created_at=run.created_at,
    )


def of_arm(run: RunInfo, name: str | None) -> RunInfo:
    """A run as if it had but one arm: the one of this name, or the first.

    Raises:
        Invalid: ``arm_unknown``.
    """
    for arm in run.arms:
        if name in {None, arm.name}:
            settings = run.settings.of_arm(arm.name)
            alone = {"arm_id": arm.id, "published": arm.published, "settings": settings}
            return run.model_copy(update={**alone, "arms": [arm]})
    known = ", ".join(arm.name for arm in run.arms)
    raise Invalid(f"run {run.name} has no arm {name!r}; it has {known}", code="arm_unknown")


def listed(principal: Principal) -> Select[Run]:
    """The principal's runs."""
    return select(Run).where(Run.project_id == principal.project_id)


def rounds_of(tx: Tx, principal: Principal, run_id: UUID) -> Select[Round]:
    """A run's rounds."""
    return select(Round).where(Round.run_id == get(tx, principal, run_id).id)


def versions_of(tx: Tx, principal: Principal, run_id: UUID) -> Select[Version]:
    """The versions of a run's arms."""
    run = get(tx, principal, run_id)
    arms = select(Arm.id).where(Arm.run_id == run.id)
    return select(Version).where(Version.arm_id.in_(arms))


def round_infos(tx: Tx, found: list[Round]) -> list[RoundInfo]:
    """Rounds as the interface shows them, with one query for all of them."""
    query = (
        select(Round.id, Version.id, ManifestRecord.sha256)
        .outerjoin(Version, Version.round_id == Round.id)
        .outerjoin(ManifestRecord, ManifestRecord.round_id == Round.id)
        .where(Round.id.in_([r.id for r in found]))
    )
    extra = {row[0]: (row[1], row[2]) for row in tx.session.execute(query)}
    return [_round_info(r, *extra[r.id]) for r in found]


def round_detail(tx: Tx, principal: Principal, round_id: UUID) -> RoundDetail:
    """A round with its assignments."""
    tx.session.flush()
    found = get_round(tx, principal, round_id)
    query = (
        select(Assignment, Client.name, Upload)
        .join(Client, Client.id == Assignment.client_id)
        .outerjoin(Upload, Upload.assignment_id == Assignment.id)
        .where(Assignment.round_id == round_id)
        .order_by(Client.name, Assignment.attempt)
    )
    assignments = [
        AssignmentInfo(
            **_columns(assignment),
            client_name=name,
            assigned_at=assignment.created_at,
            upload_id=upload and upload.id,
            detail=upload and upload.detail,
            update_size=upload.size if upload and upload.completed_at else None,
        )
        for assignment, name, upload in tx.session.execute(query)
    ]
    (brief,) = round_infos(tx, [found])
    return RoundDetail(**brief.model_dump(), assignments=assignments)


def _columns(row: Assignment) -> dict[str, Any]:
    names = ("id", "client_id", "attempt", "state", "reason", "download_size")
    return {name: getattr(row, name) for name in names}


def _round_info(found: Round, version_id: UUID | None, manifest: str | None) -> RoundInfo:
    extra = {"version_id": version_id, "manifest_sha256": manifest}
    names = (n for n in RoundInfo.model_fields if n not in extra)
    return RoundInfo.model_validate({**{n: getattr(found, n) for n in names}, **extra})
