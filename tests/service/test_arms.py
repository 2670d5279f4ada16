"""Runs of several arms: who gets which work, when a run goes on, pauses and ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from app.jobs import Lease, Progress
from app.wiring import Coordinator
from fedselect.policies import RunSettings
from workers import aggregation, running

from .conftest import MovableClock
from .factories import (
    Client,
    Json,
    Model,
    Project,
    contribute,
    deliver,
    drain,
    evaluate,
    everything,
    make_clients,
    make_model,
    make_run,
    ok,
    pass_time,
    refused,
    train,
)

FEDAVG = {"name": "fedavg", "personal": "none"}
FEDPER = {"name": "fedper", "personal": "head"}
LOCAL = {"name": "local", "personal": "all"}


@dataclass
class Trial:
    """A run of several arms, with its clients."""

    project: Project
    model: Model
    run_id: str
    clients: list[Client]

    def run(self) -> Json:
        return dict(ok(self.project.owner.get(f"/v1/runs/{self.run_id}")))

    def published(self) -> dict[str, int]:
        return {arm["name"]: arm["published"] for arm in self.run()["arms"]}

    def rounds(self) -> list[Json]:
        return everything(self.project.owner, f"/v1/runs/{self.run_id}/rounds")

    def states(self) -> dict[str, list[tuple[int, int, str]]]:
        names = {arm["id"]: arm["name"] for arm in self.run()["arms"]}
        found = defaultdict(list)
        for each in self.rounds():
            line = (each["number"], each["attempt"], each["state"])
            found[names[each["arm_id"]]].append(line)
        return dict(found)

    def command(self, name: str) -> Json:
        return dict(ok(self.project.owner.post(f"/v1/runs/{self.run_id}/{name}")))

    def assignments(self, client: Client) -> list[Json]:
        """All that a client is given before any of it is published, one after the other."""
        found: list[Json] = []
        while True:
            waiting = [each["id"] for each in found]
            body = {"pending": waiting[0], "waiting": waiting[1:]} if waiting else {"waiting": []}
            work = client.check_in(**body)["assignment"]
            if work is None or work["kind"] != "train":
                return found
            deliver(client, work, train(work, self.model.space, seed=len(found)).data)
            found.append(work)

    def play(self) -> None:
        """One round of every arm."""
        for client in self.clients:
            self.assignments(client)
        drain(self.project)


def make_trial(
    project: Project, *policies: Json, clients: int = 2, mode: str | None = None, **rules: Any
) -> Trial:
    model, made = make_model(project), make_clients(project, clients)
    arms = {"policies": list(policies), **({"mode": mode} if mode else {})}
    run = make_run(project, model, arms=arms, **{"goal": 2, **rules})
    return Trial(project, model, run["id"], made)


def policy_of(assignment: Json) -> str:
    settings = assignment["run"]["settings"]
    assert "arms" not in settings, "an agent need not know of arms"
    return str(settings["policy"]["name"])


def test_every_client_does_every_arm_with_its_own_versions(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, LOCAL, rounds=2)
    run = trial.run()
    assert [arm["name"] for arm in run["arms"]] == ["fedavg", "fedper", "local"]
    assert run["arm_id"] == run["arms"][0]["id"]
    assert run["settings"]["arms"]["mode"] == "parallel", "of two clients"
    for number in (1, 2):
        given = {client.name: trial.assignments(client) for client in trial.clients}
        for works in given.values():
            assert {policy_of(w) for w in works} == {"fedavg", "fedper", "local"}
            assert len({w["arm_id"] for w in works}) == 3
            assert {w["round"] for w in works} == {number}
            assert len({w["origin"]["sha256"] for w in works}) == 1
        drain(project)
        assert set(trial.published().values()) == {number}
    versions = everything(project.owner, f"/v1/runs/{trial.run_id}/versions")
    by_arm = Counter(version["arm_id"] for version in versions)
    assert sorted(by_arm.values()) == [3, 3, 3]
    assert len({v["sha256"] for v in versions if v["number"] == 2}) == 3


def test_a_run_is_evaluated_arm_by_arm_when_all_are_through(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER)
    trial.play()
    assert trial.run()["state"] == "evaluating"
    done = [evaluate(client) for client in trial.clients for _ in range(2)]
    assert Counter((e["client_id"], e["arm_id"]) for e in done).most_common(1)[0][1] == 1
    assert trial.run()["state"] == "finished"
    found = everything(project.owner, f"/v1/runs/{trial.run_id}/evaluations")
    assert len(found) == 4
    assert {e["version_number"] for e in found} == {1}


def test_evaluations_asked_for_together_are_given_in_one_order(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, LOCAL, clients=3, goal=3)
    trial.play()
    for client in trial.clients:
        asked = []
        for _ in range(3):
            asked.append(UUID(client.assignment()["id"]))
            evaluate(client)
        assert asked == sorted(asked), "or asking twice could be answered with two of them"


def test_an_arm_that_is_through_waits_for_the_others(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER)
    first = [client.assignment(waiting=[]) for client in trial.clients]
    arm = first[0]["arm_id"]
    # Clients spread over arms that open together, so the two may have got different ones.
    for client, work in zip(trial.clients, first, strict=True):
        if work["arm_id"] == arm:
            deliver(client, work, train(work, trial.model.space).data)
        else:
            deliver(client, work, train(work, trial.model.space).data)
            other = client.assignment(pending=work["id"], waiting=[])
            deliver(client, other, train(other, trial.model.space).data)
    drain(project)
    assert trial.run()["state"] == "running"
    assert sorted(trial.published().values())[0] == 0
    trial.play()
    assert trial.run()["state"] == "evaluating"


def test_an_agent_that_knows_of_no_arms_does_one_after_the_other(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER)
    client, second = trial.clients
    work = contribute(client, trial.model)
    drain(project)
    answer = client.check_in(pending=work["id"])
    assert (answer["assignment"], answer["pending"]["state"]) == (None, "accepted")
    trial.assignments(second)
    drain(project)
    other = client.check_in(pending=work["id"])
    assert other["pending"]["round_state"] == "published"
    assert other["assignment"]["arm_id"] != work["arm_id"]


def test_the_outcome_of_every_assignment_is_told(project: Project, other: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER)
    client = trial.clients[0]
    one, two = trial.assignments(client)
    foreign = make_trial(other, FEDAVG).clients[0].assignment()
    answer = client.check_in(pending=one["id"], waiting=[foreign["id"], two["id"], two["id"]])
    assert answer["pending"]["assignment_id"] == one["id"]
    assert [each["assignment_id"] for each in answer["outcomes"]] == [two["id"]]
    assert answer["outcomes"][0]["round_state"] == "selecting"
    drain(project)
    many = [two["id"]] * 17
    body = {"pending": one["id"], "waiting": many}
    refused(client.post("/v1/check-ins", body), 422, "request_invalid")


def test_the_round_that_is_open_longest_is_given_first(
    project: Project, clock: MovableClock
) -> None:
    clock.hold()
    trial = make_trial(project, FEDAVG, FEDPER, rounds=3, goal=1, quorum=1, min_contributors=1)
    client = trial.clients[0]
    order = []
    for _ in range(4):
        work = client.assignment(waiting=[])
        deliver(client, work, train(work, trial.model.space).data)
        drain(project)
        order.append(policy_of(work))
    assert order in (["fedavg", "fedper"] * 2, ["fedper", "fedavg"] * 2)


def test_clients_spread_over_arms_that_open_together(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, clients=16, goal=16)
    first = Counter(policy_of(client.assignment(waiting=[])) for client in trial.clients)
    assert min(first.values()) >= 2, first


# --- commands ----------------------------------------------------------------------------------


def test_a_paused_run_opens_no_round_in_any_arm(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, rounds=2)
    trial.command("pause")
    assert trial.clients[0].check_in(waiting=[])["assignment"] is None
    trial.command("resume")
    for client in trial.clients:
        trial.assignments(client)
    trial.command("pause")
    drain(project)
    assert trial.published() == {"fedavg": 1, "fedper": 1}
    assert len(trial.rounds()) == 2
    trial.command("resume")
    assert trial.states()["fedavg"][1:] == [(2, 1, "selecting")]
    assert trial.states()["fedper"][1:] == [(2, 1, "selecting")]
    trial.play()
    assert trial.run()["state"] == "evaluating"


def test_stopping_ends_the_rounds_of_all_arms(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, LOCAL)
    trial.command("stop")
    states = [line[2] for lines in trial.states().values() for line in lines]
    assert states == ["cancelled"] * 3
    assert trial.run()["state"] == "stopped"


def test_resuming_opens_nothing_in_an_arm_that_is_through(project: Project) -> None:
    trial = make_trial(project, FEDAVG, FEDPER)
    names = {arm["id"]: arm["name"] for arm in trial.run()["arms"]}
    (first,) = [r for r in trial.rounds() if names[r["arm_id"]] == "fedper"]
    ok(project.owner.post(f"/v1/rounds/{first['id']}/cancel"))
    assert trial.run()["state"] == "paused"
    trial.command("resume")
    for client in trial.clients:
        trial.assignments(client)
    drain(project)
    assert trial.published() == {"fedavg": 1, "fedper": 1}
    assert trial.states()["fedper"][1][:2] == (1, 2)
    assert trial.states()["fedavg"] == [(1, 1, "published")]


@pytest.mark.parametrize("way", ["resume", "retry"])
def test_an_arm_that_fails_pauses_all_and_then_all_go_on(
    project: Project, clock: MovableClock, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, rounds=2)
    names = {arm["id"]: arm["name"] for arm in trial.run()["arms"]}
    for client in trial.clients:
        trial.assignments(client)
    failing = {r["id"] for r in trial.rounds() if names[r["arm_id"]] == "fedper"}

    def aggregate(core: Coordinator, lease: Lease, progress: Progress) -> None:
        if str(lease.subject_id) in failing:
            raise RuntimeError("the disk is full")
        aggregation.aggregate_part(core, lease, progress)

    monkeypatch.setitem(running.HANDLERS, "aggregate", aggregate)
    for _ in range(project.core.settings.job_attempts):
        drain(project)
        clock.advance(60)
    assert trial.run()["state"] == "paused"
    assert trial.states()["fedper"] == [(1, 1, "failed")]
    assert trial.states()["fedavg"] == [(1, 1, "published"), (2, 1, "selecting")]
    for client in trial.clients:
        assert not trial.assignments(client), "a paused run gives no new places"
    if way == "resume":
        trial.command("resume")
        assert trial.states()["fedper"][-1] == (1, 2, "selecting")
    else:
        failing.clear()
        (job,) = everything(project.owner, "/v1/jobs", state="failed")
        ok(project.owner.post(f"/v1/jobs/{job['id']}/retry"))
        drain(project)
        assert trial.published() == {"fedavg": 1, "fedper": 1}
    assert trial.run()["state"] == "running"
    for _ in range(2):
        trial.play()
    assert trial.run()["state"] == "evaluating"


def test_an_arm_whose_round_ended_while_another_had_failed_goes_on(
    project: Project, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial(project, FEDAVG, FEDPER, rounds=2)
    names = {arm["id"]: arm["name"] for arm in trial.run()["arms"]}
    held = {r["id"] for r in trial.rounds() if names[r["arm_id"]] == "fedavg"}
    works = [trial.assignments(client) for client in trial.clients]
    assert [len(each) for each in works] == [2, 2]
    broken = {r["id"] for r in trial.rounds()} - held

    def aggregate(core: Coordinator, lease: Lease, progress: Progress) -> None:
        if str(lease.subject_id) in broken | held:
            raise RuntimeError("the disk is full")
        aggregation.aggregate_part(core, lease, progress)

    monkeypatch.setitem(running.HANDLERS, "aggregate", aggregate)
    for _ in range(project.core.settings.job_attempts):
        drain(project)
        clock.advance(60)
    assert {lines[0][2] for lines in trial.states().values()} == {"failed"}
    by_round = {
        job["subject_id"]: job for job in everything(project.owner, "/v1/jobs", state="failed")
    }
    trial_paused = trial.run()["state"]
    assert trial_paused == "paused"
    kept, held_round, broken_round = set(held), next(iter(held)), next(iter(broken))
    held.clear()
    ok(project.owner.post(f"/v1/jobs/{by_round[held_round]['id']}/retry"))
    trial.command("pause")
    drain(project)
    assert kept
    assert trial.states()["fedavg"] == [(1, 1, "published")], "paused: nothing is opened"
    broken.clear()
    ok(project.owner.post(f"/v1/jobs/{by_round[broken_round]['id']}/retry"))
    assert trial.states()["fedavg"][-1] == (2, 1, "selecting"), "both go on"


# --- randomized --------------------------------------------------------------------------------


def test_too_few_clients_are_not_split_at_random(project: Project) -> None:
    model = make_model(project)
    make_clients(project, 3)
    arms = {"mode": "randomized", "policies": [FEDAVG, FEDPER]}
    run = make_run(project, model, arms=arms, start=False)
    said = refused(project.owner.post(f"/v1/runs/{run['id']}/start"), 422, "arm_too_small")
    assert "at least 20 clients each" in said["detail"]
    assert ok(project.owner.get(f"/v1/runs/{run['id']}"))["state"] == "created"


def test_randomized_clients_do_one_arm_and_evaluate_it(project: Project) -> None:
    model, clients = make_model(project), make_clients(project, 50)
    arms = {"policies": [FEDAVG, FEDPER]}
    for seed in range(50):
        drawn = {"mode": "randomized", **arms}
        settings = RunSettings(rounds=1, seed=seed, arms=drawn)
        groups = {client.name: settings.arms_of(client.id)[0] for client in clients}
        if min(Counter(groups.values()).values()) >= 20:
            break
    run = make_run(project, model, arms=arms, start=False, goal=50, quorum=2, seed=seed)
    assert run["settings"]["arms"]["mode"] == "randomized", "50 clients: the default"
    ok(project.owner.post(f"/v1/runs/{run['id']}/start"))
    for client in clients[:6]:
        work = client.assignment(waiting=[])
        assert policy_of(work) == groups[client.name]
        answer = client.check_in(waiting=[work["id"]])
        assert answer["assignment"]["id"] == work["id"], "no other arm's"
    trial = Trial(project, model, run["id"], clients)
    by_arm = defaultdict(list)
    for client in clients:
        by_arm[groups[client.name]].append(client)
    for group in by_arm.values():
        for client in group[:2]:
            trial.assignments(client)
    drain(project)
    project.sql(
        "UPDATE rounds SET selection_ends = opened_at, report_ends = opened_at "
        "WHERE project_id = :project"
    )
    for _ in range(2):  # the end of the selection, then that of the reports
        pass_time(project)
    assert trial.run()["state"] == "evaluating"
    rows = project.sql(
        "SELECT c.name, a.name FROM assignments s JOIN clients c ON c.id = s.client_id "
        "JOIN arms a ON a.id = s.arm_id WHERE s.project_id = :project AND s.kind = 'evaluate'"
    )
    assert dict(rows) == groups
    assert len(rows) == 50


def test_randomized_arms_are_dealt_to_the_members_of_a_cohort_alone(project: Project) -> None:
    model, clients = make_model(project), make_clients(project, 46)
    outside, inside = clients[:4], clients[4:]
    rule = {"clients": [client.name for client in inside]}
    cohort = ok(project.owner.post("/v1/cohorts", {"name": "some", "rule": rule}), 201)
    arms = {"mode": "randomized", "policies": [FEDAVG, FEDPER]}
    for seed in range(50):
        settings = RunSettings(rounds=1, seed=seed, arms=arms)
        groups = {client.name: settings.arms_of(client.id)[0] for client in inside}
        if min(Counter(groups.values()).values()) >= 20:
            break
    more = {"arms": arms, "cohort_id": cohort["id"], "goal": 42, "quorum": 2, "seed": seed}
    run = make_run(project, model, **more)
    assert [client.check_in(waiting=[])["assignment"] for client in outside] == [None] * 4
    for client in inside[:4]:
        assert policy_of(client.assignment(waiting=[])) == groups[client.name]
    ok(project.owner.post(f"/v1/runs/{run['id']}/stop"))
    few = {"clients": [client.name for client in inside[:30]]}
    cohort = ok(project.owner.post("/v1/cohorts", {"name": "few", "rule": few}), 201)
    run = make_run(project, model, **{**more, "cohort_id": cohort["id"]}, start=False)
    refused(project.owner.post(f"/v1/runs/{run['id']}/start"), 422, "arm_too_small")


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"policies": []}, "at least 1"),
        ({"policies": [FEDAVG, FEDAVG]}, "names that differ"),
        ({"policies": [FEDAVG] * 17}, "at most 16"),
        ({"policies": [FEDAVG], "mode": "both"}, "parallel"),
    ],
)
def test_arms_that_cannot_be(project: Project, arms: Json, words: str) -> None:
    model = make_model(project)
    body = {"name": "trial", "model_id": model.id, "settings": {"rounds": 1, "arms": arms}}
    answer = project.owner.post("/v1/runs", body)
    assert answer.status_code == 422
    assert words in answer.text
    body["settings"] = {"rounds": 2, "policy": FEDPER, "arms": {"policies": [FEDAVG]}}
    assert "not both" in project.owner.post("/v1/runs", body).text
