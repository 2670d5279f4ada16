"""Folding: the running sum of one shard grows by the groups that have become complete.

Owns the files of such sums, ``partials/<round>/<part>-<groups>-<epoch>``, and the deletion of all
that was summed for a round which has ended. Whatever goes wrong here costs time alone: what is not
folded is summed when the round closes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from app import jobs, sums
from app.errors import Missing
from app.jobs import Lease, LeaseLost, Progress
from app.storage import Storage
from app.tables import PartialSum
from app.wiring import Coordinator
from fedselect.aggregate import Accumulator
from fedselect.kernels import Sums
from fedselect.manifestdocs import GROUP, ManifestUpdate
from workers import shards

ACTOR = "worker"


def fold(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Add every complete group of a gathering round to the sum of one shard.

    Raises:
        LeaseLost: the round has closed, or an update was withdrawn: another sum is needed.
    """
    with core.db.transaction(ACTOR, "fold.begin") as tx:
        jobs.renew(tx, lease, seconds=core.settings.lease)
        plan = sums.plan(tx, lease.subject_id, lease.part)
        if plan.groups == (plan.known.groups if plan.known else 0):
            sums.nothing_new(tx, lease, plan)
            return
    start = lease.part * plan.shard
    span = (start, min(start + plan.shard, plan.elements))
    accumulator = begun(core.storage, plan.known, plan.updates, span, progress)
    data = pack(accumulator.sums, most=GROUP * plan.groups)
    key = core.ring.named(f"partials/{lease.subject_id}/{lease.part}-{plan.groups}-{lease.epoch}")
    try:
        core.storage.put(key, io.BytesIO(data), len(data))
        with core.db.transaction(ACTOR, "fold.done") as tx:
            before = sums.keep(tx, lease, plan, key=key)
    except LeaseLost:
        core.storage.delete([key])  # it was this lease's alone
        raise
    if before is not None:
        core.storage.delete([before])


def begun(
    storage: Storage,
    known: PartialSum | None,
    updates: Sequence[ManifestUpdate],
    span: tuple[int, int],
    progress: Progress,
) -> Accumulator:
    """The sum of all these updates over elements [start, stop), from the known sum on."""
    start, stop = span
    held = None if known is None else _stored(storage, known, stop - start)
    accumulator = Accumulator(stop - start) if held is None else Accumulator.resume(held)
    for update in updates[GROUP * known.groups if known and held else 0 :]:
        part = shards.read_update(storage, update, start, stop)
        accumulator.add(part.packed, part.values, part.weight, part.scales)
        progress()
    return accumulator


def discard(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Delete what was summed for a round that has ended."""
    keys = list(core.storage.keys(f"partials/{lease.subject_id}/"))
    progress()
    if keys:
        core.storage.delete(keys)
    with core.db.transaction(ACTOR, "discard.done") as tx:
        jobs.finish(tx, lease)


# --- files -------------------------------------------------------------------------------------


def pack(held: Sums, *, most: int) -> bytes:
    """Sums as bytes: totals, numbers of sharers as narrow as ``most`` allows, weights if there are.

    No other format is needed: only the digest in its row tells what such a file belongs to.
    """
    arrays = [held.total.astype("<f8"), held.counts.astype(_narrow(most))]
    arrays += [] if held.weights is None else [held.weights.astype("<f8")]
    return b"".join(array.tobytes() for array in arrays)


def unpack(data: bytes, size: int, *, most: int) -> Sums | None:
    """The sums of ``size`` elements that :func:`pack` has written; None if it did not."""
    narrow = _narrow(most)
    counted = size * (8 + narrow.itemsize)
    if len(data) not in {counted, counted + 8 * size}:
        return None
    total = np.frombuffer(data, "<f8", size).astype(np.float64)
    counts = np.frombuffer(data, narrow, size, 8 * size).astype(np.int32)
    rest = np.frombuffer(data, "<f8", offset=counted).astype(np.float64)
    return Sums(total, counts, rest if rest.size else None)


def _narrow(most: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u1" if most < 2**8 else "<u2" if most < 2**16 else "<u4")


def _stored(storage: Storage, known: PartialSum, size: int) -> Sums | None:
    try:
        return unpack(storage.read(known.object_key), size, most=GROUP * known.groups)
    except Missing:  # a restored backup may lack it
        return None
