"""``fedselect pilot`` against a real coordinator: a few clients, one file, from init to report."""

from __future__ import annotations

import json
from functools import partial

import pytest

from fedselect import pilotwatch_cli
from fedselect.errors import ServiceError
from fedselect.exchange import TRANSIENT
from fedselect.pilotfile import parse
from fedselect.profiles import Profile, Profiles, write_profiles

from .factories import (
    REPORT,
    contribute,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    ok,
    pass_time,
)


@pytest.fixture
def pilot(terminal):
    """Run ``fedselect pilot …``."""
    return partial(terminal, "pilot")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ward.yaml"


@pytest.fixture
def site(project):
    """A model and four clients, two of which have the tag ``east``."""
    model = make_model(project, name="watch")
    clients = make_clients(project, 2)
    clients += [make_client(project, tags=["east"]) for _ in range(2)]
    return model, clients


def read(file):
    return parse(file.read_text(), file.name)


def play(project, model, clients):
    """Carry the one run that is under way to its end."""
    for seed in range(100):
        (run,) = everything(project.owner, "/v1/runs")
        if run["state"] != "running":
            break
        for client in clients:
            contribute(client, model, seed=seed)
        drain(project)
    assert run["state"] == "evaluating"
    for client in clients:
        ok(client.post(f"/v1/assignments/{client.assignment()['id']}/evaluations", REPORT))
    drain(project)


# --- init --------------------------------------------------------------------------------------


def test_init_asks_with_defaults_and_writes_a_commented_file(pilot, site, file):
    said = pilot("init", file, text="\n" * 20)
    assert "Name of the pilot [ward]" in said
    found = read(file)
    assert (found.name, found.model, found.policies, found.rounds) == (
        "ward",
        "watch",
        ["fedselect"],
        30,
    )
    assert found.cohort.clients == sorted(each.name for each in site[1])[:3]
    assert (found.round.goal, found.round.quorum, found.round.min_contributors) == (3, 2, 2)
    assert "Estimate for 3 clients" in said
    assert "Nothing has begun" in said
    text = file.read_text()
    assert "# Estimate for 3 clients, made with this file:" in text
    assert "% of FedAvg in float32" in text


def test_init_without_a_terminal_takes_options_and_defaults(pilot, project, site, file):
    words = ("--clients", "tag:east", "--rounds", 12, "--policies", "fedselect,fedavg")
    said = pilot("init", file, "--yes", *words, "--link", "dsl", "--json")
    found = read(file)
    assert (found.cohort.tag, found.rounds, found.link) == ("east", 12, "dsl")
    assert (found.policies, found.compare) == (["fedselect", "fedavg"], "parallel")
    assert said["pilot"]["name"] == "ward"
    assert [line for line in said["estimate"] if line.startswith("fedavg: 2 clients")]
    assert everything(project.owner, "/v1/runs") == []


def test_an_answer_that_does_not_fit_is_asked_again(pilot, site, file):
    said = pilot(
        "init", file, text="\nnone\nwatch\nnobody\n50%\nfedsel\nfedselect\n0\n9\n\nsoon" + "\n" * 9
    )
    assert "there is no model 'none' with weights; there are: watch" in said
    assert "there is no active client nobody" in said
    assert "name each policy once" in said
    assert "'0' is no number" in said
    assert "'soon' is no number" in said
    assert (read(file).cohort.percent, read(file).rounds) == (50, 9)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--clients", "tag:west"), "answer_unfit", "there are: east"),
        (("--clients", "0%"), "answer_unfit", "or 10%"),
        (("--clients", ","), "answer_unfit", "or 10%"),
        (("--model", "x"), "answer_unfit", "there are: watch"),
        (("--rounds", "many"), "answer_unfit", "no number"),
        (("--link", "fast"), "link_unknown", "10mbit"),
        (("--name", "a b"), "answer_unfit", "'a-b' would be one"),
        (("--policies", "fedselect,random", "--compare", "x"), "answer_unfit", "randomized"),
        (("--rounds", "1"), "request_invalid", "no mask of fedselect would ever be used"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(pilot, site, file, words, code, text):
    error = pilot("init", file, "--yes", *words, code=1).exception
    assert error.code == code
    assert text in str(error)
    assert not file.exists()


def test_init_replaces_no_file_unasked(pilot, site, file):
    file.write_text("mine")
    assert pilot("init", file, "--yes", code=1).exception.code == "file_exists"
    assert file.read_text() == "mine"
    pilot("init", file, "--yes", "--force")
    assert read(file).name == "ward"


def test_init_says_what_is_missing(pilot, project, file):
    assert "models create" in str(pilot("init", file, "--yes", code=1).exception)
    make_model(project)
    assert "clients enrol" in str(pilot("init", file, "--yes", code=1).exception)


def test_the_profile_is_written_and_used(pilot, project, site, file, tmp_path, monkeypatch, asked):
    key = tmp_path / "owner.key"
    key.write_text(project.owner.key)
    key.chmod(0o600)
    known = {name: Profile(f"http://{name}", str(key)) for name in ("coordinator", "elsewhere")}
    write_profiles(tmp_path / "profiles.toml", Profiles("coordinator", known))
    monkeypatch.delenv("FEDSELECT_SERVER")
    monkeypatch.delenv("FEDSELECT_KEY")
    said = pilot("init", file, text="elsewhere\n" + "\n" * 20)
    assert "Profile (coordinator, elsewhere) [coordinator]" in said
    assert read(file).profile == "elsewhere"
    pilot("start", file)
    assert asked[-1][0] == "http://elsewhere"
    pilot("watch", file, "--once", "--profile", "coordinator")
    assert asked[-1][0] == "http://coordinator"


# --- start -------------------------------------------------------------------------------------


def test_start_makes_a_run_once(pilot, project, site, file):
    pilot("init", file, "--yes", "--rounds", 8)
    assert pilot("report", file, code=1).exception.code == "pilot_not_started"
    first = pilot("start", file, "--json")
    again = pilot("start", file, "--json")
    assert (first["created"], again["created"]) == (True, False)
    assert first["run"]["id"] == again["run"]["id"]
    (run,) = everything(project.owner, "/v1/runs")
    assert (run["name"], run["state"]) == ("ward", "running")
    assert "0 of 8 rounds are published" in pilot("start", file)


def test_start_goes_on_where_it_was_cut_off(pilot, project, site, file):
    """A run that was created, but whose start never arrived."""
    pilot("init", file, "--yes")
    rule = read(file).cohort.model_dump(exclude_none=True)
    cohort = ok(project.owner.post("/v1/cohorts", {"name": "ward", "rule": rule}), 201)
    body = {
        "name": "ward",
        "model_id": site[0].id,
        "cohort_id": cohort["id"],
        "settings": read(file).settings().model_dump(mode="json"),
    }
    ok(project.owner.post("/v1/runs", body), 201)
    assert pilot("start", file, "--json")["run"]["state"] == "running"


def test_a_file_that_was_changed_is_another_pilot(pilot, site, file):
    pilot("init", file, "--yes")
    pilot("start", file)
    file.write_text(file.read_text().replace("rounds: 30", "rounds: 40"))
    error = pilot("start", file, code=1).exception
    assert error.code == "pilot_changed"
    assert "policy.start_round, rounds" in str(error)
    assert "another name" in str(error)


def test_start_refuses_what_it_cannot_do(pilot, project, site, file):
    error = pilot("start", file, code=1).exception
    assert (error.code, "pilot init" in str(error)) == ("file_invalid", True)
    file.write_text("format: fedselect-pilot/1\nname: ward\nmodel: other\ncohort: {percent: 100}\n")
    assert "there are: watch" in str(pilot("start", file, code=1).exception)
    file.write_text(file.read_text().replace("other", "watch"))
    error = pilot("start", file, code=1).exception
    assert (error.code, "has 4 active clients, but round.goal is 10" in str(error)) == (
        "pilot_cohort_small",
        True,
    )
    file.write_text(file.read_text() + "round: {goal: 4}\n")
    run = pilot("start", file, "--json")["run"]
    ok(project.owner.post(f"/v1/runs/{run['id']}/pause"))
    assert pilot("start", file, code=1).exception.code == "pilot_paused"


# --- watch, report -----------------------------------------------------------------------------


def test_a_pilot_to_its_end(pilot, project, site, file, tmp_path):
    model, clients = site
    names = ",".join(client.name for client in clients[:3])
    pilot("init", file, "--yes", "--rounds", 3, "--clients", names)
    pilot("start", file)
    scene = pilot("watch", file, "--json")
    assert (scene["run"]["state"], scene["rounds"][0]["state"]) == ("running", "selecting")
    assert scene["rounds"][0]["seconds"] is None
    play(project, model, clients[:3])
    said = pilot("watch", file)
    assert "ward: finished, of 3 rounds fedselect 3" in said
    assert "3/3" in said
    assert "3 clients have reported" in said
    rows = pilot("watch", file, "--once", "--json")["rounds"]
    actual = ok(project.owner.get(f"/v1/runs/{scene['run']['id']}/estimate"))["actual"]
    assert sum(row["sent"] for row in rows) == actual["up"] > 0
    # What was fetched for the evaluation belongs to no round.
    assert 0 < sum(row["received"] for row in rows) < actual["down"]
    assert all(row["seconds"] > 0 for row in rows)
    said = pilot("report", file, "--out", tmp_path / "out").splitlines()
    assert [line.partition(":")[0] for line in said[:5]] == [
        "Gained",
        "Lost",
        "Cost",
        "Personal",
        "Gates",
    ]
    assert (tmp_path / "out" / "ward.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "out" / "ward.json").read_text())["run"]["name"] == "ward"
    assert len((tmp_path / "out" / "ward.csv").read_text().splitlines()) == 4


def test_watch_says_when_a_run_stands_still(pilot, project, site, file):
    pilot("init", file, "--yes")
    run = pilot("start", file, "--json")["run"]
    ok(project.owner.post(f"/v1/runs/{run['id']}/pause"))
    assert f"fedselect admin runs resume {run['id']}" in pilot("watch", file, code=1).output
    ok(project.owner.post(f"/v1/runs/{run['id']}/stop"))
    assert "Stopped" in pilot("watch", file, code=1).output


def test_watch_outlives_the_coordinator(project, site, file, pilot, monkeypatch):
    """It is away for two looks; what was seen before stays."""
    pilot("init", file, "--yes")
    run = pilot("start", file, "--json")["run"]
    ok(project.owner.post(f"/v1/runs/{run['id']}/stop"))
    looks = []

    def look(self):
        looks.append(self)
        if len(looks) < 3:
            raise ServiceError("away", status=0)
        return real(self)

    real = pilotwatch_cli.Looker.look
    monkeypatch.setattr(pilotwatch_cli.Looker, "look", look)
    assert "Stopped" in pilot("watch", file, "--every", 0.1, code=1).output
    assert len(looks) == 3
    assert 0 in TRANSIENT


def test_a_file_of_other_clients_is_another_pilot(pilot, site, file):
    pilot("init", file, "--yes")
    pilot("start", file)
    file.write_text(file.read_text().replace("clients: [", "clients: [client-9, "))
    error = pilot("start", file, code=1).exception
    assert (error.code, "of other settings (rule)" in str(error)) == ("pilot_changed", True)


def test_several_policies_are_arms(pilot, site, file, tmp_path):
    pilot("init", file, "--yes", "--policies", "fedselect,fedavg")
    assert pilot("start", file, "--json")["run"]["settings"]["arms"]["mode"] == "parallel"
    scene = pilot("watch", file, "--once", "--json")
    assert {row["arm"] for row in scene["rounds"]} == {"fedselect", "fedavg"}
    said = pilot("report", file)
    assert said.startswith("Policies: nothing can be said")
    assert (tmp_path / "ward.comparison.html").exists()
    assert pilot("report", file, "--arm", "x", code=1).exception.code == "arm_unknown"


# --- promote, rollback -------------------------------------------------------------------------

GOOD = {"post": 900, "before": 500}
BAD = {"post": 100, "before": 900}


@pytest.fixture
def finished(pilot, project, site, file):
    """A finished pilot of two rounds with three of the four clients."""
    model, clients = site
    names = ",".join(client.name for client in clients[:3])
    gates = ("--stages", "50,100", "--harmed", 0.1)
    pilot("init", file, "--yes", "--rounds", 3, "--clients", names, *gates)
    pilot("start", file)
    play(project, model, clients[:3])
    return clients


def measure(project, clients, correct):
    """All clients that are asked for a version say how good it is; then the gates speak."""
    scores = {name: {"correct": n, "total": 1000, "loss": 0.4} for name, n in correct.items()}
    for client in clients:
        found = client.check_in()["assignment"]
        if found is not None:
            ok(
                client.post(
                    f"/v1/assignments/{found['id']}/evaluations", {**REPORT, "scores": scores}
                )
            )
    pass_time(project)


def test_a_good_version_goes_to_everybody_stage_by_stage(pilot, project, finished, file):
    assert "no rollout yet" in pilot("report", file)
    assert pilot("rollback", file, "--reason", "x", code=1).exception.code == "pilot_not_promoted"
    said = pilot("promote", file, text="it gained\n")  # asked why
    assert "Rollout running: stage 1 of 2 (50 %, 2 clients, control group 2)." in said
    error = pilot("promote", file, "--reason", "now", code=1).exception
    assert "being measured" in str(error)
    assert "0 of 2 clients of the stage have answered" in pilot("watch", file, "--once")
    measure(project, finished, GOOD)
    said = pilot("watch", file)
    assert "ward: rollout held, stage 1 of 2" in said
    assert "insufficient" in said
    assert "Gates: held; stage 1 of 2" in pilot("report", file)
    pilot("promote", file, "--reason", "four are too few to tell")
    measure(project, finished, GOOD)
    found = pilot("promote", file, "--reason", "nobody is harmed", "--json")["rollout"]
    assert found["state"] == "promoted"
    assert {each["reason"] for each in found["decisions"]} >= {
        "it gained",
        "four are too few to tell",
        "nobody is harmed",
    }
    (channel,) = everything(project.owner, f"/v1/models/{found['model_id']}/channels")
    assert channel["version"]["number"] == 3
    assert "everybody has it already" in str(
        pilot("promote", file, "--reason", "x", code=1).exception
    )
    for _ in range(2):  # one call, and one that changes nothing
        assert "is rolled back" in pilot("rollback", file, "--reason", "a complaint")
    (channel,) = everything(project.owner, f"/v1/models/{found['model_id']}/channels")
    assert (channel["version"]["number"], channel["reason"]) == (0, "a complaint")


def test_a_bad_version_is_held_by_its_gate_and_rolled_back(pilot, project, finished, file):
    pilot("promote", file, "--reason", "in a hurry")
    measure(project, finished, BAD)
    assert "harmed share" in pilot("watch", file)
    error = pilot("promote", file, "--reason", "let us see", code=1).exception
    assert error.code == "pilot_not_promoted"
    assert "a gate says no: harmed_share is 1, at most 0.1" in str(error)
    found = pilot("rollback", file, "--reason", "it harms", "--json")["rollout"]
    assert (found["state"], found["decisions"][-1]["reason"]) == ("rolled_back", "it harms")
    assert (
        pilot("rollback", file, "--reason", "again", "--json")["rollout"]["state"] == "rolled_back"
    )
    assert "another name" in str(pilot("promote", file, "--reason", "x", code=1).exception)


def test_a_person_may_know_better_than_a_gate(pilot, project, finished, file):
    pilot("promote", file, "--reason", "in a hurry")
    measure(project, finished, BAD)
    found = pilot("promote", file, "--reason", "the baseline is wrong", "--anyway", "--json")
    assert (found["rollout"]["state"], found["rollout"]["stage"]) == ("running", 2)


def test_only_a_finished_pilot_is_promoted(pilot, site, file):
    pilot("init", file, "--yes")
    pilot("start", file)
    error = pilot("promote", file, "--reason", "x", code=1).exception
    assert (error.code, "is running" in str(error)) == ("pilot_not_finished", True)
    assert pilot("promote", file, "--reason", "", code=1).exception.code == "request_invalid"


def test_the_schema_is_printed(pilot):
    assert json.loads(pilot("schema"))["title"] == "PilotFile"
