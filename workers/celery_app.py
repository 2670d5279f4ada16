"""The Celery application of worker and scheduler: tasks by name, no logic.

Run by ``workers.supervise`` as ``celery worker`` and ``celery beat``. Messages carry a
job id or nothing at all; losing every one of them loses nothing.
"""

from __future__ import annotations

from functools import cache
from uuid import UUID

from app import wiring
from app.jobs import RUN_JOB, broker
from app.settings import read
from workers import clearing, running, sweep

settings = read()
EVERY = {  # seconds
    "fedselect.sweep": 1.0,
    "fedselect.seal": 1.0,
    "fedselect.clear": 60.0,
    "fedselect.collect": settings.gc_every,
}
celery = broker(settings.redis_url.get_secret_value())
celery.conf.beat_schedule = {
    name: {"task": name, "schedule": every, "options": {"expires": max(5.0, every)}}
    for name, every in EVERY.items()
}


@cache
def _core() -> wiring.Coordinator:
    # Built in the child process at its first task: connections must not be shared over a fork.
    return wiring.build()


@celery.task(name=RUN_JOB)  # type: ignore[untyped-decorator]  # celery ships no types
def run_job(job_id: str) -> None:
    """Somebody rang for this job."""
    running.run_job(_core(), UUID(job_id))


@celery.task(name="fedselect.sweep")  # type: ignore[untyped-decorator]
def sweep_now() -> None:
    """Let deadlines pass and ring for what was dropped."""
    sweep.sweep(_core())


@celery.task(name="fedselect.seal")  # type: ignore[untyped-decorator]
def seal_now() -> None:
    """Seal new ledger entries."""
    sweep.seal(_core())


@celery.task(name="fedselect.collect")  # type: ignore[untyped-decorator]
def collect_now() -> None:
    """Delete what is too old."""
    sweep.collect(_core())


@celery.task(name="fedselect.clear")  # type: ignore[untyped-decorator]
def clear_now() -> None:
    """Clear away what no reservation waits for."""
    clearing.clear(_core())
