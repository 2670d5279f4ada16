"""Telling webhooks: what was sealed becomes deliveries, and what is due is sent.

Owns the order of the steps. Nothing is held locked while a receiver thinks; a delivery that was
sent but not noted is sent again, under the same id, so that the receiver can tell.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from uuid import UUID

from app import outbound, webhooks
from app.errors import Refusal
from app.webhooks import Sending
from app.wiring import Coordinator
from fedselect import __version__
from fedselect.hooks import sign

DELIVERER = 0x5EED_0005  # advisory lock
AT_ONCE = 32  # deliveries of a step, so that a slow receiver holds up few others
SENDERS = 8
STEPS = 20  # entries are looked through in so many batches at a time, then it is time to send
ACTOR = "scheduler"
log = logging.getLogger(__name__)


def deliver(core: Coordinator) -> None:
    """One step: follow the ledger, send what is due."""
    with core.db.singleton(DELIVERER) as mine:
        if not mine:
            return
        for _ in range(STEPS):
            with core.db.transaction(ACTOR, "webhooks.follow") as tx:
                looked = webhooks.follow(tx)
            if looked == 0:
                break
        with core.db.transaction(ACTOR, "webhooks.claim") as tx:
            found = webhooks.claim(tx, limit=AT_ONCE, pepper=core.settings.pepper)
        if found:
            with ThreadPoolExecutor(SENDERS) as senders:
                list(senders.map(lambda queue: _tell(core, queue), _queues(found)))


def forget(core: Coordinator) -> None:
    """One step: drop what was delivered, or given up, long ago."""
    with core.db.transaction(ACTOR, "webhooks.forget") as tx:
        webhooks.forget(tx)


def _queues(found: list[Sending]) -> list[list[Sending]]:
    """What each webhook is told, in the ledger's order: receivers side by side, events in turn."""
    queues: defaultdict[UUID, list[Sending]] = defaultdict(list)
    for sending in sorted(found, key=lambda each: each.notice.seq):
        queues[sending.webhook].append(sending)
    return list(queues.values())


def _tell(core: Coordinator, queue: list[Sending]) -> int:
    """Send one webhook's events in turn; returns how many the receiver answered.

    One that does not answer at all is not asked again for the others: each would wait as long.
    """
    answered = sum(1 for _ in takewhile(partial(_send, core), queue))
    for held in queue[answered + 1 :]:
        with core.db.transaction(ACTOR, "webhooks.settle") as tx:
            webhooks.settle(tx, held, status=None, error="held back: no answer before it")
    return answered


def _send(core: Coordinator, sending: Sending) -> bool:
    status, error = None, None
    try:
        status = outbound.post(
            sending.url, *_message(sending), private=core.settings.webhook_private
        )
        error = None if 200 <= status < 300 else f"answered {status}"
    except Refusal as refusal:
        error = str(refusal)
    with core.db.transaction(ACTOR, "webhooks.settle") as tx:
        webhooks.settle(tx, sending, status=status, error=error)
    return status is not None


def _message(sending: Sending) -> tuple[bytes, dict[str, str]]:
    body = sending.notice.model_dump_json().encode()
    message, timestamp = str(sending.id), int(sending.at.timestamp())
    signed = (
        sign(secret, message=message, timestamp=timestamp, body=body) for secret in sending.secrets
    )
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"fedselect/{__version__}",
        "webhook-id": message,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signed),
    }
    return body, headers
