"""What a client's own part is worth, on real processes: asked, measured, reported, explained.

Every number that an agent reports is measured again here, in plain torch, from the agent's folder
and the published version. One agent is killed with ``kill -9`` while it measures.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from app.localstack import LocalStack
from fedselect import wire
from fedselect.client import Client
from fedselect.explaindocs import AblationCreate
from fedselect.masks import Mask
from fedselect.serving import load_kept
from fedselect.space import ParameterSpace
from fedselect.tasks import load_task

pytestmark = pytest.mark.e2e
ROUNDS, SITES = 6, 4
# A site whose scoring can be held: then it says so in a file, and waits for another one.
SLOW = """
import pathlib, time
from fedselect.tasks.digits import DigitsTask

class Held(DigitsTask):
    def __init__(self, client, folder):
        super().__init__(client)
        self.folder = pathlib.Path(folder)

    def eval_batches(self):
        while (self.folder / "hold").exists():
            (self.folder / "measuring").touch()
            time.sleep(0.05)
        yield from super().eval_batches()
"""


@pytest.fixture(scope="module")
def demo(
    demo_module: ModuleType, product: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("sites")
    task = folder / "held.py"
    task.write_text(SLOW)
    environment = product.environment()
    project, key = demo_module.new_project(environment)
    sites = {}
    for number in range(SITES):
        own = folder / f"site-{number}"
        own.mkdir()
        sites[f"site-{number}"] = (f"{task}:Held", {"client": number, "folder": str(own)})
    url = environment["PUBLIC_URL"]
    with Client(url, key=key) as admin:
        settings = demo_module.demo_settings(ROUNDS, SITES)
        yield demo_module.Demo("digits", sites, settings, product.root, url, admin, project)


def wait_for(demo_module: ModuleType, what: str, there: Any) -> None:
    for _ in range(1200):
        if there():
            return
        demo_module.bell.wait(0.1)
    pytest.fail(f"{what} did not happen within two minutes")


@pytest.fixture(scope="module")
def ablated(demo_module: ModuleType, demo: Any) -> tuple[Any, Any]:
    """A finished run and its last version, which all sites have ablated, one of them killed."""
    run = demo_module.register_model(demo)
    with demo_module.agents(demo) as processes:
        demo.admin.start_run(run.id)
        run = demo_module.follow(demo, run, processes)
    version = max(demo.admin.versions(run.id), key=lambda each: each.number)
    asked = demo.admin.ask_ablations(version.id, AblationCreate())
    assert (asked.asked, asked.waiting) == (SITES, 0)
    victim = "site-0"
    folder = Path(demo.sites[victim][1]["folder"])
    (folder / "hold").touch()
    with demo_module.agents(demo) as processes:
        wait_for(demo_module, "the measuring", (folder / "measuring").exists)
        processes[victim].kill()
        assert processes[victim].wait(30) == -9
        (folder / "hold").unlink()
        processes[victim] = demo_module.start_agent(demo, victim, "unused")

        def answered() -> bool:
            states = [each.state.value for each in demo.admin.ablations(version.id)]
            return states == ["accepted"] * SITES

        wait_for(demo_module, "every answer", answered)
    return run, version


def test_each_site_was_asked_once_and_has_answered(demo: Any, ablated: Any) -> None:
    _, version = ablated
    found = list(demo.admin.ablations(version.id))
    assert {each.client_name for each in found} == set(demo.sites)
    assert {(each.attempt, each.version_number) for each in found} == {(1, ROUNDS)}


@pytest.mark.parametrize("number", range(SITES))
def test_the_reported_accuracy_is_that_of_the_model_with_the_shared_values(
    demo: Any, ablated: Any, number: int
) -> None:
    run, version = ablated
    name = f"site-{number}"
    ids = {client.name: client.id for client in demo.admin.clients()}
    found = demo.admin.explanation(run.id, ids[name])
    kept = load_kept(demo.root / "agents" / demo.project / name)
    space = kept.space
    data = demo.admin.fetch(demo.admin.download(version.id))
    base = wire.decode_version(data, space_digest=space.digest, dim=space.dim)
    own = (kept.state.merge_mask - Mask.initial(space)).to_bool()
    merged = np.where(kept.state.merge_mask.to_bool(), kept.state.theta, base)
    spec, arguments = demo.sites[name]
    task = load_task(spec, **arguments)

    def correct(theta: Any) -> int:
        model = task.build_model()
        named = {n: torch.from_numpy(v.copy()) for n, v in space.unflatten(theta).items()}
        model.load_state_dict(named)
        model.eval()
        with torch.no_grad():
            hits = [model(x).argmax(-1) == y for x, y in task.eval_batches()]
        return int(torch.cat(hits).sum())

    whole = correct(merged)
    measured = found.measured
    assert (measured.version, measured.whole.correct) == (ROUNDS, whole)
    examples = measured.whole.examples
    without = correct(np.where(own, base, merged))
    assert measured.lost.points == pytest.approx(100 * (whole - without) / examples)
    assert sum(each.chosen for each in found.tensors) == own.sum() > 0
    for tensor in found.tensors:
        slot = space.by_name[tensor.name]
        part = slice(slot.offset, slot.stop)
        assert tensor.chosen == own[part].sum()
        theta = merged.copy()
        theta[part] = np.where(own[part], base[part], merged[part])
        lost = 100 * (whole - correct(theta)) / examples
        assert tensor.lost.points == pytest.approx(lost)
        assert tensor.lost.paired
        assert tensor.threshold > 0, "what decided is told"
        assert tensor.delta_chosen > tensor.delta_shared
    assert found.compared == SITES - 1
    assert found.summary[0].startswith("Of the parameters that policy fedselect")


def test_the_sites_own_people_see_the_same_without_a_server(
    demo_module: ModuleType, demo: Any, ablated: Any, tmp_path: Path
) -> None:
    run, version = ablated
    name = "site-1"
    file = tmp_path / "version"
    file.write_bytes(demo.admin.fetch(demo.admin.download(version.id)))
    spec, arguments = demo.sites[name]
    state = demo.root / "agents" / demo.project / name
    command = [demo_module.FEDSELECT, "explain", "--state", str(state), "--task", spec]
    command += demo_module.task_options(arguments)

    def told(*options: str) -> Any:
        page = tmp_path / "page.html"
        words = [*command, *options, "--html", str(page), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
        return json.loads(done.stdout)

    here = told("--version", str(file))
    ids = {client.name: client.id for client in demo.admin.clients()}
    there = json.loads(demo.admin.explanation(run.id, ids[name]).model_dump_json())
    assert (here["client_name"], here["policy"]) == (name, "fedselect")
    for ours, theirs in zip(here["tensors"], there["tensors"], strict=True):
        alike = ("name", "chosen", "rank", "threshold", "delta_chosen", "distance_percent", "lost")
        assert {n: ours[n] for n in alike} == {n: theirs[n] for n in alike}
        assert ours["others_percent"] is None, "only the server knows of others"
    assert told()["measured"]["whole"], "by default the version that it was trained from"
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "are this site's own" in said


def test_the_report_knows_how_different_the_sites_are(demo: Any, ablated: Any) -> None:
    run, _ = ablated
    report = demo.admin.run_report(run.id)
    assert all(0 <= client.divergence <= 2 for client in report.clients)
    assert {each.index for each in report.heterogeneity} == {"divergence"}
    assert {client.label_distance for client in report.clients} == {None}, "nobody agreed"
    versions = {v.number: v for v in demo.admin.versions(run.id)}
    space = ParameterSpace.from_json(demo.admin.space(run.model_id).model_dump())

    def values(number: int) -> Any:
        data = demo.admin.fetch(demo.admin.download(versions[number].id))
        return wire.decode_version(data, space_digest=space.digest, dim=space.dim)

    start, end = values(ROUNDS - 1), values(ROUNDS)
    for client in report.clients:
        kept = load_kept(demo.root / "agents" / demo.project / client.name)
        shared = ~kept.state.merge_mask.to_bool()
        one, all_ = ((v - start)[shared].astype(float) for v in (kept.state.theta, end))
        cosine = one @ all_ / np.linalg.norm(one) / np.linalg.norm(all_)
        assert client.divergence == pytest.approx(1 - cosine, abs=1e-5)
