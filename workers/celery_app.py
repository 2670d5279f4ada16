"""The Celery application of the worker: one task by name, no logic.

Run by ``workers.supervise`` as ``celery worker``. Messages carry a job id and nothing else; losing
every one of them loses nothing.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any
from uuid import UUID

from celery import signals

from app import logs, tracing, wiring
from app.jobs import CAUSE, RUN_JOB, broker
from app.settings import read
from fedselect import aggregate
from workers import running

READY = "worker ready"
celery = broker(read().redis_url.get_secret_value())


@signals.setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]  # no types
def _configure_logs(**_: object) -> None:
    settings = read()
    logs.configure(settings.log_format, settings.log_level)
    for name in ("celery.worker.strategy", "celery.app.trace"):  # each ring twice; ours say more
        logging.getLogger(name).setLevel("WARNING")


@signals.worker_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _compile(**_: object) -> None:
    aggregate.warm()  # before the fork: the pool's processes have it from the start
    wiring.settle()


@signals.worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
def _announce(**_: object) -> None:
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()


@signals.worker_process_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]
def _send_spans(**_: object) -> None:
    tracing.close()


@cache
def _core() -> wiring.Coordinator:
    # Built in the child process at its first task: connections must not be shared over a fork, and
    # the thread that sends spans would not survive it.
    tracing.configure("worker")
    return wiring.build()


@celery.task(name=RUN_JOB, bind=True)  # type: ignore[untyped-decorator]  # celery ships no types
def run_job(task: Any, job_id: str) -> None:
    """Somebody rang for this job."""
    cause = (task.request.headers or {}).get(CAUSE)
    running.answer(_core(), UUID(job_id), cause if isinstance(cause, dict) else None)
