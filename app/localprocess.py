"""Processes, ports and private files of this machine, for the local stack.

The only module that starts processes. Must not know which services there are.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from fedselect.errors import FedSelectError

HOST = "127.0.0.1"
# Below the range that systems use for outgoing connections (32768 on Linux, 49152 elsewhere): a
# client that keeps knocking at a stopped server's port there may end up connected to itself.
PORTS = range(20_000, 32_000)
POLL = 0.02  # seconds between two looks
KILL_PATIENCE = 10.0  # seconds until a killed process must be gone
# The clock that create times are read from may be corrected while a process lives.
SAME_TIME = 2.0  # seconds


class StackError(FedSelectError):
    """The local stack could not do what was asked; the text ends with the log when there is one."""

    code = "local_stack"


def run(command: list[str], *, env: Mapping[str, str], folder: Path) -> None:
    """Run a command that ends by itself, and expect success."""
    done = subprocess.run(  # noqa: S603 - our own binaries, no shell
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise StackError(
            f"{command} failed ({done.returncode}):\n{done.stdout.decode(errors='replace')}"
        )


def spawn(command: list[str], *, env: Mapping[str, str], folder: Path, log: Path) -> psutil.Process:
    """Start a process in its own session that outlives this one."""
    with log.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603 - our own binaries, no shell
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # From here on only the process id and the create time count, not this handle.
    child.returncode = 0
    return psutil.Process(child.pid)


def find(pid: int, *, created: float) -> psutil.Process | None:
    """The living process with this id, if it is the one that was created then."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < SAME_TIME and alive(process):
            return process
    return None


def search(wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """All processes that are ours to look at and wanted."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if wanted(process):
                found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    """Whether any of it runs; what is left of our own children is buried here.

    A killed process is a zombie at once, but it holds its ports and files until its last thread
    has ended.
    """
    try:
        if process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1:
            return bool(process.is_running())
        os.waitpid(process.pid, os.WNOHANG)
    except (psutil.NoSuchProcess, ChildProcessError):
        pass
    return False


def end(process: psutil.Process) -> None:
    """Kill it, unless it has gone already, and wait until it has."""
    if not alive(process):
        return
    with suppress(psutil.NoSuchProcess):
        process.kill()
    if not until(lambda: not alive(process), seconds=KILL_PATIENCE):
        raise StackError(f"process {process.pid} survives SIGKILL")


def until(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Wait for something; False when it did not happen in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def is_free(port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        # As servers do: connections of a server that has ended must not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port(taken: set[int]) -> int:
    """Pick a port where nobody listens."""
    for _ in range(1000):
        port = secrets.choice(PORTS)
        if port not in taken and is_free(port):
            return port
    raise StackError(f"no free port between {PORTS.start} and {PORTS.stop}")


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can read."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
