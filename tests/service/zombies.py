"""Zombies: a worker is frozen beyond its lease, another one does its job, and then it goes on.

:func:`haunt` is one trial: it drives a run to a due job of the wanted kind, freezes a worker at
some boundary of it, lets this process do the work, and compares everything that counts before and
after the zombie's last deeds.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from workers import running

from .factories import (
    Client,
    Json,
    Model,
    Project,
    contribute,
    drain,
    due_jobs,
    make_client,
    make_model,
    make_run,
)

LEASE = 0.4  # seconds; the puppet's, and how long its transactions may stand still
PATIENCE = 30.0  # seconds until a condition must hold
# What must not change any more: every row, but for the time of the last claim of an object's key.
ROWS = {
    "rounds": "*",
    "runs": "*",
    "versions": "*",
    "updates": "*",
    "masks": "*",
    "assignments": "*",
    "transitions": "*",
    "jobs": "*",
    "ledger_entries": "*",
    "objects": "key, size, deletion_id, deleted_at",
}
KINDS = ("verify", "aggregate", "publish")


@dataclass
class Puppet:
    """The process that forks workers and freezes them."""

    process: subprocess.Popen[str]

    def send(self, text: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def puppet(environment: dict[str, str]) -> Iterator[Puppet]:
    """Its log is our standard error."""
    short = {"LEASE": str(LEASE), "IDLE_TRANSACTION": str(LEASE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("puppet.py"))]
    with subprocess.Popen(
        command,
        env={**os.environ, **environment, **short},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Puppet(process)
        finally:
            process.kill()


@dataclass
class Haunted:
    """A run with one client, whose jobs are done by this process and by zombies."""

    project: Project
    model: Model
    client: Client
    run: Json
    log: list[str] = field(default_factory=list)


def haunted(project: Project) -> Haunted:
    """A run that never ends."""
    model = make_model(project)
    run = make_run(project, model, goal=1, quorum=1, min_contributors=1, rounds=100_000)
    return Haunted(project, model, make_client(project), run)


def haunt(case: Haunted, worker: Puppet, *, kind: str, point: int) -> bool | None:
    """Whether the zombie changed nothing; None if nobody froze while the job was its own."""
    job = drive(case, kind)
    answer = worker.send(f"{job} {point}")
    if not answer.startswith("frozen"):
        assert answer == "ended 0", answer
        drain(case.project)
        return None
    ours = _take_over(case, job)
    drain(case.project)
    before = everything_that_counts(case.project)
    assert worker.send("go") == "ended 0"
    drain(case.project)
    after = everything_that_counts(case.project)
    case.log.append(f"{kind}, {answer.removeprefix('frozen ')}: {'ours' if ours else 'its own'}")
    changed = {name for name in before if before[name] != after[name]}
    if changed:
        case.log.append(f"  CHANGED: {sorted(changed)}")
    left = list(case.project.core.storage.keys("partials/"))
    mine = [key for key in left if UUID(key.split("/")[1]) in _ended(case)]
    if mine:
        case.log.append(f"  LEFT: {mine}")
    return not (changed or mine) if ours else None


def drive(case: Haunted, kind: str) -> UUID:
    """Drive the present round until a job of this kind is due."""
    contribute(case.client, case.model, seed=7)
    while True:
        (job,) = due_jobs(case.project)
        (found,) = case.project.sql("SELECT kind FROM jobs WHERE id = :job", job=job)
        if found.kind == kind:
            return job
        running.run_job(case.project.core, job)


def _take_over(case: Haunted, job: UUID) -> bool:
    """Do the job as soon as its lease has run out; False if the frozen one had done it."""
    deadline = time.monotonic() + PATIENCE
    query = "SELECT state, attempts FROM jobs WHERE id = :job"
    while True:
        (row,) = case.project.sql(query, job=job)
        if row.state == "done":
            return int(row.attempts) > 1
        assert time.monotonic() < deadline, f"the job stays {row.state}"
        before = row.attempts
        running.run_job(case.project.core, job)
        (row,) = case.project.sql(query, job=job)
        if row.attempts == before and row.state == "leased":
            time.sleep(LEASE / 20)
        elif row.state == "done":
            return bool(before)  # if it had not claimed the job yet, it was no zombie


def _ended(case: Haunted) -> set[UUID]:
    query = "SELECT id FROM rounds WHERE project_id = :project AND state = 'published'"
    return {row.id for row in case.project.sql(query)}


def everything_that_counts(project: Project) -> dict[str, str]:
    """A digest of every table and of every object of this project."""
    found = {}
    for table, columns in ROWS.items():
        query = f"SELECT {columns} FROM {table} WHERE project_id = :project"
        rows = sorted(repr(tuple(row)) for row in project.sql(query))
        found[table] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    names = "SELECT key FROM objects WHERE project_id = :project AND key !~ '^accepted'"
    storage = project.core.storage
    for (key,) in project.sql(f"{names} ORDER BY claimed_at DESC LIMIT 4"):
        found[key] = hashlib.sha256(storage.read(key)).hexdigest()
    return found
