"""A rollout on real processes, with real agents: a bad version harms, is held and is taken back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import fedselect
from app.localstack import LocalStack
from fedselect.client import Client
from fedselect.cohortdocs import ChannelMove
from fedselect.policies import Training
from fedselect.protocol import RunCreate
from fedselect.rolloutdocs import Gates, RolloutCreate, RolloutState, Verdict
from fedselect.tasks import example_clients

pytestmark = pytest.mark.e2e
ROUNDS, SITES = 8, 4


@pytest.fixture(scope="module")
def demo(demo_module: ModuleType, product: LocalStack) -> Iterator[Any]:
    environment = product.environment()
    project, key = demo_module.new_project(environment)
    sites = dict(list(example_clients("digits").items())[:SITES])
    url = environment["PUBLIC_URL"]
    with Client(url, key=key) as admin:
        settings = demo_module.demo_settings(ROUNDS, SITES)
        yield demo_module.Demo("digits", sites, settings, product.root, url, admin, project)


@pytest.fixture(scope="module")
def sites(demo: Any, demo_module: ModuleType) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Agents that go on when a run has ended."""
    tokens = demo.admin.create_enrolments(SITES).tokens
    processes = {}
    try:
        for name, token in zip(demo.sites, tokens, strict=True):
            processes[name] = start(demo, demo_module, name, token)
        yield processes
    finally:
        demo_module.end_agents(processes.values())


def start(demo: Any, demo_module: ModuleType, name: str, token: str) -> subprocess.Popen[bytes]:
    spec, arguments = demo.sites[name]
    options = demo_module.task_options(arguments)
    command = [demo_module.FEDSELECT, "agent", "--server", demo.url, "--task", spec, *options]
    command += ["--name", name, "--state", str(folder(demo, name))]
    with (demo.root / "logs" / f"rolling-{name}.log").open("ab") as log:
        environment = {**os.environ, "FEDSELECT_TOKEN": token}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def folder(demo: Any, name: str) -> Any:
    return demo.root / "agents" / demo.project / name


def wait(until: Callable[[], Any], what: str) -> Any:
    for _ in range(3000):
        found = until()
        if found:
            return found
        sys.modules["demo"].bell.wait(0.1)
    return pytest.fail(f"{what}: not within five minutes")


def trained(demo: Any, run: Any) -> Any:
    """The last version of a run, once it has finished."""
    demo.admin.start_run(run.id)
    wait(lambda: demo.admin.run(run.id).state.value == "finished", "the run")
    return max(demo.admin.versions(run.id), key=lambda version: version.number)


def served(demo: Any, name: str) -> tuple[str | None, Any]:
    found = fedselect.load_personalized(folder(demo, name))
    return found.version, {n: t.tobytes() for n, t in found.tensors.items()}


def serve(demo: Any, names: Any, sha256: str) -> dict[str, Any]:
    wait(lambda: all(served(demo, n)[0] == sha256 for n in names), "serving")
    return {name: served(demo, name)[1] for name in names}


def test_a_bad_version_is_held_by_the_gates_and_both_halves_go_back(demo, demo_module, sites):
    run = demo_module.register_model(demo)
    good = trained(demo, run)
    move = ChannelMove(version_id=good.id, reason="the first one")
    demo.admin.move_channel(run.model_id, "stable", move)
    first = serve(demo, sites, good.sha256)
    # A run that learns nothing but noise, whose own baselines are as bad as its version.
    bad = demo.settings.model_copy(update={"training": Training(steps=20, learning_rate=2.0)})
    body = RunCreate(name="bad", model_id=run.model_id, settings=bad)
    candidate = trained(demo, demo.admin.create_run(body))
    rollout = demo.admin.start_rollout(
        RolloutCreate(
            name="bad",
            model_id=run.model_id,
            version_id=candidate.id,
            stages=[50, 100],
            minimum=2,
            control=25,
            gates=Gates(mean_gain=None, worst_decile_drop=None),
            roll_back_on_harm=True,
        )
    )
    wait(lambda: demo.admin.rollout(rollout.id).state != RolloutState.RUNNING, "the verdict")
    found = demo.admin.rollout(rollout.id)
    (judged,) = found.judgements
    harmed = next(gate for gate in judged.gates if gate.gate == "harmed_share")
    assert found.state is RolloutState.ROLLED_BACK, found
    assert (judged.verdict, harmed.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert harmed.figure == 1, "everybody who had it was harmed"
    assert harmed.control.value == 0, "and nobody who had not"
    assert {m.evaluation for m in (*found.members, *found.control)} == {"accepted"}
    # Whoever served the candidate has the very tensors of before again.
    assert serve(demo, sites, good.sha256) == first
    kept = {name: (folder(demo, name) / "serving" / "serving.json").read_text() for name in sites}
    reached = {member.client_name for member in found.members}
    assert {name for name, text in kept.items() if candidate.sha256 in text} >= reached
    assert demo.admin.channel(run.model_id, "stable").version.id == good.id


def test_who_was_killed_serves_the_same(demo, demo_module, sites):
    name = next(iter(sites))
    before = served(demo, name)
    sites[name].kill()
    assert sites[name].wait(30) == -9
    assert served(demo, name) == before
    sites[name] = start(demo, demo_module, name, "")
    wait(lambda: sites[name].poll() is None, "the agent")
    assert served(demo, name) == before
