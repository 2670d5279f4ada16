"""The local stack: the whole product on one machine, as child processes under one folder.

Owns the folder (default ``./.fedselect/``: ``data/``, ``logs/``, ``secrets.json``, ``state.json``),
ports, process ids and the order of starting and stopping. Must not import the rest of ``app``: the
caller hands in what happens between servers and product.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import psutil
import psycopg

from app.localprocess import (
    HOST,
    POLL,
    StackError,
    alive,
    end,
    find,
    free_port,
    is_free,
    search,
    spawn,
    until,
    write_private,
)
from app.localservers import SERVERS
from app.localservice import MARK, NOT_YET, PRODUCT, Server, Service

__all__ = ["LocalStack", "ServiceState", "ServiceStatus", "StackError"]

START_PATIENCE = 120.0  # seconds until a service must be ready; a first worker compiles
STOP_PATIENCE = 20.0  # seconds until a service that was asked to stop is killed
LOG_TAIL = 25  # lines of the log in an error

# What asking a given server may end in: it does not answer, or its address makes no sense.
UNUSABLE: tuple[type[Exception], ...] = (*NOT_YET, psycopg.Error, ValueError)
KINDS: tuple[type[Service], ...] = (*SERVERS, *PRODUCT)
_S = TypeVar("_S", bound=Service)


class ServiceState(StrEnum):
    """What is known about a service."""

    RUNNING = "running"
    DEAD = "dead"  # it was started, and nobody stopped it
    NOT_STARTED = "not started"
    GIVEN = "given"  # a server of the caller's is used instead


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service as :meth:`LocalStack.status` found it."""

    name: str
    state: ServiceState
    pid: int | None
    port: int | None
    log: Path


@dataclass(slots=True)
class _Record:
    """One service's entry in ``state.json``; ``pid`` is 0 when it was stopped."""

    port: int
    pid: int = 0
    created: float = 0.0
    command: list[str] = field(default_factory=list)


class LocalStack:
    """PostgreSQL, Redis, S3, coordinator, worker and scheduler under the folder ``root``.

    ``durable=False`` trades safety against power cuts for speed. ``port`` is where the coordinator
    listens (otherwise a port is picked once and kept). ``given`` are the variables (default
    ``os.environ``) that name servers to use instead: ``DATABASE_URL`` (and, if another role owns
    the tables, ``MIGRATION_DATABASE_URL``), ``REDIS_URL`` and ``S3_ENDPOINT``, the last one with
    its ``S3_REGION``, ``S3_BUCKET``, ``S3_ACCESS_KEY`` and ``S3_SECRET_KEY``; a given
    ``KEY_PEPPER``, ``LEDGER_KEY``, ``NOISE_KEY``, ``ENCRYPTION_KEY`` or ``PUBLIC_URL`` wins, too.

    Any number of processes may use the same folder: the truth is in its files and a lock guards
    every change. Every method that starts or stops something raises :class:`StackError`.
    """

    def __init__(
        self,
        root: Path,
        *,
        durable: bool = True,
        port: int | None = None,
        given: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root.resolve()
        self._durable = durable
        self._port = port
        self._given = os.environ if given is None else given

    # --- what a caller may ask for ---------------------------------------------------------------

    def up(
        self, *, product: bool = True, prepare: Callable[[dict[str, str]], None] | None = None
    ) -> None:
        """Start whatever is not running and return when all of it works.

        ``prepare`` gets the environment when the servers work and before the product starts: the
        place for migrations. With ``product=False`` only the servers are started. After an error
        what has started keeps running, so that it can be looked at; :meth:`down` ends it.
        """
        with self._locked():
            self._settle_in()
            for kind in SERVERS:
                if self._is_given(kind):
                    _ask_given(kind, self._given)
            self._bring_up(kind for kind in SERVERS if not self._is_given(kind))
            if prepare is not None:
                prepare(self.environment())
            if product:
                self._bring_up(PRODUCT)

    def down(self) -> None:
        """Stop everything that runs, in reverse order; data, secrets and ports stay."""
        if not self.root.exists():
            return
        with self._locked():
            for kind in reversed(KINDS):
                self._end(kind)

    def start(self, name: str, *, wait: bool = True) -> None:
        """Start one service, and ``wait`` until it works; nothing happens when it runs already."""
        kind = _kind(name)
        if issubclass(kind, Server) and self._is_given(kind):
            raise StackError(f"{name} is not ours to start: {kind.variable} is set")
        with self._locked():
            self._settle_in()
            if wait:
                self._bring_up([kind])
            elif self._find(name) is None:
                self._spawn(self._service(kind))

    def stop(self, name: str, *, kill: bool = False) -> None:
        """Stop one service; ``kill`` ends it and all its children at once, like a power cut."""
        with self._locked():
            self._end(_kind(name), kill=kill)

    def status(self) -> list[ServiceStatus]:
        """What is known about every service, in the order of starting."""
        records = self._records()
        return [self._status(kind, records.get(kind.name)) for kind in KINDS]

    def environment(self) -> dict[str, str]:
        """The variables that tell a process how to use this stack.

        Raises:
            StackError: nothing was ever started in this folder.
        """
        records = self._records()
        if not records:
            raise StackError(f"nothing was started in {self.root} yet")
        own = self._secrets()
        names = ("KEY_PEPPER", "LEDGER_KEY", "NOISE_KEY", "ENCRYPTION_KEY")
        result = {name: own[name] for name in names if name in own}  # an older folder lacks some
        result["PUBLIC_URL"] = f"http://{HOST}:{records['coordinator'].port}"
        result |= {name: self._given[name] for name in result if self._given.get(name)}
        for kind in SERVERS:
            server = self._server(kind)
            reach = server.reach()
            if self._is_given(kind):
                reach = {name: self._given[name] for name in reach if name in self._given}
            result |= reach
        return result

    # --- starting --------------------------------------------------------------------------------

    def _bring_up(self, kinds: Iterable[type[Service]]) -> None:
        services = [self._service(kind) for kind in kinds]
        for service in services:
            if self._find(service.name) is None:
                self._spawn(service)
        for service in services:
            self._wait(service)
            service.provision()

    def _spawn(self, service: Service) -> None:
        self._end_leftovers(type(service))
        service.prepare()
        if service.log.exists():
            service.log.replace(service.log.with_suffix(".1.log"))
        command = service.command()
        env = service.env() | {MARK: str(service.folder)}
        process = spawn(command, env=env, folder=service.folder, log=service.log)
        self._note(service.name, _Record(service.port, process.pid, process.create_time(), command))

    def _wait(self, service: Service) -> None:
        deadline = time.monotonic() + START_PATIENCE
        reason: Exception | str = "it did not answer"
        while time.monotonic() < deadline:
            if self._find(service.name) is None:
                raise StackError(
                    f"{service.name} ended while it started; {service.log} ends:\n"
                    f"{_tail(service.log)}"
                )
            try:
                service.ready()
            except NOT_YET as error:
                reason = error
            else:
                return
            time.sleep(POLL)
        raise StackError(
            f"{service.name} was not ready after {START_PATIENCE:.0f} s ({reason}); "
            f"{service.log} ends:\n{_tail(service.log)}"
        )

    def _service(self, kind: type[Service]) -> Service:
        if issubclass(kind, Server):
            return self._server(kind)
        return self._build(kind, self.environment())

    def _server(self, kind: type[Server]) -> Server:
        return self._build(kind, self._secrets())

    def _build(self, kind: type[_S], settings: Mapping[str, str]) -> _S:
        return kind(
            folder=self._folder(kind),
            log=self._log(kind.name),
            port=self._records()[kind.name].port,
            settings=settings,
            durable=self._durable,
        )

    def _is_given(self, kind: type[Server]) -> bool:
        return bool(self._given.get(kind.variable))

    # --- stopping --------------------------------------------------------------------------------

    def _end(self, kind: type[Service], *, kill: bool = False) -> None:
        process = self._find(kind.name)
        family = []
        if process is not None:
            family = [process, *process.children(recursive=True)]
            if not kill:
                process.send_signal(kind.stop_signal)
                until(lambda: not alive(process), seconds=STOP_PATIENCE)
        for member in family:
            end(member)
        self._end_leftovers(kind)
        record = self._records().get(kind.name)
        if record is not None:
            self._note(kind.name, _Record(record.port))

    def _end_leftovers(self, kind: type[Service]) -> None:
        """End what a dead service left behind: a worker its pool, PostgreSQL a busy backend."""
        for process in search(lambda process: kind.includes(process, self._folder(kind))):
            end(process)

    # --- the folder ------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _settle_in(self) -> None:
        """Complete the folder, secrets and ports, and end what dead services left behind."""
        (self.root / "logs").mkdir(mode=0o700, exist_ok=True)
        (self.root / ".gitignore").write_text("*\n")
        known = self._secrets() if (self.root / "secrets.json").exists() else {}
        if _new_secrets().keys() - known.keys():  # of a new folder, or one of an older version
            write_private(self.root / "secrets.json", json.dumps(_new_secrets() | known, indent=2))
        for kind in KINDS:
            if self._find(kind.name) is None:
                self._end_leftovers(kind)
                self._choose_port(kind)

    def _choose_port(self, kind: type[Service]) -> None:
        records = self._records()
        record = records.setdefault(kind.name, _Record(0))
        if kind.name == "coordinator" and self._port is not None:
            if not is_free(self._port):
                raise StackError(f"port {self._port} is used by another program")
            record.port = self._port
        elif kind.has_port and not (record.port and is_free(record.port)):
            running = [name for name in records if self._find(name) is not None]
            if record.port and running:
                raise StackError(
                    f"another program took port {record.port} of {kind.name} while "
                    f"{', '.join(running)} run; take the stack down and up again"
                )
            record.port = free_port({other.port for other in records.values()})
        self._note(kind.name, record)

    def _log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def _folder(self, kind: type[Service]) -> Path:
        return self.root / "data" / kind.name

    def _secrets(self) -> dict[str, str]:
        content: dict[str, str] = json.loads((self.root / "secrets.json").read_text())
        return content

    def _records(self) -> dict[str, _Record]:
        try:
            content = json.loads((self.root / "state.json").read_text())
        except FileNotFoundError:
            return {}
        return {name: _Record(**entry) for name, entry in content.items()}

    def _note(self, name: str, record: _Record) -> None:
        records = self._records() | {name: record}
        content = {name: asdict(each) for name, each in records.items()}
        write_private(self.root / "state.json", json.dumps(content, indent=2))

    def _find(self, name: str) -> psutil.Process | None:
        """The service's process, if it is really the one that was started and still lives."""
        record = self._records().get(name)
        return find(record.pid, created=record.created) if record and record.pid else None

    def _status(self, kind: type[Service], record: _Record | None) -> ServiceStatus:
        process = self._find(kind.name)
        if process is not None:
            state = ServiceState.RUNNING
        elif issubclass(kind, Server) and self._is_given(kind):
            state = ServiceState.GIVEN
        elif record is not None and record.pid:
            state = ServiceState.DEAD
        else:
            state = ServiceState.NOT_STARTED
        return ServiceStatus(
            name=kind.name,
            state=state,
            pid=process.pid if process else None,
            port=record.port or None if record else None,
            log=self._log(kind.name),
        )


# --- words ---------------------------------------------------------------------------------------


def _kind(name: str) -> type[Service]:
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise StackError(f"no service {name!r}; there are {', '.join(kind.name for kind in KINDS)}")


def _ask_given(kind: type[Server], given: Mapping[str, str]) -> None:
    try:
        kind.ask(given)
    except UNUSABLE as error:
        raise StackError(f"the server in {kind.variable} cannot be used: {error}") from error


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])


def _new_secrets() -> dict[str, str]:
    return {
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "POSTGRES_SERVICE_PASSWORD": secrets.token_hex(24),
        "REDIS_PASSWORD": secrets.token_hex(24),
        "S3_ACCESS_KEY": f"fedselect{secrets.token_hex(4)}",
        "S3_SECRET_KEY": secrets.token_hex(24),
        "KEY_PEPPER": secrets.token_hex(32),
        "LEDGER_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
        "NOISE_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
        "ENCRYPTION_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
    }
