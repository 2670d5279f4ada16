"""The explanation of a mask, recomputed from the masks that were sent and the raw report."""

from __future__ import annotations

import io
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from app import runreports
from fedselect import Mask, explainpage, pages
from fedselect.effects import gain
from fedselect.evaluations import ScoreReport
from fedselect.explaindocs import Explanation

from .campaign import eager
from .factories import (
    Client,
    Json,
    Project,
    TestClient,
    evaluate,
    everything,
    make_client,
    make_project,
    make_run,
    ok,
    refused,
)
from .test_ablations import REPORT, report, work
from .test_run_report import Campaign, play


def ask(campaign: Campaign, client: Client, **query: Any) -> Any:
    path = f"/v1/runs/{campaign.run['id']}/clients/{client.id}/explanation"
    return campaign.project.owner.get(path, **query)


def explained(campaign: Campaign, client: Client, **query: Any) -> Json:
    return dict(ok(ask(campaign, client, **query)))


@pytest.fixture(scope="module")
def finished(core: Any, api: TestClient) -> Campaign:
    """Four clients with masks, all of them evaluated, the first one ablated."""
    campaign = play(make_project(core, api), rounds=2)
    for client in campaign.clients:
        evaluate(client)
    versions = everything(campaign.project.owner, f"/v1/runs/{campaign.run['id']}/versions")
    path = f"/v1/versions/{versions[-1]['id']}/ablations"
    ok(campaign.project.owner.post(path, {"clients": [campaign.clients[0].name]}), 201)
    ok(report(campaign.clients[0], work(campaign.clients[0])), 201)
    return campaign


def test_every_figure_follows_from_the_masks_and_the_report(finished: Campaign) -> None:
    space, always = finished.model.space, Mask.initial(finished.model.space)
    own = finished.clients[0]
    found = explained(finished, own)
    masks = {name: (line[-1] - always).to_bool() for name, line in finished.masks.items()}
    mine, others = masks[own.name], [m for name, m in masks.items() if name != own.name]
    assert (found["compared"], found["round"], found["chosen"]) == (3, 2, int(mine.sum()))
    whole = ScoreReport.model_validate(REPORT["whole"])
    raw = {each["name"]: each for each in REPORT["tensors"]}
    shares = {}
    for tensor in found["tensors"]:
        slot = space.by_name[tensor["name"]]
        part = mine[slot.offset : slot.stop]
        theirs = [other[slot.offset : slot.stop] for other in others]
        shares[tensor["name"]] = part.mean()
        assert (tensor["elements"], tensor["chosen"]) == (slot.size, int(part.sum()))
        met = fmean(100 * fmean(other[part]) for other in theirs)
        assert tensor["others_percent"] == pytest.approx(met)
        assert tensor["chance_percent"] == pytest.approx(100 * np.mean(theirs))
        alone = part & ~np.logical_or.reduce(theirs)
        assert tensor["alone_percent"] == pytest.approx(100 * alone.sum() / part.sum())
        said = raw[tensor["name"]]
        expected = gain(whole, ScoreReport.model_validate(said["score"]), judged=False)
        assert tensor["lost"]["points"] == pytest.approx(expected.points)
        assert tensor["lost"]["interval"]["low"] == pytest.approx(expected.interval.low)
        assert tensor["lost"]["paired"]
        told = said.get("threshold") if part.sum() >= 10 else None
        assert tensor["threshold"] == told
    ordered = sorted(shares, key=lambda name: -shares[name])
    assert [each["name"] for each in found["tensors"]] == ordered
    assert found["measured"]["lost"]["points"] == pytest.approx(20)
    assert (found["client_name"], found["run_name"]) == (own.name, finished.run["name"])
    assert found["fixed"] == ["norm.running_mean"]


def test_without_an_ablation_the_mask_is_explained(finished: Campaign) -> None:
    found = explained(finished, finished.clients[1])
    assert found["measured"] is None
    assert {tensor["lost"] for tensor in found["tensors"]} == {None}
    assert any("not measured" in line for line in found["summary"])


def test_it_comes_as_a_page_too(finished: Campaign) -> None:
    own = finished.clients[0]
    answer = ask(finished, own, format="html")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    (policy,) = answer.headers.get_list("content-security-policy")
    assert policy == f"{pages.CSP}; frame-ancestors 'none'"
    document = Explanation.model_validate(explained(finished, own))
    ours = explainpage.page(document).partition("made 2")
    page = answer.text.partition("made 2")
    assert page[0] == ours[0]
    assert "own; without them it would lose" in page[2]
    headers = {**finished.project.owner.headers(), "Accept": "text/html"}
    path = f"/v1/runs/{finished.run['id']}/clients/{own.id}/explanation"
    assert finished.project.api.get(path, headers=headers).text.startswith("<!DOCTYPE html>")
    refused(ask(finished, own, format="png"), 422, "request_invalid")


def test_no_form_holds_a_mask(finished: Campaign) -> None:
    own = finished.clients[0]
    text = ask(finished, own).text + ask(finished, own, format="html").text
    for line in finished.masks.values():
        for mask in line:
            assert mask.digest not in text
            assert mask.to_bytes().hex() not in text


# --- who may see what --------------------------------------------------------------------------


def test_two_tenants_never_see_each_others(finished: Campaign, other: Project) -> None:
    foreign = play(other, clients=4, rounds=2)
    for one, mine in ((finished, foreign), (foreign, finished)):
        for client in one.clients:
            path = f"/v1/runs/{one.run['id']}/clients/{client.id}/explanation"
            refused(mine.project.owner.get(path), 404, "not_found")
            path = f"/v1/runs/{mine.run['id']}/clients/{client.id}/explanation"
            refused(mine.project.owner.get(path), 404, "not_found")
    # The very same mask elsewhere is one more client that chose the same: it must not count.
    before = explained(finished, finished.clients[0])
    assert before["compared"] == 3
    seen = str(explained(foreign, foreign.clients[0]))
    for client in finished.clients:
        assert client.name not in seen
        assert client.id not in seen


def test_who_may_read_it(finished: Campaign) -> None:
    own = finished.clients[0]
    path = f"/v1/runs/{finished.run['id']}/clients/{own.id}/explanation"
    for role in ("owner", "operator", "auditor"):
        assert ok(finished.project.caller(role).get(path))["client_id"] == own.id
    for caller in (finished.project.caller("viewer"), own):
        refused(caller.get(path), 403, "scope_missing")


def test_small_groups_are_not_compared(project: Project) -> None:
    campaign = play(project, clients=3, rounds=1)
    found = explained(campaign, campaign.clients[0])
    assert found["compared"] == 0, "of two others a mean says too much of each"
    assert {tensor["others_percent"] for tensor in found["tensors"]} == {None}


# --- what there is not -------------------------------------------------------------------------


def test_a_client_without_a_mask_has_no_explanation(finished: Campaign) -> None:
    bare = make_client(finished.project)
    refused(ask(finished, bare), 404, "not_found")
    empty = make_run(finished.project, finished.model, start=False)
    path = f"/v1/runs/{empty['id']}/clients/{finished.clients[0].id}/explanation"
    refused(finished.project.owner.get(path), 404, "not_found")


def test_arms_are_named(finished: Campaign) -> None:
    own = finished.clients[0]
    name = finished.run["settings"]["policy"]["name"]
    assert explained(finished, own, arm=name)["client_id"] == own.id
    refused(ask(finished, own, arm="elsewhere"), 422, "arm_unknown")
    refused(ask(finished, own, arm="a" * 65), 422, "request_invalid")


def test_an_erased_client_is_not_explained_and_not_compared(project: Project) -> None:
    campaign = play(project, clients=5, rounds=1)
    gone = campaign.clients[1]
    assert explained(campaign, campaign.clients[0])["compared"] == 4
    ok(project.owner.post(f"/v1/clients/{gone.id}/erase"))
    refused(ask(campaign, gone), 404, "not_found")
    assert explained(campaign, campaign.clients[0])["compared"] == 3


def test_masks_that_were_deleted(project: Project) -> None:
    campaign = play(project, clients=4, rounds=1)
    query = "SELECT object_key FROM masks WHERE project_id = :project AND client_id = :id"
    storage, kept = project.core.storage, {}
    for client in campaign.clients[:2]:
        ((key,),) = project.sql(query, id=client.id)
        kept[key] = storage.read(key)
        storage.delete([key])
    try:
        refused(ask(campaign, campaign.clients[0]), 410, "object_deleted")
        found = explained(campaign, campaign.clients[2])
    finally:  # other tests look whether everything is there
        for key, data in kept.items():
            storage.put(key, io.BytesIO(data), len(data))
    assert (found["compared"], found["reading"]["missing"]) == (0, 2)


def test_no_more_masks_are_read_than_the_limit(core: Any, api: TestClient) -> None:
    campaign = play(make_project(core, api), clients=5, rounds=1)
    size = Mask.initial(campaign.model.space).packed.size
    try:
        api.app.state.core = eager(core, report_mask_bytes=4 * size)
        found = explained(campaign, campaign.clients[0])
        assert (found["compared"], found["reading"]["left_out"]) == (3, 1)
        api.app.state.core = eager(core, report_mask_bytes=0)
        found = explained(campaign, campaign.clients[0])
        assert (found["compared"], found["reading"]["read"]) == (0, 1), "always its own"
    finally:
        api.app.state.core = core


def test_only_so_many_are_made_at_once(finished: Campaign, monkeypatch: Any) -> None:
    monkeypatch.setattr(runreports, "PATIENCE", 0.01)
    for _ in range(runreports.AT_ONCE):
        assert runreports._ROOM.acquire(blocking=False)
    try:
        refused(ask(finished, finished.clients[0]), 503, "report_busy")
    finally:
        for _ in range(runreports.AT_ONCE):
            runreports._ROOM.release()


def test_it_costs_as_many_statements_for_many_clients(project: Project, core: Any) -> None:
    found = []
    for clients in (2, 6):
        campaign = play(project, clients=clients, rounds=1)
        seen: list[str] = []

        def note(_c: Any, _u: Any, statement: str, *_: Any, seen: list[str] = seen) -> None:
            seen.append(statement)

        explained(campaign, campaign.clients[0])
        event.listen(core.db._engine, "before_cursor_execute", note)
        try:
            explained(campaign, campaign.clients[0])
        finally:
            event.remove(core.db._engine, "before_cursor_execute", note)
        found.append(len(seen))
    assert found[0] == found[1] <= 8, found
