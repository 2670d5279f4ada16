"""The scheduler: does, as time passes, what no request and no job brings about.

Owns the rhythm alone. It does the work itself instead of ringing for it: deadlines pass and the
ledger is sealed however busy the workers are, and while Redis is away. Any number of schedulers may
run, since every step holds an advisory lock. Run by ``python -m workers.supervise schedule``.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

from app import logs, metrics, tracing, wiring
from app.errors import Unavailable
from app.wiring import Coordinator
from workers import clearing, deliver, sweep

READY = "scheduler ready"
HEARTBEAT = Path(tempfile.gettempdir()) / "fedselect-scheduler"  # touched after every sweep
CLEAR_EVERY = 60.0  # seconds
LEAVE = 5.0  # seconds that steps under way get; dying in one does no harm
log = logging.getLogger("fedselect.scheduler")
Step = Callable[[Coordinator], None]


def repeat(step: Step, core: Coordinator, *, every: float, stop: Event) -> None:
    """Do a step every so many seconds until told to stop; an error is logged and tried again."""
    while not stop.is_set():
        begun = time.perf_counter()
        outcome = _attempt(step, core, every)
        seconds = time.perf_counter() - begun
        metrics.STEPS.labels(step.__name__, outcome).observe(seconds)
        stop.wait(every)


def _attempt(step: Step, core: Coordinator, every: float) -> str:
    try:
        step(core)
    except Unavailable as error:
        log.warning("%s: %s", step.__name__, error)
        return "away"
    except Exception:
        log.exception("%s failed; trying again in %.0f s", step.__name__, every)
        return "failed"
    return "done"


def sweep_and_tell(core: Coordinator) -> None:
    """Sweep, and leave a sign of life, also when a server is away."""
    try:
        sweep.sweep(core)
    finally:
        HEARTBEAT.touch()


def main() -> None:
    """Run all steps, each in a thread of its own: a long collection holds up no deadline."""
    core = wiring.build()
    logs.configure(core.settings.log_format, core.settings.log_level)
    tracing.configure("scheduler")
    wiring.settle()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    rhythm: list[tuple[Step, float]] = [
        (sweep_and_tell, 1.0),
        (sweep.seal, 1.0),
        (deliver.deliver, 1.0),
        (clearing.clear, CLEAR_EVERY),
        (deliver.forget, CLEAR_EVERY),
        (sweep.collect, core.settings.gc_every),
    ]
    threads = [
        Thread(
            target=repeat,
            args=(step, core),
            kwargs={"every": every, "stop": stop},
            name=step.__name__,
            daemon=True,
        )
        for step, every in rhythm
    ]
    for thread in threads:
        thread.start()
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    stop.wait()
    for thread in threads:
        thread.join(LEAVE)
    tracing.close()


if __name__ == "__main__":
    main()
