"""Check-ins: what a client is told to do, and when to come again.

Owns handing out assignments and telling their outcome. States change in ``rounds`` alone. The
common answer, "nothing for you now", takes no lock.
"""

from __future__ import annotations

import math
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import aliased

from app import catalog, ledger, rounds
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Missing
from app.tables import (
    Assignment,
    Client,
    EvaluationRecord,
    MaskRecord,
    Model,
    Round,
    Run,
    Version,
)
from app.wiring import Coordinator
from fedselect.evaluations import Evaluation, EvaluationReport
from fedselect.lifecycle import (
    GATHERING_ROUNDS,
    OPEN_ASSIGNMENTS,
    TERMINAL_ROUNDS,
    AssignmentEvent,
    AssignmentState,
    RoundState,
    RunState,
    closing_window,
    may_try_again,
    retry_window,
)
from fedselect.policies import RoundPolicy, RunSettings
from fedselect.protocol import (
    Assignment as AssignmentDocument,
)
from fedselect.protocol import (
    CheckIn,
    CheckInAnswer,
    Decline,
    MaskInfo,
    Outcome,
    RunBrief,
)

SEEN_EVERY = timedelta(seconds=60)  # a write per check-in would be a write per poll


def check_in(tx: Tx, principal: Principal, body: CheckIn, *, core: Coordinator) -> CheckInAnswer:
    """Tell a client the outcome it waits for, give it work if there is any, and a retry window.

    Raises:
        Missing: ``pending`` is not an assignment of this client.
    """
    client = tx.session.get_one(Client, principal.client)
    if client.last_seen_at is None or tx.now - client.last_seen_at > SEEN_EVERY:
        client.last_seen_at = tx.now
    outcome = _outcome(tx, client, body.pending) if body.pending else None
    work = None if _unsettled(outcome) else (_open(tx, client) or _join(tx, client, body))
    run = _newest_run(tx, client)
    policy = RunSettings.model_validate(run.settings).round if run else RoundPolicy()
    low, high = _window(outcome, policy)
    checkpoint = ledger.newest_checkpoint(tx)
    return CheckInAnswer(
        assignment=_document(tx, work, body, core=core) if work else None,
        pending=outcome,
        retry_after_min=low,
        retry_after_max=high,
        checkpoint=checkpoint.text if checkpoint else None,
        run_state=RunState(run.state) if run else None,
        unable=_unable(run, body) if run and work is None else None,
    )


def _window(outcome: Outcome | None, policy: RoundPolicy) -> tuple[float, float]:
    if outcome is None or outcome.round_state is not RoundState.AGGREGATING:
        return retry_window(policy.retry_after)
    crowd = math.ceil(policy.goal * policy.over_selection)
    return closing_window(policy.retry_after, crowd=crowd)


def _unable(run: Run, body: CheckIn) -> str | None:
    encoding = RunSettings.model_validate(run.settings).wire.encoding
    if run.state != RunState.RUNNING or encoding in body.encodings:
        return None
    return (
        f"run {run.name!r} exchanges {encoding} files, this agent can do "
        f"{', '.join(body.encodings) or 'none'}; install a newer fedselect at the client"
    )


def _outcome(tx: Tx, client: Client, assignment_id: UUID) -> Outcome:
    assignment = own_assignment(tx, client.id, assignment_id)
    state = None
    if assignment.round_id is not None:
        state = RoundState(tx.session.get_one(Round, assignment.round_id).state)
    return Outcome(
        assignment_id=assignment.id,
        state=AssignmentState(assignment.state),
        round_state=state,
        reason=assignment.reason,
    )


def _unsettled(outcome: Outcome | None) -> bool:
    """Whether the client still waits: its update is in, and its round has not ended.

    An evaluation has no round: once it is in, there is nothing to wait for.
    """
    if outcome is None or outcome.round_state in {None, *TERMINAL_ROUNDS}:
        return False
    return outcome.state in {AssignmentState.UPLOADED, AssignmentState.ACCEPTED}


def _open(tx: Tx, client: Client) -> Assignment | None:
    gathering = Round.state.in_([s.value for s in GATHERING_ROUNDS])
    evaluating = (Assignment.kind == "evaluate") & (Run.state == RunState.EVALUATING.value)
    query = (
        select(Assignment)
        .join(Run, Run.id == Assignment.run_id)
        .outerjoin(Round, Round.id == Assignment.round_id)
        .where(
            Assignment.client_id == client.id,
            Assignment.state.in_([s.value for s in OPEN_ASSIGNMENTS]),
            Assignment.deadline > tx.now,
            or_(gathering, evaluating),
        )
        .order_by(Assignment.created_at)
        .limit(1)
    )
    return tx.session.scalars(query).first()


def _join(tx: Tx, client: Client, body: CheckIn) -> Assignment | None:
    able = _able(body)
    round_id = tx.session.scalar(_rejected_in(tx, client).where(able))
    round_id = round_id or tx.session.scalar(_new_to(tx, client).where(able))
    if round_id is None:
        return None
    # What was read before the lock may have changed: look again under it.
    run, current = rounds.lock_round(tx, round_id)
    mine = select(Assignment).where(
        Assignment.round_id == round_id, Assignment.client_id == client.id
    )
    last = tx.session.scalars(mine.order_by(Assignment.attempt.desc()).limit(1)).first()
    if last is None:
        new = current.state == RoundState.SELECTING and run.state == RunState.RUNNING
        return rounds.assign(tx, run, current, client) if new else None
    if last.state in OPEN_ASSIGNMENTS and rounds.gathering(tx, last):
        return last  # given a moment ago, by a call whose answer the client did not get
    policy = RunSettings.model_validate(run.settings).round
    again = may_try_again(AssignmentState(last.state), last.attempt, policy)
    if not again or not rounds.gathering(tx, last):
        return None
    return rounds.assign(tx, run, current, client, attempt=last.attempt + 1)


def _able(body: CheckIn) -> ColumnElement[bool]:
    """That the agent can write and read the files of a run."""
    encoding = Run.settings["wire"]["encoding"].as_string()
    return func.coalesce(encoding, "f32").in_(body.encodings)


def _new_to(tx: Tx, client: Client) -> Select[UUID]:
    """The oldest round that still selects and where the client has no place."""
    mine = aliased(Assignment)
    taken = select(mine.id).where(mine.round_id == Round.id, mine.client_id == client.id).exists()
    return (
        select(Round.id)
        .join(Run, Run.id == Round.run_id)
        .where(
            Round.project_id == client.project_id,
            Round.state == RoundState.SELECTING.value,
            Round.selection_ends > tx.now,
            Run.state == RunState.RUNNING.value,
            ~taken,
        )
        .order_by(Round.opened_at)
        .limit(1)
    )


def _rejected_in(tx: Tx, client: Client) -> Select[UUID]:
    """The oldest round that gathers and where the client may have another attempt."""
    last, later = aliased(Assignment), aliased(Assignment)
    followed = select(later.id).where(
        later.round_id == last.round_id,
        later.client_id == client.id,
        later.attempt > last.attempt,
    )
    most = Run.settings["round"]["client_attempts"].as_integer()
    return (
        select(Round.id)
        .join(last, last.round_id == Round.id)
        .join(Run, Run.id == Round.run_id)
        .where(
            last.client_id == client.id,
            last.state == AssignmentState.REJECTED.value,
            last.deadline > tx.now,
            last.attempt < func.coalesce(most, RoundPolicy().client_attempts),
            Round.state.in_([s.value for s in GATHERING_ROUNDS]),
            ~followed.exists(),
        )
        .order_by(Round.opened_at)
        .limit(1)
    )


def _newest_run(tx: Tx, client: Client) -> Run | None:
    query = (
        select(Run)
        .where(Run.project_id == client.project_id, Run.state != RunState.CREATED.value)
        .order_by(Run.created_at.desc())
        .limit(1)
    )
    return tx.session.scalars(query).first()


def _document(
    tx: Tx, assignment: Assignment, body: CheckIn, *, core: Coordinator
) -> AssignmentDocument:
    run = tx.session.get_one(Run, assignment.run_id)
    model = tx.session.get_one(Model, run.model_id)
    base = tx.session.get_one(Version, assignment.version_id)
    mask = tx.session.get(MaskRecord, assignment.mask_id) if assignment.mask_id else None
    number = tx.session.get_one(Round, assignment.round_id).number if assignment.round_id else None
    settings = RunSettings.model_validate(run.settings)
    deltas = catalog.deltas_to(
        tx, base, body.versions, storage=core.storage, lifetime=core.settings.url_lifetime
    )
    if assignment.download_size is None:
        whole = base.size if deltas is None else 0
        assignment.download_size = whole + sum(each.download.size for each in deltas or ())
    return AssignmentDocument(
        id=assignment.id,
        kind="train" if assignment.kind == "train" else "evaluate",
        run=RunBrief(id=run.id, name=run.name, settings=settings),
        arm_id=assignment.arm_id,
        round=number,
        attempt=assignment.attempt,
        state=AssignmentState(assignment.state),
        space_digest=model.space_digest,
        base=catalog.version_info(base),
        deltas=deltas,
        origin=catalog.version_info(catalog.origin_version(tx, assignment.arm_id)),
        mask=MaskInfo(version=mask.number, sha256=mask.sha256) if mask else None,
        deadline=assignment.deadline,
    )


def own_assignment(tx: Tx, client_id: UUID, assignment_id: UUID) -> Assignment:
    """An assignment of this client.

    Raises:
        Missing: there is none.
    """
    query = select(Assignment).where(
        Assignment.id == assignment_id, Assignment.client_id == client_id
    )
    assignment = tx.session.scalars(query).first()
    if assignment is None:
        raise Missing(f"you have no assignment {assignment_id}")
    return assignment


def _locked(tx: Tx, principal: Principal, assignment_id: UUID) -> Assignment:
    """An own assignment with its run locked, as it is under the lock."""
    assignment = own_assignment(tx, principal.client, assignment_id)
    rounds.lock_run(tx, assignment.run_id)
    tx.session.refresh(assignment)
    return assignment


def decline(tx: Tx, principal: Principal, assignment_id: UUID, body: Decline) -> Outcome:
    """Give an assignment back; the round goes on without this client.

    Raises:
        LifecycleError: it is too late for that.
    """
    assignment = _locked(tx, principal, assignment_id)
    if assignment.state != AssignmentState.DECLINED:
        reason = body.reason or "declined by the client"
        rounds.move_assignment(tx, assignment, AssignmentEvent.DECLINE, reason=reason)
        rounds.settle(tx, assignment)
    client = tx.session.get_one(Client, principal.client)
    return _outcome(tx, client, assignment.id)


def evaluate(
    tx: Tx, principal: Principal, assignment_id: UUID, body: EvaluationReport
) -> Evaluation:
    """Take a client's scores of a version; a repeated report changes nothing.

    Raises:
        Conflict: the assignment is not an evaluation, or it is over.
    """
    assignment = _locked(tx, principal, assignment_id)
    if assignment.kind != "evaluate":
        raise Conflict("this assignment is for training", code="assignment_kind")
    record = tx.session.get(EvaluationRecord, assignment.id)
    if record is None:
        rounds.move_assignment(tx, assignment, AssignmentEvent.REPORT)
        record = EvaluationRecord(
            assignment_id=assignment.id,
            project_id=assignment.project_id,
            run_id=assignment.run_id,
            client_id=assignment.client_id,
            version_id=assignment.version_id,
            report=body.model_dump(mode="json"),
            created_at=tx.now,
        )
        tx.session.add(record)
        rounds.settle(tx, assignment)
    client = tx.session.get_one(Client, principal.client)
    version = tx.session.get_one(Version, assignment.version_id)
    return evaluation_document(record, client.name, version.number)


def evaluation_document(record: EvaluationRecord, client: str, number: int) -> Evaluation:
    """The evaluation as the interface shows it."""
    return Evaluation.model_validate(
        {
            **record.report,
            "client_id": record.client_id,
            "client_name": client,
            "version_id": record.version_id,
            "version_number": number,
            "created_at": record.created_at,
        }
    )
