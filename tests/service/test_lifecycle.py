"""Rounds and runs as time passes, clients stay away and administrators step in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from fedselect.lifecycle import (
    ASSIGNMENT_TRANSITIONS,
    RUN_TRANSITIONS,
    TERMINAL_ROUNDS,
    AssignmentState,
    RoundState,
    RunState,
)
from workers import running, sweep

from .conftest import MovableClock
from .factories import (
    REPORT,
    Client,
    Json,
    Model,
    Project,
    announce,
    complete,
    contribute,
    deliver,
    drain,
    due_jobs,
    evaluate,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    ok,
    pass_time,
    refused,
    train,
    upload,
)

SELECTION, REPORTING, VERIFICATION = 1000, 2000, 500  # seconds
MARGIN = 100  # more than any test takes, on whatever machine


@dataclass
class Campaign:
    """A run with deadlines that a test can pass."""

    project: Project
    model: Model
    run_id: str
    clients: list[Client]
    clock: MovableClock

    def run(self) -> Json:
        return dict(ok(self.project.owner.get(f"/v1/runs/{self.run_id}")))

    def rounds(self) -> list[Json]:
        return everything(self.project.owner, f"/v1/runs/{self.run_id}/rounds")

    def states(self) -> list[tuple[int, int, str]]:
        return [(r["number"], r["attempt"], r["state"]) for r in self.rounds()]

    def detail(self, index: int = -1) -> Json:
        return dict(ok(self.project.owner.get(f"/v1/rounds/{self.rounds()[index]['id']}")))

    def assignments(self, index: int = -1) -> list[str]:
        """States in the order of the clients."""
        found = {a["client_name"]: a["state"] for a in self.detail(index)["assignments"]}
        return [found[c.name] for c in self.clients if c.name in found]

    def command(self, name: str) -> Json:
        return dict(ok(self.project.owner.post(f"/v1/runs/{self.run_id}/{name}")))

    def wait(self, seconds: float) -> None:
        """Time passes; the scheduler looks twice, as it would in two seconds."""
        self.clock.advance(seconds)
        pass_time(self.project)
        pass_time(self.project)

    def play(self) -> None:
        for number, client in enumerate(self.clients):
            contribute(client, self.model, seed=number)
        drain(self.project)


@pytest.fixture
def campaign(project: Project, clock: MovableClock) -> Any:
    def start(*, clients: int = 3, **rules: Any) -> Campaign:
        model = make_model(project)
        deadlines = {
            "selection_deadline": SELECTION,
            "report_deadline": REPORTING,
            "verification_timeout": VERIFICATION,
        }
        run = make_run(project, model, **{"goal": clients, "quorum": 2, **deadlines, **rules})
        return Campaign(project, model, run["id"], make_clients(project, clients), clock)

    return start


# --- the selection deadline --------------------------------------------------------------------


def test_selection_ends_with_a_quorum(campaign: Any) -> None:
    c = campaign()
    for client in c.clients[:2]:
        client.assignment()
    c.wait(SELECTION - MARGIN)
    assert c.states() == [(1, 1, "selecting")]
    c.wait(MARGIN)
    assert c.states() == [(1, 1, "collecting")]
    assert c.clients[2].check_in()["assignment"] is None, "who comes now is too late"
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    assert c.states() == [(1, 1, "published")]


def test_selection_ends_without_a_quorum(campaign: Any) -> None:
    c = campaign()
    lonely = c.clients[0].assignment()
    c.wait(SELECTION)
    assert c.states() == [(1, 1, "abandoned"), (1, 2, "selecting")]
    first, second = c.rounds()
    assert "only 1 clients came" in first["reason"]
    assert first["base_version_id"] == second["base_version_id"]
    outcome = c.clients[0].check_in(pending=lonely["id"])
    assert outcome["pending"]["state"] == "expired"
    assert outcome["pending"]["round_state"] == "abandoned"
    assert outcome["assignment"]["attempt"] == 1
    assert outcome["assignment"]["id"] != lonely["id"], "there is work in the second attempt"


def test_a_run_pauses_when_its_attempts_are_used_up(campaign: Any) -> None:
    c = campaign(max_attempts=2)
    c.wait(SELECTION)
    c.wait(SELECTION)
    assert c.states() == [(1, 1, "abandoned"), (1, 2, "abandoned")]
    run = c.run()
    assert run["state"] == "paused"
    assert "round 1 is abandoned" in run["reason"]
    c.command("resume")
    assert c.states()[2:] == [(1, 3, "selecting")]
    c.play()
    assert c.states()[2:] == [(1, 3, "published")]
    versions = everything(c.project.owner, f"/v1/runs/{c.run_id}/versions")
    assert [v["number"] for v in versions] == [0, 1], "abandoned rounds leave no gap"


# --- the report deadline -----------------------------------------------------------------------


def test_the_report_deadline_with_a_quorum(campaign: Any) -> None:
    c = campaign()
    for client in c.clients:
        client.assignment()
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    c.wait(SELECTION + REPORTING - MARGIN)
    assert c.states() == [(1, 1, "collecting")]
    c.wait(MARGIN)
    assert c.states() == [(1, 1, "published")]
    assert c.assignments() == ["accepted", "accepted", "expired"]
    manifest = ok(c.project.owner.get(f"/v1/rounds/{c.rounds()[0]['id']}/manifest"))["manifest"]
    assert [u["client"] for u in manifest["updates"]] == [x.id for x in c.clients[:2]]


def test_the_report_deadline_without_a_quorum(campaign: Any) -> None:
    c = campaign()
    for client in c.clients:
        client.assignment()
    kept = contribute(c.clients[0], c.model)
    drain(c.project)
    c.wait(SELECTION + REPORTING)
    assert c.states() == [(1, 1, "abandoned"), (1, 2, "selecting")]
    assert c.assignments(0) == ["accepted", "expired", "expired"]
    outcome = c.clients[0].check_in(pending=kept["id"])["pending"]
    assert (outcome["state"], outcome["round_state"]) == ("accepted", "abandoned")


def test_an_update_behind_the_deadline_is_late(campaign: Any) -> None:
    c = campaign()
    found = [client.assignment() for client in c.clients]
    data = train(found[2], c.model.space).data
    path = f"/v1/assignments/{found[2]['id']}/uploads"
    ticket = upload(c.clients[2], path, data)
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    c.clock.advance(SELECTION + REPORTING)
    assert complete(c.clients[2], ticket)["state"] == "late", "nobody had looked at the clock yet"
    c.wait(0)
    assert c.assignments() == ["accepted", "accepted", "late"]
    assert complete(c.clients[2], ticket)["state"] == "late"
    outcome = c.clients[2].check_in(pending=found[2]["id"])["pending"]
    assert (outcome["state"], outcome["round_state"]) == ("late", "published")
    refused(c.clients[2].post(path, announce(data)), 409, "assignment_expired")


def test_an_update_behind_the_goal_is_late(campaign: Any) -> None:
    """Over-selection: three are asked, two suffice, the third hears that it was too slow."""
    c = campaign(goal=2, over_selection=1.5)
    found = [client.assignment() for client in c.clients]
    extra = make_client(c.project)
    assert extra.check_in()["assignment"] is None, "a fourth is not wanted"
    slow = train(found[2], c.model.space).data
    ticket = upload(c.clients[2], f"/v1/assignments/{found[2]['id']}/uploads", slow)
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    assert c.states()[0] == (1, 1, "published")
    assert c.assignments(0) == ["accepted", "accepted", "expired"]
    assert complete(c.clients[2], ticket)["state"] == "late"
    assert c.assignments(0) == ["accepted", "accepted", "late"]


def test_what_is_uploaded_on_time_counts_however_long_verification_takes(campaign: Any) -> None:
    c = campaign(verification_timeout=10_000)
    found = [client.assignment() for client in c.clients]
    for number, client in enumerate(c.clients):
        made = train(found[number], c.model.space, seed=number)
        deliver(client, found[number], made.data)
    c.clock.advance(SELECTION + REPORTING + 1)
    sweep.sweep(c.project.core)
    assert c.states() == [(1, 1, "collecting")], "it waits for what came on time"
    drain(c.project)
    assert c.states() == [(1, 1, "published")]
    assert c.assignments() == ["accepted"] * 3


def test_verification_that_takes_too_long(campaign: Any) -> None:
    c = campaign()
    found = [client.assignment() for client in c.clients]
    for number, client in enumerate(c.clients[:2]):
        deliver(client, found[number], train(found[number], c.model.space, seed=number).data)
    drain(c.project)
    ticket = deliver(c.clients[2], found[2], train(found[2], c.model.space).data)
    c.clock.advance(VERIFICATION + 1)
    sweep.sweep(c.project.core)
    assert c.assignments() == ["accepted", "accepted", "rejected"]
    status = ok(c.clients[2].get(f"/v1/uploads/{ticket['id']}"))
    assert (status["state"], status["reason"]) == ("rejected", "verification_timeout")
    assert c.states() == [(1, 1, "aggregating")]
    (job,) = c.project.sql("SELECT id FROM jobs WHERE subject_id = :u", u=ticket["id"])
    running.run_job(c.project.core, job.id)
    assert ok(c.clients[2].get(f"/v1/uploads/{ticket['id']}")) == status, "too late to count"
    drain(c.project)
    manifest = ok(c.project.owner.get(f"/v1/rounds/{c.rounds()[0]['id']}/manifest"))["manifest"]
    assert len(manifest["updates"]) == 2


# --- a further attempt -----------------------------------------------------------------------


def test_a_rejected_client_tries_again_in_the_same_round(campaign: Any) -> None:
    c = campaign(clients=2, client_attempts=2)
    contribute(c.clients[1], c.model)
    drain(c.project)
    first = c.clients[0].assignment()
    deliver(c.clients[0], first, b"damaged on the way")
    drain(c.project)
    assert c.states() == [(1, 1, "collecting")], "its quorum of 2 is still within reach"
    answer = c.clients[0].check_in(pending=first["id"])
    assert answer["pending"]["state"] == "rejected"
    second = answer["assignment"]
    assert (second["attempt"], second["round"]) == (2, first["round"])
    assert second["base"] == first["base"]
    assert second["deadline"] == first["deadline"]
    assert c.clients[0].assignment() == second
    contribute(c.clients[0], c.model, seed=1)
    drain(c.project)
    assert c.states() == [(1, 1, "published")]
    (manifest,) = c.project.sql(
        "SELECT body::json->'updates' FROM manifests JOIN rounds ON rounds.id = round_id"
        " WHERE project_id = :project"
    )
    assert len(manifest[0]) == 2, "one update of each client"


def test_attempts_of_a_client_are_bounded(campaign: Any) -> None:
    c = campaign(clients=3, client_attempts=2)
    for _ in range(2):
        found = c.clients[0].assignment()
        deliver(c.clients[0], found, b"damaged")
        drain(c.project)
    assert c.clients[0].check_in()["assignment"] is None
    for number, client in enumerate(c.clients[1:]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    assert c.states() == [(1, 1, "published")]
    states = [a["state"] for a in c.detail()["assignments"]]
    assert sorted(states) == ["accepted", "accepted", "rejected", "rejected"]


def test_a_client_counts_once_for_the_selection(campaign: Any) -> None:
    """A further attempt is not another client."""
    c = campaign(clients=3, client_attempts=2)
    deliver(c.clients[0], c.clients[0].assignment(), b"damaged")
    drain(c.project)
    assert c.clients[0].assignment()["attempt"] == 2
    c.clients[1].assignment()
    assert c.states() == [(1, 1, "selecting")]
    c.clients[2].assignment()
    assert c.states() == [(1, 1, "collecting")]


def test_no_further_attempt_in_a_round_that_has_closed(campaign: Any) -> None:
    c = campaign(clients=3, client_attempts=5)
    found = c.clients[0].assignment()
    for number, client in enumerate(c.clients[1:]):
        contribute(client, c.model, seed=number)
    deliver(c.clients[0], found, b"damaged")
    drain(c.project)
    assert c.states() == [(1, 1, "published")]
    assert c.clients[0].check_in(pending=found["id"])["assignment"]["kind"] == "evaluate"


def test_two_updates_of_one_client_cannot_be_in_one_round(campaign: Any) -> None:
    """Whatever the code does: the database says no."""
    c = campaign(clients=2, goal=2)
    contribute(c.clients[0], c.model)
    drain(c.project)
    copy = (
        "INSERT INTO updates SELECT gen_random_uuid(), project_id, round_id, gen_random_uuid(),"
        " client_id, mask_id, number + 1, object_key, sha256, size, examples, created_at"
        " FROM updates WHERE project_id = :project"
    )
    with pytest.raises(IntegrityError, match="uq_updates_round_id_client_id"):
        c.project.sql(copy)


# --- clients that say no -----------------------------------------------------------------------


def test_declining_gives_the_place_back(campaign: Any) -> None:
    c = campaign()
    found = [client.assignment() for client in c.clients]
    path = f"/v1/assignments/{found[2]['id']}/decline"
    outcome = ok(c.clients[2].post(path, {"reason": "on battery"}))
    assert (outcome["state"], outcome["round_state"]) == ("declined", "collecting")
    assert ok(c.clients[2].post(path, {"reason": "still"})) == outcome
    assert outcome["reason"] == "on battery"
    assert c.clients[2].check_in(pending=found[2]["id"])["assignment"] is None
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    assert c.states() == [(1, 1, "published")], "nobody is left to wait for"


def test_when_everybody_declines_the_round_is_tried_again(campaign: Any) -> None:
    c = campaign()
    for client in c.clients:
        found = client.assignment()
        ok(client.post(f"/v1/assignments/{found['id']}/decline", {}))
    assert c.states() == [(1, 1, "abandoned"), (1, 2, "selecting")]


def test_declining_too_late(campaign: Any) -> None:
    c = campaign()
    done = contribute(c.clients[0], c.model)
    path = f"/v1/assignments/{done['id']}/decline"
    refused(c.clients[0].post(path, {}), 409, "assignment_uploaded")
    drain(c.project)
    refused(c.clients[0].post(path, {}), 409, "assignment_accepted")


def test_completing_after_declining(campaign: Any) -> None:
    c = campaign()
    found = c.clients[0].assignment()
    path = f"/v1/assignments/{found['id']}"
    ticket = upload(c.clients[0], f"{path}/uploads", train(found, c.model.space).data)
    ok(c.clients[0].post(f"{path}/decline", {}))
    answer = c.clients[0].post(f"/v1/uploads/{ticket['id']}/complete")
    refused(answer, 409, "assignment_declined")
    refused(c.clients[0].post(f"{path}/uploads", announce(b"x")), 409, "assignment_declined")


# --- check-ins -------------------------------------------------------------------------------


def test_the_same_work_is_given_until_it_is_done(campaign: Any) -> None:
    c = campaign()
    first = c.clients[0].assignment()
    assert first["state"] == "assigned"
    assert c.clients[0].assignment() == first
    data = train(first, c.model.space).data
    ticket = upload(c.clients[0], f"/v1/assignments/{first['id']}/uploads", data)
    assert c.clients[0].assignment() == {**first, "state": "reserved"}
    complete(c.clients[0], ticket)
    answer = c.clients[0].check_in(pending=first["id"])
    assert (answer["assignment"], answer["pending"]["state"]) == (None, "uploaded")
    drain(c.project)
    answer = c.clients[0].check_in(pending=first["id"])
    assert answer["assignment"] is None, "the round is not over, so it is not time for more"
    assert (answer["pending"]["state"], answer["pending"]["round_state"]) == (
        "accepted",
        "selecting",
    )
    assert 0 < answer["retry_after_min"] < answer["retry_after_max"]


def test_a_client_serves_two_runs_one_after_the_other(campaign: Any) -> None:
    c = campaign(clients=2)
    second = make_run(c.project, c.model)
    first = c.clients[0].assignment()
    assert first["run"]["id"] == c.run_id, "the older round comes first"
    deliver(c.clients[0], first, train(first, c.model.space).data)
    waiting = c.clients[0].check_in(pending=first["id"])
    assert waiting["assignment"] is None
    assert c.clients[0].assignment()["run"]["id"] == second["id"]


def test_a_client_that_comes_when_others_are_done_still_counts(campaign: Any) -> None:
    c = campaign(clients=3)
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
        drain(c.project)
    assert c.states() == [(1, 1, "selecting")]
    contribute(c.clients[2], c.model, seed=3)
    drain(c.project)
    assert c.states() == [(1, 1, "published")]
    assert c.assignments() == ["accepted"] * 3


# --- administrators ----------------------------------------------------------------------------


def test_a_paused_run_ends_its_round_and_opens_no_other(campaign: Any) -> None:
    c = campaign(rounds=2)
    found = [client.assignment() for client in c.clients[:2]]
    assert c.command("pause")["state"] == "paused"
    assert c.clients[2].check_in()["assignment"] is None, "nobody joins a paused run"
    for number, client in enumerate(c.clients[:2]):
        assert client.assignment()["id"] == found[number]["id"], "who has joined goes on"
        contribute(client, c.model, seed=number)
    drain(c.project)
    c.wait(SELECTION)
    assert c.states() == [(1, 1, "published")]
    assert c.run()["state"] == "paused"
    assert c.clients[0].check_in()["assignment"] is None
    assert c.command("resume")["state"] == "running"
    assert c.states() == [(1, 1, "published"), (2, 1, "selecting")]
    c.play()
    assert c.run()["state"] == "evaluating"


def test_a_round_under_way_survives_pause_and_resume(campaign: Any) -> None:
    c = campaign()
    first = c.clients[0].assignment()
    c.command("pause")
    c.command("resume")
    assert c.states() == [(1, 1, "selecting")]
    assert c.clients[0].assignment()["id"] == first["id"]


def test_the_last_round_of_a_paused_run_leads_to_its_evaluation(campaign: Any) -> None:
    c = campaign()
    for number, client in enumerate(c.clients):
        contribute(client, c.model, seed=number)
    c.command("pause")
    drain(c.project)
    assert c.states() == [(1, 1, "published")]
    assert c.run()["state"] == "evaluating"


def test_stopping_cancels_the_round(campaign: Any) -> None:
    c = campaign()
    found = [client.assignment() for client in c.clients]
    ticket = deliver(c.clients[0], found[0], train(found[0], c.model.space).data)
    assert c.command("stop")["state"] == "stopped"
    assert c.states() == [(1, 1, "cancelled")]
    assert c.assignments() == ["rejected", "expired", "expired"]
    status = ok(c.clients[0].get(f"/v1/uploads/{ticket['id']}"))
    assert (status["state"], status["reason"]) == ("rejected", "round_cancelled")
    drain(c.project)
    assert ok(c.clients[0].get(f"/v1/uploads/{ticket['id']}")) == status
    answer = c.clients[0].check_in(pending=found[0]["id"])
    assert answer["pending"]["round_state"] == "cancelled"
    assert (answer["assignment"], answer["run_state"]) == (None, "stopped")
    c.wait(SELECTION + REPORTING)
    assert c.states() == [(1, 1, "cancelled")]


def test_cancelling_a_round_pauses_the_run(campaign: Any) -> None:
    c = campaign()
    c.clients[0].assignment()
    path = f"/v1/rounds/{c.rounds()[0]['id']}/cancel"
    assert ok(c.project.owner.post(path))["state"] == "cancelled"
    assert c.run()["state"] == "paused"
    assert "round 1 is cancelled" in c.run()["reason"]
    refused(c.project.owner.post(path), 409, "round_cancelled")
    c.command("resume")
    c.play()
    assert c.states() == [(1, 1, "cancelled"), (1, 2, "published")]


def test_cancelling_while_the_round_is_aggregated(campaign: Any) -> None:
    c = campaign()
    for number, client in enumerate(c.clients):
        contribute(client, c.model, seed=number)
    for job in due_jobs(c.project):
        running.run_job(c.project.core, job)
    (aggregation,) = due_jobs(c.project)
    assert c.states() == [(1, 1, "aggregating")]
    ok(c.project.owner.post(f"/v1/rounds/{c.rounds()[0]['id']}/cancel"))
    running.run_job(c.project.core, aggregation)
    drain(c.project)
    assert c.states() == [(1, 1, "cancelled")]
    versions = everything(c.project.owner, f"/v1/runs/{c.run_id}/versions")
    assert [v["number"] for v in versions] == [0]


COMMANDS = {
    "start": {"created"},
    "pause": {"running"},
    "resume": {"paused"},
    "stop": {"created", "running", "paused", "evaluating"},
}


@pytest.mark.parametrize("state", [s.value for s in RunState])
def test_commands_in_every_state(project: Project, state: str) -> None:
    model = make_model(project)
    run = make_run(project, model, start=False, goal=1, min_contributors=1)
    client = make_client(project)
    path = f"/v1/runs/{run['id']}"
    if state != "created":
        ok(project.owner.post(f"{path}/start"))
    if state in {"paused", "stopped"}:
        ok(project.owner.post(f"{path}/{'pause' if state == 'paused' else 'stop'}"))
    if state in {"evaluating", "finished"}:
        contribute(client, model)
        drain(project)
    if state == "finished":
        evaluate(client)
    assert ok(project.owner.get(path))["state"] == state
    for command, allowed in COMMANDS.items():
        if state not in allowed:
            refused(project.owner.post(f"{path}/{command}"), 409, f"run_{state}")
    assert ok(project.owner.get(path))["state"] == state


# --- evaluation --------------------------------------------------------------------------------


def test_the_evaluation_deadline_finishes_the_run(campaign: Any) -> None:
    c = campaign()
    c.play()
    assert c.run()["state"] == "evaluating"
    evaluate(c.clients[0])
    c.wait(REPORTING - MARGIN)
    assert c.run()["state"] == "evaluating"
    late = c.clients[1].assignment()
    c.wait(MARGIN)
    assert c.run()["state"] == "finished"
    path = f"/v1/assignments/{late['id']}/evaluations"
    refused(c.clients[1].post(path, REPORT), 409, "assignment_expired")
    found = ok(c.project.owner.get(f"/v1/runs/{c.run_id}/evaluations"))["items"]
    assert [e["client_name"] for e in found] == [c.clients[0].name]


def test_evaluations_are_listed_page_by_page(campaign: Any) -> None:
    c = campaign()
    c.play()
    for client in c.clients:
        evaluate(client)
    found = everything(c.project.owner, f"/v1/runs/{c.run_id}/evaluations", limit=1)
    assert [e["client_name"] for e in found] == [client.name for client in c.clients]


def test_an_evaluation_is_nothing_to_wait_for(campaign: Any) -> None:
    """A client may ask for its outcome without being kept from other work for ever."""
    c = campaign(clients=2)
    c.play()
    found = c.clients[0].assignment()
    assert found["kind"] == "evaluate"
    refused(
        c.clients[0].post(f"/v1/assignments/{found['id']}/uploads", announce(b"x")),
        409,
        "assignment_kind",
    )
    evaluate(c.clients[0])
    make_run(c.project, c.model)
    answer = c.clients[0].check_in(pending=found["id"])
    assert (answer["pending"]["state"], answer["pending"]["round_state"]) == ("accepted", None)
    assert answer["assignment"]["kind"] == "train"


def test_training_is_not_answered_with_an_evaluation(campaign: Any) -> None:
    c = campaign()
    found = c.clients[0].assignment()
    path = f"/v1/assignments/{found['id']}/evaluations"
    refused(c.clients[0].post(path, REPORT), 409, "assignment_kind")


def test_suspended_clients_are_not_asked_to_evaluate(campaign: Any) -> None:
    c = campaign(clients=2)
    for number, client in enumerate(c.clients):
        contribute(client, c.model, seed=number)
    ok(c.project.owner.post(f"/v1/clients/{c.clients[1].id}/suspend"))
    drain(c.project)
    evaluate(c.clients[0])
    assert c.run()["state"] == "finished"


def test_stopping_while_clients_evaluate_ends_what_they_do(campaign: Any) -> None:
    c = campaign()
    c.play()
    found = c.clients[0].assignment()
    evaluate(c.clients[1])
    c.command("stop")
    path = f"/v1/assignments/{found['id']}/evaluations"
    refused(c.clients[0].post(path, REPORT), 409, "assignment_expired")
    assert c.clients[0].check_in()["assignment"] is None
    query = "SELECT state, count(*) FROM assignments WHERE run_id = :r AND kind = 'evaluate'"
    counts = dict(map(tuple, c.project.sql(f"{query} GROUP BY state", r=c.run_id)))
    assert counts == {"accepted": 1, "expired": 2}
    c.wait(REPORTING)
    assert c.run()["state"] == "stopped"


# --- history -----------------------------------------------------------------------------------


def test_history_and_ledger_tell_the_same_story(campaign: Any) -> None:
    """Every change of state is in both, and every change is one that the tables of rules allow."""
    c = campaign(rounds=2, max_attempts=3)
    c.clients[0].assignment()
    c.wait(SELECTION)
    c.play()
    c.command("pause")
    c.command("resume")
    found = c.clients[0].assignment()
    ok(c.clients[0].post(f"/v1/assignments/{found['id']}/decline", {}))
    for number, client in enumerate(c.clients[1:]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    evaluate(c.clients[0])
    c.wait(REPORTING)
    assert c.run()["state"] == "finished"
    history = c.project.sql(
        "SELECT subject_kind || ':' || subject_id, subject_kind || '.' || to_state, from_state,"
        " reason, actor, created_at FROM transitions WHERE project_id = :project"
    )
    entries = c.project.sql(
        "SELECT subject, action, body->>'from', body->>'reason', actor, at FROM ledger_entries"
        " WHERE project_id = :project AND body ? 'from' AND subject !~ '^client:'"
    )
    assert len(history) > 25
    assert Counter(map(tuple, history)) == Counter(map(tuple, entries))
    allowed = {
        "run": {(s, t) for (s, _), t in RUN_TRANSITIONS.items()},
        "assignment": {(s, t) for (s, _), t in ASSIGNMENT_TRANSITIONS.items()},
    }
    for subject, action, before, *_ in history:
        kind, _, after = action.partition(".")
        if before is not None and kind in allowed:
            assert (before, after) in allowed[kind], (subject, before, after)
    _assert_present_states_are_the_last_ones(c.project)


def _assert_present_states_are_the_last_ones(project: Project) -> None:
    for kind in ("run", "round", "assignment"):
        last = project.sql(
            "SELECT DISTINCT ON (t.subject_id) t.to_state, s.state FROM transitions t"
            f" JOIN {kind}s s ON s.id = t.subject_id"
            " WHERE t.project_id = :project AND t.subject_kind = :kind"
            " ORDER BY t.subject_id, t.id DESC",
            kind=kind,
        )
        assert last
        assert [row for row in last if row[0] != row[1]] == []


def test_everything_has_come_to_an_end(campaign: Any) -> None:
    """A finished run leaves no round, assignment or job that waits for something."""
    c = campaign()
    for client in c.clients:
        client.assignment()
    for number, client in enumerate(c.clients[:2]):
        contribute(client, c.model, seed=number)
    drain(c.project)
    c.wait(SELECTION + REPORTING)
    c.wait(REPORTING)
    assert c.run()["state"] == "finished"
    ended = {s.value for s in AssignmentState} - {"assigned", "reserved", "uploaded"}
    states = "SELECT DISTINCT state FROM {} WHERE project_id = :project"
    found = {s for (s,) in c.project.sql(states.format("assignments"))}
    assert found <= ended
    assert {s for (s,) in c.project.sql(states.format("jobs"))} == {"done"}
    rounds = {RoundState(s) for (s,) in c.project.sql(states.format("rounds"))}
    assert rounds <= TERMINAL_ROUNDS
