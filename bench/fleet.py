"""A whole service for the benchmarks of the control plane, with clients in thousands.

The stack is durable: every acknowledged commit is on the disk. Clients and their keys are written
by SQL, because registering is not what is measured; all else goes over HTTP, as from agents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import psutil
import psycopg
from sqlalchemy import insert

from app import auth, cli, keys, tenants, wiring
from app.localstack import LocalStack
from app.settings import read
from app.tables import Client as ClientRow
from app.tables import Key
from bench.harness import Json, Room
from fedselect import Kind, ParameterSpace, Role, RunSettings, wire
from fedselect.client import Client
from fedselect.protocol import ModelCreate, RunCreate

PATIENCE = 120.0  # seconds
DIM = 2400  # elements: an update of 10 kB


@dataclass(frozen=True)
class Tenant:
    """A project with its owner's key and the keys of its clients."""

    id: UUID
    owner: str
    keys: Sequence[str]


class Fleet:
    """The running service."""

    def __init__(self, room: Room, processes: int) -> None:
        self.folder = room.folder
        self.stack = LocalStack(room.folder / f"stack-{processes}", given={})
        room.cleanup.callback(self.stack.down)
        os.environ["WEB_CONCURRENCY"] = str(processes)
        root = self.stack.root
        self.stack.up(prepare=lambda environment: cli.prepare(root, environment))
        self.environment = self.stack.environment()
        self.core = wiring.build(read(self.environment))
        room.cleanup.callback(self.core.close)

    # --- who and what ----------------------------------------------------------------------------

    def tenant(self, clients: int) -> Tenant:
        """A project of its own with so many registered clients."""
        name, pepper = f"bench-{uuid4().hex[:8]}", self.core.settings.pepper
        tokens = [auth.mint(auth.KEY_PREFIX, pepper) for _ in range(clients)]
        ids = [uuid4() for _ in tokens]
        with self.core.db.transaction("bench", "bench.tenant") as tx:
            project = tenants.ensure_project(tx, organisation=name, project=name)
            owner = keys.first(tx, pepper, project, role="owner").key
            common: Json = {"project_id": project.id, "created_at": tx.now}
            owned = {**common, "organisation_id": project.organisation_id}
            rows = [
                {"id": each, "name": f"client-{n}", "tags": [], "state": "active", **common}
                for n, each in enumerate(ids)
            ]
            secrets = [
                {"id": t.id, "digest": t.digest, "client_id": each, "role": "client", **owned}
                for t, each in zip(tokens, ids, strict=True)
            ]
            tx.session.execute(insert(ClientRow), rows)
            tx.session.execute(insert(Key), secrets)
        return Tenant(project.id, owner, [t.text for t in tokens])

    def run(self, tenant: Tenant, *, rounds: int = 1, goal: int) -> UUID:
        """A started run in which all clients of the tenant may take part."""
        space = ParameterSpace.of([("weight", (DIM,), Kind.WEIGHT, Role.SELECTABLE)])
        values = np.zeros(DIM, np.float32)
        rules: Json = {"goal": goal, "quorum": goal, "over_selection": 1, "retry_after": 1}
        policy = {"personal": "learned", "start_round": 0, "growth": 0}
        common: Json = {"policy": policy, "training": {"steps": 1}, "round": rules}
        with Client(self.environment["PUBLIC_URL"], key=tenant.owner) as owner:
            model = owner.create_model(ModelCreate(name="model", space=space.to_json()))
            sent = owner.send_weights(model.id, wire.encode_version(space.digest, values))
            wait(lambda: owner.upload(sent.id).state == "accepted", "the weights")
            settings = RunSettings.model_validate({"rounds": rounds, **common})
            run = owner.create_run(RunCreate(name="run", model_id=model.id, settings=settings))
            owner.start_run(run.id)
        return run.id

    def sql(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the database says."""
        url = self.environment["DATABASE_URL"].replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(query.encode(), values).fetchall()

    # --- load ------------------------------------------------------------------------------------

    def load(self, work: str, lines: Sequence[Sequence[str]], **plan: Any) -> Load:
        """A process of simulated agents; each line is a connection with the keys of its clients."""
        port = int(self.environment["PUBLIC_URL"].rpartition(":")[2])
        store = int(self.environment["S3_ENDPOINT"].rpartition(":")[2])
        file = self.folder / f"load-{uuid4().hex[:8]}.json"
        common = {"work": work, "port": port, "store_port": store, "dim": DIM}
        file.write_text(json.dumps({**common, "lines": lines, **plan}))
        return Load(file)

    def processes(self, name: str) -> list[psutil.Process]:
        """The processes of one service of the stack."""
        pid = next(s.pid for s in self.stack.status() if s.name == name)
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]

    def memory(self, name: str) -> float:
        """Resident memory of the largest process of a service, MiB."""
        return max(float(each.memory_info().rss) for each in self.processes(name)) / 1024**2

    def busy(self) -> dict[str, float]:
        """Processor seconds of each service so far."""
        names = [s.name for s in self.stack.status() if s.pid]
        return {name: sum(map(_seconds, self.processes(name))) for name in names}


def _seconds(process: psutil.Process) -> float:
    try:
        found = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(found.user + found.system)


class Load:
    """One process of ``bench.load``."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.load", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def reaches(self, word: str) -> None:
        """Wait until it says so."""
        assert self._child.stdout is not None
        said = self._child.stdout.readline().strip()
        assert said == word, f"the load generator said {said!r} instead of {word!r}"

    def go(self) -> None:
        """Let it go on from where it waits."""
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()

    def result(self, *, seconds: float = 900.0) -> Samples:
        """What it found, once it has ended."""
        assert self._child.wait(seconds) == 0, "the load generator failed"
        found = json.loads(self._file.with_suffix(".out.json").read_text())
        return Samples([tuple(each) for each in found["samples"]], found["cpu"])


@dataclass(frozen=True)
class Samples:
    """(kind, begin, seconds, status) of every call, and the generator's own processor seconds."""

    calls: list[tuple[str, float, float, int]]
    cpu: float

    def of(self, kind: str) -> Calls:
        return Calls([c for c in self.calls if c[0] == kind])


@dataclass(frozen=True)
class Calls:
    """The calls of one kind."""

    calls: list[tuple[str, float, float, int]]

    @property
    def span(self) -> float:
        """Seconds from the first call's begin to the last one's end."""
        return max(c[1] + c[2] for c in self.calls) - min(c[1] for c in self.calls)

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.calls) / self.span

    def percentile(self, q: float) -> float:
        """Of the latencies, in ms; from the raw samples."""
        return 1000 * float(np.percentile([c[2] for c in self.calls], q, method="higher"))

    def check(self, *statuses: int) -> None:
        """Every call must have had one of these answers."""
        other = [c[3] for c in self.calls if c[3] not in statuses]
        assert not other, f"{len(other)} of {len(self.calls)} calls answered {set(other)}"


def wait(condition: Callable[[], bool], what: str, *, seconds: float = PATIENCE) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@contextmanager
def measured(fleet: Fleet) -> Iterator[dict[str, float]]:
    """Processor seconds that each service uses while the block runs."""
    used: dict[str, float] = {}
    before = fleet.busy()
    yield used
    used.update({name: now - before.get(name, 0.0) for name, now in fleet.busy().items()})
