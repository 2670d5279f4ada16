"""Whatever clients, workers, time and administrators do, the service does what the model does.

Hypothesis chooses the steps. After each one run, rounds and assignments are compared with
``round_model``; at the end also versions, updates and the ledger.
"""

from __future__ import annotations

import os
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from app import jobs, rounds
from fedselect.lifecycle import AfterRound
from workers import running, sweep

from .conftest import MovableClock
from .factories import (
    REPORT,
    Json,
    due_jobs,
    everything,
    make_clients,
    make_model,
    make_project,
    make_run,
    ok,
    train,
    upload,
)
from .round_model import RunModel

EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "4"))  # more of them: make soak
CLIENTS, STEP = 4, 600  # seconds; no deadline is within 200 seconds of a multiple of it
RULES: Json = {
    "goal": 3,
    "quorum": 2,
    "over_selection": 1.0,
    "selection_deadline": 1000,
    "report_deadline": 2200,
    "verification_timeout": 80_000,
    "max_attempts": 3,
}
who = st.integers(0, CLIENTS - 1)
pick = st.integers(0, 1000)


def machine(core: Any, api: Any, clock: MovableClock) -> type[RuleBasedStateMachine]:
    """The machine on this coordinator; every example has a project of its own."""

    class Service(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            clock.hold()
            self.project = make_project(core, api)
            self.weights = make_model(self.project)
            self.clients = make_clients(self.project, CLIENTS)
            run = make_run(self.project, self.weights, rounds=2, **RULES)
            self.path = f"/v1/runs/{run['id']}"
            self.model = RunModel(CLIENTS, 3, 2, 3, 2, 3, 1000, 2200)
            self.work: dict[int, Json] = {}  # the newest assignment of each client
            self.files: dict[str, tuple[int, str, bool]] = {}  # upload → client, its work, honest
            self.tickets: dict[int, Json] = {}
            self.failures = 0

        # --- clients

        @rule(client=who)
        def check_in(self, client: int) -> None:
            found = self.clients[client].check_in()["assignment"]
            expected = self.model.check_in(client)
            assert (found and found["kind"]) == expected
            if found:
                self.work[client] = found
                self.compare()

        @rule(client=who, honest=st.sampled_from([True, True, True, False]))
        def reserve(self, client: int, honest: bool) -> None:
            work = self.work.get(client)
            if not work or work["kind"] != "train" or not self.current(client, {"assigned"}):
                return
            path = f"/v1/assignments/{work['id']}/uploads"
            changes = {} if honest else {"round": 99}
            data = train(work, self.weights.space, seed=client, **changes).data
            if not self.model.gathers():
                return
            self.tickets[client] = upload(self.clients[client], path, data)
            self.files[self.tickets[client]["id"]] = (client, work["id"], honest)
            self.model.last.places[client] = "reserved"
            self.compare()

        @rule(client=who, again=st.booleans())
        def complete(self, client: int, again: bool) -> None:
            ticket = self.tickets.get(client)
            if ticket is None:
                return
            path = f"/v1/uploads/{ticket['id']}/complete"
            state = ok(self.clients[client].post(path), 202)["state"]
            if self.files[ticket["id"]][1] == self.work[client]["id"] and self.current(
                client, {"reserved", "expired"}
            ):
                now = self.current(client, {"reserved"}) and self.model.gathers()
                expected = "uploaded" if now else "late"
                assert state == expected
                self.model.last.places[client] = expected
            if again:
                assert ok(self.clients[client].post(path), 202)["state"] == state
            self.compare()

        @rule(client=who, honest=st.sampled_from([True, True, False]))
        def contribute(self, client: int, honest: bool) -> None:
            self.check_in(client)
            self.reserve(client, honest)
            self.complete(client, False)

        @rule(absent=who)
        def crowd(self, absent: int) -> None:
            """Everybody but one takes part, so that rounds come to their end."""
            for client in set(range(CLIENTS)) - {absent}:
                self.contribute(client, True)
            self.all_jobs()

        @rule(client=who)
        def decline(self, client: int) -> None:
            work = self.work.get(client)
            if not work or work["kind"] != "train" or client not in self.places():
                return
            if self.current(client, {"declined"}):
                return
            answer = self.clients[client].post(f"/v1/assignments/{work['id']}/decline", {})
            assert (answer.status_code == 200) == self.model.decline(client), answer.text
            self.compare()

        @precondition(lambda self: self.model.state == "evaluating")
        @rule(client=who)
        def report(self, client: int) -> None:
            work = self.work.get(client)
            if work and work["kind"] == "evaluate":
                path = f"/v1/assignments/{work['id']}/evaluations"
                ok(self.clients[client].post(path, REPORT), 201)
                self.model.report(client)
                self.compare()

        # --- workers

        @rule(which=pick, twice=st.booleans())
        def one_job(self, which: int, twice: bool) -> None:
            job = self.choose(which)
            if job is not None:
                for _ in range(1 + twice):  # a doubled message
                    running.run_job(core, job)
                self.done(job)

        @rule()
        def all_jobs(self) -> None:
            for _ in range(20):
                job = self.choose(0)
                if job is None:
                    return
                running.run_job(core, job)
                self.done(job)

        @rule(which=pick)
        def zombie(self, which: int) -> None:
            """Its lease runs out, another worker does the job, then it wakes up."""
            job = self.choose(which)
            if job is None:
                return
            with core.db.transaction("test", "test") as tx:
                stale = jobs.claim(tx, job, seconds=-1)
            assert stale is not None
            running.run_job(core, job)
            with pytest.raises(jobs.LeaseLost), core.db.transaction("test", "test") as tx:
                jobs.finish(tx, stale)
            self.done(job)

        @precondition(lambda self: self.failures < 3)
        @rule(which=pick)
        def failing_job(self, which: int) -> None:
            job = self.choose(which)
            if job is None:
                return
            self.failures += 1
            with pytest.MonkeyPatch.context() as patch:
                for kind in running.HANDLERS:
                    patch.setitem(running.HANDLERS, kind, broken)
                running.run_job(core, job)
            query = "UPDATE jobs SET run_after = created_at WHERE id = :id RETURNING state"
            assert self.project.sql(query, id=job)[0].state == "due"
            self.compare()

        # --- time and the administrator

        @rule(steps=st.integers(1, 3))
        def time(self, steps: int) -> None:
            clock.advance(steps * STEP)
            sweep.sweep(core)
            self.model.pass_time(steps * STEP)
            self.compare()

        @rule(order=st.sampled_from(["pause", "resume", "resume", "stop", "cancel"]), sure=pick)
        def order(self, order: str, sure: int) -> None:
            if order == "stop" and sure % 5:
                return
            if order == "cancel":
                last = everything(self.project.owner, f"{self.path}/rounds")[-1]
                answer = self.project.owner.post(f"/v1/rounds/{last['id']}/cancel")
                allowed = self.model.cancel()
            else:
                answer = self.project.owner.post(f"{self.path}/{order}")
                allowed = self.model.order(order)
            assert answer.status_code == (200 if allowed else 409), answer.text
            self.compare()

        # --- the comparison

        def places(self) -> dict[int, str]:
            return self.model.last.places

        def current(self, client: int, states: set[str]) -> bool:
            """Whether the client's newest work belongs to the last round, in one of the states.

            The model's last round: the service may have ended it and opened another just now.
            """
            rows = everything(self.project.owner, f"{self.path}/rounds")
            last = rows[len(self.model.history) - 1]
            mine = ok(self.project.owner.get(f"/v1/rounds/{last['id']}"))["assignments"]
            known = {a["id"] for a in mine}
            return self.work[client]["id"] in known and self.places().get(client) in states

        def choose(self, which: int) -> UUID | None:
            due = due_jobs(self.project)
            return sorted(due)[which % len(due)] if due else None

        def done(self, job: UUID) -> None:
            query = "SELECT kind, subject_id, state FROM jobs WHERE id = :id"
            (row,) = self.project.sql(query, id=job)
            assert row.state == "done"
            if row.kind == "verify" and str(row.subject_id) in self.files:
                client, work, honest = self.files[str(row.subject_id)]
                if self.work[client]["id"] == work and self.current(client, {"uploaded"}):
                    self.model.verified(client, honest)
            elif row.kind == "publish":
                self.model.summed()
            self.compare()

        def compare(self) -> None:
            owner = self.project.owner
            rows = everything(owner, f"{self.path}/rounds")
            told = [(r["number"], r["attempt"], r["state"]) for r in rows]
            assert told == [r.row() for r in self.model.history]
            assert ok(owner.get(self.path))["state"] == self.model.state
            detail = ok(owner.get(f"/v1/rounds/{rows[-1]['id']}"))["assignments"]
            names = {client.name: number for number, client in enumerate(self.clients)}
            assert {names[a["client_name"]]: a["state"] for a in detail} == self.places()

        def teardown(self) -> None:
            self.compare()
            found = everything(self.project.owner, f"{self.path}/versions")
            assert [v["number"] for v in found] == list(range(self.model.published + 1))
            assert not self.project.sql(UNCOUNTED)
            assert not self.project.sql(TWICE)
            clock.offset *= 0

    return Service


def broken(*_: Any) -> None:
    raise RuntimeError("the store does not answer")


# Every accepted assignment has its one update, and no other assignment has one.
UNCOUNTED = """
SELECT a.id FROM assignments a LEFT JOIN updates u ON u.assignment_id = a.id
WHERE a.project_id = :project AND a.kind = 'train'
AND (a.state = 'accepted') IS DISTINCT FROM (u.id IS NOT NULL)
"""
TWICE = """
SELECT round_id, client_id FROM updates WHERE project_id = :project
GROUP BY round_id, client_id HAVING count(*) > 1
"""


def play(case: type[RuleBasedStateMachine], examples: int = EXAMPLES, **more: Any) -> None:
    test = case.TestCase()  # type: ignore[attr-defined]
    test.settings = settings(
        max_examples=examples,
        stateful_step_count=24,
        deadline=None,
        database=None,
        derandomize="STATEFUL_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        **more,
    )
    test.runTest()


def test_the_service_does_what_the_model_does(core: Any, api: Any, clock: MovableClock) -> None:
    play(machine(core, api, clock))


def test_a_service_with_a_wrong_rule_is_seen(
    core: Any, api: Any, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rounds.after_round

    def wrong(*args: Any, **more: Any) -> AfterRound:
        found = right(*args, **more)
        return AfterRound.PAUSE if found is AfterRound.NEXT else found

    monkeypatch.setattr(rounds, "after_round", wrong)
    with pytest.raises(AssertionError):
        play(machine(core, api, clock), 50, phases=[Phase.generate], print_blob=False)
