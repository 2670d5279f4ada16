"""Aggregation and publishing: from a frozen manifest to a new version file.

Owns the range reads of one shard and the joining of shards. The arithmetic is in
``fedselect.aggregate``; memory is bounded by the shard, whatever the model or the fleet.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from typing import BinaryIO, cast
from uuid import UUID

import numpy as np

from app import jobs, ledger, manifests, objects, rounds
from app.db import Tx
from app.jobs import Lease, LeaseLost, Progress
from app.storage import Storage
from app.tables import Round
from app.wiring import Coordinator
from fedselect import wire
from fedselect.aggregate import Accumulator, value_range
from fedselect.deltas import Frames, delta_encoding, scale_counts
from fedselect.masks import ByteVector
from fedselect.protocol import Manifest, ManifestUpdate
from fedselect.space import FloatValues, FloatVector

FIRST_READ = 64 * 1024  # covers the head and the rank table of all but very large files
IN_MEMORY = 8 * 1024**2
ACTOR = "worker"


def aggregate_part(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Aggregate one shard and store it; the last shard makes publishing due."""
    with core.db.transaction(ACTOR, "aggregate.begin") as tx:
        jobs.renew(tx, lease, seconds=core.settings.lease)  # a zombie announces nothing
        manifest = manifests.load(tx, lease.subject_id)
        _note(tx, lease, "aggregation.begun", manifest=manifests.digest(tx, lease.subject_id))
    start = lease.part * manifest.shard
    stop = min(start + manifest.shard, manifest.elements)
    accumulator = Accumulator(stop - start)
    for update in manifest.updates:
        packed, values = _read_shard(core.storage, update, start, stop)
        accumulator.add(packed, values, update.weight)
        progress()
    base = _read_base(core.storage, manifest, start, stop)
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
    core.storage.delete(partials)


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


def _read_shard(
    storage: Storage, update: ManifestUpdate, start: int, stop: int
) -> tuple[ByteVector, FloatValues]:
    """The mask bytes and the shared values of elements [start, stop) of one accepted update.

    Of a delta file, the exact decoded deltas in float64.
    """
    length = -(-stop // 8) - start // 8
    packed = np.frombuffer(storage.read(update.mask_object, start // 8, length), dtype=np.uint8)
    head = storage.read(update.object, 0, FIRST_READ)
    layout = wire.read_update_layout(head)
    names = [name for name in ("block_rank", "lengths") if name in layout.sections]
    tables = [layout.sections[name] for name in names]
    if tables[-1].stop > len(head):
        head += storage.read(update.object, len(head), tables[-1].stop - len(head))
    rank = np.frombuffer(head[tables[0].start : tables[0].stop], dtype="<u8")
    offset = layout.sections["values"].start
    if layout.metadata["format"] != wire.CODED_FORMAT:
        first, last = value_range(rank, start, stop)
        data = _range(storage, update.object, head, offset + 4 * first, offset + 4 * last)
        return packed, np.frombuffer(data, dtype="<f4")
    lengths = np.frombuffer(head[tables[1].start : tables[1].stop], dtype="<u4")
    encoding = delta_encoding(layout.metadata["encoding"])
    frames = Frames(encoding, wire.elements_of(layout), rank, lengths)
    first, last = frames.span(start, stop)
    data = _range(storage, update.object, head, offset + first, offset + last)
    return packed, frames.decode(data, start, stop).values(scale_counts(packed, stop - start))


def _read_base(storage: Storage, manifest: Manifest, start: int, stop: int) -> FloatVector:
    head = storage.read(manifest.base_object, 0, FIRST_READ)
    offset = wire.read_version_layout(head).sections["values"].start
    data = _range(storage, manifest.base_object, head, offset + 4 * start, offset + 4 * stop)
    return np.frombuffer(data, dtype="<f4")


def _range(storage: Storage, key: str, head: bytes, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object whose beginning is known already."""
    if stop <= len(head):
        return head[start:stop]
    return storage.read(key, start, stop - start) if stop > start else b""
