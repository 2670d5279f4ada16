"""Whole runs on real processes, in every encoding: coordinator, Celery worker, scheduler, agents.

One agent is killed with ``kill -9`` in the middle and started again. That the service then still
publishes the very versions that the simulation computes shows that nothing was lost or counted
twice, that the agent kept its personal parameters and what its encoding lost, and that both run the
same rules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import get_args

import numpy as np
import pytest

from app.localstack import LocalStack
from fedselect.agent_state import AgentFolder
from fedselect.client import Client
from fedselect.deltas import Encoding
from fedselect.exporting import version_tensors
from fedselect.policies import Wire
from fedselect.space import ParameterSpace
from fedselect.tasks import example_clients, load_task

pytestmark = pytest.mark.e2e
ROUNDS, SITES = 8, 3


@pytest.fixture(scope="module", params=get_args(Encoding))
def demo(
    demo_module: ModuleType, product: LocalStack, request: pytest.FixtureRequest
) -> Iterator[object]:
    environment = product.environment()
    project, key = demo_module.new_project(environment)
    sites = dict(list(example_clients("digits").items())[:SITES])
    url = environment["PUBLIC_URL"]
    with Client(url, key=key) as admin:
        settings = demo_module.demo_settings(ROUNDS, SITES)
        settings = settings.model_copy(update={"wire": Wire(encoding=request.param)})
        yield demo_module.Demo("digits", sites, settings, product.root, url, admin, project)


@pytest.fixture(scope="module")
def finished(demo_module: ModuleType, demo):
    """A finished run in which one agent died twice and came back."""
    run = demo_module.register_model(demo)
    tokens = demo.admin.create_enrolments(SITES).tokens
    with demo_module.agents(demo) as processes:
        demo.admin.start_run(run.id)
        victim = next(iter(processes))
        for published in (2, ROUNDS // 2 + 1):
            _wait_until(demo, run.id, published)
            processes[victim].kill()
            assert processes[victim].wait(30) == -9
            processes[victim] = demo_module.start_agent(demo, victim, tokens.pop())
        return demo_module.follow(demo, run, processes)


def _wait_until(demo, run_id, published: int) -> None:
    for _ in range(3000):
        if demo.admin.run(run_id).published >= published:
            return
        sys.modules["demo"].bell.wait(0.1)
    pytest.fail(f"version {published} was not published within five minutes")


def test_the_run_is_complete_in_spite_of_the_kills(demo, finished):
    assert finished.state.value == "finished"
    assert finished.published == ROUNDS
    rounds = list(demo.admin.rounds(finished.id))
    assert [(r.number, r.attempt) for r in rounds] == [(n, 1) for n in range(1, ROUNDS + 1)]
    evaluations = {e.client_name: e for e in demo.admin.evaluations(finished.id)}
    assert set(evaluations) == set(demo.sites)
    assert {e.participations for e in evaluations.values()} == {ROUNDS}


def test_every_version_is_recomputed_from_its_manifest(demo_module, demo, finished):
    assert demo_module.check_versions(demo, finished) == ROUNDS


def test_the_ledger_verifies(demo_module, demo, finished):
    assert demo_module.check_ledger(demo, finished) > ROUNDS


def test_the_simulation_agrees_bit_for_bit(demo, finished):
    import torch

    from fedselect.simulate import simulate

    torch.set_num_threads(1)
    accepted = {}
    names = {str(client.id): client.name for client in demo.admin.clients()}
    for found in demo.admin.rounds(finished.id):
        manifest = demo.admin.manifest(found.id).manifest
        accepted[found.number] = [names[update.client] for update in manifest.updates]
    tasks = {name: load_task(spec, **own) for name, (spec, own) in demo.sites.items()}
    result = simulate(tasks, demo.settings, order=lambda number, _: accepted[number])
    versions = [v.sha256 for v in demo.admin.versions(finished.id)]
    assert versions == result.versions
    for name, state in result.states.items():
        folder = AgentFolder(demo.root / "agents" / demo.project / name)
        try:
            kept = folder.arm(finished.arm_id).committed(result.space)
        finally:
            folder.close()
        assert kept is not None
        assert kept.participations == ROUNDS
        assert kept.mask == state.mask
        np.testing.assert_array_equal(kept.theta, state.theta)
        if demo.settings.wire.encoding == "f32":
            assert kept.residual is state.residual is None
        else:
            np.testing.assert_array_equal(kept.residual, state.residual)
            assert kept.residual.any()
    received = {e.client_name: e.bytes_received for e in demo.admin.evaluations(finished.id)}
    assert received == result.bytes_down
    scores = {e.client_name: e.scores["post"] for e in demo.admin.evaluations(finished.id)}
    assert {n: s.correct for n, s in scores.items()} == {
        n: s["post"].correct for n, s in result.scores.items()
    }


def test_versions_travelled_as_deltas_where_that_was_agreed(demo, finished):
    encoding = demo.settings.wire.encoding
    versions = sorted(demo.admin.versions(finished.id), key=lambda version: version.number)
    assert {v.encoding for v in versions[1:]} == {encoding}
    for found in demo.admin.evaluations(finished.id):
        deltas = sum(v.delta_size or 0 for v in versions)
        assert found.delta_bytes_received == deltas
        whole = versions[0].size if deltas else sum(v.size for v in versions)
        assert found.bytes_received == whole + deltas
        assert min(found.control_sent, found.control_received) > 10_000


def test_a_site_serves_its_own_model(demo, finished):
    """From the folder of an agent that was killed twice, without torch; and exported versions."""
    import fedselect

    name = next(iter(demo.sites))
    served = fedselect.load_personalized(demo.root / "agents" / demo.project / name)
    assert (served.arm, served.participations) == (finished.arm_id, ROUNDS)
    space = ParameterSpace.from_json(demo.admin.space(finished.model_id).model_dump())
    last = max(demo.admin.versions(finished.id), key=lambda version: version.number)
    shared = version_tensors(demo.admin.fetch(demo.admin.download(last.id)), space)
    assert {n: t.shape for n, t in served.tensors.items()} == {
        n: t.shape for n, t in shared.items()
    }
    assert any((served.tensors[n] != shared[n]).any() for n in shared)
    card = demo.admin.card(last.id)
    assert (card.origin.round_number, card.evaluation.clients) == (ROUNDS, SITES)
    line = demo.admin.lineage(last.id)
    assert [step.number for step in line.steps] == [*range(ROUNDS, -1, -1), 0]


def test_the_estimate_was_within_five_percent(demo, finished):
    """From a dry run at its sites; control bytes within a half."""
    from fedselect.dryrun import measure

    tasks = {name: load_task(spec, **own) for name, (spec, own) in demo.sites.items()}
    measured = measure(tasks, demo.settings).measured
    found = demo.admin.run_estimate(finished.id, link="lan", measured=measured)
    assert found.actual.reports == found.actual.clients == SITES
    evaluations = list(demo.admin.evaluations(finished.id))
    assert found.actual.up == sum(e.bytes_sent for e in evaluations)
    assert found.actual.down == sum(e.bytes_received for e in evaluations)
    errors = found.errors
    assert max(map(abs, (errors.up, errors.down, errors.payload))) < 0.05, errors
    assert abs(errors.control) < 0.5, (errors, found.estimate.run, found.actual)


def test_masks_grew_and_the_last_updates_carried_less(demo, finished):
    shares = [e.personal_share for e in demo.admin.evaluations(finished.id)]
    assert all(0.05 < share <= 0.3 for share in shares)


def test_the_report_tells_what_became_of_every_client(demo_module, demo, finished):
    report = demo.admin.run_report(finished.id)
    assert {client.name for client in report.clients} == set(demo.sites)
    said = {e.client_name: e for e in demo.admin.evaluations(finished.id)}
    for client in report.clients:
        scores, gain = said[client.name].scores, client.gains["local_only"]
        lead = scores["post"].correct - scores["local_only"].correct
        assert gain.points == pytest.approx(100 * lead / scores["post"].total)
        assert gain.paired, "agents of classifiers tell which examples both models got right"
        assert set(client.gains) == {"local_only", "start", "global", "pre"}
        assert client.cost.seconds > 0
    assert report.masks.reading.read == report.masks.reading.wanted > 0
    assert 0 < report.cost.of_fedavg_percent < 110
    place = demo_module.write_report(demo, finished)
    assert place.read_text().count("<svg") == 11


def test_no_log_holds_a_key_or_a_signature(demo, product, finished):
    secrets = [demo.admin._key] if hasattr(demo.admin, "_key") else []
    secrets += [p.read_text() for p in product.root.glob("*.key")]
    secrets += ["X-Amz-Signature=", product.environment()["S3_SECRET_KEY"]]
    for log in (product.root / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert not [s for s in secrets if s and s in text], log.name
        assert "Traceback" not in text, log.name
