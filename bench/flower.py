"""Flower's side of the turnaround: SuperLink, SuperNodes and FedAvg on this machine.

Owns Flower's environment (``.venv-flower/``, made at the first use, never part of ``make install``)
and its processes. Telemetry and the look for updates are switched off; all ports are free ones on
127.0.0.1, and everything ends with the ``with`` block.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from app.localprocess import HOST, end, free_port, until
from bench.memory import Peaks

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-flower"
PINS = Path(__file__).with_name("flower-constraints.txt")
APP = Path(__file__).with_name("flower_app")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
INSTALL_PATIENCE = 600.0  # seconds


def install() -> str:
    """Make the environment unless it is there; returns the versions in it.

    Raises:
        CalledProcessError: the packages cannot be had.
    """
    pins, done = PINS.read_text(), VENV / "pins"
    python = str(VENV / "bin" / "python")
    if not done.exists() or done.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        packages = ["--constraint", str(PINS), "flwr", "numpy"]
        command = [python, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True, timeout=INSTALL_PATIENCE)
        done.write_text(pins)
    return ", ".join(line.replace("==", " ") for line in pins.splitlines() if "==" in line)


@contextmanager
def federation(folder: Path, *, clients: int, **config: Any) -> Iterator[tuple[Path, Peaks]]:
    """A run under way; yields the file in which its rounds are noted, and the memory it takes."""
    folder.mkdir(parents=True)
    (folder / "home").mkdir()
    notes = folder / "notes"
    started: list[subprocess.Popen[bytes]] = []
    ports: set[int] = set()

    def port() -> int:
        ports.add(found := free_port(ports))
        return found

    def start(*command: str) -> subprocess.Popen[bytes]:
        environment = os.environ | QUIET | {"FLWR_HOME": str(folder / "home")}
        environment["PATH"] = f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
        with (folder / f"{len(started)}.log").open("wb") as log:
            child = subprocess.Popen(
                [str(VENV / "bin" / command[0]), *command[1:]],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(child)
        return child

    link = f"{HOST}:{(link_port := port())}"
    config |= {"clients": clients, "notes": str(notes)}
    given = " ".join(f"{k}={_toml(v)}" for k, v in config.items())
    try:
        where = ("--insecure", "--host", HOST, "--port")
        start(
            "flower-superlink", *where, str(link_port), "--disable-runtime-dependency-installation"
        )
        _listening(link_port)
        for number in range(clients):
            own = ("--superlink", link, "--node-config", f"partition-id={number}")
            start("flower-supernode", *where, str(port()), *own)
        (folder / "home" / "config.toml").write_text(_connection(link))
        with Peaks() as peaks:
            start("flwr", "run", str(APP), "bench", "--run-config", given)
            yield notes, peaks
    finally:
        for child in started:
            _end_family(child)


def check(clients: int) -> None:
    """Give up where Flower does: on a machine that is too busy it starts client processes anew
    before the old ones have begun, until nothing else runs.

    Raises:
        RuntimeError: there are three times as many as clients.
    """
    family = psutil.Process().children(recursive=True)
    names = [name for name in map(_command, family) if "flwr-clientapp" in name]
    if len(names) > 3 * clients:
        raise RuntimeError(f"{len(names)} client processes of Flower: the machine is too busy")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _connection(address: str) -> str:
    lines = '[superlink]\ndefault = "bench"\n\n[superlink.bench]\n'
    return f'{lines}address = "{address}"\ninsecure = true\n'


def _listening(port: int) -> None:
    def answers() -> bool:
        return any(
            c.laddr.port == port and c.status == psutil.CONN_LISTEN
            for c in psutil.net_connections("tcp")
        )

    if not until(answers, seconds=60):
        raise TimeoutError("Flower's SuperLink does not listen")


def _end_family(child: subprocess.Popen[bytes]) -> None:
    family = []
    try:
        parent = psutil.Process(child.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        pass
    for process in family:
        end(process)
    child.wait()
