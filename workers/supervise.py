"""The command behind worker and scheduler: a program that is started again when it ends.

``python -m workers.supervise worker …``, where what follows goes to Celery, and ``… schedule``.
Owns the child process, its restarts and the watchdog, which ends a worker that no longer consumes
although work is due (celery#10205: after a reconnect to Redis it may be deaf for ever). Must not
run tasks, nor load the product before the first look: a supervisor outlives what is broken.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from app import logs

CELERY = (sys.executable, "-m", "celery", "-A", "workers.celery_app")
SCHEDULER = (sys.executable, "-m", "workers.scheduler")
LOOK_EVERY = 5.0  # seconds between two looks of the watchdog
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a restart, doubled with each quick death
HEALTHY = 60.0  # seconds after which a death is not a quick one
POLL = 0.1  # seconds; how soon a death or a signal is noticed
log = logging.getLogger("fedselect.supervise")


class Supervisor:
    """Keeps one command running until it is told to stop.

    ``stalled`` gets the seconds since the start and says whether the child should be replaced.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stalled: Callable[[float], bool] | None = None,
        every: float = LOOK_EVERY,
    ) -> None:
        self._command = list(command)
        self._every = every
        self._stalled = stalled
        self._stopping = False
        self._pause = FIRST_PAUSE

    def run(self) -> None:
        """Start the child, and again whenever it ends; SIGTERM and SIGINT are handed on to it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        while not self._stopping:
            started = time.monotonic()
            # A group of its own, so that a dead worker's pool can be ended with it.
            child = subprocess.Popen(self._command, process_group=0)  # noqa: S603 - our own
            try:
                self._attend(child)
            finally:
                _end(child)
            if not self._stopping:
                self._rest(child.returncode, lived=time.monotonic() - started)

    def _note(self, *_: object) -> None:
        self._stopping = True

    def _attend(self, child: subprocess.Popen[bytes]) -> None:
        started = looked = time.monotonic()
        told = False
        while child.poll() is None:
            if self._stopping and not told:
                child.terminate()  # Celery lets tasks under way end; whoever waits may kill us
                told = True
            time.sleep(POLL)
            now = time.monotonic()
            if self._stalled is None or self._stopping or now - looked < self._every:
                continue
            looked = now
            if self._stalled(now - started):
                log.error("work is due and nothing happens: ending the worker")
                return

    def _rest(self, code: int, *, lived: float) -> None:
        self._pause = FIRST_PAUSE if lived > HEALTHY else min(2 * self._pause, LONGEST_PAUSE)
        log.warning("the child ended (%s); starting it again in %.1f s", code, self._pause)
        until = time.monotonic() + self._pause
        while not self._stopping and time.monotonic() < until:
            time.sleep(POLL)


def _end(child: subprocess.Popen[bytes]) -> None:
    # Also after its death: what is left of a worker's pool would work on without being watched.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class Watchdog:
    """Looks at the rows: is work due that nobody touches, although the bell can be rung?"""

    def __call__(self, alive: float) -> bool:
        """Whether to restart; a child gets WATCHDOG seconds to begin."""
        try:
            return self._look(alive)
        except Exception as error:  # whatever is away: a restart would not bring it back
            log.warning("the watchdog cannot look: %s", type(error).__name__)
            return False

    def _look(self, alive: float) -> bool:
        from app import jobs, wiring

        core = wiring.build()
        try:
            seconds = core.settings.watchdog
            if alive < seconds:
                return False
            with core.db.transaction("watchdog", "watchdog.look") as tx:
                job = jobs.stalled(tx, seconds=seconds)
            return job is not None and core.bell.answers()
        finally:
            core.close()


def main(arguments: Sequence[str]) -> None:
    """Supervise ``celery worker`` or the scheduler."""
    logs.configure(os.environ.get("LOG_FORMAT") or "text", "INFO")
    with _metrics_served():
        if list(arguments) == ["schedule"]:
            Supervisor(SCHEDULER).run()
        else:
            Supervisor([*CELERY, *arguments], stalled=Watchdog()).run()


@contextmanager
def _metrics_served() -> Iterator[None]:
    """Where METRICS_PORT is set, let all processes below count together, and serve their counts."""
    port = os.environ.get("METRICS_PORT") or ""
    if not port.isdigit():  # the child will say what is wrong with it
        yield
        return
    from app import exposition

    with tempfile.TemporaryDirectory(prefix="fedselect-metrics-") as folder:
        os.environ[exposition.FOLDER] = folder
        address = os.environ.get("METRICS_ADDRESS") or "127.0.0.1"
        with exposition.served(address, int(port), exposition.of_processes(folder)):
            yield


if __name__ == "__main__":
    main(sys.argv[1:])
