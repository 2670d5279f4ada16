"""A local stack of real processes under fire: killed on purpose, started again by a watchman.

The watchman stands for what every deployment has (systemd, Kubernetes): it starts whatever is
dead, without waiting for anything. Settings of the service are given as environment variables.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Self
from uuid import UUID

import psutil
import psycopg
import redis

from app import keys, tenants, wiring
from app.cli import prepare
from app.localprocess import until
from app.localstack import START_PATIENCE, LocalStack, ServiceState, StackError
from app.settings import AppSettings
from fedselect.client import AsyncClient, Client, Retries

SERVICES = ("postgres", "redis", "s3", "coordinator", "worker", "scheduler")
GLANCE = 0.2  # seconds between two looks of the watchman
PATIENT = {"tries": 60, "first": 0.1, "longest": 1.0, "obeyed": 1.0}  # outlasts any restart


class Stack:
    """The whole product below ``folder``, watched while its ``with`` block runs."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        settings = {"calls_per_second": 100_000, "calls_burst": 100_000} | settings
        self._settings = {name.upper(): str(value) for name, value in settings.items()}
        self._local = LocalStack(folder, given={})
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self._down: set[str] = set()
        self.extra: list[subprocess.Popen[bytes]] = []
        self.kills: dict[str, int] = dict.fromkeys(SERVICES, 0)

    def __enter__(self) -> Self:
        self._before = {name: os.environ.get(name) for name in self._settings}
        os.environ.update(self._settings)
        try:
            self._local.up(prepare=lambda environment: prepare(self.folder, environment))
        except BaseException:
            self.__exit__()
            raise
        self.environment = self._local.environment()
        self.core = wiring.build(
            AppSettings(**{k.lower(): v for k, v in (self.environment | self._settings).items()})
        )
        self._watchman = threading.Thread(target=self._watch, daemon=True)
        self._watchman.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if hasattr(self, "core"):
            self._watchman.join(90)
            self.core.close()
        self.end_extra_workers()
        self._local.down()
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    # --- who asks --------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self.environment["PUBLIC_URL"]

    def project(self, name: str) -> tuple[UUID, str]:
        """A tenant of its own, and its owner's key."""
        with self.core.db.transaction("soak", "soak") as tx:
            project = tenants.ensure_project(tx, organisation="soak", project=name)
            issued = keys.first(tx, self.core.settings.pepper, project, role="owner")
            return project.id, issued.key

    def client(self, key: str | None, **changes: Any) -> Client:
        """The SDK, patient enough for everything that happens here."""
        return Client(self.url, key=key, retries=Retries(Random(), **(PATIENT | changes)))

    def async_client(self, key: str | None, **changes: Any) -> AsyncClient:
        return AsyncClient(self.url, key=key, retries=Retries(Random(), **(PATIENT | changes)))

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the database says to its owner."""
        url = self.environment.get("MIGRATION_DATABASE_URL", self.environment["DATABASE_URL"])
        plain = url.replace("+psycopg", "")
        with psycopg.connect(plain, autocommit=True, connect_timeout=5) as connection:
            found = connection.execute(query, values or None)
            return found.fetchall() if found.description else []

    @contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        with redis.Redis.from_url(self.environment["REDIS_URL"], socket_timeout=5) as client:
            yield client

    # --- what is done to it ----------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """``kill -9`` a service with all its children, and start it again at once."""
        self.stop(name)
        self.start(name)

    def stop(self, name: str) -> None:
        """``kill -9`` a service that stays down until :meth:`start`."""
        with self._busy:
            self._down.add(name)
            self._local.stop(name, kill=True)
            self.kills[name] += 1

    def start(self, name: str, *, wait: bool = False) -> None:
        """Let a service come back, at once or when the watchman can."""
        with self._busy:
            self._down.discard(name)
            with suppress(StackError):
                self._local.start(name, wait=wait)

    def extra_workers(self, count: int) -> None:
        """Work with ``count`` single-process workers instead of the stack's own one; returns when
        they are ready.
        """
        if "worker" not in self._down:
            self.stop("worker")
        self.end_extra_workers()
        before = self._ready_extra()
        for number in range(count):
            options = ["--concurrency", "1", "--without-gossip", "--without-mingle"]
            options += ["-n", f"extra{number}@%h", "--loglevel", "INFO"]
            log = self.folder / "logs" / f"extra{number}.log"
            with log.open("ab") as output:
                child = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "celery",
                        "-A",
                        "workers.celery_app",
                        "worker",
                        *options,
                    ],
                    env={**os.environ, **self.environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.extra.append(child)
        if not until(lambda: self._ready_extra() == before + count, seconds=START_PATIENCE):
            raise TimeoutError(f"{count} workers were not ready in {START_PATIENCE:.0f} s")

    def _ready_extra(self) -> int:
        """How often an extra worker has said that it is ready."""
        logs = (self.folder / "logs").glob("extra*.log")
        return sum(log.read_text().splitlines().count("worker ready") for log in logs)

    def end_extra_workers(self) -> None:
        """``kill -9`` them with their children."""
        for child in self.extra:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(child.pid)
                for process in (parent, *parent.children(recursive=True)):
                    process.kill()
            child.wait()
        self.extra.clear()

    # --- the watchman ----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(GLANCE):
            for name in self._dead():
                with self._busy, suppress(StackError):
                    if name not in self._down and not self._ended.is_set():
                        self._local.start(name, wait=False)

    def _dead(self) -> list[str]:
        lost = {ServiceState.DEAD, ServiceState.NOT_STARTED}
        found = [s.name for s in self._local.status() if s.state in lost]
        return [name for name in found if name not in self._down]
