"""Aggregation and publishing: from a frozen manifest to a new version file.

Owns the end of a shard's sum and the joining of shards. The arithmetic is in
``fedselect.aggregate``; memory is bounded by the shard, whatever the model or the fleet.
"""

from __future__ import annotations

import hashlib

from app import jobs, ledger, manifests, objects, rounds, sums
from app.db import Tx
from app.jobs import Lease, LeaseLost, Progress
from app.rounds import StoredFile
from app.tables import Round
from app.wiring import Coordinator
from workers import folding, noising, shards
from workers.bounding import BoundedShard
from workers.copying import Copy
from workers.pieces import Joined, Pieces, Shard

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
    base = shards.read_base(core.storage, manifest.base_object, *span)
    total: Shard
    if manifest.noise is not None:
        key = noising.key(core, manifest)
        total = noising.summed(core.storage, manifest, span, key, progress)
    elif manifest.bounds is not None:
        total = BoundedShard(core.storage, manifest, start, progress)
    else:
        total = folding.begun(core.storage, known, updates, span, progress)
    pieces = Pieces(core.storage, manifest, lease.subject_id)
    digest, keys = pieces.store(lease.part, total, base)
    try:
        with core.db.transaction(ACTOR, "aggregate.done") as tx:
            _note(tx, lease, "aggregation.done", sha256=digest)
            rounds.part_done(tx, lease)
    except LeaseLost:
        _clear_away(core, lease, keys)  # those who had the lease may have cleared up long ago
        raise


def _clear_away(core: Coordinator, lease: Lease, keys: list[str]) -> None:
    with core.db.transaction(ACTOR, "aggregate.clear_away") as tx:
        over = rounds.has_ended(tx, lease.subject_id)
    if over:
        core.storage.delete(keys)


def publish(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Join the shards to a version file, and in a run of deltas to a delta file as well; store
    them, and publish the version under the lease.
    """
    with core.db.transaction(ACTOR, "publish.begin") as tx:
        jobs.renew(tx, lease, seconds=core.settings.lease)  # a zombie announces nothing
        manifest = manifests.load(tx, lease.subject_id)
        current = tx.session.get_one(Round, lease.subject_id)
        # With the attempt: a zombie of a cancelled one must not reach its successor's file.
        key = f"versions/{current.arm_id}/{current.number}-{current.attempt}"
        _note(tx, lease, "publish.begun", manifest=manifests.digest(tx, lease.subject_id))
    pieces, delta = Pieces(core.storage, manifest, lease.subject_id), None
    file = _store(core, lease, key, joined=pieces.version(), progress=progress)
    if manifest.encoding != "f32":
        joined = pieces.delta(manifest.encoding, file.sha256)
        delta = _store(core, lease, f"{key}.delta", joined=joined, progress=progress)
    with core.db.transaction(ACTOR, "publish.done") as tx:
        rounds.publish(tx, lease, file, delta)


def _store(
    core: Coordinator, lease: Lease, key: str, *, joined: Joined, progress: Progress
) -> StoredFile:
    with core.db.transaction(ACTOR, "publish.claim") as tx:
        jobs.renew(tx, lease, seconds=core.settings.lease)
        objects.claim(tx, key, project=lease.project_id, size=joined.size)
    digest = hashlib.sha256()
    # A zombie may write this object as well, but only with the very same bytes.
    with Copy(core.storage, key, joined.size) as copy:
        for piece in joined.pieces:
            digest.update(piece)
            copy.write(piece)
            progress()
        copy.keep()
    return StoredFile(key, digest.hexdigest(), joined.size)


def _note(tx: Tx, lease: Lease, action: str, **digests: str) -> None:
    """Before the act what is about to be done to the object store, after it what came of it."""
    body = {"part": lease.part, "attempt": lease.attempt, **digests}
    ledger.append(tx, action, f"round:{lease.subject_id}", project=lease.project_id, body=body)
