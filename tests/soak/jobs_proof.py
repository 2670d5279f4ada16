"""Proofs of the jobs: zombies, killed and deaf workers, poison."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from app import wiring
from app.cli import migrate, prepare
from app.localstack import LocalStack
from app.wiring import Coordinator

from .proofs import Figures, Room, proof

sys.path.append(str(Path(__file__).parents[1]))  # as pytest finds the other suites' tools
from service.factories import Caller, Json, contribute, everything, make_project, ok
from service.zombie_trials import trials
from service.zombies import Haunted, haunted

PATIENCE = 240.0  # seconds until something must have happened


def _core(environment: dict[str, str]) -> Coordinator:
    os.environ.update(environment)
    return wiring.build()


@proof(
    promise="zombies cannot publish",
    test="SIGSTOP at a random boundary beyond the lease, another worker does the job, SIGCONT",
    target="200 trials, 0 stale writes",
    quick={"count": 8},
    full={"count": 200},
    minutes=(4, 40),
)
def zombies(room: Room, *, count: int) -> Figures:
    """Rows and objects are compared before and after a zombie's last deeds."""
    stack = LocalStack(room.folder / "stack", durable=False, given={})
    room.cleanup.callback(stack.down)
    stack.up(product=False)
    environment = stack.environment()
    core = _core(environment)
    migrate()
    core.storage.prepare()
    found = trials(core, environment, count=count, seed=room.seed)
    (room.folder / "trials").write_text("\n".join(found.log))
    return Figures(
        found.trials >= count and not found.stale,
        f"{found.trials} trials, {found.stale} stale writes",
        {"spared": found.spared},
    )


def _product(room: Room, **settings: str) -> tuple[LocalStack, Haunted, Path]:
    """The whole product as processes, with failpoints to steer it, and a run with one client."""
    steering = room.folder / "failpoints"
    steering.mkdir()
    os.environ.update({"FAILPOINT": str(steering), **settings})
    stack = LocalStack(room.folder / "stack", given={})
    room.cleanup.callback(stack.down)
    stack.up(prepare=lambda ready: prepare(stack.root, ready))
    environment = stack.environment()
    api = room.cleanup.enter_context(httpx.Client(base_url=environment["PUBLIC_URL"], timeout=60))
    core = _core(environment)
    stack.stop("worker")  # what prepares the run does its work in this process
    case = haunted(make_project(core, api))  # type: ignore[arg-type]  # asks in the same way
    stack.start("worker")
    return stack, case, steering


def _rounds(case: Haunted) -> list[str]:
    found = everything(case.project.owner, f"/v1/runs/{case.run['id']}/rounds")
    return [str(r["state"]) for r in found]


def _until(condition: Callable[[], bool]) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > PATIENCE:
            raise TimeoutError(f"it did not happen within {PATIENCE:.0f} s")
        time.sleep(0.05)
    return time.monotonic() - started


def _visits(steering: Path) -> Counter[str]:
    file = steering / "visits"
    return Counter(file.read_text().split()) if file.exists() else Counter()


@proof(
    promise="a killed worker costs one lease",
    test="kill -9 in mid-aggregation, LEASE 30 s",
    target="published within 40 s",
    quick={"count": 1},
    full={"count": 5},
    minutes=(3, 8),
)
def killed_worker(room: Room, *, count: int) -> Figures:
    """From the death of the process to the published version."""
    _, case, steering = _product(room, LEASE="30")
    place, took = "store.put.partials.before", []
    for number in range(1, count + 1):
        before = _visits(steering)[place]
        (steering / "armed").write_text(f"{place}:1")
        contribute(case.client, case.model, seed=number)
        _until(lambda before=before: _visits(steering)[place] > before)  # type: ignore[misc]
        took.append(_until(lambda n=number: _rounds(case).count("published") == n))  # type: ignore[misc]
    return Figures(max(took) <= 40, f"{count} kills, {max(took):.1f} s at most")


@proof(
    promise="poison is contained",
    test="an update that kills every worker that reads it; a round that kills its aggregators",
    target="at most 5 runs each, then failed and an entry",
    quick={"lease": 2.0},
    full={"lease": 10.0},
    minutes=(3, 6),
)
def poison(room: Room, *, lease: float) -> Figures:
    """Failpoints kill the process at the same place again and again."""
    _, case, steering = _product(room, LEASE=str(lease))
    owner: Caller = case.project.owner
    read, summed = "store.stream.staging.after", "store.put.partials.before"
    reading = _poisoned(case, steering, read, failed=1)
    summing = _poisoned(case, steering, summed, failed=2)
    failed = _failed(case)
    state = ok(owner.get(f"/v1/runs/{case.run['id']}"))["state"]
    query = "SELECT 1 FROM ledger_entries WHERE project_id = :project AND action = 'job.failed'"
    entries = len(case.project.sql(query))
    (job,) = [j for j in failed if j["kind"] == "aggregate"]
    ok(owner.post(f"/v1/jobs/{job['id']}/retry"))
    _until(lambda: "published" in _rounds(case))
    kinds = sorted(j["kind"] for j in failed)
    met = 1 <= reading <= 5 and 1 <= summing <= 5 and kinds == ["aggregate", "verify"]
    return Figures(
        met and state == "paused" and entries == 2,
        f"{reading} and {summing} runs, {len(failed)} jobs failed, run {state}, {entries} entries; "
        "the round retried: published",
    )


def _poisoned(case: Haunted, steering: Path, place: str, *, failed: int) -> int:
    """How often a process came to this place, and died there, until the poison was contained."""
    (steering / "armed").write_text("\n".join([f"{place}:1"] * 20))
    before = _visits(steering)[place]
    contribute(case.client, case.model, seed=1)
    _until(lambda: len(_failed(case)) == failed)
    (steering / "armed").write_text("")
    return _visits(steering)[place] - before


def _failed(case: Haunted) -> list[Json]:
    return everything(case.project.owner, "/v1/jobs", state="failed")


@proof(
    promise="a deaf worker is replaced",
    test="SIGSTOP of Celery's main process, which then consumes nothing; WATCHDOG 10 s",
    target="the round is published within 60 s",
    quick={"count": 1},
    full={"count": 3},
    minutes=(3, 8),
)
def deaf_worker(room: Room, *, count: int) -> Figures:
    """From the delivery of an update that nobody hears of to its published version."""
    stack, case, _ = _product(room, WATCHDOG="10")
    took = []
    for number in range(1, count + 1):
        (supervisor,) = [s.pid for s in stack.status() if s.name == "worker"]
        (celery,) = psutil.Process(supervisor).children()
        for process in (celery, *celery.children(recursive=True)):
            process.suspend()
        contribute(case.client, case.model, seed=number)
        took.append(_until(lambda n=number: _rounds(case).count("published") == n))  # type: ignore[misc]
    return Figures(max(took) <= 60, f"{count} trials, {max(took):.1f} s at most")
