"""What a comparison of a run's arms is made of: its rows, in a fixed number of statements.

Owns these queries. The figures are ``fedselect.comparison``'s. Must not write.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import select

from app import runs
from app.auth import Principal
from app.db import Tx
from app.tables import Client, EvaluationRecord, Model, Version
from fedselect.comparedoc import ComparedRun, Comparison
from fedselect.comparison import Scored, compare
from fedselect.evaluations import EvaluationReport
from fedselect.policies import RunSettings
from fedselect.protocol import RunInfo
from fedselect.reporting import Evaluated, budget


@dataclass(frozen=True, slots=True)
class Found:
    """The rows of one run."""

    run: ComparedRun
    settings: RunSettings
    arms: list[Scored]
    now: datetime

    def comparison(self) -> Comparison:
        """What follows from them; it takes a while, so no transaction waits for it."""
        return compare(self.run, self.settings, self.arms, made_at=self.now)


def find(tx: Tx, principal: Principal, run_id: UUID) -> Found:
    """The evaluations of every arm's newest version that has any.

    Raises:
        Missing: there is no such run in the principal's project.
    """
    run = runs.get(tx, principal, run_id)
    info = runs.info(tx, run)
    settings = info.settings
    compared = ComparedRun(
        id=run.id,
        name=run.name,
        model=tx.session.get_one(Model, run.model_id).name,
        state=info.state,
        mode="parallel" if settings.arms is None else settings.arms.mode or "parallel",
        rounds=settings.rounds,
        seed=settings.seed,
        budget=budget(settings.training),
    )
    return Found(compared, settings, scored(tx, info), tx.now)


def scored(tx: Tx, run: RunInfo) -> list[Scored]:
    """The arms of a run, each with the evaluations of its newest version that has any."""
    query = (
        select(EvaluationRecord.report, Client.id, Client.name, Version.number, Version.arm_id)
        .join(Client, Client.id == EvaluationRecord.client_id)
        .join(Version, Version.id == EvaluationRecord.version_id)
        .where(EvaluationRecord.run_id == run.id, EvaluationRecord.rollout_id.is_(None))
        .order_by(Client.name)
    )
    rows = tx.session.execute(query).all()
    found = []
    for arm in run.arms:
        own = [row for row in rows if row.arm_id == arm.id]
        last = max((row.number for row in own), default=None)
        evaluations = [
            Evaluated(row.id, row.name, EvaluationReport.model_validate(row.report))
            for row in own
            if row.number == last
        ]
        found.append(Scored(arm.id, arm.policy, arm.published, last, evaluations))
    return found
