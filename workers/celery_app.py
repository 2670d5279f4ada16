"""The Celery application of the worker: one task by name, no logic.

Run by ``workers.supervise`` as ``celery worker``. Messages carry a job id and nothing else; losing
every one of them loses nothing.
"""

from __future__ import annotations

from functools import cache
from uuid import UUID

from app import wiring
from app.jobs import RUN_JOB, broker
from app.settings import read
from workers import running

celery = broker(read().redis_url.get_secret_value())


@cache
def _core() -> wiring.Coordinator:
    # Built in the child process at its first task: connections must not be shared over a fork.
    return wiring.build()


@celery.task(name=RUN_JOB)  # type: ignore[untyped-decorator]  # celery ships no types
def run_job(job_id: str) -> None:
    """Somebody rang for this job."""
    running.answer(_core(), UUID(job_id))
