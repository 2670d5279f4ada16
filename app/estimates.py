"""Estimates beside facts: the space that one is about, and what a run has really cost.

Owns the counting of a run's bytes and seconds. The figures themselves are ``fedselect.estimate``'s.
Must not write.
"""

from __future__ import annotations

from statistics import median
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Select, func, select

from app import catalog, runs
from app.auth import Principal
from app.db import Tx
from app.tables import Assignment, Client, EvaluationRecord, Model, Round, Run, Update, Upload
from fedselect.armestimate import estimate_run
from fedselect.estimate import single_tensor
from fedselect.estimatedocs import (
    Errors,
    Estimate,
    EstimateCreate,
    Measured,
    RunEstimate,
    Spent,
)
from fedselect.lifecycle import TERMINAL_ROUNDS, RoundState
from fedselect.policies import RunSettings
from fedselect.space import ParameterSpace


def space_of(tx: Tx, principal: Principal, asked: EstimateCreate) -> ParameterSpace:
    """The parameter space that an estimate is asked for.

    Raises:
        Missing: no such model.
        SpaceError: not a usable parameter space.
    """
    if asked.model_id is not None:
        return ParameterSpace.from_json(catalog.get_model(tx, principal, asked.model_id).space)
    if asked.space is not None:
        return ParameterSpace.from_json(asked.space)
    return single_tensor(asked.elements or 1)


def of_run(
    tx: Tx, principal: Principal, run_id: UUID, *, link: str, measured: Measured
) -> RunEstimate:
    """What a run has cost, beside what would have been estimated for as many rounds and clients.

    Before anything is published, the estimate is of the whole run with all active clients.

    Raises:
        Missing: there is no such run.
        SettingsError: link_unknown.
    """
    run = runs.get(tx, principal, run_id)
    actual, examples = _spent(tx, run)
    settings = RunSettings.model_validate(run.settings)
    clients = actual.clients or _active(tx, run)
    if actual.rounds:
        # Of one arm: what all have published, evenly.
        rounds = max(1, round(actual.rounds / len(settings.policies)))
        settings = settings.model_copy(update={"rounds": rounds})
    asked = EstimateCreate(
        model_id=run.model_id,
        settings=settings,
        clients=max(clients, settings.round.quorum * len(settings.policies) // settings.parallel),
        links=[link],
        examples=examples or 1000,
        measured=measured,
    )
    space = ParameterSpace.from_json(tx.session.get_one(Model, run.model_id).space)
    found = estimate_run(asked, space, round_seconds=actual.round_seconds)
    return RunEstimate(run_id=run.id, estimate=found, actual=actual, errors=_errors(found, actual))


def _active(tx: Tx, run: Run) -> int:
    query = select(func.count()).select_from(Client)
    mine = query.where(Client.project_id == run.project_id, Client.state == "active")
    return tx.session.scalar(mine) or 0


# --- what was counted --------------------------------------------------------------------------


def _spent(tx: Tx, run: Run) -> tuple[Spent, int]:
    """What a run has cost in rounds that are over, and a client's examples on average."""
    tx.session.flush()
    published = _seconds(tx, run)
    clients, sent, fetched, examples = tx.session.execute(_training(run)).one()
    reports, received, control_up, control_down = tx.session.execute(_reports(run)).one()
    evaluated = tx.session.scalar(_evaluations(run)) or 0
    arms = RunSettings.model_validate(run.settings).parallel
    whole = 0 < clients * arms <= reports
    down = received if whole else int(fetched or 0) + int(evaluated)
    return (
        Spent(
            rounds=len(published),
            clients=max(clients, reports // arms),
            reports=reports,
            up=int(sent or 0),
            down=int(down),
            control_up=int(control_up or 0) if whole else None,
            control_down=int(control_down or 0) if whole else None,
            round_seconds=median(published) if published else None,
        ),
        round(examples or 0),
    )


def _seconds(tx: Tx, run: Run) -> list[float]:
    """Of every published round, from its opening to its closing."""
    query = select(Round.opened_at, Round.closed_at).where(
        Round.run_id == run.id, Round.state == RoundState.PUBLISHED.value
    )
    times = tx.session.execute(query)
    return [(closed - opened).total_seconds() for opened, closed in times if closed]


def _training(run: Run) -> Select[Any]:
    """Clients, bytes sent, bytes to fetch and mean examples of the rounds that are over."""
    over = [state.value for state in TERMINAL_ROUNDS]
    sent = func.sum(Upload.size).filter(Upload.completed_at.is_not(None))
    return (
        select(
            func.count(Assignment.client_id.distinct()),
            sent,
            func.sum(Assignment.download_size),
            func.avg(Update.examples),
        )
        .select_from(Assignment)
        .join(Round, Round.id == Assignment.round_id)
        .outerjoin(Upload, Upload.assignment_id == Assignment.id)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(Assignment.run_id == run.id, Round.state.in_(over))
    )


def _evaluations(run: Run) -> Select[Any]:
    query = select(func.sum(Assignment.download_size))
    of_run = (Assignment.run_id == run.id) & Assignment.rollout_id.is_(None)
    return query.where(of_run, Assignment.kind == "evaluate")


def _reports(run: Run) -> Select[Any]:
    """How many evaluations there are, and what clients have counted in all."""
    names = ("bytes_received", "control_sent", "control_received")
    sums = [func.sum(EvaluationRecord.report[name].astext.cast(BigInteger)) for name in names]
    return select(func.count(), *sums).where(
        EvaluationRecord.run_id == run.id, EvaluationRecord.rollout_id.is_(None)
    )


def _errors(found: Estimate, actual: Spent) -> Errors:
    """Relative errors; of what nobody has fetched for an evaluation yet, none is expected."""
    evaluated = actual.clients if actual.reports else 0
    skipped = (found.clients - evaluated) * found.evaluation_down
    up, down = found.run.up, found.run.down - skipped
    told = actual.rounds > 0
    control = None
    if actual.control_up is not None and actual.control_down is not None:
        spent = actual.control_up + actual.control_down
        control = _relative(found.run.control_up + found.run.control_down, spent)
    return Errors(
        up=_relative(up, actual.up) if told else None,
        down=_relative(down, actual.down) if told else None,
        payload=_relative(up + down, actual.up + actual.down) if told else None,
        control=control,
        round_seconds=_relative(found.links[0].round_seconds, actual.round_seconds or 0),
    )


def _relative(estimated: float, actual: float) -> float | None:
    return (estimated - actual) / actual if actual else None
