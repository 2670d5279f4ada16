"""Clearing ``staging/`` and unfinished multipart uploads, a bounded batch at a time.

Owns no state and decides nothing: ``app.staging`` says what is dead. Every deletion may be
repeated, so a crash costs a second pass at most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from itertools import islice
from typing import TypeVar

from app import staging
from app.storage import BEGINNING, IncompleteMultipart
from app.wiring import Coordinator

CLEARER = 0x5EED_0004  # advisory lock
BATCH = 500  # keys looked up at once
MOST = 1000  # deletions of one kind in one pass
ACTOR = "scheduler"
log = logging.getLogger(__name__)
T = TypeVar("T")


def clear(core: Coordinator) -> None:
    """One pass over dead multipart uploads, forgotten ones, and files without a reservation."""
    with core.db.singleton(CLEARER) as mine:
        if not mine:
            return
        done = (_abort_dead(core), _abort_forgotten(core), _delete_files(core))
        if any(done):
            log.info("cleared %d dead, %d forgotten multiparts, %d staged files", *done)


def _abort_dead(core: Coordinator) -> int:
    with core.db.transaction(ACTOR, "find_dead") as tx:
        found = staging.dead_multiparts(tx, core.settings, limit=MOST)
    for dead in found:
        core.storage.abort_multipart(dead.key, dead.multipart_id)
        with core.db.transaction(ACTOR, "forget_multipart") as tx:
            staging.forget(tx, dead)
    return len(found)


def _abort_forgotten(core: Coordinator) -> int:
    """Those that no row names: replaced ones, and what a crash of ours has left anywhere."""
    with core.db.transaction(ACTOR, "find_live") as tx:
        before = tx.now - timedelta(seconds=core.settings.multipart_keep)
    old = (found for found in core.storage.multiparts("") if _is_old(found, before))
    aborted = 0
    for batch in _batches(islice(old, MOST)):
        with core.db.transaction(ACTOR, "find_live") as tx:
            live = staging.live_keys(tx, core.settings, [found.key for found in batch])
        for found in batch:
            if found.key not in live:
                core.storage.abort_multipart(found.key, found.upload_id)
                aborted += 1
    return aborted


def _is_old(found: IncompleteMultipart, before: datetime) -> bool:
    # Without a date it may be what a worker writes at this moment; below staging/ no worker writes.
    known = found.initiated != BEGINNING or found.key.startswith(staging.PREFIX)
    return known and found.initiated < before


def _delete_files(core: Coordinator) -> int:
    with core.db.transaction(ACTOR, "find_live") as tx:
        before = tx.now - staging.GRACE
    old = (found.key for found in core.storage.entries(staging.PREFIX) if found.modified < before)
    deleted = 0
    for batch in _batches(old):
        with core.db.transaction(ACTOR, "find_live") as tx:
            dead = sorted(set(batch) - staging.live_keys(tx, core.settings, batch))
        core.storage.delete(dead)
        deleted += len(dead)
        if deleted >= MOST:
            break
    return deleted


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
