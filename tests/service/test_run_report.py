"""The report of a run: every figure recomputed from what the clients said and sent."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from app import media, runreports
from fedselect import Mask, RunSettings, pages, reportpage
from fedselect.reportdoc import RunReport

from .campaign import eager
from .factories import (
    REPORT,
    Caller,
    Client,
    Json,
    Model,
    Project,
    TestClient,
    deliver,
    drain,
    evaluate,
    everything,
    make_clients,
    make_model,
    make_project,
    make_run,
    ok,
    refused,
    train,
)

ROUNDS = 3
# Correct of 100, by client: gains for certain, cannot be told, worse alone, harmed.
POST = (90, 71, 70, 45)
ALONE = (60, 70, 74, 80)
START = (10, 12, 9, 11)


@dataclass
class Campaign:
    """A finished run of four clients, and the masks that each of them has sent, by round."""

    project: Project
    model: Model
    run: Json
    clients: list[Client]
    masks: dict[str, list[Mask]] = field(default_factory=dict)

    def report(self, caller: Caller | None = None, **query: Any) -> Json:
        path = f"/v1/runs/{self.run['id']}/report"
        return dict(ok((caller or self.project.owner).get(path, **query)))


def play(
    project: Project,
    *,
    clients: int = 4,
    rounds: int = ROUNDS,
    again: Campaign | None = None,
    shift: int = 0,
    **rules: Any,
) -> Campaign:
    """A client's next mask holds the one before; ``again``: with the clients of another run."""
    model = again.model if again else make_model(project)
    run = make_run(project, model, rounds=rounds, goal=clients, **rules)
    found = Campaign(
        project, model, run, again.clients if again else make_clients(project, clients)
    )
    lower, upper = RunSettings.model_validate(run["settings"]).policy.bounds(model.space)
    for number in range(rounds):
        for seed, client in enumerate(found.clients):
            drawn = np.random.default_rng(100 * number + seed + shift).random(model.space.dim) < 0.2
            line = found.masks.setdefault(client.name, [])
            mask = (lower | (Mask.from_bool(drawn) & upper)) | (line[-1] if line else lower)
            line.append(mask)
            assignment = client.assignment()
            deliver(client, assignment, train(assignment, model.space, mask=mask).data)
        drain(project)
    return found


def scores(number: int, total: int = 100) -> Json:
    counts = {"post": POST, "local_only": ALONE, "start": START, "pre": POST}
    found = {n: {"correct": each[number], "total": total, "loss": 1} for n, each in counts.items()}
    found["pre"]["both"] = POST[number]
    return found


@pytest.fixture(scope="module")
def finished(core: Any, api: TestClient) -> Campaign:
    campaign = play(make_project(core, api))
    for number, client in enumerate(campaign.clients):
        evaluate(client, scores=scores(number), bytes_sent=1000 + number, personal_share=0.3)
    return campaign


@pytest.fixture
def limited(core: Any, api: TestClient):
    """Let the coordinator have other settings."""

    def change(**settings: Any) -> None:
        api.app.state.core = eager(core, **settings)

    yield change
    api.app.state.core = core


# --- figures -----------------------------------------------------------------------------------


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The two roots of (p − π)² = z² π (1 − π) / n."""
    p, z2 = correct / n, 1.959963984540054**2
    roots = np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p])
    return float(min(roots)), float(max(roots))


def test_gains_follow_from_the_raw_evaluations(finished: Campaign) -> None:
    path = f"/v1/runs/{finished.run['id']}/evaluations"
    raw = {e["client_name"]: e for e in everything(finished.project.owner, path)}
    report = finished.report()
    assert [c["name"] for c in report["clients"]] == sorted(raw)
    for client in report["clients"]:
        said = raw[client["name"]]["scores"]
        for baseline in ("local_only", "start"):
            a, b = said["post"]["correct"], said[baseline]["correct"]
            (la, ua), (lb, ub) = wilson(a, 100), wilson(b, 100)
            gain = client["gains"][baseline]
            assert gain["points"] == pytest.approx(a - b)
            low = (a - b) / 100 - math.hypot(a / 100 - la, ub - b / 100)
            high = (a - b) / 100 + math.hypot(ua - a / 100, b / 100 - lb)
            expected = (100 * low, 100 * high)
            assert (gain["interval"]["low"], gain["interval"]["high"]) == pytest.approx(expected)
            assert not gain["paired"]
        assert client["gains"]["pre"]["paired"]
        assert client["personal_percent"] == pytest.approx(30)


def test_the_planted_client_is_harmed_and_nobody_else(finished: Campaign) -> None:
    names = [client.name for client in finished.clients]
    report = finished.report()
    effect = report["effects"]["local_only"]
    assert effect["harmed"] == [names[3]]
    assert effect["worse"] == [names[2], names[3]]
    assert effect["gained"] == [names[0]]
    assert effect["worst_decile"] == [names[3]]
    gaps = [a - b for a, b in zip(POST, ALONE, strict=True)]
    assert effect["mean_points"] == pytest.approx(np.mean(gaps))
    assert (effect["evidence"], effect["interval"]) == ("insufficient", None)
    assert report["fairness"]["post"] == pytest.approx(
        sum(POST) ** 2 / 4 / sum(p * p for p in POST)
    )
    page = finished.project.owner.get(f"/v1/runs/{finished.run['id']}/report", format="html").text
    assert "1 of 4 clients are harmed" in page
    assert f"They are: {names[3]}." in page


def test_masks_follow_from_what_the_clients_have_sent(finished: Campaign) -> None:
    space, found = finished.model.space, finished.report()["masks"]
    always = Mask.initial(space)
    assert found["reading"]["read"] == found["reading"]["wanted"] == 4 * ROUNDS
    assert (found["every"], found["clients_known"]) == (1, 4)
    for client in found["clients"]:
        line = finished.masks[client["name"]]
        assert client["rounds"] == [1, 2, 3]
        assert client["personal_percent"] == pytest.approx([100 * m.share(space) for m in line])
        steps = [(b - always).jaccard(a - always) for a, b in pairwise(line)]
        assert client["jaccard"] == [None, *(pytest.approx(step) for step in steps)]
    last = [finished.masks[name][-1] - always for name in found["overlap"]["clients"]]
    for i, j in combinations(range(4), 2):
        assert found["overlap"]["jaccard"][i][j] == pytest.approx(last[i].jaccard(last[j]))
    for tensor in found["tensors"]:
        slot = space.by_name[tensor["name"]]
        parts = [m[-1].to_bool()[slot.offset : slot.stop] for m in finished.masks.values()]
        assert tensor["clients_percent"] == pytest.approx([100 * part.mean() for part in parts])


def test_cost_is_what_was_reported_and_what_fedavg_would_be(finished: Campaign) -> None:
    report, dim = finished.report(), finished.model.space.dim
    cost = report["cost"]
    assert cost["sent_bytes"] == sum(1000 + n for n in range(4))
    assert cost["received_bytes"] == 4 * 2000
    assert cost["fedavg_sent_bytes"] == 4 * 3 * 4 * dim
    assert cost["fedavg_received_bytes"] == 4 * 4 * 4 * dim
    moved = cost["sent_bytes"] + cost["received_bytes"]
    assert cost["of_fedavg_percent"] == pytest.approx(100 * moved / (4 * 7 * 4 * dim))
    assert cost["rejected"] == {"percent": 0, "count": 0, "of": 12}
    assert cost["rounds_timed"] == ROUNDS


def test_seconds_are_those_of_the_rows(project: Project, clock: Any) -> None:
    clock.hold()
    model = make_model(project)
    run = make_run(project, model, rounds=1, goal=2)
    clients = make_clients(project, 2)
    assignments = [client.assignment() for client in clients]
    for wait, client, assignment in zip((5, 20), clients, assignments, strict=True):
        clock.advance(wait)
        deliver(client, assignment, train(assignment, model.space).data)
        drain(project)
    for client in clients:
        evaluate(client)
    found = ok(project.owner.get(f"/v1/runs/{run['id']}/report"))
    spent = {c["name"]: c["cost"]["seconds"] for c in found["clients"]}
    assert spent == {
        clients[0].name: pytest.approx(5, abs=1),
        clients[1].name: pytest.approx(25, abs=1),
    }
    assert found["cost"]["client_seconds"] == pytest.approx(15, abs=1)
    assert found["cost"]["collecting_seconds"] == pytest.approx(25, abs=1)
    assert found["cost"]["elapsed_seconds"] == pytest.approx(25, abs=1)
    assert 0 < found["cost"]["aggregating_seconds"] < 1


def test_a_run_without_anything_has_a_report_too(project: Project) -> None:
    run = make_run(project, start=False)
    for form in ("json", "html", "csv"):
        answer = project.owner.get(f"/v1/runs/{run['id']}/report", format=form)
        assert answer.status_code == 200
    found = ok(project.owner.get(f"/v1/runs/{run['id']}/report"))
    assert (found["clients"], found["effects"], found["run"]["version"]) == ([], {}, None)


def test_another_run_is_the_baseline_of_fedavg(finished: Campaign) -> None:
    project, owner = finished.project, finished.project.owner
    tuned = play(project, again=finished, policy={"personal": "none", "name": "fedavg"})
    for number, client in enumerate(tuned.clients):
        score = {"correct": START[number], "total": 100, "loss": 1}
        evaluate(client, scores={"post": score, "local_only": {**score, "both": 1}})
    report = finished.report(fedavg=tuned.run["id"])
    assert (report["fedavg_run"], report["unmeasured"]) == (tuned.run["id"], {})
    for number, client in enumerate(sorted(finished.clients, key=lambda c: c.name)):
        (row,) = (c for c in report["clients"] if c["name"] == client.name)
        assert row["gains"]["fedavg_ft"]["points"] == pytest.approx(POST[number] - START[number])
    assert report["effects"]["fedavg_ft"]["harmed"] == []
    path = f"/v1/runs/{finished.run['id']}/report"
    refused(owner.get(path, fedavg=finished.run["id"]), 422, "baseline_unfit")
    elsewhere = make_run(project, start=False, rounds=ROUNDS, policy={"personal": "none"})
    said = refused(owner.get(path, fedavg=elsewhere["id"]), 422, "baseline_unfit")
    assert "another model" in said["detail"]
    assert "fedavg" in finished.report()["unmeasured"]["fedavg_ft"]


def test_a_run_of_another_tenant_is_no_baseline(finished: Campaign, other: Project) -> None:
    foreign = make_run(other, start=False, policy={"personal": "none"})
    path = f"/v1/runs/{finished.run['id']}/report"
    refused(finished.project.owner.get(path, fedavg=foreign["id"]), 404, "not_found")


def test_a_rerun_with_another_seed_is_compared(finished: Campaign) -> None:
    project, owner = finished.project, finished.project.owner
    again = play(project, again=finished, seed=5, shift=50)
    report = finished.report(rerun=again.run["id"])
    found, always = report["masks"]["rerun"], Mask.initial(finished.model.space)
    assert (found["run"], found["seed"]) == (again.run["id"], 5)
    shares = []
    for client in found["clients"]:
        one, two = (c.masks[client["name"]][-1] - always for c in (finished, again))
        shares.append(100 * (one & two).personal / one.personal)
        assert client["again_percent"] == pytest.approx(shares[-1])
        counts = [mask.per_slot(finished.model.space) for mask in (one, two)]
        blind = sum(
            counts[0][slot.name] * counts[1][slot.name] / slot.size
            for slot in finished.model.space.slots
        )
        assert client["chance_percent"] == pytest.approx(100 * blind / one.personal)
    assert found["mean_again_percent"] == pytest.approx(np.mean(shares))
    assert report["masks"]["reading"]["wanted"] == 4 * ROUNDS + 4
    path = f"/v1/runs/{finished.run['id']}/report"
    refused(owner.get(path, rerun=finished.run["id"]), 422, "rerun_unfit")
    longer = make_run(project, finished.model, start=False, rounds=ROUNDS + 1, seed=6)
    said = refused(owner.get(path, rerun=longer["id"]), 422, "rerun_unfit")
    assert "rounds" in said["detail"]
    elsewhere = make_run(project, start=False, rounds=ROUNDS, goal=4, seed=6)
    said = refused(owner.get(path, rerun=elsewhere["id"]), 422, "rerun_unfit")
    assert "another model" in said["detail"]


def test_heterogeneity_follows_from_what_the_clients_said(project: Project) -> None:
    campaign = play(project, clients=4, rounds=1)
    labels = [{"a": 80, "b": 20}, {"a": 50, "b": 50}, {"b": 100, "c": 3}, {"a": 100}]
    for number, client in enumerate(campaign.clients):
        told = {"divergence": number / 10, "labels": labels[number]}
        evaluate(client, scores=scores(number), **told)
    report = campaign.report()
    assert [c["divergence"] for c in report["clients"]] == [0, 0.1, 0.2, 0.3]
    first = report["clients"][0]
    assert first["label_distance"] == pytest.approx(abs(0.8 - 0.5))
    found = {(each["index"], each["baseline"]): each for each in report["heterogeneity"]}
    alone = found["divergence", "local_only"]
    assert alone["rank_correlation"] == pytest.approx(-1), "the further away the less it gains"
    assert (alone["clients"], alone["evidence"]) == (4, "insufficient")
    text = str(report) + str(
        everything(project.owner, f"/v1/runs/{campaign.run['id']}/evaluations")
    )
    assert "labels" not in text
    assert "'c': 3" not in text
    kept = project.sql("SELECT report->'labels' FROM evaluations WHERE project_id = :project")
    assert {"b": 100} in [each for (each,) in kept], "three examples of a label are not kept"


@pytest.mark.parametrize(
    "changes", [{"divergence": 2.1}, {"labels": {"a": -1}}, {"labels": {"": 1}}]
)
def test_odd_words_about_oneself_are_refused(project: Project, changes: Json) -> None:
    campaign = play(project, clients=2, rounds=1)
    client = campaign.clients[0]
    path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
    refused(client.post(path, {**REPORT, **changes}), 422, "request_invalid")


# --- forms -------------------------------------------------------------------------------------


def ask(campaign: Campaign, accept: str, **query: str) -> Any:
    caller = campaign.project.owner
    headers = {**caller.headers(), "Accept": accept}
    path = f"/v1/runs/{campaign.run['id']}/report"
    return caller.api.get(path, params=query, headers=headers)


@pytest.mark.parametrize(
    ("accept", "query", "form"),
    [
        ("*/*", {}, "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", {}, "text/html; charset=utf-8"),
        ("text/csv", {}, "text/csv; charset=utf-8"),
        ("text/html", {"format": "json"}, "application/json"),
        ("application/json", {"format": "csv"}, "text/csv; charset=utf-8"),
        ("image/png", {}, "application/json"),
    ],
)
def test_the_form_is_asked_for(finished: Campaign, accept: str, query: Json, form: str) -> None:
    answer = ask(finished, accept, **query)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == form
    assert len(answer.content) > 1000


def test_forms_that_there_are_not(finished: Campaign) -> None:
    refused(ask(finished, "*/*", format="png"), 422, "request_invalid")
    refused(ask(finished, "*/*", form="html"), 422, "setting_unknown")


@pytest.mark.parametrize(
    ("accept", "best"),
    [
        (None, "a/b"),
        ("", "a/b"),
        ("x/y", "x/y"),
        ("x/*", "x/y"),
        ("a/b;q=0.1, x/y;q=0.2", "x/y"),
        ("*/*;q=0.5, a/b;q=0.1", "x/y"),
        ("x/y;q=nonsense", "a/b"),
        (";;;,,,q=", "a/b"),
        ("X/Y; Q=1", "x/y"),
    ],
)
def test_the_best_of_two_forms(accept: str | None, best: str) -> None:
    assert media.preferred(accept, ["a/b", "x/y"]) == best


def test_all_forms_say_the_same(finished: Campaign) -> None:
    document = RunReport.model_validate(finished.report())
    lines = list(csv.DictReader(io.StringIO(ask(finished, "text/csv").text)))
    for line, client in zip(lines, document.clients, strict=True):
        gain = client.gains["local_only"]
        assert line["name"] == client.name
        assert float(line["gain_local_only_points"]) == gain.points
        assert line["harmed_local_only"] == str(gain.harmed)
    page = ask(finished, "text/html").text.partition("report made")
    own = reportpage.page(document).partition("report made")
    assert page[0] == own[0]
    assert page[2][20:] == own[2][20:]


def test_a_browser_may_use_its_stylesheet_and_nothing_else(finished: Campaign) -> None:
    answer = ask(finished, "text/html")
    (policy,) = answer.headers.get_list("content-security-policy")
    assert policy == f"{pages.CSP}; frame-ancestors 'none'"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cache-control"] == "no-store"
    (plain,) = ask(finished, "*/*").headers.get_list("content-security-policy")
    assert plain.startswith("default-src 'none'; frame")


# --- who may see what --------------------------------------------------------------------------


def test_another_tenant_sees_nothing_of_it(finished: Campaign, other: Project) -> None:
    foreign = play(other, clients=3, rounds=1)
    for number, client in enumerate(foreign.clients):
        evaluate(client, scores=scores(number))
    path = f"/v1/runs/{finished.run['id']}/report"
    for form in ("json", "html", "csv"):
        refused(other.owner.get(path, format=form), 404, "not_found")
    seen = str(foreign.report())
    for client in finished.clients:
        assert client.name not in seen
        assert client.id not in seen
    for mask in (m for line in finished.masks.values() for m in line):
        assert mask.digest not in seen


def test_every_role_of_the_staff_may_read_it(finished: Campaign) -> None:
    for role in ("owner", "operator", "auditor", "viewer"):
        assert finished.report(finished.project.caller(role))["run"]["id"] == finished.run["id"]
    path = f"/v1/runs/{finished.run['id']}/report"
    refused(finished.clients[0].get(path), 403, "scope_missing")


def test_a_viewer_sees_nothing_of_a_single_mask(finished: Campaign) -> None:
    """Means over clients stay; what says whose mask is like whose is for ``mask:read``."""
    viewer = finished.project.caller("viewer")
    whole, bare = finished.report()["masks"], finished.report(viewer)["masks"]
    assert (whole["single_clients"], bare["single_clients"]) == (True, False)
    assert bare["clients"] == bare["overlap"]["jaccard"] == bare["overlap"]["tree"] == []
    assert bare["overlap"]["clients"] == []
    assert bare["overlap"]["mean"] == whole["overlap"]["mean"]
    for one, other in zip(bare["tensors"], whole["tensors"], strict=True):
        assert one["clients_percent"] == []
        assert other["clients_percent"]
        assert one["mean_percent"] == other["mean_percent"]
    path = f"/v1/runs/{finished.run['id']}/report"
    page = viewer.get(path, format="html").text
    assert "mask:read" in page
    assert "Which clients choose alike?" not in page
    assert "Which clients choose alike?" in finished.project.owner.get(path, format="html").text


def test_figures_that_sites_have_rounded(project: Project) -> None:
    """Rounded before anything is stored, though these agents did not; the report says so."""
    rule = {"round_scores": 0.05, "round_counts": 10}
    campaign = play(project, rounds=1, disclosure=rule)
    for number, client in enumerate(campaign.clients):
        told = {"local_only": 61 + number, "post": 83 + number}
        found = {n: {"correct": c, "total": 97, "loss": 0.734} for n, c in told.items()}
        labels = {"walking": 44, "resting": 8}
        evaluate(client, scores=found, personal_share=0.313, divergence=0.41, labels=labels)
    for ((report,),) in [[row] for row in kept_reports(project)]:
        scores = report["scores"]
        assert {score["total"] for score in scores.values()} == {100}
        assert {score["correct"] % 5 for score in scores.values()} == {0}
        assert {score["loss"] for score in scores.values()} == {0.75}
        assert (report["personal_share"], report["divergence"]) == (0.3, 0.4)
        assert report["labels"] == {"walking": 40}, "and 8 are too few to tell"
    made = campaign.report()
    (fact,) = [each for each in made["facts"] if each["code"] == "rounded"]
    assert "steps of 5 points" in fact["text"]
    assert "numbers of examples in steps of 10" in fact["text"]
    for client in made["clients"]:
        assert {each["percent"] % 5 for each in client["accuracy"].values()} == {0}
    shown = ok(project.owner.get(f"/v1/runs/{campaign.run['id']}/evaluations"))
    assert "walking" not in str(shown), "labels are shown nowhere"


def kept_reports(project: Project) -> list[Any]:
    return project.sql("SELECT report FROM evaluations WHERE project_id = :project")


def test_no_form_holds_a_mask(finished: Campaign) -> None:
    text = ask(finished, "*/*").text + ask(finished, "text/html").text
    for mask in (m for line in finished.masks.values() for m in line):
        assert mask.digest not in text


def test_scores_of_few_examples_are_not_even_kept(project: Project) -> None:
    campaign = play(project, clients=3, rounds=1)
    small = {"post": {"correct": 5, "total": 9, "loss": 1}}
    answer = evaluate(campaign.clients[0], scores=small)
    assert answer["scores"] == {}
    evaluate(campaign.clients[1], scores={**scores(0), "global": small["post"]})
    ((kept,), (more,)) = project.sql(
        "SELECT report->'scores' FROM evaluations WHERE project_id = :project ORDER BY created_at"
    )
    assert kept == {}
    assert "global" not in more
    hidden = next(c for c in campaign.report()["clients"] if c["withheld"])
    assert hidden["name"] == campaign.clients[0].name
    assert (hidden["accuracy"], hidden["gains"]) == ({}, {})


def test_harm_is_written_down_when_it_is_reported(finished: Campaign) -> None:
    noted = finished.project.sql(
        "SELECT subject, body FROM ledger_entries"
        " WHERE project_id = :project AND action = 'client.harmed'"
    )
    clients = finished.report()["clients"]
    gains = {f"client:{c['client_id']}": c["gains"]["local_only"] for c in clients}
    harmed = {subject: gain for subject, gain in gains.items() if gain["interval"]["high"] < 0}
    assert harmed, "or this shows nothing"
    assert {subject for subject, _ in noted} == set(harmed)
    for subject, body in noted:
        interval = harmed[subject]["interval"]
        told = (harmed[subject]["points"], interval["low"], interval["high"])
        assert tuple(float(body[n]) for n in ("points", "low", "high")) == pytest.approx(
            told, abs=0.01
        )
        assert body["baseline"] == "local_only"


def test_an_erased_client_is_in_no_report(project: Project) -> None:
    campaign = play(project, clients=3, rounds=2)
    for number, client in enumerate(campaign.clients):
        evaluate(client, scores=scores(number))
    gone = campaign.clients[1]
    ok(project.owner.post(f"/v1/clients/{gone.id}/erase"))
    found = campaign.report()
    assert {c["name"] for c in found["clients"]} == {campaign.clients[n].name for n in (0, 2)}
    assert gone.id not in str(found)
    assert found["masks"]["clients_known"] == 2


# --- limits ------------------------------------------------------------------------------------


def test_no_more_masks_are_read_than_the_limit(finished: Campaign, limited: Any) -> None:
    size = Mask.initial(finished.model.space).packed.size
    limited(report_mask_bytes=5 * size + 1)
    found = finished.report()["masks"]
    reading = {"wanted": 12, "read": 5, "missing": 0, "left_out": 7}
    assert found["reading"] == reading | {"read_bytes": 5 * size, "limit_bytes": 5 * size + 1}
    assert found["overlap"]["clients"] == [c.name for c in finished.clients], "last masks first"
    limited(report_mask_bytes=0)
    found = finished.report()["masks"]
    assert (found["reading"]["read"], found["overlap"], found["tensors"]) == (0, None, [])
    assert found["clients"][0]["personal_percent"][0] > 0, "the rows know how many there are"


def test_long_runs_are_looked_at_every_so_many_rounds(finished: Campaign, monkeypatch: Any) -> None:
    monkeypatch.setattr(runreports, "MOST_ROUNDS", 2)
    monkeypatch.setattr(runreports, "MOST_CLIENTS", 3)
    found = finished.report()["masks"]
    assert (found["every"], found["clients_known"], len(found["clients"])) == (2, 4, 3)
    assert {tuple(c["rounds"]) for c in found["clients"]} == {(1, 3)}


def test_a_mask_that_was_deleted_is_missed_and_the_rest_told(project: Project) -> None:
    campaign = play(project, clients=3, rounds=1)
    ((key,), *_) = project.sql("SELECT object_key FROM masks WHERE project_id = :project")
    storage = project.core.storage
    data = storage.read(key)
    storage.delete([key])
    try:
        found = campaign.report()["masks"]
    finally:  # other tests look whether everything is there
        storage.put(key, io.BytesIO(data), len(data))
    assert (found["reading"]["missing"], found["reading"]["read"]) == (1, 2)


def test_only_so_many_reports_are_made_at_once(finished: Campaign, monkeypatch: Any) -> None:
    monkeypatch.setattr(runreports, "PATIENCE", 0.01)
    for _ in range(runreports.AT_ONCE):
        assert runreports._ROOM.acquire(blocking=False)
    path = f"/v1/runs/{finished.run['id']}/report"
    refused(finished.project.owner.get(path), 503, "report_busy")
    for _ in range(runreports.AT_ONCE):
        runreports._ROOM.release()
    finished.report()


def test_it_costs_as_many_statements_for_many_clients(project: Project, core: Any) -> None:
    found = []
    for clients, rounds in ((2, 1), (5, 3)):
        campaign = play(project, clients=clients, rounds=rounds)
        for client in campaign.clients:
            evaluate(client)
        campaign.report()
        seen: list[str] = []

        def note(_c: Any, _u: Any, statement: str, *_: Any, seen: list[str] = seen) -> None:
            seen.append(statement)

        event.listen(core.db._engine, "before_cursor_execute", note)
        try:
            campaign.report()
        finally:
            event.remove(core.db._engine, "before_cursor_execute", note)
        found.append(len(seen))
    assert found[0] == found[1] <= 10, found
