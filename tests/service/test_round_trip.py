"""A whole run through every part: what is published follows from the manifests alone."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import select

from app import rounds
from app.localprocess import until
from app.tables import Round
from fedselect import Mask, ParameterSpace, wire
from fedselect.aggregate import SHARD, Contribution, reference
from fedselect.audit import canonical_json
from fedselect.manifestdocs import ManifestDocument
from fedselect.space import FloatVector, Kind, Role

from .factories import (
    REPORT,
    Caller,
    Client,
    Json,
    Model,
    Project,
    ask_store,
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


def stored(download: Json) -> bytes:
    """A file as anyone gets it who has the signed address."""
    answer = ask_store("GET", download["url"])
    assert answer.status_code == 200, answer.text
    assert len(answer.content) == download["size"]
    return answer.content


def fetch(download: Json) -> bytes:
    data = stored(download)
    assert hashlib.sha256(data).hexdigest() == download["sha256"]
    return data


def opened(document: Json) -> dict[str, bytes]:
    """All files of a manifest document, those that are encrypted with the keys that it brings."""
    read = ManifestDocument.model_validate(document).downloads
    found = {name: read[name].opened(stored(d)) for name, d in document["downloads"].items()}
    for name, data in found.items():
        assert hashlib.sha256(data).hexdigest() == read[name].sha256
    return found


def recomputed(document: Json, space: ParameterSpace) -> bytes:
    """The version file that follows from a manifest document, by nothing but the reference."""
    manifest, files = document["manifest"], opened(document)
    parts = []
    for update in manifest["updates"]:
        mask = Mask.from_bytes(space.dim, files[update["mask_object"]])
        assert mask.digest == update["mask_sha256"]
        data = files[update["object"]]
        assert hashlib.sha256(data).hexdigest() == update["sha256"]
        values = wire.read_update_layout(data[: wire.header_size(data)]).sections["values"]
        vector = np.frombuffer(data[values.start : values.stop], dtype="<f4")
        parts.append(Contribution(mask, vector, update["weight"]))
    base = files[manifest["base_object"]]
    assert hashlib.sha256(base).hexdigest() == manifest["base_sha256"]
    start = wire.decode_version(base, space_digest=space.digest, dim=space.dim)
    return wire.encode_version(space.digest, reference(start, parts, manifest["min_contributors"]))


def version_file(caller: Caller, version_id: str) -> bytes:
    return fetch(ok(caller.get(f"/v1/versions/{version_id}/download")))


@dataclass
class Campaign:
    """A run and those who take part in it; remembers what every client has sent."""

    project: Project
    model: Model
    run: Json
    clients: list[Client]
    sent: list[dict[str, Any]] = field(default_factory=list)

    def play(self, *, send_mask: Any = lambda _: True, examples: Any = lambda _: 7) -> None:
        """One round in which every client delivers; the masks of a client never change."""
        for number, client in enumerate(self.clients):
            assignment = client.assignment()
            made = train(
                assignment,
                self.model.space,
                seed=number,
                send_mask=send_mask(number),
                examples=examples(number),
            )
            deliver(client, assignment, made.data)
            self.sent.append({"assignment": assignment, "made": made})
        drain(self.project)

    @property
    def owner(self) -> Caller:
        return self.project.owner

    def versions(self) -> list[Json]:
        return everything(self.owner, f"/v1/runs/{self.run['id']}/versions")

    def rounds(self) -> list[Json]:
        return everything(self.owner, f"/v1/runs/{self.run['id']}/rounds", limit=2)

    def manifest(self, number: int) -> Json:
        found = [r for r in self.rounds() if r["number"] == number]
        return dict(ok(self.owner.get(f"/v1/rounds/{found[-1]['id']}/manifest")))


def start(
    project: Project, *, clients: int = 3, model: Model | None = None, **rules: Any
) -> Campaign:
    model = model or make_model(project)
    run = make_run(project, model, goal=clients, **rules)
    return Campaign(project, model, run, make_clients(project, clients))


@pytest.fixture(scope="module")
def finished(core: Any, api: Any) -> Campaign:
    """Three rounds of three clients, evaluated; the second round leaves the masks out."""
    campaign = start(make_project(core, api), rounds=3)
    campaign.play()
    campaign.play(send_mask=lambda _: False)
    campaign.play(send_mask=lambda number: number == 0)
    for client in campaign.clients:
        evaluate(client)
    return campaign


def test_every_published_version_follows_from_its_manifest_alone(finished: Campaign) -> None:
    for version in finished.versions()[1:]:
        document = finished.manifest(version["number"])
        expected = recomputed(document, finished.model.space)
        assert version_file(finished.owner, version["id"]) == expected
        assert version["sha256"] == hashlib.sha256(expected).hexdigest()
        assert version["size"] == len(expected)


def test_a_manifests_digest_is_that_of_its_canonical_json(finished: Campaign) -> None:
    rounds = {r["number"]: r for r in finished.rounds()}
    for version in finished.versions()[1:]:
        document = finished.manifest(version["number"])
        digest = hashlib.sha256(canonical_json(document["manifest"])).hexdigest()
        shown = rounds[version["number"]]["manifest_sha256"]
        assert digest == document["sha256"] == version["manifest_sha256"] == shown


def test_versions_are_gapless_and_each_names_its_parent(finished: Campaign) -> None:
    versions = finished.versions()
    assert [v["number"] for v in versions] == [0, 1, 2, 3]
    for parent, child in pairwise(versions):
        assert child["parent_id"] == parent["id"]
    initial = ok(finished.owner.get(f"/v1/models/{finished.model.id}"))["initial_version"]
    assert versions[0]["parent_id"] == initial["id"]
    assert versions[0]["sha256"] == initial["sha256"]
    assert [r["version_id"] for r in finished.rounds()] == [v["id"] for v in versions[1:]]


def test_what_was_aggregated_is_what_the_clients_sent(finished: Campaign) -> None:
    sent = [s for s in finished.sent if s["assignment"]["round"] == 1]
    base: FloatVector = finished.model.weights
    parts = [Contribution(s["made"].mask, s["made"].theta[~s["made"].mask.to_bool()]) for s in sent]
    expected = wire.encode_version(finished.model.space.digest, reference(base, parts, 2))
    assert version_file(finished.owner, finished.versions()[1]["id"]) == expected


def test_a_mask_that_is_left_out_is_the_last_one_sent(finished: Campaign) -> None:
    first, second, third = (finished.manifest(n)["manifest"]["updates"] for n in (1, 2, 3))
    assert [u["mask_sha256"] for u in first] == [u["mask_sha256"] for u in second]
    assert [u["mask_object"] for u in second] == [u["mask_object"] for u in third]
    known = [s["assignment"]["mask"] for s in finished.sent]
    assert known[:3] == [None] * 3
    assert [m["version"] for m in known[3:]] == [1, 1, 1, 1, 1, 1]
    assert known[3]["sha256"] == finished.sent[0]["made"].mask.digest


def test_files_are_smaller_by_the_personal_part_and_the_mask(finished: Campaign) -> None:
    with_mask, without = (len(finished.sent[i]["made"].data) for i in (0, 3))
    dim = finished.model.space.dim
    assert with_mask - without > -(-dim // 8)
    assert without < 1024 + 4 * dim


def test_personal_values_never_reach_the_coordinator(finished: Campaign) -> None:
    """The model's running statistics keep the initial value in every version."""
    personal = Mask.initial(finished.model.space).to_bool()
    for version in finished.versions():
        data = version_file(finished.owner, version["id"])
        space = finished.model.space
        values = wire.decode_version(data, space_digest=space.digest, dim=space.dim)
        assert np.array_equal(values[personal], finished.model.weights[personal])


def test_the_run_finishes_with_an_evaluation_of_every_client(finished: Campaign) -> None:
    run = ok(finished.owner.get(f"/v1/runs/{finished.run['id']}"))
    assert (run["state"], run["published"]) == ("finished", 3)
    found = ok(finished.owner.get(f"/v1/runs/{run['id']}/evaluations"))["items"]
    assert [e["client_name"] for e in found] == sorted(c.name for c in finished.clients)
    assert all(e["version_number"] == 3 for e in found)
    assert all(e["scores"] == REPORT["scores"] for e in found)
    assert finished.clients[0].check_in()["assignment"] is None
    assert finished.clients[0].check_in()["run_state"] == "finished"


def test_outcomes_tell_the_client_to_commit(finished: Campaign) -> None:
    assignment = finished.sent[0]["assignment"]["id"]
    outcome = finished.clients[0].check_in(pending=assignment)["pending"]
    assert (outcome["state"], outcome["round_state"]) == ("accepted", "published")


def test_weights_by_examples(project: Project) -> None:
    campaign = start(project, rounds=1, weighting="examples")
    campaign.play(examples=lambda number: 10 ** (number + 1))
    document = campaign.manifest(1)
    assert [u["weight"] for u in document["manifest"]["updates"]] == [10, 100, 1000]
    version = campaign.versions()[1]
    assert version_file(campaign.owner, version["id"]) == recomputed(document, campaign.model.space)


def test_an_element_that_fewer_than_k_clients_share_stays(project: Project) -> None:
    campaign = start(project, rounds=1, min_contributors=3)
    campaign.play()
    shares = sum((~s["made"].mask.to_bool()).astype(int) for s in campaign.sent)
    assert set(shares) == {0, 1, 2, 3}, "the masks of this test overlap in every way"
    space = campaign.model.space
    data = version_file(campaign.owner, campaign.versions()[1]["id"])
    values = wire.decode_version(data, space_digest=space.digest, dim=space.dim)
    kept = values == campaign.model.weights
    assert np.array_equal(kept, shares < 3)


def test_more_clients_than_a_group_and_more_elements_than_a_shard(project: Project) -> None:
    """The order of summation matters in the last bits: ten clients, two shards."""
    space = ParameterSpace.of(
        [
            ("wide.weight", (SHARD + 1001,), Kind.WEIGHT, Role.SELECTABLE),
            ("wide.bias", (2,), Kind.BIAS, Role.SHARED),
        ]
    )
    campaign = start(project, clients=10, rounds=1, model=make_model(project, space=space))
    campaign.play()
    document = campaign.manifest(1)
    version = campaign.versions()[1]
    assert version_file(campaign.owner, version["id"]) == recomputed(document, space)
    jobs = ok(campaign.owner.get("/v1/jobs", limit=100, state="done"))["items"]
    assert sorted(j["part"] for j in jobs if j["kind"] == "aggregate") == [0, 1]


def test_a_run_of_one_client_with_contributor_threshold_one(project: Project) -> None:
    campaign = start(project, clients=1, rounds=2, min_contributors=1)
    assert campaign.run["warnings"], "goal 1 is below 2k"
    campaign.play()
    campaign.play()
    document = campaign.manifest(2)
    version = campaign.versions()[2]
    assert version_file(campaign.owner, version["id"]) == recomputed(document, campaign.model.space)


def test_a_policy_that_keeps_everything_personal_publishes_the_base_again(project: Project) -> None:
    campaign = start(project, clients=2, rounds=1, policy={"personal": "all"})
    campaign.play()
    assert len({v["sha256"] for v in campaign.versions()}) == 1


def test_nothing_is_left_in_staging_or_partials(finished: Campaign) -> None:
    core = finished.project.core
    with core.db.transaction("test", "test") as tx:
        rounds = tx.session.scalars(select(Round.id).where(Round.run_id == finished.run["id"]))
        left = [key for r in rounds for key in core.storage.keys(f"partials/{r}/")]
    assert left == []
    keys = finished.project.sql("SELECT staging_key FROM uploads WHERE project_id = :project")
    assert not {key for (key,) in keys} & set(core.storage.keys("staging/"))


def test_a_manifest_exists_only_once_a_round_is_closed(project: Project) -> None:
    campaign = start(project)
    current = campaign.rounds()[0]
    refused(campaign.owner.get(f"/v1/rounds/{current['id']}/manifest"), 404, "manifest_missing")


def test_a_client_that_asks_again_before_its_first_call_is_through_gets_the_same_work(
    project: Project,
) -> None:
    client = make_clients(project, 1)[0]
    client.check_in()  # its row is not written again within a minute
    run = make_run(project)
    client_waits = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    with ThreadPoolExecutor(2) as pool:
        with project.core.db.transaction("test", "test") as tx:
            rounds.lock_run(tx, UUID(run["id"]))
            calls = [pool.submit(client.assignment) for _ in range(2)]
            assert until(lambda: project.sql(client_waits)[0][0] == 2, seconds=30)
        first, second = (call.result(30)["id"] for call in calls)
    assert first == second


def test_who_holds_the_base_need_not_fetch_it(project):
    campaign = start(project, clients=2)
    work = campaign.clients[0].assignment()
    assert work["deltas"] is None, "nothing was said of what it holds"
    held = campaign.clients[0].check_in(versions=["0" * 64, work["base"]["sha256"]])
    assert held["assignment"]["deltas"] == []
    other = campaign.clients[0].check_in(versions=["0" * 64])
    assert other["assignment"]["deltas"] is None


def test_an_agent_is_not_given_what_it_cannot_do(project):
    campaign = start(project, clients=2)
    answer = campaign.clients[0].check_in(encodings=["int4", "x-later"])
    assert answer["assignment"] is None
    assert "f32" in answer["unable"]
    answer = campaign.clients[0].check_in(encodings=["int4", "f32"])
    assert answer["assignment"] is not None
    assert answer["unable"] is None
