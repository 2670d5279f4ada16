"""What may be cleared away from ``staging/``: files and parts that no live reservation waits for.

Owns the question which uploads are live. A dead one never comes to life again, and keys are never
used twice: what is dead when it is looked up is still dead when it is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import outerjoin

from app.db import Tx
from app.settings import AppSettings
from app.tables import Assignment, Client, Upload

PREFIX = "staging/"
# An update with its assignment and client, weights without them.
SENDERS = outerjoin(
    outerjoin(Upload, Assignment, Assignment.id == Upload.assignment_id),
    Client,
    Client.id == Assignment.client_id,
)
GRACE = timedelta(minutes=10)  # behind a deadline, for clocks that differ and calls under way


@dataclass(frozen=True, slots=True)
class DeadMultipart:
    """A multipart upload that nobody waits for."""

    upload_id: UUID
    key: str
    multipart_id: str


def dead_multiparts(tx: Tx, settings: AppSettings, *, limit: int) -> Sequence[DeadMultipart]:
    """Multipart uploads of reservations that are over, completed ones among them."""
    query = (
        select(Upload.id, Upload.staging_key, Upload.multipart_id)
        .select_from(SENDERS)
        .where(Upload.multipart_id.is_not(None), ~_live(tx, settings))
        .limit(limit)
    )
    rows = tx.session.execute(query)
    return [DeadMultipart(upload, key, begun) for upload, key, begun in rows if begun]


def forget(tx: Tx, dead: DeadMultipart) -> None:
    """Note that a multipart upload was aborted."""
    row = (Upload.id == dead.upload_id) & (Upload.multipart_id == dead.multipart_id)
    tx.session.execute(update(Upload).where(row).values(multipart_id=None))


def live_keys(tx: Tx, settings: AppSettings, keys: Iterable[str]) -> set[str]:
    """Those of the keys that a live reservation or an unverified upload needs."""
    query = (
        select(Upload.staging_key)
        .select_from(SENDERS)
        .where(Upload.staging_key.in_(list(keys)), _live(tx, settings))
    )
    return set(tx.session.scalars(query))


def _live(tx: Tx, settings: AppSettings) -> ColumnElement[bool]:
    kept = timedelta(seconds=settings.multipart_keep)
    lapses = func.coalesce(Assignment.deadline, Upload.created_at + kept)
    barred = func.coalesce(Client.state, "active") == "revoked"  # which is final
    reserved = and_(Upload.state == "reserved", lapses > tx.now - GRACE, ~barred)
    return or_(Upload.state == "uploaded", reserved)
