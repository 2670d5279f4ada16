"""Rollouts as the interface shows them: their groups, what gates have said, what was decided.

Owns these queries. Must not change a rollout: ``rollouts`` does.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any
from uuid import UUID

from sqlalchemy import Select, func, select

from app.auth import Principal
from app.db import Tx
from app.errors import Missing
from app.tables import (
    Assignment,
    Client,
    EvaluationRecord,
    Rollout,
    RolloutClient,
    RolloutJudgement,
    Transition,
)
from fedselect import gates
from fedselect.evaluations import EvaluationReport, ScoreReport
from fedselect.rolloutdocs import (
    GateVerdict,
    GroupMember,
    Judgement,
    RolloutCreate,
    RolloutDecision,
    RolloutDetail,
    RolloutInfo,
    RolloutState,
    Verdict,
)


def settings_of(rollout: Rollout) -> RolloutCreate:
    """What was asked for."""
    return RolloutCreate.model_validate(rollout.settings)


def in_stage(rollout: Rollout) -> Any:
    """That a client is in the present stage, or in the control group."""
    reached = (RolloutClient.stage <= rollout.stage) | RolloutClient.stage.is_(None)
    return (RolloutClient.rollout_id == rollout.id) & reached


def asked(rollout: Rollout) -> Any:
    """That an assignment is of the rollout's present stage."""
    return (Assignment.rollout_id == rollout.id) & (Assignment.attempt == rollout.stage + 1)


def get(tx: Tx, principal: Principal, rollout_id: UUID) -> Rollout:
    """A rollout of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = select(Rollout).where(
        Rollout.id == rollout_id, Rollout.project_id == principal.project_id
    )
    found = tx.session.scalars(query).first()
    if found is None:
        raise Missing(f"there is no rollout {rollout_id} in this project")
    return found


def listed(principal: Principal) -> Select[Rollout]:
    """The principal's rollouts."""
    return select(Rollout).where(Rollout.project_id == principal.project_id)


def infos(tx: Tx, found: list[Rollout]) -> list[RolloutInfo]:
    """Rollouts as the interface shows them, with one query for all of them."""
    tx.session.flush()
    query = (
        select(RolloutClient.rollout_id, RolloutClient.stage, func.count())
        .where(RolloutClient.rollout_id.in_([each.id for each in found]))
        .group_by(RolloutClient.rollout_id, RolloutClient.stage)
    )
    sizes = {(row[0], row[1]): row[2] for row in tx.session.execute(query)}
    return [_info(each, sizes) for each in found]


def _info(rollout: Rollout, sizes: dict[tuple[UUID, int | None], int]) -> RolloutInfo:
    settings, control = settings_of(rollout), sizes.get((rollout.id, None), 0)
    added = [sizes.get((rollout.id, stage), 0) for stage in range(len(settings.stages))]
    stages = list(accumulate(added))
    counted = {
        "settings": settings,
        "stage": rollout.stage + 1,
        "stage_percent": settings.stages[rollout.stage],
        "stage_clients": stages[rollout.stage],
        "control_clients": control,
        "notes": gates.cannot_tell(settings.gates, stages, control),
    }
    same = (name for name in RolloutInfo.model_fields if name not in counted)
    return RolloutInfo.model_validate({**{n: getattr(rollout, n) for n in same}, **counted})


def detail(tx: Tx, rollout: Rollout) -> RolloutDetail:
    """A rollout with its groups, the verdicts of its gates, and everything decided."""
    (brief,) = infos(tx, [rollout])
    groups = _members(tx, rollout)
    return RolloutDetail(
        **dict(brief),
        members=groups[False],
        control=groups[True],
        judgements=_judgements(tx, rollout),
        decisions=_decisions(tx, rollout),
    )


def _members(tx: Tx, rollout: Rollout) -> dict[bool, list[GroupMember]]:
    query = (
        select(Client.id, Client.name, RolloutClient.stage, Assignment.state)
        .add_columns(EvaluationRecord.report)
        .select_from(RolloutClient)
        .join(Client, Client.id == RolloutClient.client_id)
        .outerjoin(Assignment, (Assignment.client_id == Client.id) & asked(rollout))
        .outerjoin(EvaluationRecord, EvaluationRecord.assignment_id == Assignment.id)
        .where(in_stage(rollout))
        .order_by(Client.name)
    )
    groups: dict[bool, list[GroupMember]] = {True: [], False: []}
    baseline = settings_of(rollout).gates.baseline
    for row in tx.session.execute(query):
        member = GroupMember(
            client_id=row.id,
            client_name=row.name,
            evaluation=row.state or "not asked",
            gain=gates.gain_of(scores_of(row.report), baseline) if row.report else None,
        )
        groups[row.stage is None].append(member)
    return groups


def scores_of(report: dict[str, Any]) -> dict[str, ScoreReport]:
    """The scores of an evaluation as it is stored."""
    return {str(k): v for k, v in EvaluationReport.model_validate(report).scores.items()}


def _judgements(tx: Tx, rollout: Rollout) -> list[Judgement]:
    query = select(RolloutJudgement).where(RolloutJudgement.rollout_id == rollout.id)
    return [
        Judgement(
            stage=row.stage + 1,
            verdict=Verdict(row.verdict),
            gates=[GateVerdict.model_validate(each) for each in row.gates["gates"]],
            judged_at=row.created_at,
        )
        for row in tx.session.scalars(query.order_by(RolloutJudgement.stage))
    ]


def _decisions(tx: Tx, rollout: Rollout) -> list[RolloutDecision]:
    query = select(Transition).where(
        Transition.subject_kind == "rollout", Transition.subject_id == rollout.id
    )
    return [
        RolloutDecision(
            from_state=RolloutState(row.from_state) if row.from_state else None,
            to_state=RolloutState(row.to_state),
            reason=row.reason or "",
            actor=row.actor,
            at=row.created_at,
        )
        for row in tx.session.scalars(query.order_by(Transition.id))
    ]
