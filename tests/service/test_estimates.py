"""Estimates over HTTP, and runs beside what was estimated."""

from __future__ import annotations

import pytest

from fedselect.estimate import estimate
from fedselect.estimatedocs import EstimateCreate

from .factories import (
    REPORT,
    deliver,
    drain,
    everything,
    make_clients,
    make_model,
    make_run,
    make_space,
    ok,
    refused,
    settings,
    train,
)

ALL = ["f32", "bf16", "int8"]
FEDAVG = {"personal": "none"}
ROUNDS, CLIENTS = 3, 3


def question(**changes):
    return {"clients": 10, "settings": settings(rounds=4), **changes}


def test_the_three_ways_to_name_a_model(project):
    model = make_model(project)
    asked = question(space=model.space.to_json())
    expected = estimate(EstimateCreate.model_validate(asked), model.space)
    by_space = ok(project.owner.post("/v1/estimates", asked), 200)
    assert by_space == expected.model_dump(mode="json")
    assert ok(project.owner.post("/v1/estimates", question(model_id=model.id))) == by_space
    found = ok(project.owner.post("/v1/estimates", question(elements=10**6)))
    assert (found["format"], found["elements"]) == ("fedselect-estimate/1", 10**6)


def test_nothing_is_created(project):
    def rows():
        tables = ("ledger_entries", "runs", "idempotent_answers", "models")
        return [project.sql(f"SELECT count(*) FROM {name}")[0][0] for name in tables]

    before = rows()
    for _ in range(2):
        ok(project.owner.post("/v1/estimates", question(elements=5), once="k"), 200)
    assert rows() == before


def test_refusals(project, other):
    model = make_model(other)
    for body, status, code in (
        (question(), 422, "request_invalid"),
        (question(elements=5, space={}), 422, "request_invalid"),
        (question(elements=5, links=["10mbits"]), 422, "link_unknown"),
        (question(elements=5, store_link="x"), 422, "link_unknown"),
        (question(elements=5, clients=1), 422, "settings_invalid"),
        (question(space={"tensors": []}), 422, "space_invalid"),
        (question(space={"tensors": 7}), 422, "space_invalid"),
        (question(model_id=model.id), 404, "not_found"),
        (question(elements=5, colour=1), 422, "setting_unknown"),
    ):
        refused(project.owner.post("/v1/estimates", body), status, code)
    run = make_run(project, make_model(project), start=False)
    path = f"/v1/runs/{run['id']}/estimate"
    refused(project.owner.get(path, link="nowhere"), 422, "link_unknown")
    refused(project.owner.get(path, step_seconds=-1), 422, "request_invalid")
    refused(project.owner.get(path, speed=1), 422, "setting_unknown")
    refused(other.owner.get(path), 404, "not_found")


def test_a_space_may_be_longer_than_other_bodies(project):
    rows = [
        {"name": f"layer{n}.weight", "shape": [3, n], "kind": "weight", "role": "selectable"}
        for n in range(1, 1500)
    ]
    found = ok(project.owner.post("/v1/estimates", question(space={"tensors": rows})))
    assert found["elements"] == 3 * 1499 * 1500 // 2


class Played:
    """A run of FedAvg in which every client sends normal deltas and counts what it receives."""

    def __init__(self, project, encoding):
        self.project = project
        self.model = make_model(project, space=make_space(rows=25_000))
        self.run = make_run(
            project, self.model, rounds=ROUNDS, goal=CLIENTS, policy=FEDAVG, encoding=encoding
        )
        self.clients = make_clients(project, CLIENTS)
        self.sent, self.received = [0] * CLIENTS, [0] * CLIENTS

    def beside(self, **params):
        return ok(self.project.owner.get(f"/v1/runs/{self.run['id']}/estimate", **params))

    def work(self, number, held):
        found = self.clients[number].assignment(encodings=ALL, versions=held)
        deltas = found["deltas"]
        sizes = [d["download"]["size"] for d in deltas or []]
        self.received[number] += found["base"]["size"] if deltas is None else sum(sizes)
        return found

    def play(self):
        for number in range(ROUNDS):
            for place, client in enumerate(self.clients):
                work = self.work(place, self.digests()[:number])
                first = number == 0
                data = train(work, self.model.space, seed=9 * number + place, send_mask=first).data
                self.sent[place] += len(data)
                deliver(client, work, data)
            drain(self.project)

    def digests(self):
        path = f"/v1/runs/{self.run['id']}/versions"
        found = everything(self.project.owner, path)
        return [v["sha256"] for v in sorted(found, key=lambda v: v["number"])]

    def evaluate(self, place):
        work = self.work(place, self.digests()[:ROUNDS])
        counted = {"bytes_sent": self.sent[place], "bytes_received": self.received[place]}
        control = {"control_sent": 30_000, "control_received": 60_000}
        path = f"/v1/assignments/{work['id']}/evaluations"
        ok(self.clients[place].post(path, {**REPORT, **counted, **control}), 201)


@pytest.fixture(params=ALL)
def played(request, project):
    return Played(project, request.param)


def test_bytes_are_within_five_percent_of_what_was_sent(played):
    fresh = played.beside()
    assert (fresh["actual"]["rounds"], fresh["actual"]["up"]) == (0, 0)
    assert set(fresh["errors"].values()) == {None}
    played.play()
    half = played.beside(link="lan")
    assert half["actual"]["up"] == sum(played.sent)
    assert half["actual"]["down"] == sum(played.received)
    assert half["actual"]["round_seconds"] > 0
    for place in range(CLIENTS):
        played.evaluate(place)
    full = played.beside()
    assert (full["actual"]["clients"], full["actual"]["reports"]) == (CLIENTS, CLIENTS)
    assert full["actual"]["down"] == sum(played.received)
    assert full["actual"]["control_up"] == 30_000 * CLIENTS
    for found in (half, full):
        for name in ("up", "down", "payload"):
            assert abs(found["errors"][name]) < 0.05, (name, found["errors"])
    total = full["actual"]["up"] + full["actual"]["down"]
    said = full["estimate"]["run"]
    expected = (said["up"] + said["down"] - total) / total
    assert full["errors"]["payload"] == pytest.approx(expected)


def test_what_was_measured_is_taken(project):
    run = make_run(project, make_model(project), encoding="int8", start=False)
    path = f"/v1/runs/{run['id']}/estimate"
    plain = ok(project.owner.get(path))["estimate"]
    told = ok(project.owner.get(path, value_bytes_up=0.01, step_seconds=3))["estimate"]
    assert told["run"]["up"] < plain["run"]["up"]
    assert (told["compute"]["basis"], plain["compute"]["basis"]) == ("measured", "flops")
