"""Runs of deltas: what is published, what clients are offered, and what becomes of the files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from app import retention
from app.objects import check_objects
from fedselect import wire
from fedselect.aggregate import SHARD, Contribution, reference
from fedselect.deltafiles import patch, step
from fedselect.downloads import LONGEST_CHAIN
from fedselect.manifestdocs import Manifest
from fedselect.recompute import manifest_digest, recompute_files

from .campaign import eager
from .factories import (
    ask_store,
    deliver,
    drain,
    everything,
    make_clients,
    make_model,
    make_run,
    make_space,
    ok,
    train,
)
from .test_round_trip import opened

ALL = ["f32", "bf16", "int8"]


class DeltaRun:
    """A run of two clients that send deltas; remembers the masks and the files of each round."""

    def __init__(self, project, encoding, *, rows=20, rounds=3, **rules):
        self.project, self.encoding = project, encoding
        self.model = make_model(project, space=make_space(rows=rows))
        self.run = make_run(project, self.model, rounds=rounds, encoding=encoding, **rules)
        self.clients = make_clients(project, 2)
        self.sent = []

    def play(self, rounds=1):
        for _ in range(rounds):
            made = []
            for client in self.clients:
                work = client.assignment(encodings=ALL)
                made.append(train(work, self.model.space, seed=len(self.sent) * 2 + len(made)))
                deliver(client, work, made[-1].data)
            self.sent.append(made)
            drain(self.project)
        return self

    def versions(self):
        found = everything(self.project.owner, f"/v1/runs/{self.run['id']}/versions")
        return sorted(found, key=lambda v: v["number"])

    def rounds(self):
        found = everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")
        return {r["number"]: r for r in found}

    def detail(self, number):
        found = ok(self.project.owner.get(f"/v1/rounds/{self.rounds()[number]['id']}"))
        return found["assignments"]

    def file(self, number):
        (found,) = (v for v in self.versions() if v["number"] == number)
        path = f"/v1/versions/{found['id']}/download"
        return fetch(ok(self.project.owner.get(path)))

    def offered(self, *held, client=0):
        versions = self.versions()
        digests = [versions[number]["sha256"] for number in held]
        return self.clients[client].assignment(encodings=ALL, versions=digests)

    def values(self, number):
        space = self.model.space
        return wire.decode_version(self.file(number), space_digest=space.digest, dim=space.dim)


def fetch(download):
    answer = ask_store("GET", download["url"])
    assert answer.status_code == 200, answer.text
    assert len(answer.content) == download["size"]
    assert hashlib.sha256(answer.content).hexdigest() == download["sha256"]
    return answer.content


@pytest.fixture(params=["bf16", "int8"])
def encoding(request):
    return request.param


ROWS = (SHARD + 70_000) // 3  # two shards, the second with more than one block


def test_a_version_is_its_base_and_the_quantised_mean(project, encoding):
    run = DeltaRun(project, encoding, rows=ROWS).play()
    space, (first, second) = run.model.space, run.sent[0]
    parts = [Contribution(m.mask, wire.update_values(m.data, m.mask)) for m in (first, second)]
    mean = reference(np.zeros(space.dim, np.float32), parts, 2)
    result, delta = step(run.file(0), mean, space=space.digest, encoding=encoding)
    assert run.file(1) == result
    (_, version) = run.versions()
    assert version["encoding"] == encoding
    assert (version["delta_sha256"], version["delta_size"]) == (
        hashlib.sha256(delta).hexdigest(),
        len(delta),
    )
    both = ~(first.mask.to_bool() | second.mask.to_bool())
    np.testing.assert_array_equal(run.values(1)[~both], run.values(0)[~both])


def test_both_files_follow_from_the_manifest_and_are_in_the_ledger(project, encoding):
    run = DeltaRun(project, encoding).play()
    document = ok(project.owner.get(f"/v1/rounds/{run.rounds()[1]['id']}/manifest"))
    manifest = Manifest.model_validate(document["manifest"])
    assert (manifest.format, manifest.encoding) == ("fedselect-manifest/2", encoding)
    files = opened(document)
    version, delta = recompute_files(manifest, files.__getitem__)
    found = run.versions()[1]
    assert hashlib.sha256(version).hexdigest() == found["sha256"]
    assert hashlib.sha256(delta).hexdigest() == found["delta_sha256"]
    assert manifest_digest(manifest) == document["sha256"] == found["manifest_sha256"]
    ((body,),) = project.sql(
        "SELECT body FROM ledger_entries WHERE action = 'version.published' AND subject = :s",
        s=f"version:{found['id']}",
    )
    assert body["encoding"] == encoding
    assert (body["delta"], body["delta_size"]) == (found["delta_sha256"], found["delta_size"])


def test_a_run_of_values_has_the_manifest_it_always_had(project):
    run = DeltaRun(project, "f32").play()
    document = ok(project.owner.get(f"/v1/rounds/{run.rounds()[1]['id']}/manifest"))
    assert document["manifest"]["format"] == "fedselect-manifest/1"
    assert "encoding" not in document["manifest"]
    ((body,),) = project.sql("SELECT body FROM manifests WHERE sha256 = :d", d=document["sha256"])
    assert json.loads(body) == document["manifest"]
    version = run.versions()[1]
    assert (version["encoding"], version["delta_sha256"]) == ("f32", None)


def test_a_client_gets_from_any_version_that_it_holds_to_the_newest(project, encoding):
    run = DeltaRun(project, encoding, rows=4000, rounds=4).play(rounds=2)
    space = run.model.space
    work = run.offered(0)
    assert [d["result"] for d in work["deltas"]] == [v["sha256"] for v in run.versions()[1:]]
    data = run.file(0)
    for delta in work["deltas"]:
        assert delta["base"] == hashlib.sha256(data).hexdigest()
        data = patch(data, fetch(delta["download"]), space=space.digest, dim=space.dim)
    assert data == run.file(2)
    assert len(run.offered(0, 1)["deltas"]) == 1
    assert run.offered(0, 1, 2)["deltas"] == []
    assert run.offered()["deltas"] is None


def test_a_chain_is_offered_only_while_it_is_smaller(project):
    run = DeltaRun(project, "bf16", rows=1000, rounds=6).play(rounds=5)
    whole, *deltas = (v["delta_size"] or v["size"] for v in run.versions())
    smaller = [sum(deltas[held:]) < whole for held in range(5)]
    assert set(smaller) == {True, False}, (whole, deltas)
    assert [run.offered(held)["deltas"] is not None for held in range(5)] == smaller


def test_a_round_says_what_was_sent_and_what_was_to_be_fetched(project):
    run = DeltaRun(project, "int8", rows=1000, rounds=3).play()
    held = run.versions()[0]["sha256"]
    late = run.clients[1]
    for _ in range(2):  # what counts is the first answer: then it has the file
        work = run.offered(0)
    deliver(run.clients[0], work, train(work, run.model.space).data)
    assert late.assignment(encodings=ALL, versions=[held])["deltas"]
    drain(project)
    first, second = (run.detail(number) for number in (1, 2))
    whole, delta = run.versions()[0]["size"], run.versions()[1]["delta_size"]
    sizes = [len(made.data) for made in run.sent[0]]
    assert [(a["update_size"], a["download_size"]) for a in first] == [
        (size, whole) for size in sizes
    ]
    assert [a["download_size"] for a in second] == [delta, delta]
    assert second[1]["update_size"] is None


def test_small_models_come_whole(project):
    """The head of a delta file is longer than the values that it would save."""
    run = DeltaRun(project, "int8", rows=5).play()
    assert run.offered(0)["deltas"] is None


def test_a_run_of_deltas_is_only_for_those_who_can(project, encoding):
    run = DeltaRun(project, encoding)
    for offer in ({}, {"encodings": ["f32"]}):
        answer = run.clients[0].check_in(**offer)
        assert answer["assignment"] is None
        assert f"exchanges {encoding} files" in answer["unable"]
        assert run.run["name"] in answer["unable"]
    answer = run.clients[0].check_in(encodings=["f32", encoding])
    assert (answer["assignment"] is not None, answer["unable"]) == (True, None)


def test_store_and_rows_agree_on_delta_files(project, encoding):
    run = DeltaRun(project, encoding).play()
    ((key, size),) = project.sql(
        "SELECT delta_key, delta_size FROM versions WHERE project_id = :project AND number = 1 "
        "AND delta_key IS NOT NULL"
    )
    assert project.core.storage.size(key) == size
    assert not [found for found in check_objects(project.core).missing if found[0] == key]
    assert list(project.core.storage.keys(f"partials/{run.rounds()[1]['id']}/")) == []
    project.core.storage.delete([key])
    assert (key, "not in the store") in check_objects(project.core).missing


def test_a_delta_file_goes_with_its_version_and_nobody_is_led_through_it(project, clock):
    run = DeltaRun(project, "int8", rows=4000, rounds=6).play(rounds=3)
    clock.advance(40 * 86_400)
    core = eager(project.core, recompute_window=30, retain_versions=30)
    retention.collect(core)
    gone = project.sql(
        "SELECT v.number, a.deletion_id IS NOT NULL, b.deletion_id IS NOT NULL FROM versions v "
        "JOIN objects a ON a.key = v.object_key JOIN objects b ON b.key = v.delta_key "
        "WHERE v.project_id = :project ORDER BY v.number"
    )
    assert [(number, *marks) for number, *marks in gone] == [
        (1, True, True),
        (2, False, False),  # what the newest is recomputed from
        (3, False, False),
    ]
    clock.advance(-40 * 86_400)  # back to when the round still took clients
    assert run.offered(0)["deltas"] is None
    assert len(run.offered(1)["deltas"]) == 2


def test_a_gap_in_the_chain_means_the_whole_file(project):
    run = DeltaRun(project, "int8", rows=4000, rounds=6).play(rounds=3)
    assert len(run.offered(0)["deltas"]) == 3
    project.sql(
        "UPDATE objects SET deletion_id = gen_random_uuid(), deleted_at = now() WHERE key IN "
        "(SELECT delta_key FROM versions WHERE project_id = :project AND number = 2)"
    )
    assert run.offered(0)["deltas"] is None
    assert len(run.offered(2)["deltas"]) == 1
    assert LONGEST_CHAIN > 3
