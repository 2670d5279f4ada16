"""What a process of the local stack is, and the product's own processes.

Owns the contract between the stack and its services, and the commands of coordinator, worker and
scheduler. Must not know process ids, the state file or any order (`app/localstack.py` does), and
must not import the rest of the product, which runs as child processes.
"""

from __future__ import annotations

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import ClassVar

import psutil
import psycopg
import redis
import urllib3
from minio.error import MinioException

from app.localprocess import HOST

ASK_TIMEOUT = 5.0  # seconds for one readiness question
# In the environment of every process of a service: its folder. A service that dies may leave
# children behind, and this is how they are found.
MARK = "FEDSELECT_LOCAL_SERVICE"


class NotReadyError(Exception):
    """The process runs, but it cannot do its work yet."""


# What an answer to a readiness question may be while a server is still starting.
NOT_YET: tuple[type[Exception], ...] = (
    NotReadyError,
    OSError,
    HTTPException,
    psycopg.OperationalError,
    redis.RedisError,
    MinioException,
    urllib3.exceptions.HTTPError,
)


@dataclass(frozen=True, kw_only=True)
class Service(ABC):
    """One child process of the stack.

    ``folder`` holds its data and is its working directory; ``log`` begins with the present start.
    ``settings`` are the stack's secrets for a server, the whole environment for the product.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    has_port: ClassVar[bool] = True

    folder: Path
    log: Path
    port: int
    settings: Mapping[str, str]
    durable: bool = True

    @abstractmethod
    def command(self) -> list[str]:
        """What to execute; never contains a secret, since everybody can list processes."""

    @abstractmethod
    def env(self) -> dict[str, str]:
        """The complete environment of the process."""

    @abstractmethod
    def ready(self) -> None:
        """Ask the service itself; raises one of ``NOT_YET`` until it works."""

    def prepare(self) -> None:
        """Set up what must exist before the process starts; may be called again and again."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def provision(self) -> None:  # noqa: B027 - most have nothing to do here
        """Create inside the ready service what the product expects there."""

    @classmethod
    def includes(cls, process: psutil.Process, folder: Path) -> bool:
        """Whether a process belongs to the service with this folder, whatever its id."""
        return bool(process.environ().get(MARK) == str(folder))


class Server(Service):
    """A server that the product uses; a real one takes its place when ``variable`` is set."""

    variable: ClassVar[str]

    @abstractmethod
    def reach(self) -> dict[str, str]:
        """The variables that tell the product how to reach this server."""

    @staticmethod
    @abstractmethod
    def ask(variables: Mapping[str, str]) -> None:
        """Raise one of ``NOT_YET`` unless the server behind these variables answers."""

    def ready(self) -> None:
        """Ask through the variables that the product will use."""
        self.ask(self.reach())

    def env(self) -> dict[str, str]:
        """A bare environment: nothing of the caller's shell configures a server by accident."""
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
        }


class ProductProcess(Service):
    """A part of the product itself: this interpreter with the stack's environment on top."""

    def env(self) -> dict[str, str]:
        """The caller's environment, so that every setting of the product can be given.

        All but one: the product has no use for the role that owns its tables.
        """
        found = {**os.environ, **self.settings, "PYTHONUNBUFFERED": "1"}
        found.pop("MIGRATION_DATABASE_URL", None)
        return found


class Coordinator(ProductProcess):
    """The HTTP service."""

    name = "coordinator"

    def command(self) -> list[str]:
        """Uvicorn with the application's factory."""
        options = ["--host", HOST, "--port", str(self.port), "--timeout-graceful-shutdown", "10"]
        return [sys.executable, "-m", "uvicorn", "--factory", "app.main:serve", *options]

    def ready(self) -> None:
        """Ask ``/health/ready`` (not through urllib, which would obey proxy variables)."""
        connection = HTTPConnection(HOST, self.port, timeout=ASK_TIMEOUT)
        try:
            connection.request("GET", "/health/ready")
            answer = connection.getresponse()
            if answer.status != 200:
                raise NotReadyError(answer.read(400).decode(errors="replace"))
        finally:
            connection.close()


class SupervisedProcess(ProductProcess):
    """A program that is started again whenever it ends; its log must say when it is ready."""

    has_port = False
    arguments: ClassVar[tuple[str, ...]]
    announcement: ClassVar[str]

    def command(self) -> list[str]:
        """The supervisor of `workers/`, and what it is to run."""
        return [sys.executable, "-m", "workers.supervise", *self.arguments]

    def ready(self) -> None:
        """Look for the announcement in the log of this start."""
        if self.announcement not in self.log.read_text(errors="replace"):
            raise NotReadyError(f"the log does not say {self.announcement!r} yet")


class Worker(SupervisedProcess):
    """The Celery worker."""

    name = "worker"
    arguments = (
        *("worker", "--concurrency", "2"),
        *("--without-gossip", "--without-mingle"),
    )
    announcement = "worker ready"


class Scheduler(SupervisedProcess):
    """What happens as time passes: deadlines, dropped doorbells, sealing, deleting."""

    name = "scheduler"
    arguments = ("schedule",)
    announcement = "scheduler ready"


PRODUCT: tuple[type[ProductProcess], ...] = (Coordinator, Worker, Scheduler)
