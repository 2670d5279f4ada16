"""Zombies cannot publish, poison is contained: a few trials on real processes.

``zombies.haunt`` says what a zombie is, ``tests/soak`` has many of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .factories import Project, drain, everything, ok
from .zombies import LEASE, PATIENCE, Haunted, Puppet, drive, haunt, haunted, puppet


@pytest.fixture(scope="module")
def worker(environment: dict[str, str]) -> Iterator[Puppet]:
    with puppet(environment) as found:
        yield found


@pytest.fixture
def case(project: Project) -> Haunted:
    return haunted(project)


@pytest.mark.parametrize(
    ("kind", "points"), [("verify", [9]), ("aggregate", [10, 13]), ("publish", [11])]
)
def test_a_zombie_changes_nothing(
    case: Haunted, worker: Puppet, kind: str, points: list[int]
) -> None:
    found = [haunt(case, worker, kind=kind, point=point) for point in points]
    assert False not in found, case.log
    assert True in found, case.log


def test_a_job_that_kills_its_workers_is_contained(
    case: Haunted, environment: dict[str, str]
) -> None:
    project, job = case.project, drive(case, "aggregate")
    died = f"ended {137 << 8}"
    deaths, deadline = 0, time.monotonic() + PATIENCE
    with puppet({**environment, "FAILPOINT": "store.put.partials.before:1"}) as worker:
        while ok(project.owner.get(f"/v1/jobs/{job}"))["state"] != "failed":
            assert time.monotonic() < deadline
            answer = worker.send(f"{job} 0")
            assert answer in {died, "ended 0"}
            deaths += answer == died
            time.sleep(LEASE / 4)
    assert deaths == project.core.settings.job_attempts == 5
    path = f"/v1/runs/{case.run['id']}"
    assert ok(project.owner.get(path))["state"] == "paused"
    assert [r["state"] for r in everything(project.owner, f"{path}/rounds")] == ["failed"]
    query = "SELECT body FROM ledger_entries WHERE project_id = :project AND action = 'job.failed'"
    assert len(project.sql(query)) == 1
    ok(project.owner.post(f"/v1/jobs/{job}/retry"))
    drain(project)
    assert everything(project.owner, f"{path}/rounds")[0]["state"] == "published"
