"""The comparison of arms over HTTP: figures from the raw evaluations, forms, tenants, cost."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from sqlalchemy import event

from fedselect import pages
from fedselect.policies import RunSettings

from .factories import (
    Json,
    Project,
    TestClient,
    evaluate,
    everything,
    make_model,
    make_project,
    make_run,
    ok,
    refused,
)
from .test_arms import FEDAVG, FEDPER, LOCAL, Trial, make_trial

# Correct of 100 in each arm, by client.
POST = {"fedavg": (70, 60, 80), "fedper": (90, 75, 85), "local": (55, 50, 60)}
ALONE = 65


def finish(trial: Trial, post: dict[str, tuple[int, ...]] = POST) -> Trial:
    """Play all rounds; every client reports what the tables say, in the arm it is asked of."""
    while trial.run()["state"] == "running":
        trial.play()
    names = {arm["id"]: arm["name"] for arm in trial.run()["arms"]}
    for number, client in enumerate(trial.clients):
        for _ in names:
            arm = names[client.assignment()["arm_id"]]
            score = {"correct": post[arm][number], "total": 100, "loss": 1}
            scores = {"post": score, "pre": score, "local_only": {**score, "correct": ALONE}}
            sent = 1000 * (1 + list(post).index(arm))
            evaluate(client, scores=scores, bytes_sent=sent)
    assert trial.run()["state"] == "finished"
    return trial


@pytest.fixture(scope="module")
def trial(core: Any, api: TestClient) -> Trial:
    found = make_trial(make_project(core, api), FEDAVG, FEDPER, LOCAL, clients=3, goal=3)
    return finish(found)


def path(trial: Trial, what: str = "comparison") -> str:
    return f"/v1/runs/{trial.run_id}/{what}"


def compare(trial: Trial, **query: Any) -> Json:
    return dict(ok(trial.project.owner.get(path(trial), **query)))


def test_its_figures_follow_from_the_raw_evaluations(trial: Trial) -> None:
    found = compare(trial)
    raw = everything(trial.project.owner, path(trial, "evaluations"))
    arms = {arm["id"]: arm["name"] for arm in trial.run()["arms"]}
    for arm in found["arms"]:
        own = [each for each in raw if arms[each["arm_id"]] == arm["name"]]
        correct = sum(each["scores"]["post"]["correct"] for each in own)
        assert (arm["pooled"]["correct"], arm["pooled"]["examples"]) == (correct, 300)
        assert arm["pooled"]["percent"] == pytest.approx(correct / 3)
        assert arm["sent_bytes"] == sum(each["bytes_sent"] for each in own)
        assert arm["pooled_over_clients"] is None, "three clients"
        worst = min(own, key=lambda each: each["scores"]["post"]["correct"])
        assert arm["worst"]["name"] == worst["client_name"]
        gains = [each["scores"]["post"]["correct"] - ALONE for each in own]
        assert arm["effects"]["local_only"]["mean_points"] == pytest.approx(sum(gains) / 3)
        assert len(arm["effects"]["local_only"]["worse"]) == sum(gain < -2 for gain in gains)
    (first, *_) = found["differences"]
    assert (first["arm"], first["against"]) == ("fedavg", "fedper")
    assert first["pooled_points"] == pytest.approx((210 - 250) / 3)
    assert (first["verdict"], first["unit"], first["paired"]) == ("worse", "examples", True)
    told = found["recommendation"]
    assert (told["policy"], told["tied"]) == ("fedper", [])
    assert (told["can_tell"], told["short"]) == (False, True), "of three participations"
    assert len(found["clients"]) == 9


def test_the_reports_of_its_arms_stand_beside_the_fedavg_arm(trial: Trial) -> None:
    owner = trial.project.owner
    for arm in ("fedper", "local"):
        report = ok(owner.get(path(trial, "report"), arm=arm))
        assert report["run"]["policy"] == arm
        assert (report["fedavg_run"], report["unmeasured"]) == (trial.run_id, {})
        by_name = {client["name"]: client for client in report["clients"]}
        for number, client in enumerate(trial.clients):
            gain = by_name[client.name]["gains"]["fedavg_ft"]["points"]
            assert gain == pytest.approx(POST[arm][number] - POST["fedavg"][number])
        assert report["run"]["published"] == 1
        assert report["masks"]["clients_known"] == 3
    first = ok(owner.get(path(trial, "report")))
    assert (first["run"]["policy"], first["fedavg_run"]) == ("fedavg", None)
    said = refused(owner.get(path(trial, "report"), arm="none"), 422, "arm_unknown")
    assert "fedavg, fedper, local" in said["detail"]


def test_an_arm_of_another_run_may_be_the_baseline(trial: Trial) -> None:
    project = trial.project
    foreign = make_run(project, make_model(project), start=False, goal=3)
    answer = project.owner.get(path(trial, "report"), arm="fedper", fedavg=foreign["id"])
    assert "another model" in refused(answer, 422, "baseline_unfit")["detail"]


def test_its_forms_say_the_same(trial: Trial) -> None:
    owner = trial.project.owner
    html = owner.get(path(trial), format="html")
    assert html.headers["content-type"] == "text/html; charset=utf-8"
    (policy,) = html.headers.get_list("content-security-policy")
    assert policy == f"{pages.CSP}; frame-ancestors 'none'"
    for words in ("fedper", "fedavg", trial.clients[0].name, "short trial"):
        assert words in html.text
    lines = list(csv.DictReader(io.StringIO(owner.get(path(trial), format="csv").text)))
    assert len(lines) == 9
    by_arm = {(line["name"], line["arm"]): int(line["correct"]) for line in lines}
    for arm, counts in POST.items():
        for number, client in enumerate(trial.clients):
            assert by_arm[client.name, arm] == counts[number]
    refused(owner.get(path(trial), format="png"), 422, "request_invalid")


def test_the_same_is_said_again(trial: Trial) -> None:
    one, two = compare(trial), compare(trial)
    assert {**one, "made_at": 0} == {**two, "made_at": 0}


def test_who_may_read_it(trial: Trial, other: Project) -> None:
    for role in ("owner", "operator", "auditor", "viewer"):
        ok(trial.project.caller(role).get(path(trial)))
    refused(trial.clients[0].get(path(trial)), 403, "scope_missing")
    for form in ("json", "html", "csv"):
        refused(other.owner.get(path(trial), format=form), 404, "not_found")


def test_a_run_without_arms_is_compared_with_nothing(project: Project) -> None:
    model_run = make_trial(project, FEDPER)
    found = compare(model_run)
    assert [arm["name"] for arm in found["arms"]] == ["fedper"]
    assert found["recommendation"]["reasons"][0]["code"] == "one_arm"


def test_a_run_that_has_just_begun_has_a_comparison_too(project: Project) -> None:
    early = make_trial(project, FEDPER, FEDAVG)
    for form in ("json", "html", "csv"):
        assert early.project.owner.get(path(early), format=form).status_code == 200
    found = compare(early)
    assert found["recommendation"]["reasons"][0]["code"] == "not_finished"
    assert [arm["pooled"] for arm in found["arms"]] == [None, None]


def test_scores_of_few_clients_are_left_out(project: Project) -> None:
    two = finish(make_trial(project, FEDPER, FEDAVG), {"fedper": (80, 70), "fedavg": (60, 70)})
    found = compare(two)
    assert found["recommendation"]["reasons"][0]["code"] == "no_scores"
    assert all(arm["pooled"] is None and arm["effects"] == {} for arm in found["arms"])


def test_it_costs_as_many_statements_for_many_clients_and_arms(
    project: Project, other: Project, core: Any
) -> None:
    found = []
    for tenant, clients, arms in (
        (project, 2, (FEDPER, FEDAVG)),
        (other, 5, (FEDPER, FEDAVG, LOCAL)),
    ):
        many = make_trial(tenant, *arms, clients=clients, goal=clients)
        finish(many, {arm["name"]: (50,) * clients for arm in arms})
        compare(many)
        seen: list[str] = []

        def note(_c: Any, _u: Any, statement: str, *_: Any, seen: list[str] = seen) -> None:
            seen.append(statement)

        event.listen(core.db._engine, "before_cursor_execute", note)
        try:
            compare(many)
        finally:
            event.remove(core.db._engine, "before_cursor_execute", note)
        found.append(len(seen))
    assert found[0] == found[1] <= 8, found


def test_what_it_has_cost_is_counted_over_the_arms(trial: Trial) -> None:
    found = ok(trial.project.owner.get(path(trial, "estimate")))
    assert [arm["name"] for arm in found["estimate"]["arms"]] == ["fedavg", "fedper", "local"]
    assert (found["actual"]["clients"], found["actual"]["reports"]) == (3, 9)
    assert found["estimate"]["participations"] == pytest.approx(3), "one round of three arms"


def test_settings_of_a_run_with_arms_say_its_first_policy(trial: Trial) -> None:
    settings = RunSettings.model_validate(trial.run()["settings"])
    assert settings.policy == settings.arms.policies[0]
    assert settings.parallel == 3
