"""Webhooks: who is told of what happens in a project.

Owns the ``webhooks`` and ``deliveries`` rows. Events are the ledger's sealed entries, followed by
number: nothing is written for them where they happen, none is lost and none comes twice to the
rows. Sending is ``workers.deliver``. Must not open connections.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import Select, and_, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert

from app import ledger
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Invalid, Missing
from app.tables import Delivery, Entry, Seal, Webhook
from fedselect.hooks import (
    SECRET_PREFIX,
    TESTED,
    DeliveryInfo,
    Notice,
    WebhookChange,
    WebhookCreate,
    WebhookInfo,
    WebhookIssued,
)

MOST = 20  # webhooks of a project
AT_ONCE = 500  # entries looked through in one step
PAUSES = (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600, 24 * 3600)  # seconds after each failure
CLAIM = timedelta(seconds=60)  # a delivery that died with its sender is tried again after it
KEPT = timedelta(days=14)  # deliveries that have ended
OVERLAP = timedelta(days=1)  # both secrets sign after a rotation


@dataclass(frozen=True, slots=True)
class Sending:
    """One delivery that is ours to send now; ``secrets`` are two during a rotation."""

    id: UUID
    webhook: UUID
    url: str
    notice: Notice
    secrets: tuple[str, ...]
    at: datetime


# --- what owners do ------------------------------------------------------------------------------


def create(tx: Tx, principal: Principal, body: WebhookCreate, *, pepper: bytes) -> WebhookIssued:
    """Tell an address of what is sealed from now on.

    Raises:
        Conflict: the project has as many as it may.
    """
    count = select(func.count()).where(Webhook.project_id == principal.project_id)
    if (tx.session.scalar(count) or 0) >= MOST:
        raise Conflict(f"a project has at most {MOST} webhooks", code="webhook_limit")
    row = Webhook(
        id=uuid4(),
        project_id=principal.project_id,
        url=body.url,
        events=sorted(set(body.events)),
        state="active",
        seen=tx.session.scalar(select(func.max(Seal.seq))) or 0,
        generation=1,
        created_at=tx.now,
    )
    tx.session.add(row)
    tx.session.flush()
    _note(tx, row, "webhook.created", {"events": row.events})
    return WebhookIssued(webhook=infos(tx, [row])[0], secret=_secret(row, pepper, row.generation))


def change(tx: Tx, row: Webhook, body: WebhookChange) -> WebhookInfo:
    """Change a webhook, whose row must be locked; a disabled one skips what happens meanwhile."""
    given = {k: v for k, v in body.model_dump(exclude_unset=True).items() if v is not None}
    if "events" in given:
        given["events"] = sorted(set(given["events"]))
    if given.get("state") == "active" and row.state == "disabled":
        row.seen = tx.session.scalar(select(func.max(Seal.seq))) or 0
    changed = sorted(name for name, value in given.items() if getattr(row, name) != value)
    for name in changed:
        setattr(row, name, given[name])
    if changed:
        # Not the address: it may hold a secret of the receiver's.
        _note(tx, row, "webhook.changed", {"changed": changed, "state": row.state})
    return infos(tx, [row])[0]


def rotate(tx: Tx, row: Webhook, *, pepper: bytes) -> WebhookIssued:
    """A new secret; for a day both sign, so that a receiver can change over."""
    row.generation, row.rotated_at = row.generation + 1, tx.now
    _note(tx, row, "webhook.rotated", {})
    return WebhookIssued(webhook=infos(tx, [row])[0], secret=_secret(row, pepper, row.generation))


def test(tx: Tx, row: Webhook) -> WebhookInfo:
    """Have it told that it was tested.

    Raises:
        Conflict: it is disabled.
    """
    _check_active(row.state)
    _note(tx, row, TESTED, {})
    return infos(tx, [row])[0]


def retry(tx: Tx, principal: Principal, delivery_id: UUID) -> DeliveryInfo:
    """Try a delivery now, with all its attempts again.

    Raises:
        Missing: there is none.
        Conflict: it was delivered, or the webhook is disabled.
    """
    query = (
        select(Delivery, Webhook.state)
        .join(Webhook, Webhook.id == Delivery.webhook_id)
        .where(Delivery.id == delivery_id, Webhook.project_id == principal.project_id)
        .with_for_update(of=Delivery)
    )
    found = tx.session.execute(query).first()
    if found is None:
        raise Missing(f"there is no delivery {delivery_id}")
    delivery, state = found
    _check_active(state)
    if delivery.state == "delivered":
        raise Conflict("it was delivered", code="delivery_done")
    delivery.state, delivery.attempts, delivery.due_at, delivery.finished_at = (
        "waiting",
        0,
        tx.now,
        None,
    )
    return delivery_info(delivery)


def get(tx: Tx, principal: Principal, webhook_id: UUID, *, lock: bool = False) -> Webhook:
    """A webhook of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = listed(principal).where(Webhook.id == webhook_id)
    row = tx.session.scalars(query.with_for_update() if lock else query).first()
    if row is None:
        raise Missing(f"there is no webhook {webhook_id}")
    return row


def listed(principal: Principal) -> Select[Webhook]:
    """The project's webhooks."""
    return select(Webhook).where(Webhook.project_id == principal.project_id)


def deliveries(row: Webhook, state: str | None) -> Select[Delivery]:
    """A webhook's deliveries."""
    query = select(Delivery).where(Delivery.webhook_id == row.id)
    return query if state is None else query.where(Delivery.state == state)


def infos(tx: Tx, rows: Sequence[Webhook]) -> list[WebhookInfo]:
    """Webhooks as the interface shows them."""
    counts = (
        select(Delivery.webhook_id, Delivery.state, func.count())
        .where(Delivery.webhook_id.in_([row.id for row in rows]), Delivery.state != "delivered")
        .group_by(Delivery.webhook_id, Delivery.state)
    )
    found = {(hook, state): count for hook, state, count in tx.session.execute(counts)}
    return [
        WebhookInfo(
            id=row.id,
            url=row.url,
            events=row.events,
            state="active" if row.state == "active" else "disabled",
            seen=row.seen,
            waiting=found.get((row.id, "waiting"), 0),
            dead=found.get((row.id, "dead"), 0),
            created_at=row.created_at,
        )
        for row in rows
    ]


def delivery_info(row: Delivery) -> DeliveryInfo:
    """A delivery as the interface shows it."""
    return DeliveryInfo.model_validate(row, from_attributes=True)


# --- what the scheduler does ---------------------------------------------------------------------


def follow(tx: Tx) -> int:
    """Make deliveries of newly sealed entries; returns how many entries were looked through."""
    newest = tx.session.scalar(select(func.max(Seal.seq))) or 0
    query = (
        select(Webhook)
        .where(Webhook.state == "active", Webhook.seen < newest)
        .order_by(Webhook.id)
        .with_for_update(skip_locked=True)
    )
    looked = 0
    for row in tx.session.scalars(query).all():
        last = min(newest, row.seen + AT_ONCE)
        wanted = or_(
            Entry.action.in_(row.events),
            and_(Entry.action == TESTED, Entry.subject == f"webhook:{row.id}"),
        )
        found = (
            select(Seal.seq)
            .join(Entry, Entry.id == Seal.entry_id)
            .where(Seal.seq > row.seen, Seal.seq <= last)
            .where(Entry.project_id == row.project_id, wanted)
        )
        for seq in tx.session.scalars(found).all():
            _add(tx, row, seq)
        looked += last - row.seen
        row.seen = last
    return looked


def forget(tx: Tx) -> None:
    """Delete the deliveries that ended long ago."""
    tx.session.execute(delete(Delivery).where(Delivery.finished_at < tx.now - KEPT))


def _add(tx: Tx, row: Webhook, seq: int) -> None:
    values = {"id": uuid4(), "webhook_id": row.id, "seq": seq, "state": "waiting", "attempts": 0}
    times = {"due_at": tx.now, "created_at": tx.now}
    tx.session.execute(insert(Delivery).values(**values, **times).on_conflict_do_nothing())


def claim(tx: Tx, *, limit: int, pepper: bytes) -> list[Sending]:
    """Take what is due; who dies with it leaves it to others after a while."""
    query = (
        select(Delivery, Webhook, Entry)
        .join(Webhook, Webhook.id == Delivery.webhook_id)
        .join(Seal, Seal.seq == Delivery.seq)
        .join(Entry, Entry.id == Seal.entry_id)
        .where(Delivery.state == "waiting", Delivery.due_at <= tx.now, Webhook.state == "active")
        .order_by(Delivery.due_at, Delivery.seq)
        .limit(limit)
        .with_for_update(of=Delivery, skip_locked=True)
    )
    found = []
    for row, hook, entry in tx.session.execute(query).all():
        row.due_at, row.attempts = tx.now + CLAIM, row.attempts + 1
        notice = Notice(
            seq=row.seq,
            at=entry.at,
            project_id=hook.project_id,
            event=entry.action,
            actor=entry.actor,
            subject=entry.subject,
            body=entry.body,
        )
        found.append(Sending(row.id, hook.id, hook.url, notice, _secrets(tx, hook, pepper), tx.now))
    return found


def settle(tx: Tx, sending: Sending, *, status: int | None, error: str | None) -> None:
    """Note what came of it; after the last pause it is given up."""
    delivery = tx.session.get_one(Delivery, sending.id, with_for_update=True)
    if delivery.state != "waiting":  # somebody else was faster
        return
    delivery.status, delivery.error = status, error[:300] if error else None
    if error is None:
        delivery.state, delivery.finished_at = "delivered", tx.now
    elif delivery.attempts > len(PAUSES):
        delivery.state, delivery.finished_at = "dead", tx.now
        hook = tx.session.get_one(Webhook, delivery.webhook_id)
        _note(tx, hook, "webhook.given_up", {"seq": delivery.seq, "status": status})
    else:
        delivery.due_at = tx.now + timedelta(seconds=PAUSES[delivery.attempts - 1])


def check_address(url: str, *, private: bool) -> None:
    """Refuse at once what could never be told.

    Raises:
        Invalid: plain HTTP, which only private deployments may use.
    """
    if not private and not url.startswith("https://"):
        raise Invalid(
            "webhooks go to https:// only (setting WEBHOOK_PRIVATE allows others)",
            code="webhook_address",
        )


def _check_active(state: str) -> None:
    if state != "active":
        raise Conflict("this webhook is disabled", code="webhook_disabled")


def _secrets(tx: Tx, row: Webhook, pepper: bytes) -> tuple[str, ...]:
    present = _secret(row, pepper, row.generation)
    if row.rotated_at is None or tx.now - row.rotated_at > OVERLAP:
        return (present,)
    return (present, _secret(row, pepper, row.generation - 1))


def _secret(row: Webhook, pepper: bytes, generation: int) -> str:
    # Derived, not stored: whoever steals the table cannot sign.
    made = hmac.digest(pepper, f"webhook\0{row.id}\0{generation}".encode(), hashlib.sha256)
    return SECRET_PREFIX + base64.b64encode(made).decode()


def _note(tx: Tx, row: Webhook, action: str, body: dict[str, object]) -> None:
    ledger.append(tx, action, f"webhook:{row.id}", project=row.project_id, body=body)
