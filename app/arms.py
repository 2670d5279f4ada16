"""The arms of a run: which there are, who does which, and which still have rounds to go.

Owns these questions. Must not change anything: arms are made with their run (``runs``), and move on
in ``rounds``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, select

from app import cohorts
from app.db import Tx
from app.tables import Arm, Client, Run, Version
from fedselect.policies import RunSettings


def of_run(tx: Tx, run: Run) -> list[Arm]:
    """A run's arms in the order of its settings."""
    order = [policy.name for policy in RunSettings.model_validate(run.settings).policies]
    found = tx.session.scalars(select(Arm).where(Arm.run_id == run.id)).all()
    return sorted(found, key=lambda arm: order.index(arm.name))


def settings_of(tx: Tx, run: Run, arm_id: UUID) -> RunSettings:
    """The settings of one arm, as its clients get them."""
    settings = RunSettings.model_validate(run.settings)
    return settings.of_arm(tx.session.get_one(Arm, arm_id).name) if settings.arms else settings


def left(tx: Tx, run: Run, rounds: int, *, but: UUID) -> int:
    """How many of the run's other arms have not published so many rounds."""
    tx.session.flush()
    through = select(Version.arm_id).where(Version.number >= rounds)
    query = select(func.count()).where(Arm.run_id == run.id, Arm.id != but, Arm.id.not_in(through))
    return tx.session.scalar(query.select_from(Arm)) or 0


def clients_of(tx: Tx, run: Run) -> Sequence[UUID]:
    """The clients that may take part in a run, by name."""
    return clients_in(tx, run.project_id, run.cohort_id)


def clients_in(tx: Tx, project_id: UUID, cohort_id: UUID | None) -> Sequence[UUID]:
    """The active clients of a project, or of one of its cohorts, by name."""
    active = select(Client.id).where(Client.project_id == project_id, Client.state == "active")
    every = tx.session.scalars(active.order_by(Client.name)).all()
    return cohorts.among_members(tx, cohort_id, every)


def check_split(tx: Tx, run: Run) -> None:
    """Refuse to split too few clients among arms.

    Raises:
        SettingsError: ``arm_too_small``.
    """
    settings = RunSettings.model_validate(run.settings)
    if settings.arms is None or settings.arms.mode != "randomized":
        return
    every = clients_of(tx, run)
    settings.arms.check_split(Counter(settings.arms_of(str(each))[0] for each in every))
