"""Conduct: what a client's updates say of it, and what follows.

Owns the questions about likeness, groups and strikes, and the job that suspends. The rules are
``fedselect.influence`` and ``likeness``. Must not read files.
"""

from __future__ import annotations

from collections import defaultdict
from uuid import UUID

from sqlalchemy import select

from app import clients, jobs
from app.db import Tx
from app.tables import Assignment, Client, Round, Run, Transition, Update
from fedselect.influence import Judgement, group_of, is_strike, standing, suspended
from fedselect.lifecycle import AssignmentState
from fedselect.likeness import cosine
from fedselect.policies import Influence, RunSettings
from fedselect.protocol import ClientConduct, RunConduct, Strike

CONDUCT = "conduct"
GIVEN_UP = [AssignmentState.DECLINED.value, AssignmentState.EXPIRED.value]


def rules_of(run: Run) -> Influence | None:
    """What the run bounds, if it does."""
    return RunSettings.model_validate(run.settings).influence


def resembles(tx: Tx, round_id: UUID, sketch: bytes, rules: Influence) -> int | None:
    """The number of an accepted update of the round that changes the same way, if there is one."""
    if rules.likeness is None:
        return None
    query = (
        select(Update.number, Update.sketch)
        .where(Update.round_id == round_id, Update.withdrawn_at.is_(None))
        .order_by(Update.number)
    )
    for number, other in tx.session.execute(query):
        if other is not None and cosine(sketch, other) >= rules.likeness:
            return int(number)
    return None


def has_room(tx: Tx, run: Run, current: Round, client_id: UUID) -> bool:
    """Whether the round takes one more client of this one's group.

    Without a lock of the run the answer may be out of date: who gives a place asks under it.

    Clients without a tag of the kind are one group together, so that leaving it out wins nothing.
    A place that was declined or not used in time is free again.
    """
    rules = rules_of(run)
    if rules is None or rules.clients_per_group is None:
        return True
    own = group_of(tx.session.get_one(Client, client_id).tags, rules.group)
    query = (
        select(Client.tags)
        .join(Assignment, Assignment.client_id == Client.id)
        .where(Assignment.round_id == current.id, Assignment.attempt == 1)
        .where(Assignment.state.not_in(GIVEN_UP))
    )
    there = [group_of(tags, rules.group) for tags in tx.session.scalars(query)]
    return there.count(own) < rules.clients_per_group


def struck(tx: Tx, run: Run, assignment: Assignment, reason: str) -> None:
    """After a refusal: have the client's conduct looked at, if the run counts strikes."""
    rules = rules_of(run)
    if rules is not None and rules.strikes is not None and is_strike(reason):
        client, project = assignment.client_id, assignment.project_id
        jobs.revive(tx, client, kinds=(CONDUCT,))  # one that failed is due again, too
        jobs.require(tx, CONDUCT, client, project=project, parts=[0])


def judge(tx: Tx, lease: jobs.Lease) -> None:
    """Suspend a client whose refusals in any run are enough for that.

    Raises:
        LeaseLost: another worker holds the job.
    """
    # The client first, as everywhere. Whoever strikes meanwhile makes the job due under the lock
    # of its row, which we hold from here on: a strike is seen either now or then.
    query = select(Client).where(Client.id == lease.subject_id).with_for_update()
    client = tx.session.scalars(query, execution_options={"populate_existing": True}).one()
    jobs.finish(tx, lease)
    for run_id, judged in _judged(tx, client.id).items():
        rules = rules_of(tx.session.get_one(Run, run_id))
        if rules and suspended(judged, rules, since=client.forgiven_at, now=tx.now):
            clients.suspend(tx, client, cause=f"strikes in run {run_id}")


def standing_of(tx: Tx, client: Client) -> ClientConduct:
    """Which strikes count against a client, in every run that counts them."""
    judged = _judged(tx, client.id)
    query = select(Run).where(Run.id.in_(judged)).order_by(Run.created_at, Run.id)
    found = []
    for run in tx.session.scalars(query):
        rules = rules_of(run)
        if rules is None or rules.strikes is None:
            continue
        counted = standing(judged[run.id], rules, since=client.forgiven_at, now=tx.now)
        shown = [Strike(round=s.round[0], reason=str(s.reason), at=s.at) for s in counted]
        found.append(
            RunConduct(
                run_id=run.id,
                run=run.name,
                count=len(shown),
                strikes=shown,
                limit=rules.strikes,
                window=rules.strike_window,
            )
        )
    return ClientConduct(
        client_id=client.id, state=client.state, forgiven_at=client.forgiven_at, runs=found
    )


def _judged(tx: Tx, client_id: UUID) -> dict[UUID, list[Judgement]]:
    """What became of all updates of a client, by run."""
    became = [AssignmentState.REJECTED.value, AssignmentState.ACCEPTED.value]
    query = (
        select(Assignment.run_id, Transition.to_state, Transition.created_at, Transition.reason)
        .add_columns(Round.number, Round.attempt.label("again"), Assignment.attempt)
        .join(Transition, Transition.subject_id == Assignment.id)
        .join(Round, Round.id == Assignment.round_id)
        .where(
            Assignment.client_id == client_id,
            Transition.subject_kind == "assignment",
            Transition.to_state.in_(became),
        )
        .order_by(Transition.created_at, Assignment.id)
    )
    found: dict[UUID, list[Judgement]] = defaultdict(list)
    for row in tx.session.execute(query):
        reason = None if row.to_state == AssignmentState.ACCEPTED else row.reason
        place = (row.number, row.again)
        found[row.run_id].append(Judgement(row.created_at, reason, place, row.attempt))
    return found
