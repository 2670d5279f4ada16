"""Builds the coordinator's parts from its settings, for the API and the workers alike.

Owns construction and the one real clock. Must not contain rules or know HTTP.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import UTC, datetime

from app import failpoints, metrics
from app.db import Clock, Database
from app.encrypted import KeyRing, encrypted
from app.heads import StoredHeads
from app.jobs import Doorbell
from app.ledger import Sealer
from app.limits import Callers, Rate
from app.oidc import Issuer
from app.settings import AppSettings, read
from app.storage import S3Storage


@dataclass(frozen=True, slots=True)
class Coordinator:
    """Everything a request or a job needs."""

    settings: AppSettings
    db: Database
    storage: S3Storage
    ring: KeyRing
    sealer: Sealer
    heads: StoredHeads
    bell: Doorbell
    callers: Callers
    issuer: Issuer | None

    def close(self) -> None:
        """Release connections."""
        self.db.close()


def now() -> datetime:
    """The wall clock, UTC."""
    return datetime.now(UTC)


def settle() -> None:
    """Take what is in memory by now out of the garbage collector's sight; once in a process's life.

    All of it stays as long as the process. A full collection looks at every object of every
    library, for a tenth of a second and more in which nobody gets an answer.
    """
    gc.collect()
    gc.freeze()


def build(settings: AppSettings | None = None, *, clock: Clock = now) -> Coordinator:
    """Build all parts; connections are opened when they are first used."""
    settings = settings or read()
    bell = failpoints.bracket(Doorbell(settings.redis_url.get_secret_value()), "bell")
    db = Database(
        settings.database_url.get_secret_value(),
        pool=settings.database_pool,
        clock=clock,
        bell=bell.ring,
        patience=settings.idle_transaction,
    )
    sealer = Sealer(settings.ledger_seed, settings.ledger_origin)
    ring = KeyRing(settings.encryption_keys)
    storage = metrics.observed(failpoints.bracket(S3Storage(settings), "store"))
    storage = encrypted(storage, ring)
    heads = StoredHeads(storage, settings.ledger_origin)
    rate = Rate(settings.calls_per_second, settings.calls_burst)
    callers = Callers(
        settings.redis_url.get_secret_value(), rate, at_once=settings.calls_in_progress
    )
    issuer = None
    if settings.oidc_issuer is not None:
        issuer = Issuer(settings.oidc_issuer, settings.oidc_audience)
    return Coordinator(settings, db, storage, ring, sealer, heads, bell, callers, issuer)
