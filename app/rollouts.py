"""Rollouts: bringing a version to everybody, stage by stage.

Owns the ``rollouts`` rows and what belongs to them, and is the one door to their states: lock the
row, ask ``fedselect.rollout``, write, then what follows. What clients serve follows from the rows
(``channels.pointers``). Locks are taken in the order rollout, run, model.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import or_, select

from app import channels, ledger, rolloutviews, rounds
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict
from app.rolloutviews import asked, in_stage, scores_of, settings_of
from app.rounds import Errand
from app.tables import (
    Arm,
    Assignment,
    Channel,
    Client,
    EvaluationRecord,
    Rollout,
    RolloutClient,
    RolloutJudgement,
    Run,
    Transition,
    Version,
)
from fedselect import gates
from fedselect.checkindocs import Serving
from fedselect.cohorts import Groups, split
from fedselect.gates import Observation, Observed
from fedselect.lifecycle import OPEN_ASSIGNMENTS, AssignmentEvent
from fedselect.rollout import RolloutDecided, RolloutEvent, RolloutFacts, decide, together
from fedselect.rolloutdocs import RolloutCreate, RolloutDetail, RolloutInfo, RolloutState

# --- starting ----------------------------------------------------------------------------------


def start(tx: Tx, principal: Principal, body: RolloutCreate) -> RolloutInfo:
    """Deal the clients of the channel to stages and control group, and open the first stage.

    Raises:
        Missing: no such model or version in this project.
        Conflict: ``channel_unset``, ``rollout_active``, ``rollout_name_taken``, ``version_unfit``.
        Gone: the file of either version was deleted.
        SettingsError: ``rollout_too_small``: fewer clients than a stage and the control group need.
    """
    channel = channels.lock(tx, principal, body.model_id, body.channel)
    version = channels.check_version(tx, principal, body.model_id, body.version_id)
    old = _old_version(tx, principal, body, channel)
    rollout = Rollout(
        id=uuid4(),
        project_id=principal.project_id,
        model_id=body.model_id,
        channel=body.channel,
        version_id=version.id,
        old_version_id=old.id,
        name=body.name,
        settings=body.model_dump(mode="json"),
        state=RolloutState.RUNNING.value,
        reason=body.reason,
        stage=0,
        stage_ends=tx.now,
        created_at=tx.now,
    )
    taken = Conflict(f"there is already a rollout named {body.name!r}", code="rollout_name_taken")
    groups = _deal(tx, rollout, body)
    tx.insert(rollout, taken=taken)
    _keep(tx, rollout, groups)
    _write_down(tx, rollout, "rollout.started", before=None)
    _open_stage(tx, rollout)
    return rolloutviews.infos(tx, [rollout])[0]


def _old_version(
    tx: Tx, principal: Principal, body: RolloutCreate, channel: Channel | None
) -> Version:
    if channel is None:
        raise Conflict(
            f"channel {body.channel} is not set: point it at the version that clients have now",
            code="channel_unset",
        )
    if channel.version_id == body.version_id:
        raise Conflict("the channel points at this version already", code="version_unfit")
    return channels.check_version(tx, principal, body.model_id, channel.version_id)


def _deal(tx: Tx, rollout: Rollout, body: RolloutCreate) -> Groups:
    query = select(Client.id).where(
        Client.project_id == rollout.project_id, Client.state == "active"
    )
    every = tx.session.scalars(query).all()
    elsewhere = channels.elsewhere(tx, rollout.model_id, rollout.channel, every)
    return split(
        (str(each) for each in every if each not in elsewhere),
        salt=str(rollout.id),
        stages=body.stages,
        control=body.control,
        minimum=body.minimum,
    )


def _keep(tx: Tx, rollout: Rollout, groups: Groups) -> None:
    parts: list[tuple[int | None, Sequence[str]]] = [*enumerate(groups.added)]
    for stage, clients in [*parts, (None, groups.control)]:
        for client in clients:
            row = RolloutClient(rollout_id=rollout.id, client_id=UUID(client), stage=stage)
            tx.session.add(row)
    tx.session.flush()


def _open_stage(tx: Tx, rollout: Rollout) -> None:
    """Ask the clients of the stage for the candidate, the control group for the old version."""
    rollout.stage_ends = tx.now + timedelta(seconds=settings_of(rollout).stage_seconds)
    reason, attempt = f"rollout {rollout.name}, stage {rollout.stage + 1}", rollout.stage + 1
    errand = Errand("evaluate", rollout.stage_ends, reason, attempt, rollout.id)
    runs = {run.id: run for run in _lock_runs(tx, rollout)}
    query = (
        select(RolloutClient.client_id, RolloutClient.stage)
        .join(Client, Client.id == RolloutClient.client_id)
        .where(in_stage(rollout), Client.state == "active")
        .order_by(Client.name)
    )
    groups: dict[bool, list[UUID]] = {True: [], False: []}
    for client_id, stage in tx.session.execute(query):
        groups[stage is None].append(client_id)
    for control, clients in groups.items():
        version_id = rollout.old_version_id if control else rollout.version_id
        version = tx.session.get_one(Version, version_id)
        run = runs[tx.session.get_one(Arm, version.arm_id).run_id]
        rounds.send(tx, run, version, clients, errand)


# --- going on ----------------------------------------------------------------------------------


def command(tx: Tx, rollout: Rollout, event: RolloutEvent, *, reason: str) -> RolloutDetail:
    """An administrator's order; the rollout's row must be locked.

    Raises:
        LifecycleError: the state does not allow it.
    """
    decided = decide(_facts(rollout), event, reason=reason)
    if decided is not None:
        _enter(tx, rollout, decided)
    return rolloutviews.detail(tx, rollout)


def due(tx: Tx) -> Sequence[UUID]:
    """Rollouts whose stage can be judged: everybody has answered, or its deadline has passed."""
    waiting = (
        select(Assignment.id)
        .where(
            Assignment.rollout_id == Rollout.id,
            Assignment.state.in_([state.value for state in OPEN_ASSIGNMENTS]),
        )
        .exists()
    )
    over = (Rollout.stage_ends <= tx.now) | ~waiting
    query = select(Rollout.id).where(Rollout.state == RolloutState.RUNNING.value, over)
    return tx.session.scalars(query).all()


def step(tx: Tx, rollout_id: UUID) -> None:
    """Judge a stage that is over; nothing happens if it is not, or somebody was here before."""
    rollout = _locked(tx, rollout_id)
    if rollout.state != RolloutState.RUNNING or rollout_id not in due(tx):
        return
    _end_evaluations(tx, rollout, "no evaluation before the deadline")
    verdicts = gates.judge(settings_of(rollout).gates, _observed(tx, rollout))
    verdict = together(verdicts)
    tx.session.add(
        RolloutJudgement(
            rollout_id=rollout.id,
            stage=rollout.stage,
            verdict=verdict.value,
            gates={"gates": [each.model_dump(mode="json") for each in verdicts]},
            created_at=tx.now,
        )
    )
    ledger.append(
        tx,
        "rollout.judged",
        f"rollout:{rollout.id}",
        project=rollout.project_id,
        body={
            "stage": rollout.stage + 1,
            "verdict": verdict.value,
            "gates": {each.gate: f"{each.verdict.value}: {each.text}" for each in verdicts},
        },
    )
    decided = decide(_facts(rollout), RolloutEvent.JUDGE, gates=verdicts)
    if decided is not None:
        _enter(tx, rollout, decided)


def _observed(tx: Tx, rollout: Rollout) -> Observed:
    query = (
        select(Assignment.client_id, Assignment.created_at, RolloutClient.stage)
        .add_columns(EvaluationRecord.report, EvaluationRecord.created_at.label("answered"))
        .join(RolloutClient, RolloutClient.client_id == Assignment.client_id)
        .join(Client, Client.id == Assignment.client_id)
        .outerjoin(EvaluationRecord, EvaluationRecord.assignment_id == Assignment.id)
        .where(asked(rollout), RolloutClient.rollout_id == rollout.id)
        # Who was suspended or has left meanwhile has refused nothing.
        .where(or_(EvaluationRecord.report.is_not(None), Client.state == "active"))
        .order_by(Assignment.client_id)
    )
    groups: dict[bool, list[Observation]] = {True: [], False: []}
    for row in tx.session.execute(query):
        if row.report is None:
            seen = Observation(str(row.client_id), None)
        else:
            seconds = (row.answered - row.created_at).total_seconds()
            seen = Observation(str(row.client_id), scores_of(row.report), seconds)
        groups[row.stage is None].append(seen)
    return Observed(stage=groups[False], control=groups[True], seed=rollout.id.int % 2**63)


def _enter(tx: Tx, rollout: Rollout, decided: RolloutDecided) -> None:
    before = rollout.state
    rollout.state, rollout.stage = decided.to.value, decided.stage
    rollout.reason = decided.reason
    if decided.to is RolloutState.RUNNING:
        _write_down(tx, rollout, "rollout.advanced", before=before)
        _open_stage(tx, rollout)
        return
    _write_down(tx, rollout, f"rollout.{decided.to.value}", before=before)
    _end_evaluations(tx, rollout, f"the rollout is {decided.to.value.replace('_', ' ')}")
    if decided.to in {RolloutState.PROMOTED, RolloutState.ROLLED_BACK}:
        rollout.ended_at = tx.now
    if decided.to is RolloutState.PROMOTED:
        channels.promote(tx, rollout, reason=f"rollout {rollout.name}: {decided.reason}"[:500])


def before(tx: Tx, assignment: Assignment) -> Serving | None:
    """What an evaluation is compared with: the channel's version, where the gates ask for that."""
    if assignment.rollout_id is None:
        return None
    rollout = tx.session.get_one(Rollout, assignment.rollout_id)
    if settings_of(rollout).gates.baseline != "before":
        return None
    return channels.as_served(tx, rollout.channel, rollout.old_version_id)


def _end_evaluations(tx: Tx, rollout: Rollout, reason: str) -> None:
    _lock_runs(tx, rollout)  # a report on its way in locks its run, too
    query = select(Assignment).where(
        Assignment.rollout_id == rollout.id,
        Assignment.state.in_([state.value for state in OPEN_ASSIGNMENTS]),
    )
    tx.session.flush()
    for assignment in tx.session.scalars(query, execution_options={"populate_existing": True}):
        rounds.move_assignment(tx, assignment, AssignmentEvent.EXPIRE, reason=reason)
    tx.session.flush()


def _lock_runs(tx: Tx, rollout: Rollout) -> list[Run]:
    """The runs that the candidate and the old version are of, locked in order."""
    versions = (rollout.version_id, rollout.old_version_id)
    query = select(Arm.run_id).join(Version, Version.arm_id == Arm.id)
    found = set(tx.session.scalars(query.where(Version.id.in_(versions))))
    return [rounds.lock_run(tx, run_id) for run_id in sorted(found)]


def _locked(tx: Tx, rollout_id: UUID) -> Rollout:
    # Evaluations that point at it may come in: their transactions hold the run that we lock next.
    query = select(Rollout).where(Rollout.id == rollout_id).with_for_update(key_share=True)
    return tx.session.scalars(query, execution_options={"populate_existing": True}).one()


def _facts(rollout: Rollout) -> RolloutFacts:
    settings = settings_of(rollout)
    return RolloutFacts(
        state=RolloutState(rollout.state),
        stage=rollout.stage,
        stages=len(settings.stages),
        automatic=settings.automatic,
        roll_back_on_harm=settings.roll_back_on_harm,
    )


def _write_down(tx: Tx, rollout: Rollout, action: str, *, before: str | None) -> None:
    tx.session.add(
        Transition(
            project_id=rollout.project_id,
            subject_kind="rollout",
            subject_id=rollout.id,
            from_state=before,
            to_state=rollout.state,
            reason=rollout.reason,
            actor=tx.actor,
            created_at=tx.now,
        )
    )
    body: dict[str, Any] = {
        "name": rollout.name,
        "channel": rollout.channel,
        "version": str(rollout.version_id),
        "old_version": str(rollout.old_version_id),
        "stage": rollout.stage + 1,
        "from": before,
        "to": rollout.state,
        "reason": rollout.reason,
    }
    if before is None:  # as text: entries hold no floats
        body["settings"] = settings_of(rollout).model_dump_json()
    subject = f"rollout:{rollout.id}"
    ledger.append(tx, action, subject, project=rollout.project_id, body=body)


def get_locked(tx: Tx, principal: Principal, rollout_id: UUID) -> Rollout:
    """A rollout of the principal's project, locked for a change.

    Raises:
        Missing: there is none.
    """
    return _locked(tx, rolloutviews.get(tx, principal, rollout_id).id)
