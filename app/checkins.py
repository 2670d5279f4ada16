"""Check-ins: what a client is told to do, and when to come again.

Owns handing out assignments and telling their outcome. States change in ``rounds`` alone. The
common answer, "nothing for you now", takes no lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, get_args
from uuid import UUID

from sqlalchemy import ColumnElement, Select, bindparam, exists, func, or_, select, true
from sqlalchemy.orm import aliased

from app import arms, catalog, channels, cohorts, conduct, rollouts, rounds
from app.auth import Principal
from app.db import Tx, among, per_thread
from app.errors import Missing
from app.tables import (
    Arm,
    Assignment,
    CheckpointRecord,
    Client,
    Cohort,
    MaskRecord,
    Model,
    Round,
    Run,
    Version,
)
from app.wiring import Coordinator
from fedselect.checkindocs import Assignment as AssignmentDocument
from fedselect.checkindocs import (
    CheckIn,
    CheckInAnswer,
    Decline,
    Kind,
    MaskInfo,
    Outcome,
    RunBrief,
)
from fedselect.cohorts import Candidate
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
from fedselect.policies import Arms, RoundPolicy, RunSettings

KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
SEEN_EVERY = timedelta(seconds=60)  # a write per check-in would be a write per poll


def check_in(tx: Tx, principal: Principal, body: CheckIn, *, core: Coordinator) -> CheckInAnswer:
    """Tell a client the outcome it waits for, give it work if there is any, and a retry window.

    Raises:
        Missing: ``pending`` is not an assignment of this client.
    """
    client_id = principal.client
    seen = tx.session.execute(_situation(), {"client": client_id}).one()
    candidate = Candidate(str(client_id), seen.tags)
    if seen.last_seen_at is None or tx.now - seen.last_seen_at > SEEN_EVERY:
        tx.session.get_one(Client, client_id).last_seen_at = tx.now
    outcome = _outcome(tx, client_id, body.pending) if body.pending else None
    others = _outcomes(tx, client_id, body.waiting) if body.waiting else []
    settings = RunSettings.model_validate(seen.settings) if seen.settings else None
    outcomes = [*others, *([outcome] if outcome else [])]
    side_by_side = body.waiting is not None and settings is not None and settings.parallel > 1
    free = side_by_side or not any(map(_unsettled, outcomes))
    work = _work(tx, candidate, body, seen) if free else None
    low, high = _window(outcomes, settings.round if settings else RoundPolicy())
    return CheckInAnswer(
        assignment=_document(tx, work, body, core=core) if work else None,
        pending=outcome,
        outcomes=others,
        retry_after_min=low,
        retry_after_max=high,
        checkpoint=seen.checkpoint,
        run_state=RunState(seen.run_state) if seen.run_state else None,
        unable=_unable(seen, settings, body) if settings and work is None else None,
        serving=channels.serving(tx, seen.pointers, candidate),
        pinned=channels.pinned(seen.pointers),
    )


# The statements of every check-in are built once: building one costs more than executing it.
@per_thread
def _situation() -> Select[Any]:
    """Of ``:client``: when it was seen, the newest run of its project, whether any run evaluates
    there or a rollout asks this client, whether it is asked for ablations, what channels point at,
    and the newest signed head of the ledger.
    """
    evaluated, asked = aliased(Run), aliased(Assignment)
    run = (
        select(Run.name, Run.state, Run.settings)
        .where(Run.project_id == Client.project_id, Run.state != RunState.CREATED.value)
        .order_by(Run.created_at.desc())
        .limit(1)
        .lateral()
    )
    evaluating = exists().where(
        evaluated.project_id == Client.project_id, evaluated.state == RunState.EVALUATING.value
    )
    in_rollout = exists().where(
        asked.client_id == Client.id,
        asked.state == AssignmentState.ASSIGNED.value,
        asked.rollout_id.is_not(None),
    )
    head = select(CheckpointRecord.text).order_by(CheckpointRecord.size.desc()).limit(1)
    return (
        select(
            *(Client.last_seen_at, Client.tags),
            run.c.name.label("run_name"),
            run.c.state.label("run_state"),
            run.c.settings,
            or_(evaluating, in_rollout).label("evaluating"),
            exists().where(*_ablating(Client.id)).label("ablating"),
            channels.pointers().label("pointers"),
            head.scalar_subquery().label("checkpoint"),
        )
        .outerjoin(run, true())
        .where(Client.id == bindparam("client"))
    )


def _ablating(client: Any) -> tuple[ColumnElement[bool], ...]:
    open_ones = Assignment.state.in_([s.value for s in OPEN_ASSIGNMENTS])
    return Assignment.client_id == client, Assignment.kind == "ablate", open_ones


def _unable(seen: Any, settings: RunSettings, body: CheckIn) -> str | None:
    encoding = settings.wire.encoding
    if seen.run_state != RunState.RUNNING or encoding in body.encodings:
        return None
    return (
        f"run {seen.run_name!r} exchanges {encoding} files, this agent can do "
        f"{', '.join(body.encodings) or 'none'}; install a newer fedselect at the client"
    )


def _window(outcomes: Sequence[Outcome], policy: RoundPolicy) -> tuple[float, float]:
    if all(outcome.round_state is not RoundState.AGGREGATING for outcome in outcomes):
        return retry_window(policy.retry_after)
    crowd = math.ceil(policy.goal * policy.over_selection)
    return closing_window(policy.retry_after, crowd=crowd)


def _outcome(tx: Tx, client_id: UUID, assignment_id: UUID) -> Outcome:
    assignment = own_assignment(tx, client_id, assignment_id)
    state = None
    if assignment.round_id is not None:
        state = RoundState(tx.session.get_one(Round, assignment.round_id).state)
    return Outcome(
        assignment_id=assignment.id,
        state=AssignmentState(assignment.state),
        round_state=state,
        reason=assignment.reason,
    )


def _outcomes(tx: Tx, client_id: UUID, wanted: Sequence[UUID]) -> list[Outcome]:
    """Of those that are this client's, in the order asked."""
    query = (
        select(Assignment.id, Assignment.state, Assignment.reason, Round.state.label("round_state"))
        .outerjoin(Round, Round.id == Assignment.round_id)
        .where(Assignment.client_id == client_id, among(Assignment.id, wanted))
    )
    found = {row.id: row for row in tx.session.execute(query)}
    return [
        Outcome(
            assignment_id=row.id,
            state=AssignmentState(row.state),
            round_state=RoundState(row.round_state) if row.round_state else None,
            reason=row.reason,
        )
        for row in (found[each] for each in dict.fromkeys(wanted) if each in found)
    ]


def _unsettled(outcome: Outcome) -> bool:
    """Whether the client still waits: its update is in, and its round has not ended.

    An evaluation has no round: once it is in, there is nothing to wait for.
    """
    if outcome.round_state in {None, *TERMINAL_ROUNDS}:
        return False
    return outcome.state in {AssignmentState.UPLOADED, AssignmentState.ACCEPTED}


def _work(tx: Tx, candidate: Candidate, body: CheckIn, seen: Any) -> Assignment | None:
    """The oldest open assignment, then what was asked of it about a version, then a new one: in a
    round that rejected this client's update, or in one that still selects.

    Among several it is the one that has been open longest, so that no arm is left behind, and of
    those given together always the same, so that asking twice is answered alike; clients spread
    over rounds that opened together.
    """
    client_id = UUID(candidate.id)
    places = tx.session.execute(_places(), {"client": client_id}).all()
    given: list[Assignment] = [p.Assignment for p in places if p.Assignment is not None]
    given = [each for each in given if each.state in OPEN_ASSIGNMENTS and each.deadline > tx.now]
    if seen.evaluating:
        given += tx.session.scalars(_evaluations(), {"client": client_id, "now": tx.now})
    if given:
        return min(given, key=lambda each: (each.created_at, each.id))
    if seen.ablating and "ablate" in (body.kinds or ()):
        asked = tx.session.scalars(_ablations(), {"client": client_id, "now": tx.now}).first()
        if asked is not None:
            return asked
    places = [p for p in places if p.encoding in body.encodings and _in_arm(p, client_id)]
    places = [p for p in places if cohorts.admits(p.rule, p.salt, candidate)]
    open_to = [p for p in places if _again(p, tx.now)] or [p for p in places if _new(p, tx.now)]
    open_to.sort(key=lambda place: (place.Round.opened_at, place.Round.id.int ^ client_id.int))
    # Looked for without a lock, so that one run alone is locked, whose room counts again then.
    first = next((place for place in open_to if _has_room(tx, place, client_id)), None)
    return _join(tx, client_id, first.Round.id) if first else None


def _in_arm(place: Any, client_id: UUID) -> bool:
    """Whether the client does this arm of the run."""
    if not place.arms:
        return True
    mine = Arms.model_validate(place.arms).of_client(str(client_id), seed=place.seed)
    return place.arm in {policy.name for policy in mine}


@per_thread
def _places() -> Select[Any]:
    """The gathering rounds of the project of ``:client``, each with its last place there."""
    last = (
        select(Assignment)
        .where(Assignment.round_id == Round.id, Assignment.client_id == Client.id)
        .order_by(Assignment.attempt.desc())
        .limit(1)
        .lateral()
    )
    most = Run.settings["round"]["client_attempts"].as_integer()
    encoding = func.coalesce(Run.settings["wire"]["encoding"].as_string(), "f32")
    per_group = Run.settings["influence"]["clients_per_group"].as_integer()
    return (
        select(Round, aliased(Assignment, last, name="Assignment"))
        .add_columns(Run.state.label("run_state"), most.label("most"), encoding.label("encoding"))
        .add_columns(Arm.name.label("arm"), Run.settings["arms"].label("arms"))
        .add_columns(Run.settings["seed"].label("seed"), Cohort.rule, Cohort.salt)
        .add_columns(per_group.label("per_group"))
        .join(Client, Client.project_id == Round.project_id)
        .join(Run, Run.id == Round.run_id)
        .join(Arm, Arm.id == Round.arm_id)
        .outerjoin(Cohort, Cohort.id == Run.cohort_id)
        .outerjoin(last, true())
        .where(
            Client.id == bindparam("client"),
            Round.state.in_([s.value for s in GATHERING_ROUNDS]),
        )
        .order_by(Round.opened_at)
    )


@per_thread
def _evaluations() -> Select[Assignment]:
    """The open evaluations of ``:client``: of runs that evaluate, and of rollouts."""
    return (
        select(Assignment)
        .join(Run, Run.id == Assignment.run_id)
        .where(
            Assignment.client_id == bindparam("client"),
            Assignment.kind == "evaluate",
            Assignment.state.in_([s.value for s in OPEN_ASSIGNMENTS]),
            Assignment.deadline > bindparam("now"),
            or_(Run.state == RunState.EVALUATING.value, Assignment.rollout_id.is_not(None)),
        )
    )


@per_thread
def _ablations() -> Select[Assignment]:
    """The open ablations of ``:client``, oldest first."""
    query = select(Assignment).where(*_ablating(bindparam("client")))
    query = query.where(Assignment.deadline > bindparam("now"))
    return query.order_by(Assignment.created_at, Assignment.id)


def _again(place: Any, now: datetime) -> bool:
    """Whether the client may have another attempt, its last one having been rejected."""
    last = place.Assignment
    if last is None or last.state != AssignmentState.REJECTED or last.deadline <= now:
        return False
    return bool(last.attempt < (place.most or RoundPolicy().client_attempts))


def _new(place: Any, now: datetime) -> bool:
    """Whether the round still selects and the client has no place in it."""
    selecting = place.Round.state == RoundState.SELECTING and place.Round.selection_ends > now
    return bool(selecting and place.Assignment is None and place.run_state == RunState.RUNNING)


def _has_room(tx: Tx, place: Any, client_id: UUID) -> bool:
    """Whether the round takes this client, as far as its group is concerned."""
    if place.Assignment is not None or place.per_group is None:
        return True
    run = tx.session.get_one(Run, place.Round.run_id)
    return conduct.has_room(tx, run, place.Round, client_id)


def _join(tx: Tx, client_id: UUID, round_id: UUID) -> Assignment | None:
    # What was read before the lock may have changed: look again under it.
    run, current = rounds.lock_round(tx, round_id)
    mine = select(Assignment).where(
        Assignment.round_id == round_id, Assignment.client_id == client_id
    )
    last = tx.session.scalars(
        mine.order_by(Assignment.attempt.desc()).limit(1),
        execution_options={"populate_existing": True},
    ).first()
    if last is None:
        new = current.state == RoundState.SELECTING and run.state == RunState.RUNNING
        new = new and conduct.has_room(tx, run, current, client_id)
        return rounds.assign(tx, run, current, client_id) if new else None
    if last.state in OPEN_ASSIGNMENTS and rounds.gathering(tx, last):
        return last  # given a moment ago, by a call whose answer the client did not get
    policy = RunSettings.model_validate(run.settings).round
    again = may_try_again(AssignmentState(last.state), last.attempt, policy)
    if not again or not rounds.gathering(tx, last):
        return None
    return rounds.assign(tx, run, current, client_id, attempt=last.attempt + 1)


def _document(
    tx: Tx, assignment: Assignment, body: CheckIn, *, core: Coordinator
) -> AssignmentDocument:
    run = tx.session.get_one(Run, assignment.run_id)
    model = tx.session.get_one(Model, run.model_id)
    base = tx.session.get_one(Version, assignment.version_id)
    mask = tx.session.get(MaskRecord, assignment.mask_id) if assignment.mask_id else None
    number = tx.session.get_one(Round, assignment.round_id).number if assignment.round_id else None
    # What bounds clients is none of their business, and earlier agents do not know it.
    settings = arms.settings_of(tx, run, assignment.arm_id).model_copy(update={"influence": None})
    deltas = catalog.deltas_to(
        tx, base, body.versions, storage=core.storage, lifetime=core.settings.url_lifetime
    )
    if assignment.download_size is None:
        whole = base.size if deltas is None else 0
        assignment.download_size = whole + sum(each.download.size for each in deltas or ())
    return AssignmentDocument(
        id=assignment.id,
        kind=KINDS[assignment.kind],
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
        against=rollouts.before(tx, assignment),
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


def locked(tx: Tx, principal: Principal, assignment_id: UUID) -> Assignment:
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
    assignment = locked(tx, principal, assignment_id)
    if assignment.state != AssignmentState.DECLINED:
        reason = body.reason or "declined by the client"
        rounds.move_assignment(tx, assignment, AssignmentEvent.DECLINE, reason=reason)
        rounds.settle(tx, assignment)
    return _outcome(tx, principal.client, assignment.id)
