"""What the database knows of the service's health, read when somebody asks for metrics.

Owns the queries: each answers from an index or a small table, however long the service has been
running. The figures are those of the whole deployment, the same from every API process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from threading import Lock

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app import ledger
from app.db import Database, Tx
from app.exposition import FOLDER, of_processes
from app.tables import Client, Job, Rollout, Round, Run
from fedselect.lifecycle import RoundState, RunState
from fedselect.rolloutdocs import RolloutState

KEPT = 2.0  # seconds that an answer is good for: many may ask, the database is asked once
JOB_STATES = ("due", "leased")
log = logging.getLogger(__name__)


class DatabaseCollector(Collector):
    """A Prometheus collector over one database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = Lock()
        self._kept: list[Metric] = []
        self._until = 0.0

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering must not need the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All gauges; only ``fedselect_database_up`` 0 while the database is away."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._kept = self._look()
                self._until = time.monotonic() + KEPT
            yield from self._kept

    def _look(self) -> list[Metric]:
        up = GaugeMetricFamily("fedselect_database_up", "Whether the database answers: 1 or 0.")
        try:
            with self._db.transaction("metrics", "metrics") as tx:
                found = [*_jobs(tx), *_states(tx), *_ledger(tx)]
        except SQLAlchemyError as error:
            log.warning("metrics without the database: %s", type(error).__name__)
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, *found]


def _jobs(tx: Tx) -> Iterator[Metric]:
    counts = GaugeMetricFamily(
        "fedselect_jobs", "Jobs that are due or leased.", labels=["kind", "state"]
    )
    ages = GaugeMetricFamily(
        "fedselect_job_queue_age_seconds",
        "How long the oldest job that could be done now has been waiting for a worker.",
        labels=["kind"],
    )
    oldest: dict[str, float] = {}
    query = (
        select(Job.kind, Job.state, func.count(), func.min(Job.run_after))
        .where(Job.state.in_(JOB_STATES))
        .group_by(Job.kind, Job.state)
    )
    for kind, state, count, since in tx.session.execute(query):
        counts.add_metric([kind, state], count)
        waiting = (tx.now - since).total_seconds() if state == "due" else 0.0
        oldest[kind] = max(0.0, waiting, oldest.get(kind, 0.0))
    for kind, age in oldest.items():
        ages.add_metric([kind], age)
    yield counts
    yield ages


def _states(tx: Tx) -> Iterator[Metric]:
    for name, column, known in (
        ("rounds", Round.state, list(RoundState)),
        ("runs", Run.state, list(RunState)),
        ("clients", Client.state, []),
        ("rollouts", Rollout.state, list(RolloutState)),
    ):
        gauge = GaugeMetricFamily(
            f"fedselect_{name}", f"{name.capitalize()} by present state.", labels=["state"]
        )
        counts = dict.fromkeys(map(str, known), 0)
        for state, count in tx.session.execute(select(column, func.count()).group_by(column)):
            counts[state] = count
        for state, count in counts.items():
            gauge.add_metric([state], count)
        yield gauge


def _ledger(tx: Tx) -> Iterator[Metric]:
    count, oldest = ledger.waiting(tx)
    lag = (tx.now - oldest).total_seconds() if oldest else 0.0
    yield GaugeMetricFamily(
        "fedselect_ledger_sealing_lag_seconds",
        "Age of the oldest ledger entry that is not sealed.",
        value=max(0.0, lag),
    )
    yield GaugeMetricFamily(
        "fedselect_ledger_unsealed_entries", "Ledger entries that are not sealed.", value=count
    )
    newest = ledger.newest_checkpoint(tx)
    yield GaugeMetricFamily(
        "fedselect_ledger_size_entries",
        "Entries under the newest signed head.",
        value=newest.size if newest else 0,
    )


def registry(db: Database) -> CollectorRegistry:
    """What this API process, or all that count with it, have counted; and the database's gauges."""
    folder = os.environ.get(FOLDER)
    found = of_processes(folder) if folder else CollectorRegistry()
    if not folder:
        found.register(REGISTRY)
    found.register(DatabaseCollector(db))
    return found
