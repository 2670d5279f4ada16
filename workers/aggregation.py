"""Aggregation and publishing: from a frozen manifest to a new version file.

Owns the end of a shard's sum and the joining of shards. The arithmetic is in
``fedselect.aggregate``; memory is bounded by the shard, whatever the model or the fleet.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from typing import BinaryIO, cast
from uuid import UUID

from app import jobs, ledger, manifests, objects, rounds, sums
from app.db import Tx
from app.jobs import Lease, LeaseLost, Progress
from app.tables import Round
from app.wiring import Coordinator
from fedselect import wire
from workers import folding, shards

IN_MEMORY = 8 * 1024**2
ACTOR = "worker"


def aggregate_part(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Aggregate one shard and store it; the last shard makes publishing due."""
    with core.db.transaction(ACTOR, "aggregate.begin") as tx:
        jobs.renew(tx, lease, seconds=core.settings.lease)  # a zombie announces nothing
        manifest = manifests.load(tx, lease.subject_id)
        updates, shard = manifest.updates, manifest.shard
        known = sums.fitting(tx, lease.subject_id, lease.part, updates, shard=shard)
        _note(tx, lease, "aggregation.begun", manifest=manifests.digest(tx, lease.subject_id))
    start = lease.part * shard
    span = (start, min(start + shard, manifest.elements))
    accumulator = folding.begun(core.storage, known, updates, span, progress)
    base = shards.read_base(core.storage, manifest, *span)
    data = accumulator.finish(base, manifest.min_contributors).astype("<f4").tobytes()
    key = _partial(lease.subject_id, lease.part)
    core.storage.put(key, io.BytesIO(data), len(data))
    try:
        with core.db.transaction(ACTOR, "aggregate.done") as tx:
            _note(tx, lease, "aggregation.done", sha256=hashlib.sha256(data).hexdigest())
            rounds.part_done(tx, lease)
    except LeaseLost:
        _clear_away(core, lease, key)  # those who had the lease may have cleared up long ago
        raise


def _clear_away(core: Coordinator, lease: Lease, key: str) -> None:
    with core.db.transaction(ACTOR, "aggregate.clear_away") as tx:
        over = rounds.has_ended(tx, lease.subject_id)
    if over:
        core.storage.delete([key])


def publish(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Join the shards to a version file, store it, and publish it under the lease."""
    with core.db.transaction(ACTOR, "publish.begin") as tx:
        jobs.renew(tx, lease, seconds=core.settings.lease)  # a zombie announces nothing
        manifest = manifests.load(tx, lease.subject_id)
        current = tx.session.get_one(Round, lease.subject_id)
        # With the attempt: a zombie of a cancelled one must not reach its successor's file.
        key = f"versions/{current.arm_id}/{current.number}-{current.attempt}"
        head = wire.version_head(manifest.space, manifest.elements)
        size = len(head) + 4 * manifest.elements
        objects.claim(tx, key, project=current.project_id, size=size)
        _note(tx, lease, "publish.begun", manifest=manifests.digest(tx, lease.subject_id))
    parts = -(-manifest.elements // manifest.shard)
    partials = [_partial(lease.subject_id, part) for part in range(parts)]
    digest = hashlib.sha256()
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as spool:
        for piece in (head, *map(core.storage.read, partials)):
            digest.update(piece)
            spool.write(piece)
            progress()
        spool.seek(0)
        # A zombie may write this object as well, but only with the very same bytes.
        core.storage.put(key, cast(BinaryIO, _Reported(cast(BinaryIO, spool), progress)), size)
    with core.db.transaction(ACTOR, "publish.done") as tx:
        rounds.publish(tx, lease, object_key=key, sha256=digest.hexdigest(), size=size)


class _Reported:
    """A file whose every reading is progress, so that a long upload keeps its lease."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        self._progress()
        return self._file.read(size)


def _note(tx: Tx, lease: Lease, action: str, **digests: str) -> None:
    """Before the act what is about to be done to the object store, after it what came of it."""
    body = {"part": lease.part, "attempt": lease.attempt, **digests}
    ledger.append(tx, action, f"round:{lease.subject_id}", project=lease.project_id, body=body)


def _partial(round_id: UUID, part: int) -> str:
    return f"partials/{round_id}/{part}"
