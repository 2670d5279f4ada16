"""Asking clients what their personal parts are worth, and what they answer."""

from __future__ import annotations

from typing import Any

import pytest

from .factories import (
    Client,
    Json,
    Project,
    announce,
    contribute,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    ok,
    pass_time,
    refused,
)

KINDS = ["train", "evaluate", "ablate"]


def score(correct: int, both: int, total: int = 100) -> Json:
    return {"correct": correct, "total": total, "loss": 0.5, "both": both}


REPORT: Json = {
    "whole": score(90, 90),
    "without": score(70, 68),
    "tensors": [
        {"name": "layer.weight", "score": score(80, 78), "threshold": 0.01},
        {"name": "norm.weight", "score": score(89, 88)},
    ],
}


class Place:
    """A run with one published version, whose clients have a mask."""

    def __init__(self, project: Project, *, clients: int = 2, **rules: Any) -> None:
        self.project, self.model = project, make_model(project)
        self.run = make_run(project, self.model, rounds=2, goal=clients, **rules)
        self.clients = make_clients(project, clients)
        for number, client in enumerate(self.clients):
            contribute(client, self.model, seed=number)
        drain(project)
        versions = everything(project.owner, f"/v1/runs/{self.run['id']}/versions")
        self.first, self.version = versions[0]["id"], versions[1]["id"]

    def ask(self, version: str | None = None, **body: Any) -> Any:
        path = f"/v1/versions/{version or self.version}/ablations"
        return self.project.owner.post(path, body)

    def listed(self) -> list[Json]:
        return everything(self.project.owner, f"/v1/versions/{self.version}/ablations")


@pytest.fixture
def place(project: Project) -> Place:
    found = Place(project)
    ok(project.owner.post(f"/v1/runs/{found.run['id']}/pause"))
    ok(project.owner.post(f"/v1/runs/{found.run['id']}/stop"))
    return found


def work(client: Client) -> Json | None:
    found = client.check_in(kinds=KINDS)["assignment"]
    return found if found is None else dict(found)


def report(client: Client, assignment: Json, **changes: Any) -> Any:
    return client.post(f"/v1/assignments/{assignment['id']}/ablation", {**REPORT, **changes})


def test_a_client_is_asked_and_answers_once(place: Place) -> None:
    said = ok(place.ask(), 201)
    assert (said["asked"], said["waiting"], said["run_id"]) == (2, 0, place.run["id"])
    one = place.clients[0]
    given = work(one)
    assert (given["kind"], given["round"], given["base"]["id"]) == ("ablate", None, place.version)
    info = ok(report(one, given), 201)
    assert (info["state"], info["client_name"], info["version_number"]) == ("accepted", one.name, 1)
    assert ok(report(one, given, tensors=[]), 201) == info, "repeating it changes nothing"
    assert work(one) is None
    states = {each["client_name"]: each["state"] for each in place.listed()}
    assert states == {one.name: "accepted", place.clients[1].name: "assigned"}
    ((kept,),) = place.project.sql("SELECT report FROM ablations WHERE project_id = :project")
    assert kept["tensors"][0]["score"]["correct"] == 80


def test_an_agent_that_does_not_say_that_it_can_gets_none_of_it(place: Place) -> None:
    ok(place.ask(), 201)
    assert place.clients[0].check_in()["assignment"] is None
    assert place.clients[0].check_in(kinds=["train", "evaluate"])["assignment"] is None
    assert work(place.clients[0])["kind"] == "ablate"


def test_who_still_has_it_is_not_asked_twice_and_who_has_answered_is(place: Place) -> None:
    one, other = place.clients
    ok(place.ask(clients=[one.name]), 201)
    again = ok(place.ask(), 201)
    assert (again["asked"], again["waiting"]) == (1, 1)
    ok(report(one, work(one)), 201)
    assert ok(place.ask(), 201)["asked"] == 1
    found = [(each["client_name"], each["attempt"], each["state"]) for each in place.listed()]
    assert sorted(found) == sorted(
        [(one.name, 1, "accepted"), (one.name, 2, "assigned"), (other.name, 1, "assigned")]
    )


def test_training_under_way_comes_first(project: Project) -> None:
    """An agent that has an update to deliver is never sent elsewhere."""
    found = Place(project)
    ok(found.ask(), 201)
    one = found.clients[0]
    assert work(one)["kind"] == "ablate", "before a new round"
    train = one.assignment()
    assert train["kind"] == "train"
    assert work(one)["id"] == train["id"]


def test_only_who_has_a_mask_can_be_asked(place: Place) -> None:
    bare = make_client(place.project)
    said = refused(place.ask(clients=[bare.name]), 409, "ablation_unfit")
    assert bare.name in said["detail"]
    refused(place.ask(clients=["nobody"]), 404, "not_found")
    refused(place.ask(place.first), 409, "ablation_unfit")
    initial = place.project.sql(
        "SELECT id FROM versions WHERE project_id = :project AND arm_id IS NULL"
    )
    refused(place.ask(str(initial[0][0])), 409, "ablation_unfit")
    ok(place.project.owner.post(f"/v1/clients/{place.clients[0].id}/suspend"))
    refused(place.ask(clients=[place.clients[0].name]), 404, "not_found")
    assert ok(place.ask(), 201)["asked"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {"clients": []},
        {"clients": ["a b"]},
        {"deadline": 59},
        {"deadline": 1e9},
        {"deadline": "60"},
        {"tensors": 5},
    ],
)
def test_odd_questions_are_refused(place: Place, body: Json) -> None:
    assert place.ask(**body).status_code == 422


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tensors": [{"name": "elsewhere.weight"}]}, "tensor_unknown"),
        ({"tensors": [{"name": "layer.weight"}] * 2}, "request_invalid"),
        ({"without": score(70, 69, total=99)}, "request_invalid"),
        ({"without": score(70, 71)}, "request_invalid"),
        ({"tensors": [{"name": "layer.weight", "threshold": -1}]}, "request_invalid"),
        ({"tensors": [{"name": "layer.weight", "mask": "AA"}]}, "setting_unknown"),
        ({"whole": {"correct": 1}}, "request_invalid"),
    ],
)
def test_odd_answers_are_refused(place: Place, changes: Json, code: str) -> None:
    ok(place.ask(), 201)
    given = work(place.clients[0])
    refused(report(place.clients[0], given, **changes), 422, code)
    assert work(place.clients[0])["id"] == given["id"], "and may be made good"


def test_scores_of_few_examples_are_not_even_kept(place: Place) -> None:
    ok(place.ask(), 201)
    few = {"whole": score(9, 9, 9), "without": score(5, 5, 9), "tensors": []}
    few["tensors"] = [{"name": "layer.weight", "score": score(4, 4, 9), "threshold": 0.5}]
    ok(report(place.clients[0], work(place.clients[0]), **few), 201)
    ((kept,),) = place.project.sql("SELECT report FROM ablations WHERE project_id = :project")
    assert kept["whole"] is kept["without"] is kept["tensors"][0]["score"] is None
    assert kept["tensors"][0]["threshold"] == 0.5


def test_kinds_are_not_mixed_up(place: Place) -> None:
    ok(place.ask(), 201)
    one = place.clients[0]
    given = work(one)
    path = f"/v1/assignments/{given['id']}"
    refused(one.post(f"{path}/uploads", announce(b"x")), 409, "assignment_kind")
    scores = {"scores": {}, "participations": 0, "personal_share": 0}
    scores |= {"bytes_sent": 0, "bytes_received": 0}
    refused(one.post(f"{path}/evaluations", scores), 409, "assignment_kind")
    refused(report(place.clients[1], given), 404, "not_found")


def test_training_is_not_answered_with_an_ablation(project: Project) -> None:
    make_run(project)
    client = make_client(project)
    refused(report(client, client.assignment()), 409, "assignment_kind")


def test_it_may_be_declined(place: Place) -> None:
    ok(place.ask(), 201)
    one = place.clients[0]
    given = work(one)
    said = ok(one.post(f"/v1/assignments/{given['id']}/decline", {"reason": "no data today"}))
    assert (said["state"], said["round_state"]) == ("declined", None)
    refused(report(one, given), 409, "assignment_declined")
    assert work(one) is None
    (info,) = [each for each in place.listed() if each["client_name"] == one.name]
    assert info["reason"] == "no data today"


def test_the_deadline_ends_it(project: Project, clock: Any) -> None:
    place = Place(project)
    ok(project.owner.post(f"/v1/runs/{place.run['id']}/stop"))
    ok(place.ask(deadline=60), 201)
    one = place.clients[0]
    given = work(one)
    clock.advance(59)
    pass_time(project)
    assert work(one)["id"] == given["id"]
    clock.advance(2)
    assert work(one) is None
    pass_time(project)
    assert {each["state"] for each in place.listed()} == {"expired"}
    refused(report(one, given), 409, "assignment_expired")
    history = project.sql(
        "SELECT reason FROM transitions WHERE subject_id = :id AND to_state = 'expired'",
        id=given["id"],
    )
    assert history == [("no ablation before the deadline",)]
    assert ok(place.ask(), 201)["asked"] == 2


def test_it_does_not_touch_an_evaluation_under_way(project: Project) -> None:
    place = Place(project)
    for number, client in enumerate(place.clients):
        contribute(client, place.model, seed=number)
    drain(project)
    ok(place.ask(), 201)
    one = place.clients[0]
    assert work(one)["kind"] == "evaluate", "given before it was asked"
    run = f"/v1/runs/{place.run['id']}"
    assert ok(project.owner.get(run))["state"] == "evaluating"
    ok(one.post(f"/v1/assignments/{work(one)['id']}/decline", {}))
    ok(report(one, work(one)), 201)
    assert ok(project.owner.get(run))["state"] == "evaluating", "the other has not answered"


def test_another_tenant_can_neither_ask_nor_look(place: Place, other: Project) -> None:
    path = f"/v1/versions/{place.version}/ablations"
    refused(other.owner.post(path, {}), 404, "not_found")
    refused(other.owner.get(path), 404, "not_found")
    stranger = make_client(other)
    ok(place.ask(), 201)
    given = work(place.clients[0])
    refused(report(stranger, given), 404, "not_found")
    assert work(stranger) is None


def test_an_erased_client_leaves_no_answer(place: Place) -> None:
    ok(place.ask(), 201)
    one, other = place.clients
    ok(report(one, work(one)), 201)
    ok(place.project.owner.post(f"/v1/clients/{one.id}/erase"))
    ok(place.project.owner.post(f"/v1/clients/{other.id}/erase"))
    assert place.project.sql("SELECT 1 FROM ablations WHERE project_id = :project") == []
    assert {each["state"] for each in place.listed()} == {"accepted", "expired"}


def test_a_version_whose_file_is_gone_is_not_asked_of(place: Place) -> None:
    query = (
        "UPDATE objects SET deletion_id = gen_random_uuid() FROM versions"
        " WHERE versions.id = :id AND objects.key = versions.object_key"
    )
    place.project.sql(query, id=place.version)
    try:
        refused(place.ask(), 410, "version_deleted")
    finally:  # other tests look whether everything is there
        place.project.sql(query.replace("gen_random_uuid()", "NULL"), id=place.version)


def test_asking_twice_with_one_key_asks_once(place: Place) -> None:
    path = f"/v1/versions/{place.version}/ablations"
    first = ok(place.project.owner.post(path, {}, once="k"), 201)
    assert ok(place.project.owner.post(path, {}, once="k"), 201) == first
    assert len(place.listed()) == 2
