"""Bounded influence in the service: what is published follows from the manifest alone.

And who is refused, who is suspended, and that agents hear nothing of it.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from app import conduct, manifests, sums
from fedselect import Kind, Mask, ParameterSpace, Role, wire
from fedselect.aggregate import Contribution
from fedselect.bounded import norm_of
from fedselect.clipping import quantile
from fedselect.errors import LedgerError
from fedselect.manifestdocs import Manifest
from fedselect.masks import BLOCK
from fedselect.recompute import manifest_digest, recompute_files

from .factories import (
    deliver,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    meta,
    ok,
    refused,
    train,
)

SPACE = ParameterSpace.of(
    [
        ("wide.weight", (BLOCK + 1000,), Kind.WEIGHT, Role.SELECTABLE),
        ("wide.bias", (3,), Kind.BIAS, Role.SHARED),
    ]
)
BOUNDED = {
    "rule": "trimmed_mean",
    "clip_quantile": 0.5,
    "max_change": 2.5,
    "movers": True,
    "likeness": 0.98,
}


@pytest.fixture
def small_shards(monkeypatch):
    """Two shards of a model that is quickly sent."""
    for module in (manifests, sums):
        monkeypatch.setattr(module, "SHARD", BLOCK)


def manifest_of(project, number):
    ((body, digest),) = project.sql(
        "SELECT m.body, m.sha256 FROM manifests m JOIN rounds r ON r.id = m.round_id "
        "WHERE r.project_id = :project AND r.number = :number",
        number=number,
    )
    manifest = Manifest.model_validate(json.loads(body))
    assert manifest_digest(manifest) == digest
    return manifest


def version_of(project, number):
    return project.sql(
        "SELECT sha256, object_key FROM versions WHERE project_id = :project AND number = :number "
        "AND arm_id IS NOT NULL",
        number=number,
    )[0]


def play(clients, project, space, *, seed=0):
    """A round in which every client sends a change of its own size, with an honest mask."""
    for number, client in enumerate(clients):
        assignment = client.assignment(encodings=["f32", "int8"])
        assert "influence" not in assignment["run"]["settings"]
        data = train(assignment, space, seed=100 * seed + number, examples=1 + 400 * (number == 0))
        deliver(client, assignment, data.data)
        drain(project)


@pytest.mark.parametrize(("encoding", "weighting"), [("f32", "examples"), ("int8", "uniform")])
def test_what_is_published_is_recomputed_from_the_manifest_alone(
    project, small_shards, encoding, weighting
):
    model = make_model(project, space=SPACE)
    make_run(
        project,
        model,
        rounds=3,
        goal=6,
        quorum=6,
        encoding=encoding,
        weighting=weighting,
        influence=BOUNDED,
    )
    clients = make_clients(project, 6)
    read, before = project.core.storage.read, None
    for number in (1, 2):
        play(clients, project, SPACE, seed=number)
        manifest = manifest_of(project, number)
        norms = [float(update.norm) for update in manifest.updates]
        assert manifest.format == "fedselect-manifest/3"
        assert float(manifest.bounds.clip) == quantile(before or norms, 0.5)
        before = norms
        sha256, key = version_of(project, number)
        file, delta = recompute_files(manifest, read)
        assert hashlib.sha256(file).hexdigest() == sha256
        assert read(key) == file
        assert (delta is None) == (encoding == "f32")
    ((folded,),) = project.sql(
        "SELECT count(*) FROM jobs WHERE project_id = :project AND kind = 'fold'"
    )
    assert folded == 0
    ((kept,),) = project.sql(
        "SELECT count(*) FROM updates WHERE project_id = :project AND sketch IS NOT NULL"
    )
    assert kept == 0


def test_a_norm_that_is_not_the_files_is_found(project):
    model = make_model(project)
    make_run(project, model, goal=3, quorum=3, influence={"clip_norm": 1.0})
    play(make_clients(project, 3), project, model.space)
    manifest = manifest_of(project, 1)
    assert manifest.bounds.clip == "1.0"
    base = wire.decode_version(
        project.core.storage.read(manifest.base_object),
        space_digest=model.space.digest,
        dim=model.space.dim,
    )
    update = manifest.updates[0]
    mask = Mask.from_bytes(model.space.dim, project.core.storage.read(update.mask_object))
    values = wire.update_values(project.core.storage.read(update.object), mask)
    assert float(update.norm) == norm_of(base, Contribution(mask, values))
    forged = manifest.model_copy(
        update={"updates": [update.model_copy(update={"norm": "0.5"}), *manifest.updates[1:]]}
    )
    with pytest.raises(LedgerError, match="does not change its base by"):
        recompute_files(forged, project.core.storage.read)


def sent(client, model, values, mask=None):
    """An update of these very values (D,)."""
    assignment = client.assignment()
    mask = mask or Mask.empty(model.space.dim) | Mask.initial(model.space)
    deliver(
        client, assignment, wire.encode_update(meta(assignment), values, mask=mask, send_mask=True)
    )
    return assignment


def outcome(client, assignment):
    return client.check_in(pending=assignment["id"])["pending"]


def test_free_riders_and_copies_are_refused_and_the_round_goes_on(project):
    model = make_model(project)
    make_run(project, model, goal=4, quorum=2, influence={"likeness": 0.98})
    honest, rider, copier, other = make_clients(project, 4)
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, model.space.dim)).astype(np.float32)
    places = [
        (honest, sent(honest, model, model.weights + one), None),
        (rider, sent(rider, model, model.weights), "update_unchanged"),
        (copier, sent(copier, model, model.weights + 1.01 * one), "update_alike"),
        (other, sent(other, model, model.weights + two), None),
    ]
    drain(project)
    for client, assignment, reason in places:
        found = outcome(client, assignment)
        assert found["state"] == ("rejected" if reason else "accepted")
        assert found["reason"] == reason
    assert [each.number for each in manifest_of(project, 1).updates] == [1, 2]


def test_who_shares_nothing_is_no_free_rider(project):
    model = make_model(project)
    make_run(project, model, policy={"personal": "all"}, goal=2, quorum=2, influence={})
    for client in make_clients(project, 2):
        assignment = client.assignment()
        made = train(assignment, model.space)
        deliver(client, assignment, made.data)
        drain(project)
        assert outcome(client, assignment)["state"] == "accepted"


def fault(client, model, **asked):
    """An update that is refused, in the next round that the client is given."""
    assignment = client.assignment(**asked)
    deliver(client, assignment, train(assignment, model.space).data + b"!")
    return assignment


def state_of(project, client):
    return ok(project.owner.get(f"/v1/clients/{client.id}"))["state"]


def strikes_of(project, client):
    """Why each strike that counts in the project's run was one."""
    found = ok(project.owner.get(f"/v1/clients/{client.id}/conduct"))
    assert (found["client_id"], found["state"]) == (str(client.id), state_of(project, client))
    assert {(run["limit"], run["window"]) for run in found["runs"]} <= {(2, 7 * 86_400)}
    assert all(run["count"] == len(run["strikes"]) for run in found["runs"])
    return [strike["reason"] for run in found["runs"] for strike in run["strikes"]]


def test_strikes_suspend_and_an_administrator_lets_in_again(project):
    model = make_model(project)
    rules = {"strikes": 2, "clip_norm": 1.0}
    make_run(project, model, rounds=3, goal=2, quorum=1, client_attempts=5, influence=rules)
    bad, good = make_clients(project, 2)
    for number, state in enumerate(("active", "suspended"), start=1):
        fault(bad, model)
        drain(project)
        assert state_of(project, bad) == state
        assert strikes_of(project, bad) == ["file_trailing"] * number
    assert strikes_of(project, good) == []
    assert refused(bad.post("/v1/check-ins", {}), 403, "client_suspended")
    ((entry,),) = project.sql(
        "SELECT body FROM ledger_entries WHERE project_id = :project "
        "AND action = 'client.suspended'"
    )
    assert entry["cause"].startswith("strikes in run")
    ok(project.owner.post(f"/v1/clients/{bad.id}/activate"))
    assert strikes_of(project, bad) == []
    fault(bad, model)
    drain(project)
    assert state_of(project, bad) == "active", "what was is forgiven"
    for command in ("activate", "suspend", "activate"):  # of an active client: all three
        ok(project.owner.post(f"/v1/clients/{bad.id}/{command}"))
    fault(bad, model)
    drain(project)
    assert [state_of(project, each) for each in (bad, good)] == ["active", "active"]


def test_a_fault_that_shows_in_every_arm_is_one_strike(project):
    model = make_model(project)
    policies = [{"name": name, "personal": "none"} for name in ("one", "other")]
    make_run(
        project,
        model,
        rounds=3,
        goal=2,
        quorum=1,
        client_attempts=2,
        arms={"policies": policies, "mode": "parallel"},
        influence={"strikes": 2},
    )
    bad, _ = make_clients(project, 2)
    for state, attempt in (("active", 1), ("suspended", 2)):
        one = fault(bad, model, waiting=[])
        other = fault(bad, model, pending=one["id"], waiting=[])
        assert one["arm_id"] != other["arm_id"]
        assert one["attempt"] == other["attempt"] == attempt
        drain(project)
        assert state_of(project, bad) == state


def test_changing_nothing_is_refused_and_no_strike_at_first(project):
    model = make_model(project)
    make_run(project, model, goal=2, quorum=1, client_attempts=4, influence={"strikes": 1})
    still, _ = make_clients(project, 2)
    for _ in range(3):
        assignment = sent(still, model, model.weights)
        drain(project)
        assert outcome(still, assignment)["reason"] == "update_unchanged"
    assert state_of(project, still) == "active"


def test_a_look_at_conduct_that_fails_is_tried_again_and_ends(project, clock, monkeypatch):
    """Its subject is a client, of no round: nothing else may come to a stop because of it."""
    model = make_model(project)
    rules = {"strikes": 1}
    make_run(project, model, goal=2, quorum=1, client_attempts=4, influence=rules)
    bad, _ = make_clients(project, 2)
    with monkeypatch.context() as patch:
        patch.setattr(conduct, "judge", lambda tx, lease: 1 / 0)
        fault(bad, model)
        for _ in range(8):
            drain(project)
            clock.advance(30)
    look = "SELECT state, attempts FROM jobs WHERE project_id = :project AND kind = 'conduct'"
    assert [tuple(row) for row in project.sql(look)] == [("failed", 5)]
    assert state_of(project, bad) == "active"
    fault(bad, model)
    drain(project)
    assert state_of(project, bad) == "suspended", "the next strike has it looked at again"


def test_a_round_takes_so_many_of_a_group(project):
    make_run(project, goal=4, quorum=2, influence={"clients_per_group": 2})
    north = [make_client(project, tags=["site:north"]) for _ in range(3)]
    bare = [make_client(project) for _ in range(3)]
    given = [client.check_in()["assignment"] is not None for client in (*north, *bare)]
    assert given == [True, True, False, True, True, False]


def test_a_round_that_is_full_for_a_group_hides_no_other_run(project):
    model, one = make_model(project), {"clients_per_group": 1}
    for _ in range(2):
        make_run(project, model, goal=4, quorum=2, influence=one)
    north = [make_client(project, tags=["site:north"]) for _ in range(4)]
    runs = [client.assignment()["run"]["id"] for client in north[:2]]
    assert len(set(runs)) == 2, "the second is given the other run"
    assert north[2].check_in()["assignment"] is None
    free = make_run(project, model, goal=4, quorum=2)
    assert [client.assignment()["run"]["id"] for client in north[2:]] == [free["id"]] * 2


def test_bounds_that_make_no_sense_are_refused(project):
    model = make_model(project)
    for wrong in ({"clip_norm": 0}, {"trim": 0.5}, {"rule": "krum"}, {"likeness": 2}, {"x": 1}):
        body = {
            "name": f"r-{sorted(wrong)}",
            "model_id": model.id,
            "settings": {"influence": wrong},
        }
        answer = project.owner.post("/v1/runs", body)
        assert answer.status_code == 422, answer.text
    assert everything(project.owner, "/v1/runs") == []
