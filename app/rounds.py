"""The one door: every change of state of a run, a round or an assignment goes through here.

Lock the run's row, ask ``fedselect.lifecycle``, write the row, its history and its ledger entry,
then what follows from it. Must not know HTTP or the object store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy import update as sql_update

from app import arms, budgets, catalog, jobs, ledger, logs, manifests, metrics, objects, sums
from app.db import Tx, Values, among
from app.tables import (
    Arm,
    Assignment,
    MaskRecord,
    Round,
    Run,
    Transition,
    Update,
    Upload,
    Version,
)
from fedselect import __version__
from fedselect.accounting import rounds_allowed
from fedselect.lifecycle import (
    GATHERING_ROUNDS,
    OPEN_ASSIGNMENTS,
    TERMINAL_ROUNDS,
    AfterRound,
    AssignmentEvent,
    AssignmentState,
    Decision,
    Ended,
    RoundEvent,
    RoundFacts,
    RoundState,
    RunEvent,
    RunState,
    after_round,
    decide,
    may_try_again,
    next_assignment_state,
    next_run_state,
)
from fedselect.policies import RoundPolicy, RunSettings

# --- locks -------------------------------------------------------------------------------------


def lock_run(tx: Tx, run_id: UUID) -> Run:
    """Lock a run for transitions. Locks are always taken in the order run, round, assignment."""
    query = select(Run).where(Run.id == run_id).with_for_update()
    return tx.session.scalars(query, execution_options={"populate_existing": True}).one()


def hold_runs(tx: Tx, run_ids: Iterable[UUID]) -> None:
    """Keep runs from changing while uploads are registered, which do not exclude each other."""
    query = select(Run.id).where(among(Run.id, sorted(run_ids))).order_by(Run.id)
    tx.session.execute(query.with_for_update(read=True))


def lock_round(tx: Tx, round_id: UUID) -> tuple[Run, Round]:
    """Lock a round's run and read both afresh."""
    run_id = tx.session.scalars(select(Round.run_id).where(Round.id == round_id)).one()
    run = lock_run(tx, run_id)
    logs.note(run=run_id, round=round_id)
    return run, fresh_round(tx, round_id)


def fresh_round(tx: Tx, round_id: UUID) -> Round:
    """A round's row as it is now, never as this transaction saw it before it had the lock."""
    query = select(Round).where(Round.id == round_id)
    return tx.session.scalars(query, execution_options={"populate_existing": True}).one()


# --- runs --------------------------------------------------------------------------------------


def move_run(tx: Tx, run: Run, event: RunEvent, *, reason: str | None = None) -> None:
    """Change a run's state; its row must be locked.

    Raises:
        LifecycleError: the state does not allow it.
    """
    before, after = run.state, next_run_state(RunState(run.state), event)
    run.state, run.reason = after.value, reason
    _record(tx, "run", run, before=before, reason=reason)


def open_next_round(tx: Tx, run: Run, arm: Arm, *, attempt: int = 1) -> Round:
    """Open the round behind the arm's newest version."""
    base = catalog.newest_version(tx, arm.id)
    policy = RunSettings.model_validate(run.settings).round
    selection_ends = tx.now + timedelta(seconds=policy.selection_deadline)
    opened = Round(
        id=uuid4(),
        project_id=run.project_id,
        run_id=run.id,
        arm_id=arm.id,
        base_version_id=base.id,
        number=base.number + 1,
        attempt=attempt,
        state=RoundState.SELECTING.value,
        selection_ends=selection_ends,
        report_ends=selection_ends + timedelta(seconds=policy.report_deadline),
        opened_at=tx.now,
    )
    tx.session.add(opened)
    tx.session.flush()
    _record(tx, "round", opened, before=None, reason=f"round {opened.number}, attempt {attempt}")
    return opened


def open_idle_arms(tx: Tx, run: Run) -> None:
    """Open a round in every arm that has none under way, unless it has had them all."""
    settings = RunSettings.model_validate(run.settings)
    for arm in arms.of_run(tx, run):
        number = catalog.newest_version(tx, arm.id).number + 1
        if number <= rounds_allowed(settings) and active_round(tx, arm.id) is None:
            tried = select(func.max(Round.attempt)).where(
                Round.arm_id == arm.id, Round.number == number
            )
            open_next_round(tx, run, arm, attempt=(tx.session.scalar(tried) or 0) + 1)


def active_round(tx: Tx, arm_id: UUID) -> Round | None:
    """The arm's round that has not ended (a failed one has not); there is at most one."""
    ended = [s.value for s in TERMINAL_ROUNDS]
    query = select(Round).where(Round.arm_id == arm_id, Round.state.not_in(ended))
    return tx.session.scalars(query).first()


# --- rounds ------------------------------------------------------------------------------------


def apply(tx: Tx, round_id: UUID, event: RoundEvent) -> RoundState:
    """Let a round take an event, with all that follows; returns its state afterwards.

    Raises:
        LifecycleError: the state does not allow it.
    """
    run, current = lock_round(tx, round_id)
    return advance(tx, run, current, event)


def advance(tx: Tx, run: Run, current: Round, event: RoundEvent) -> RoundState:
    """:func:`apply` for a run that is locked already."""
    policy = RunSettings.model_validate(run.settings).round
    decision = decide(_facts(tx, current, policy), event, policy=policy, now=tx.now)
    if decision.to is not None:
        _enter(tx, run, current, decision)
    return RoundState(current.state)


def accepted(tx: Tx, run: Run, round_id: UUID, *, fold_from: int) -> None:
    """Tell a round that it has one more update: it may close, or have a group to add up.

    The run must be locked.
    """
    logs.note(run=run.id, round=round_id)
    current = fresh_round(tx, round_id)
    if advance(tx, run, current, RoundEvent.SETTLE) in GATHERING_ROUNDS:
        sums.grown(tx, run, current, at_least=fold_from)


def withdraw(tx: Tx, assignment: Assignment, *, reason: str) -> list[str]:
    """Take an accepted update out of its round; the run must be locked.

    Returns the keys of sums that hold it; the round is still to be told (:func:`settle`). Nothing
    happens once the manifest is frozen.
    """
    query = select(Update).where(Update.assignment_id == assignment.id)
    update = tx.session.scalars(query).first()
    if update is None or update.withdrawn_at is not None:
        return []
    current = fresh_round(tx, update.round_id)
    if RoundState(current.state) not in GATHERING_ROUNDS:
        return []
    update.withdrawn_at = tx.now
    move_assignment(tx, assignment, AssignmentEvent.WITHDRAW, reason=reason)
    _reject_upload(tx, assignment, reason=reason)
    return sums.withdrawn(tx, tx.session.get_one(Run, current.run_id), current)


def _facts(tx: Tx, current: Round, policy: RoundPolicy) -> RoundFacts:
    kind = (Assignment.state, Assignment.attempt)
    query = select(*kind, func.count()).where(Assignment.round_id == current.id).group_by(*kind)
    tx.session.flush()
    counts: Counter[str] = Counter()
    assigned = again = 0
    for state, attempt, count in tx.session.execute(query):
        counts[state] += count
        assigned += count if attempt == 1 else 0
        again += count if may_try_again(AssignmentState(state), attempt, policy) else 0
        again -= count if attempt > 1 else 0  # it follows a rejected one, which was counted
    return RoundFacts(
        state=RoundState(current.state),
        selection_ends=current.selection_ends,
        report_ends=current.report_ends,
        assigned=assigned,
        open=sum(counts[s.value] for s in OPEN_ASSIGNMENTS),
        pending=counts[AssignmentState.UPLOADED.value],
        accepted=counts[AssignmentState.ACCEPTED.value],
        again=again,
    )


def _enter(tx: Tx, run: Run, current: Round, decision: Decision) -> None:
    if decision.to is None:
        return
    before, current.state, current.reason = current.state, decision.to.value, decision.reason
    ended = decision.to in TERMINAL_ROUNDS
    if ended:
        current.closed_at = tx.now
    _record(tx, "round", current, before=before, reason=decision.reason)
    if before == RoundState.FAILED and not ended:
        # The manifest stands, and so do the parts that are done.
        jobs.revive(tx, current.id, kinds=("aggregate", "publish"))
    elif ended or decision.to is RoundState.AGGREGATING:
        _close_assignments(tx, current)
    if decision.to is RoundState.AGGREGATING and before != RoundState.FAILED:
        jobs.drop(tx, current.id)  # nobody folds any more: what is there is what counts
        parts = manifests.freeze(tx, run, current)
        for part in range(parts):
            jobs.enqueue(tx, "aggregate", current.id, project=current.project_id, part=part)
    if ended or decision.to is RoundState.FAILED:
        _follow(tx, run, current)


def _close_assignments(tx: Tx, current: Round) -> None:
    unsettled = [s.value for s in (*OPEN_ASSIGNMENTS, AssignmentState.UPLOADED)]
    query = select(Assignment).where(
        Assignment.round_id == current.id, Assignment.state.in_(unsettled)
    )
    for assignment in tx.session.scalars(query.with_for_update()):
        if assignment.state == AssignmentState.UPLOADED:
            reject(tx, assignment, reason=f"round_{current.state}")
        else:
            reason = f"the round is {current.state}: {current.reason}"
            move_assignment(tx, assignment, AssignmentEvent.EXPIRE, reason=reason)
    # Sketches serve the round that gathers, and no longer.
    drop = sql_update(Update).where(Update.round_id == current.id, Update.sketch.is_not(None))
    tx.session.execute(drop.values(sketch=None), execution_options={"synchronize_session": False})


def _follow(tx: Tx, run: Run, ended: Round) -> None:
    # The other parts of a failed round may as well be done: they are there when it is retried.
    if ended.state not in {RoundState.PUBLISHED, RoundState.FAILED}:
        jobs.drop(tx, ended.id)
    if ended.state != RoundState.FAILED:
        sums.discard(tx, ended)
    settings = RunSettings.model_validate(run.settings)
    allowed = rounds_allowed(settings)
    found = Ended(
        RoundState(ended.state),
        ended.number,
        ended.attempt,
        arms_left=arms.left(tx, run, allowed, but=ended.arm_id),
    )
    step = after_round(
        RunState(run.state),
        found,
        rounds=allowed,
        max_attempts=settings.round.max_attempts,
    )
    arm = tx.session.get_one(Arm, ended.arm_id)
    if step is AfterRound.NEXT:
        open_next_round(tx, run, arm)
    elif step is AfterRound.RETRY:
        open_next_round(tx, run, arm, attempt=ended.attempt + 1)
    elif step is AfterRound.PAUSE:
        reason = f"round {ended.number} is {ended.state}: {ended.reason}"
        move_run(tx, run, RunEvent.PAUSE, reason=reason)
    elif step is AfterRound.EVALUATE:
        why = budgets.reached(tx, run, settings) if allowed < settings.rounds else None
        _start_evaluation(tx, run, settings, reason=why)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a worker has put into the store: its key, its SHA-256 (hex), its bytes."""

    key: str
    sha256: str
    size: int


def publish(tx: Tx, lease: jobs.Lease, file: StoredFile, delta: StoredFile | None = None) -> None:
    """Write a round's new version: the fenced end of its aggregation.

    ``delta`` is the file that leads to it from the version before, if the run's encoding has one.

    Raises:
        LeaseLost: another worker holds the job.
        LifecycleError: the round is not aggregating (any more).
    """
    run, current = lock_round(tx, lease.subject_id)
    jobs.finish(tx, lease)
    objects.keep(tx, *(each.key for each in (file, delta) if each is not None))
    version = Version(
        id=uuid4(),
        project_id=run.project_id,
        model_id=run.model_id,
        arm_id=current.arm_id,
        round_id=current.id,
        parent_id=current.base_version_id,
        number=current.number,
        object_key=file.key,
        sha256=file.sha256,
        size=file.size,
        encoding=manifests.load(tx, current.id).encoding,
        delta_key=delta and delta.key,
        delta_sha256=delta and delta.sha256,
        delta_size=delta and delta.size,
        manifest_sha256=manifests.digest(tx, current.id),
        code_version=__version__,
        created_at=tx.now,
    )
    tx.session.add(version)
    tx.session.flush()
    body, subject = _published(version), f"version:{version.id}"
    ledger.append(tx, "version.published", subject, project=run.project_id, body=body)
    advance(tx, run, current, RoundEvent.PUBLISH)


def _published(version: Version) -> dict[str, str | int | None]:
    names = ["number", "sha256", "manifest_sha256"]
    names += ["encoding", "delta_sha256", "delta_size"] if version.delta_key else []
    return {name.removesuffix("_sha256"): getattr(version, name) for name in names}


def part_done(tx: Tx, lease: jobs.Lease) -> None:
    """Mark one shard as aggregated; the last one makes publishing due.

    Raises:
        LeaseLost: another worker holds the job.
    """
    lock_round(tx, lease.subject_id)
    jobs.finish(tx, lease)
    tx.session.flush()
    if jobs.remaining(tx, "aggregate", lease.subject_id) == 0:
        jobs.enqueue(tx, "publish", lease.subject_id, project=lease.project_id)


# --- assignments -------------------------------------------------------------------------------


def assign(tx: Tx, run: Run, current: Round, client_id: UUID, *, attempt: int = 1) -> Assignment:
    """Give a client its place in a round; the run must be locked and the round selecting.

    A further ``attempt`` takes the place of a rejected one, as long as the round gathers.
    """
    assignment = Assignment(
        id=uuid4(),
        project_id=run.project_id,
        run_id=run.id,
        arm_id=current.arm_id,
        round_id=current.id,
        client_id=client_id,
        version_id=current.base_version_id,
        mask_id=_known_mask(tx, current.arm_id, client_id),
        kind="train",
        attempt=attempt,
        state=AssignmentState.ASSIGNED.value,
        deadline=current.report_ends,
        created_at=tx.now,
    )
    tx.session.add(assignment)
    tx.session.flush()
    reason = f"attempt {attempt}" if attempt > 1 else None
    _record(tx, "assignment", assignment, before=None, reason=reason)
    if attempt == 1:
        advance(tx, run, current, RoundEvent.JOIN)
    return assignment


def move_assignment(
    tx: Tx, assignment: Assignment, event: AssignmentEvent, *, reason: str | None = None
) -> None:
    """Change an assignment's state; its row, or its run, must be locked.

    Raises:
        LifecycleError: the state does not allow it.
    """
    before = assignment.state
    after = next_assignment_state(AssignmentState(before), event)
    if after.value == before:
        return
    assignment.state, assignment.reason = after.value, reason
    _record(tx, "assignment", assignment, before=before, reason=reason)


def reject(tx: Tx, assignment: Assignment, *, reason: str, detail: str | None = None) -> None:
    """Refuse an uploaded update, with a stable reason; the client and the admin see both."""
    move_assignment(tx, assignment, AssignmentEvent.REJECT, reason=reason)
    _reject_upload(tx, assignment, reason=reason, detail=detail)


def _reject_upload(
    tx: Tx, assignment: Assignment, *, reason: str, detail: str | None = None
) -> None:
    query = select(Upload).where(Upload.assignment_id == assignment.id)
    upload = tx.session.scalars(query).one()
    upload.state, upload.reason, upload.detail = "rejected", reason, detail


def settle(tx: Tx, assignment: Assignment) -> None:
    """Tell the round (or the evaluation) that one of its assignments has reached its end."""
    if assignment.round_id is not None:
        apply(tx, assignment.round_id, RoundEvent.SETTLE)
    elif assignment.rollout_id is None:  # a rollout looks for itself, when it steps
        finish_evaluation(tx, assignment.run_id)


def gathering(tx: Tx, assignment: Assignment) -> bool:
    """Whether the assignment's round still takes updates."""
    if assignment.round_id is None:
        return False
    return takes_updates(tx, assignment, fresh_round(tx, assignment.round_id))


def takes_updates(tx: Tx, assignment: Assignment, current: Round) -> bool:
    """The same of a round that was read under the lock of its run."""
    return tx.now < assignment.deadline and RoundState(current.state) in GATHERING_ROUNDS


def _known_mask(tx: Tx, arm_id: UUID, client_id: UUID) -> UUID | None:
    query = (
        select(MaskRecord.id)
        .where(MaskRecord.arm_id == arm_id, MaskRecord.client_id == client_id)
        .order_by(MaskRecord.number.desc())
        .limit(1)
    )
    return tx.session.scalar(query)


# --- what clients are asked of a version -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Errand:
    """Work outside a round: its kind, until when, and why, in words for the history."""

    kind: str
    deadline: datetime
    reason: str
    attempt: int = 1
    rollout_id: UUID | None = None


def send(tx: Tx, run: Run, version: Version, clients: Sequence[UUID], errand: Errand) -> None:
    """Give clients work on a version of an arm, in three statements however many they are; the run
    must be locked.
    """
    ids, state = [uuid4() for _ in clients], AssignmentState.ASSIGNED.value
    same: Values = {
        Assignment.project_id: run.project_id,
        Assignment.run_id: run.id,
        Assignment.arm_id: version.arm_id,
        Assignment.rollout_id: errand.rollout_id,
        Assignment.version_id: version.id,
        Assignment.kind: errand.kind,
        Assignment.attempt: errand.attempt,
        Assignment.state: state,
        Assignment.deadline: errand.deadline,
        Assignment.created_at: tx.now,
    }
    tx.insert_each({Assignment.id: ids, Assignment.client_id: clients}, same)
    moved: Values = {
        Transition.project_id: run.project_id,
        Transition.subject_kind: "assignment",
        Transition.to_state: state,
        Transition.reason: errand.reason,
        Transition.actor: tx.actor,
        Transition.created_at: tx.now,
    }
    tx.insert_each({Transition.subject_id: ids}, moved)
    body = {"from": None, "to": state, "reason": errand.reason}
    subjects = [f"assignment:{each}" for each in ids]
    ledger.append_each(tx, f"assignment.{state}", subjects, project=run.project_id, body=body)


def overdue_ablations(tx: Tx) -> Sequence[Assignment]:
    """Open ablations behind their deadline."""
    query = select(Assignment).where(
        Assignment.kind == "ablate",
        Assignment.state.in_([s.value for s in OPEN_ASSIGNMENTS]),
        Assignment.deadline <= tx.now,
    )
    return tx.session.scalars(query).all()


def expire_ablations(tx: Tx, run_id: UUID) -> None:
    """End the ablations of a run that nobody has answered in time."""
    lock_run(tx, run_id)
    for assignment in overdue_ablations(tx):
        if assignment.run_id == run_id:
            reason = "no ablation before the deadline"
            move_assignment(tx, assignment, AssignmentEvent.EXPIRE, reason=reason)


# --- evaluation at the end of a run ------------------------------------------------------------


def _start_evaluation(
    tx: Tx, run: Run, settings: RunSettings, *, reason: str | None = None
) -> None:
    """Ask every client for its scores in each of its arms, one arm after the other."""
    move_run(tx, run, RunEvent.EVALUATE, reason=reason)
    run.evaluation_ends = tx.now + timedelta(seconds=settings.round.report_deadline)
    errand = Errand("evaluate", run.evaluation_ends, "evaluate the last version")
    clients = arms.clients_of(tx, run)
    for arm in arms.of_run(tx, run):
        mine = [each for each in clients if arm.name in settings.arms_of(str(each))]
        send(tx, run, catalog.newest_version(tx, arm.id), mine, errand)
    finish_evaluation(tx, run.id)


def finish_evaluation(tx: Tx, run_id: UUID) -> None:
    """Finish a run once every evaluation is in or overdue."""
    run = lock_run(tx, run_id)
    if run.state != RunState.EVALUATING or run.evaluation_ends is None:
        return
    missing = open_evaluations(tx, run)
    if missing and tx.now < run.evaluation_ends:
        return
    for assignment in missing:
        reason = "no evaluation before the deadline"
        move_assignment(tx, assignment, AssignmentEvent.EXPIRE, reason=reason)
    move_run(tx, run, RunEvent.FINISH, reason=run.reason)


def open_evaluations(tx: Tx, run: Run) -> Sequence[Assignment]:
    """Evaluations at the end of the run that have not been reported; no rollout's."""
    still_open = [s.value for s in OPEN_ASSIGNMENTS]
    query = select(Assignment).where(
        Assignment.run_id == run.id,
        Assignment.kind == "evaluate",
        Assignment.rollout_id.is_(None),
        Assignment.state.in_(still_open),
    )
    tx.session.flush()
    return tx.session.scalars(query).all()


# --- time --------------------------------------------------------------------------------------


def overdue(tx: Tx) -> tuple[list[UUID], list[UUID]]:
    """Rounds that gather and runs that evaluate: what a passing deadline can move."""
    states = [s.value for s in GATHERING_ROUNDS]
    rounds = tx.session.scalars(select(Round.id).where(Round.state.in_(states))).all()
    late = (Run.state == RunState.EVALUATING.value) & (Run.evaluation_ends <= tx.now)
    return list(rounds), list(tx.session.scalars(select(Run.id).where(late)))


def has_ended(tx: Tx, round_id: UUID) -> bool:
    """Whether a round needs nothing any more; a failed one may still be published."""
    return RoundState(fresh_round(tx, round_id).state) in TERMINAL_ROUNDS


def tick(tx: Tx, round_id: UUID) -> None:
    """Let a round notice the time: deadlines, and uploads whose verification takes too long."""
    run, current = lock_round(tx, round_id)
    if RoundState(current.state) not in GATHERING_ROUNDS:
        return
    policy = RunSettings.model_validate(run.settings).round
    before = tx.now - timedelta(seconds=policy.verification_timeout)
    query = (
        select(Assignment)
        .join(Upload, Upload.assignment_id == Assignment.id)
        .where(
            Assignment.round_id == round_id,
            Assignment.state == AssignmentState.UPLOADED.value,
            Upload.completed_at < before,
        )
    )
    for assignment in tx.session.scalars(query):
        reject(tx, assignment, reason="verification_timeout")
    advance(tx, run, current, RoundEvent.TICK)


# --- history ----------------------------------------------------------------------------------


def _record(
    tx: Tx, kind: str, row: Run | Round | Assignment, *, before: str | None, reason: str | None
) -> None:
    tx.session.add(
        Transition(
            project_id=row.project_id,
            subject_kind=kind,
            subject_id=row.id,
            from_state=before,
            to_state=row.state,
            reason=reason,
            actor=tx.actor,
            created_at=tx.now,
        )
    )
    trained = isinstance(row, Assignment) and row.round_id is not None
    tx.after_commit(partial(metrics.moved, "update" if trained else kind, row.state))
    body = {"from": before, "to": row.state, "reason": reason}
    ledger.append(tx, f"{kind}.{row.state}", f"{kind}:{row.id}", project=row.project_id, body=body)
