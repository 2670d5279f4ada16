"""Evaluations: what clients say of versions on their own held-out data.

Owns the ``evaluations`` rows and what is written down about them. Must not judge: reports,
comparisons and rollouts do.
"""

from __future__ import annotations

from uuid import UUID

from app import checkins, ledger, rounds
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict
from app.tables import Arm, Assignment, Client, EvaluationRecord, Run, Version
from fedselect import effects
from fedselect.evaluations import Evaluation, EvaluationReport
from fedselect.lifecycle import AssignmentEvent
from fedselect.policies import RunSettings


def evaluate(
    tx: Tx, principal: Principal, assignment_id: UUID, body: EvaluationReport
) -> Evaluation:
    """Take a client's scores of a version; a repeated report changes nothing.

    Raises:
        Conflict: the assignment is not an evaluation, or it is over.
    """
    assignment = checkins.locked(tx, principal, assignment_id)
    if assignment.kind != "evaluate":
        raise Conflict(f"this assignment is to {assignment.kind}", code="assignment_kind")
    record = tx.session.get(EvaluationRecord, assignment.id)
    if record is None:
        rounds.move_assignment(tx, assignment, AssignmentEvent.REPORT)
        run = tx.session.get_one(Run, assignment.run_id)
        report = body.disclosed(RunSettings.model_validate(run.settings))
        record = EvaluationRecord(
            assignment_id=assignment.id,
            project_id=assignment.project_id,
            run_id=assignment.run_id,
            client_id=assignment.client_id,
            version_id=assignment.version_id,
            rollout_id=assignment.rollout_id,
            report=report.model_dump(mode="json"),
            created_at=tx.now,
        )
        tx.session.add(record)
        _note_harm(tx, assignment, report)
        rounds.settle(tx, assignment)
    client = tx.session.get_one(Client, principal.client)
    version = tx.session.get_one(Version, assignment.version_id)
    arm = tx.session.get_one(Arm, assignment.arm_id)
    return document(record, client.name, version, arm.name)


def _note_harm(tx: Tx, assignment: Assignment, report: EvaluationReport) -> None:
    """Write down that a client does worse than alone, as far as its own examples can tell."""
    scores = {str(name): score for name, score in report.scores.items()}
    gain = effects.gains(scores).get("local_only")
    if gain is None or not gain.harmed:
        return
    # As text: ledger entries hold no floats.
    points = (gain.points, gain.interval.low, gain.interval.high)
    body = dict(zip(("points", "low", "high"), (f"{value:.2f}" for value in points), strict=True))
    ledger.append(
        tx,
        "client.harmed",
        f"client:{assignment.client_id}",
        project=assignment.project_id,
        body={
            "run": str(assignment.run_id),
            "version": str(assignment.version_id),
            "baseline": "local_only",
            **body,
        },
    )


def document(
    record: EvaluationRecord, client: str, version: Version, arm: str | None
) -> Evaluation:
    """The evaluation as the interface shows it."""
    return Evaluation.model_validate(
        {
            **record.report,
            "client_id": record.client_id,
            "client_name": client,
            "version_id": record.version_id,
            "version_number": version.number,
            "arm_id": version.arm_id,
            "arm": arm,
            "created_at": record.created_at,
        }
    )
