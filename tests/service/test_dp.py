"""Differential privacy through the service: what is published, spent, recomputable and refused."""

from __future__ import annotations

import base64
import hashlib

import numpy as np
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from app.wiring import Coordinator
from fedselect import wire
from fedselect.accounting import epsilon
from fedselect.cli import build
from fedselect.errors import LedgerError, SettingsError
from fedselect.manifestdocs import Manifest
from fedselect.masks import BLOCK
from fedselect.noise import commitment, run_secret
from fedselect.recompute import recompute, recompute_files
from workers import noising

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
    pass_time,
    refused,
    settings,
    train,
)

DP = {"clip": 2.0, "noise": 0.2, "epsilon": 100.0, "delta": 1e-6}


class PrivateRun:
    """A run of two clients with differential privacy."""

    def __init__(self, project, *, rows=20, rounds=2, dp=DP, **rules):
        self.project, self.core = project, project.core
        self.model = make_model(project, space=make_space(rows=rows))
        self.run = make_run(project, self.model, rounds=rounds, dp=dp, **rules)
        self.clients = make_clients(project, 2)

    def play(self, rounds=1):
        for number in range(rounds):
            for seed, client in enumerate(self.clients):
                work = client.assignment(encodings=["f32", "bf16", "int8"])
                made = train(work, self.model.space, seed=2 * number + seed)
                deliver(client, work, made.data)
            drain(self.project)
        return self

    @property
    def shown(self):
        return ok(self.project.owner.get(f"/v1/runs/{self.run['id']}"))

    def versions(self):
        found = everything(self.project.owner, f"/v1/runs/{self.run['id']}/versions")
        return sorted(found, key=lambda v: v["number"])

    def file(self, number):
        path = f"/v1/versions/{self.versions()[number]['id']}/download"
        return ask_store("GET", ok(self.project.owner.get(path))["url"]).content

    def manifest(self, number=1):
        rounds = everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")
        (found,) = (r["id"] for r in rounds if r["number"] == number and r["manifest_sha256"])
        document = ok(self.project.owner.get(f"/v1/rounds/{found}/manifest"))
        return Manifest.model_validate(document["manifest"])

    @property
    def secret(self):
        return run_secret(self.core.settings.noise_seed, self.run["id"])

    def entries(self, action):
        query = "SELECT body FROM ledger_entries WHERE action = :action AND subject = :run"
        found = self.project.sql(query, action=action, run=f"run:{self.run['id']}")
        return [body for (body,) in found]


@pytest.mark.parametrize("encoding", ["f32", "int8"])
def test_an_auditor_with_the_secret_recomputes_and_nobody_else(project, encoding):
    run = PrivateRun(project, encoding=encoding).play()
    manifest, read = run.manifest(), project.core.storage.read
    assert manifest.noise.commitment == commitment(run.secret)
    version, delta = recompute_files(manifest, read, secret=run.secret)
    assert version == run.file(1)
    if delta is not None:
        assert hashlib.sha256(delta).hexdigest() == run.versions()[1]["delta_sha256"]
    for secret in (None, bytes(32)):
        with pytest.raises(LedgerError, match="secret") as refused:
            recompute(manifest, read, secret=secret)
        assert refused.value.code == "noise_secret"


def test_every_element_that_may_travel_moves_and_no_other(project):
    run = PrivateRun(project).play()
    space = run.model.space
    before, after = (
        wire.decode_version(run.file(number), space_digest=space.digest, dim=space.dim)
        for number in (0, 1)
    )
    (never,) = run.manifest().noise.still
    moved = before != after
    assert not moved[slice(*never)].any()
    assert moved.sum() == space.dim - (never[1] - never[0])


def test_the_secret_is_promised_before_the_first_round_and_is_not_in_the_database(project):
    run = PrivateRun(project, rounds=1)
    (created,) = run.entries("run.created")
    assert created["noise"] == commitment(run.secret)
    kept = project.sql("SELECT to_jsonb(runs)::text FROM runs WHERE id = :id", id=run.run["id"])
    assert run.secret.hex() not in str(kept)
    assert commitment(run.secret) in str(kept)


def test_what_is_spent_is_shown_before_the_start_and_in_every_card(project):
    run = PrivateRun(project)
    one, two = (epsilon(0.2, rounds, 1e-6) for rounds in (1, 2))
    promised = run.run["privacy"]
    assert promised["epsilon"] == pytest.approx(two, rel=1e-6)
    assert (promised["spent"], promised["rounds"], promised["budget"]) == (0, 2, 100)
    run.play()
    assert run.shown["privacy"]["spent"] == pytest.approx(one, rel=1e-6)
    run.play()
    for version, spent in zip(run.versions(), (0, one, two), strict=True):
        card = ok(project.owner.get(f"/v1/versions/{version['id']}/card"))
        assert card["privacy"]["spent"] == pytest.approx(spent, rel=1e-6)
        assert f"{spent:.3g} at δ = 1e-06" in card["markdown"]
        assert card["privacy"]["claim"] in card["limitations"]
        assert "No differential privacy was applied to it." not in card["limitations"]


def test_a_run_ends_at_its_budget_and_says_so(project):
    budget = epsilon(0.2, 1, 1e-6) * 1.01
    hook = {"url": "https://example.org/told", "events": ["budget.reached"]}
    ok(project.owner.post("/v1/webhooks", hook), 201)
    run = PrivateRun(project, rounds=5, dp={**DP, "epsilon": budget})
    assert run.run["privacy"]["rounds"] == 1
    run.play()
    assert len(run.versions()) == 2
    shown = run.shown
    assert shown["state"] == "evaluating"
    assert shown["reason"].startswith("budget reached: 1 rounds have spent")
    (told,) = run.entries("budget.reached")
    assert told["rounds"] == 1
    assert float(told["spent"]) == pytest.approx(budget / 1.01, rel=1e-4)


def let_it_close(run, clock):
    """Fewer clients than the goal came: the round closes when its times are over."""
    drain(run.project)
    for seconds in (700, 4000):
        clock.advance(seconds)
        pass_time(run.project)


def test_a_run_with_too_few_clients_for_its_model_is_refused(project):
    model = make_model(project, space=make_space(rows=2000))
    asked = {"name": "hopeless", "model_id": model.id, "settings": settings(dp=DP)}
    problem = refused(project.owner.post("/v1/runs", asked), 422, "privacy_useless")
    assert "is the least" in problem["detail"]


def test_without_a_noise_key_there_is_no_private_run(project, api):
    model = make_model(project)
    asked = {"name": "keyless", "model_id": model.id, "settings": settings(dp=DP)}
    core: Coordinator = api.app.state.core
    api.app.state.core = eager(core, noise_key=None)
    try:
        refused(project.owner.post("/v1/runs", asked), 422, "noise_key_missing")
    finally:
        api.app.state.core = core


def test_secure_aggregation_is_refused_because_the_service_does_not_do_it(project):
    rules = settings(min_contributors=3, goal=3, policy={"personal": "head"})
    asked = {"name": "blind", "model_id": make_model(project).id}
    asked["settings"] = {**rules, "privacy": {"secure": {}}}
    problem = refused(project.owner.post("/v1/runs", asked), 422, "secure_prototype")
    assert "SECURE-AGGREGATION.md" in problem["detail"]


def test_agreement_is_refused_because_the_service_does_not_measure_it(project):
    asked = {"name": "pooled", "model_id": make_model(project).id}
    asked["settings"] = {"policy": {"pooled": 1.0}}
    problem = refused(project.owner.post("/v1/runs", asked), 422, "pooled_prototype")
    assert "policy.pooled" in problem["detail"]
    asked["settings"] = {"arms": {"policies": [{"name": "a"}, {"name": "b", "pooled": 2}]}}
    refused(project.owner.post("/v1/runs", asked), 422, "pooled_prototype")


def test_another_noise_key_than_the_run_began_with_is_refused(project):
    manifest = PrivateRun(project).play().manifest()
    other = base64.b64encode(bytes(range(32))).decode()
    for key in (None, SecretStr(other)):
        with pytest.raises(SettingsError, match="NOISE_KEY"):
            noising.key(eager(project.core, noise_key=key), manifest)


def test_an_attempt_anew_or_another_subset_draws_noise_of_its_own(project):
    manifest = PrivateRun(project).play().manifest()
    key = noising.key(project.core, manifest)
    assert noising.key(project.core, manifest.model_copy()) == key, "so done again it is the same"
    others = ({"attempt": manifest.attempt + 1}, {"updates": manifest.updates[:1]}, {"round": 2})
    keys = {noising.key(project.core, manifest.model_copy(update=each)) for each in others}
    assert len({key, *keys}) == 4


def test_shards_of_any_size_give_the_same_bits(project, clock):
    run = PrivateRun(project, rows=70_000, goal=400, quorum=2, dp={**DP, "noise": 0.5}, rounds=4)
    for seed, client in enumerate(run.clients):
        work = client.assignment()
        deliver(client, work, train(work, run.model.space, seed=seed).data)
    let_it_close(run, clock)
    manifest = run.manifest()
    space = run.model.space
    after = wire.decode_version(run.file(1), space_digest=space.digest, dim=space.dim)
    base = wire.decode_version(run.file(0), space_digest=space.digest, dim=space.dim)
    key = noising.key(project.core, manifest)
    small = manifest.model_copy(update={"shard": BLOCK})
    pieces = []
    for start in range(0, space.dim, BLOCK):
        span = (start, min(start + BLOCK, space.dim))
        total = noising.summed(project.core.storage, small, span, key, lambda: None)
        pieces.append(total.finish(base[slice(*span)], 1))
    np.testing.assert_array_equal(np.concatenate(pieces), after)


def test_the_operator_prints_the_secret_for_an_auditor(project, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = PrivateRun(project, rounds=1)
    found = CliRunner().invoke(build(), ["admin", "noise-secret", run.run["id"]])
    assert (found.exit_code, found.output.strip()) == (0, run.secret.hex())
    assert run.secret.hex() not in str(run.shown)
