"""Lineage, differences, cards and spaces of real versions in a real store."""

from __future__ import annotations

from uuid import uuid4

import numpy as np
import pytest

from app import differences
from fedselect import wire
from fedselect.space import ParameterSpace

from .campaign import Campaign
from .factories import (
    REPORT,
    deliver,
    drain,
    evaluate,
    everything,
    make_clients,
    make_model,
    make_run,
    make_space,
    ok,
    pass_time,
    refused,
    train,
)
from .test_deltas import fetch


class Played(Campaign):
    """Three rounds; the run is over and evaluated."""

    def __init__(self, project, min_clients=2):
        super().__init__(project, rounds=3, published=3, report={"min_clients": min_clients})
        for client in self.clients:
            evaluate(client)

    def get(self, number, what="", **params):
        (found,) = (v for v in self.versions() if v["number"] == number)
        return self.project.owner.get(f"/v1/versions/{found['id']}{what}", **params)

    def values(self, number):
        data = fetch(ok(self.get(number, "/download")))
        space = self.model.space
        return wire.decode_version(data, space_digest=space.digest, dim=space.dim)


@pytest.fixture
def played(project):
    return Played(project)


def initial_of(played):
    model = ok(played.project.owner.get(f"/v1/models/{played.model.id}"))
    return model["initial_version"]["id"]


# --- lineage -----------------------------------------------------------------------------------


def test_a_line_leads_back_to_the_registered_weights(played):
    versions = {v["number"]: v for v in played.versions()}
    found = ok(played.get(3, "/lineage"))
    assert found["format"] == "fedselect-lineage/1"
    ids = [step["id"] for step in found["steps"]]
    assert ids == [*(versions[n]["id"] for n in (3, 2, 1, 0)), initial_of(played)]
    assert (found["next_id"], found["children"]) == (None, [])
    rounds = {r["number"]: r for r in played.rounds()}
    for step in found["steps"][:3]:
        assert step["round_id"] == rounds[step["number"]]["id"]
        assert step["manifest_sha256"] == versions[step["number"]]["manifest_sha256"]
        assert (step["updates"], step["attempt"]) == (2, 1)
        assert step["run_name"] == played.run["name"]
    start, registered = found["steps"][3:]
    assert (start["run_id"], start["round_id"], start["updates"]) == (played.run["id"], None, None)
    assert (registered["run_id"], registered["parent_id"]) == (None, None)


def test_a_line_goes_on_where_a_page_ends(played):
    whole = ok(played.get(3, "/lineage"))["steps"]
    part = ok(played.get(3, "/lineage", limit=2))
    assert part["steps"] == whole[:2]
    rest = ok(played.project.owner.get(f"/v1/versions/{part['next_id']}/lineage"))
    assert rest["steps"] == whole[2:]


def test_children(played):
    second = make_run(played.project, played.model, start=False)
    path = f"/v1/runs/{second['id']}/versions"
    ((other,),) = [ok(played.project.owner.get(path))["items"]]
    found = ok(played.project.owner.get(f"/v1/versions/{initial_of(played)}/lineage"))
    (first,) = (v["id"] for v in played.versions() if v["number"] == 0)
    assert found["children"] == [first, other["id"]]


# --- differences -------------------------------------------------------------------------------


def test_differences_are_those_of_the_files(played):
    space = played.model.space
    for base, number in ((1, 2), (0, 3), (3, 1)):
        (other,) = (v["id"] for v in played.versions() if v["number"] == base)
        found = ok(played.get(number, "/diff", base=other))
        step = played.values(number).astype(float) - played.values(base)
        assert found["total"]["l2"] == pytest.approx(np.linalg.norm(step))
        assert found["total"]["elements"] == space.dim
        assert found["omitted"] == 0
        for row in found["tensors"]:
            slot = space.by_name[row["name"]]
            own = step[slot.offset : slot.stop]
            assert row["l2"] == pytest.approx(np.linalg.norm(own))
            assert row["largest"] == pytest.approx(np.abs(own).max())
            assert (row["kind"], row["role"]) == (slot.kind.value, slot.role.value)
    assert ok(played.get(2, "/diff"))["base_id"] == ok(played.get(2))["parent_id"]
    short = ok(played.get(2, "/diff", limit=1))
    assert (len(short["tensors"]), short["omitted"]) == (1, len(space.slots) - 1)
    personal = space.by_name["norm.running_mean"]
    rows = {row["name"]: row for row in ok(played.get(3, "/diff"))["tensors"]}
    assert rows[personal.name]["changed"] == 0


def test_ranges_are_put_together(played, monkeypatch):
    whole = ok(played.get(3, "/diff"))
    monkeypatch.setattr(differences, "PIECE", 7)
    again = ok(played.get(3, "/diff"))
    assert again["total"]["l2"] == pytest.approx(whole["total"]["l2"])
    assert [row["name"] for row in again["tensors"]] == [row["name"] for row in whole["tensors"]]


def test_refused_differences(played, other, monkeypatch):
    owner = played.project.owner
    first = f"/v1/versions/{initial_of(played)}/diff"
    refused(owner.get(first), 409, "version_without_parent")
    refused(played.get(1, "/diff", base=str(uuid4())), 404, "not_found")
    foreign = Campaign(other, rounds=1, published=1).versions()[0]["id"]
    refused(played.get(1, "/diff", base=foreign), 404, "not_found")
    odd = make_model(played.project, space=make_space(rows=3))
    model = ok(owner.get(f"/v1/models/{odd.id}"))
    base = model["initial_version"]["id"]
    refused(played.get(1, "/diff", base=base), 409, "versions_incomparable")
    with monkeypatch.context() as patch:
        patch.setattr(differences, "MOST_ELEMENTS", 5)
        refused(played.get(1, "/diff"), 413, "difference_too_large")
    with differences._place(), differences._place():
        refused(played.get(1, "/diff"), 503, "difference_busy")
    ok(played.get(1, "/diff"))
    played.project.sql(
        "UPDATE objects SET deletion_id = gen_random_uuid(), deleted_at = now() WHERE key IN "
        "(SELECT object_key FROM versions WHERE project_id = :project AND number = 2)"
    )
    refused(played.get(3, "/diff"), 410, "version_deleted")


# --- cards -------------------------------------------------------------------------------------


def test_a_card_says_what_the_rows_say(played):
    found = ok(played.get(3, "/card"))
    version = ok(played.get(3))
    space = played.model.space
    assert (found["format"], found["version"]) == ("fedselect-card/1", version)
    counts = found["parameters"]
    assert counts["elements"] == space.dim
    assert sum(counts[n] for n in ("selectable", "shared", "personal", "frozen")) == space.dim
    origin = found["origin"]
    assert (origin["run_id"], origin["round_number"]) == (played.run["id"], 3)
    assert (origin["updates"], origin["examples"]) == (2, None), "two clients have 14 together"
    assert origin["settings"] == played.run["settings"]
    evaluation = found["evaluation"]
    assert (evaluation["clients"], evaluation["examples"]) == (2, 20)
    post = REPORT["scores"]["post"]
    accuracy = post["correct"] / post["total"]
    assert evaluation["scores"]["post"] == {"pooled": accuracy, "mean": accuracy, "worst": accuracy}
    text = found["markdown"]
    for part in (
        version["sha256"],
        version["manifest_sha256"],
        played.run["name"],
        "90.0",
        "## Limits",
    ):
        assert part in text
    assert all(f"- {limit}" in text for limit in found["limitations"])
    assert not [c.name for c in played.clients if c.name in str(found)], "clients are not named"


def test_a_card_for_people(played):
    (version,) = (v["id"] for v in played.versions() if v["number"] == 3)
    path = f"/v1/versions/{version}/card"
    expected = ok(played.project.owner.get(path))["markdown"]
    asked = played.project.owner.get(path, format="markdown")
    preferred = played.project.owner.request("GET", path, Accept="text/markdown")
    for answer in (asked, preferred):
        assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
        assert answer.text == expected


def test_cards_of_beginnings(played):
    registered = ok(played.project.owner.get(f"/v1/versions/{initial_of(played)}/card"))
    assert (registered["origin"], registered["evaluation"]) == (None, None)
    assert "with which the model was registered" in registered["markdown"]
    start = ok(played.get(0, "/card"))
    assert (start["origin"]["round_number"], start["origin"]["updates"]) == (None, None)
    middle = ok(played.get(2, "/card"))
    assert "Too few clients have reported how good it is, or none." in middle["limitations"]


def test_a_card_tells_nothing_of_few(project):
    few = Played(project, min_clients=3)
    found = ok(few.get(3, "/card"))
    assert found["evaluation"] is None
    assert "Too few clients have reported how good it is, or none." in found["limitations"]


def test_a_card_of_no_run_tells_nothing_of_few_either(played):
    to = {"initial": initial_of(played)}
    played.project.sql(
        "UPDATE evaluations SET version_id = :initial WHERE project_id = :project", **to
    )
    found = ok(played.project.owner.get(f"/v1/versions/{to['initial']}/card"))
    assert (found["origin"], found["evaluation"]) == (None, None), (
        "two clients, and three are asked"
    )


def test_cards_of_two_versions_do_not_tell_how_many_examples_one_client_has(project, clock):
    model = make_model(project)
    run = make_run(project, model, rounds=2, goal=9, quorum=8, report={"min_clients": 3})
    clients = make_clients(project, 9)
    for there in (clients, clients[:8]):
        for number, client in enumerate(there):
            assignment = client.assignment()
            deliver(client, assignment, train(assignment, model.space, examples=90 + number).data)
        drain(project)
    for _ in range(2):  # selection ends, then the round
        clock.advance(3601)
        pass_time(project)
    found = everything(project.owner, f"/v1/runs/{run['id']}/versions")
    cards = {v["number"]: ok(project.owner.get(f"/v1/versions/{v['id']}/card")) for v in found}
    origins = [cards[number]["origin"] for number in (1, 2)]
    assert [each["updates"] for each in origins] == [9, 8]
    assert [each["examples"] for each in origins] == [500, 500], "of 846, and of 748"
    assert "9 updates, at least 500 examples" in cards[1]["markdown"]


def test_a_card_admits_what_was_deleted(played):
    played.project.sql("UPDATE versions SET recomputable = false WHERE project_id = :project")
    assert any("cannot be recomputed" in t for t in ok(played.get(3, "/card"))["limitations"])


# --- taking them along -------------------------------------------------------------------------


def test_a_space_comes_back_as_it_was_registered(played):
    found = ok(played.project.owner.get(f"/v1/models/{played.model.id}/space"))
    assert ParameterSpace.from_json(found).digest == found["digest"] == played.model.space.digest
    assert found["elements"] == played.model.space.dim
