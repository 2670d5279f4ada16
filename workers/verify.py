"""Verification: read a staged file once, check everything, keep the very bytes that were hashed.

Owns the way of a file from ``staging/`` to ``accepted/``. The checks themselves are in
``fedselect.wire``; whatever happens to the staged object afterwards does not matter.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

import numpy as np

from app import objects, updates
from app.errors import Missing
from app.jobs import Lease, Progress
from app.storage import Storage
from app.tables import Assignment, MaskRecord, Model, Round, Run, Upload, Version
from app.wiring import Coordinator
from fedselect import wire
from fedselect.errors import WireError
from fedselect.masks import Mask
from fedselect.policies import RunSettings
from fedselect.space import ParameterSpace
from workers.assemble import assemble

IN_MEMORY = 8 * 1024**2  # larger files are spooled to disk
VALUES_AT_ONCE = 1024**2
ACTOR = "worker"


@dataclass(frozen=True, slots=True)
class Order:
    """What to verify: the upload, and either the plan of its update or the space of its model."""

    upload: Upload
    space: ParameterSpace
    assignment: Assignment | None = None
    mask: MaskRecord | None = None
    round_number: int = 0
    base_sha256: str = ""
    settings: RunSettings | None = None


def verify(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Accept or reject one upload; errors of the store or the database are raised, to try again."""
    order = _load(core, lease)
    upload = order.upload
    try:
        assemble(core.storage, upload)
        with _spooled(core.storage, upload, progress) as file:
            if order.assignment is None:
                _take_weights(core, lease, order, file)
            else:
                _take_update(core, lease, order, file)
    except WireError as error:
        with core.db.transaction(ACTOR) as tx:
            updates.reject(tx, lease, reason=error.code, detail=str(error))
    core.storage.delete([upload.staging_key])


def _load(core: Coordinator, lease: Lease) -> Order:
    with core.db.transaction(ACTOR) as tx:
        upload = tx.session.get_one(Upload, lease.subject_id)
        objects.claim(tx, _key(upload), project=upload.project_id, size=upload.size)
        if upload.assignment_id is None:
            model = tx.session.get_one(Model, upload.model_id)
            return Order(upload, ParameterSpace.from_json(model.space))
        assignment = tx.session.get_one(Assignment, upload.assignment_id)
        run = tx.session.get_one(Run, assignment.run_id)
        model = tx.session.get_one(Model, run.model_id)
        mask_id = assignment.mask_id
        return Order(
            upload,
            ParameterSpace.from_json(model.space),
            assignment,
            tx.session.get_one(MaskRecord, mask_id) if mask_id else None,
            tx.session.get_one(Round, assignment.round_id).number,
            tx.session.get_one(Version, assignment.version_id).sha256,
            RunSettings.model_validate(run.settings),
        )


@contextmanager
def _spooled(storage: Storage, upload: Upload, progress: Progress) -> Iterator[BinaryIO]:
    digest = hashlib.sha256()
    size = 0
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as spool:
        try:
            for chunk in storage.stream(upload.staging_key):
                size += len(chunk)
                if size > upload.size:
                    break
                digest.update(chunk)
                progress()
                spool.write(chunk)
        except Missing as error:
            raise WireError(
                "complete was called, but the file is not in the store", code="upload_missing"
            ) from error
        if size != upload.size:
            raise WireError(f"{size} bytes, {upload.size} were announced", code="upload_size")
        if digest.hexdigest() != upload.sha256:
            raise WireError("the file's SHA-256 is not the announced one", code="upload_digest")
        yield cast(BinaryIO, spool)


def _take_weights(core: Coordinator, lease: Lease, order: Order, file: BinaryIO) -> None:
    layout = wire.read_version_layout(_head(file))
    wire.check_version_head(layout, space_digest=order.space.digest, dim=order.space.dim)
    wire.check_size(layout, order.upload.size)
    _check_values(file, layout)
    key = _keep(core.storage, order.upload, file)
    with core.db.transaction(ACTOR) as tx:
        updates.accept_weights(tx, lease, object_key=key)


def _take_update(core: Coordinator, lease: Lease, order: Order, file: BinaryIO) -> None:
    plan = _plan(core.storage, order)
    layout = wire.read_update_layout(_head(file))
    wire.check_size(layout, order.upload.size)
    meta = wire.check_update_head(layout, plan)
    sent = _section(file, layout, "mask") if "mask" in layout.sections else None
    mask = wire.check_update_mask(layout, plan, sent=sent)
    wire.check_block_rank(_section(file, layout, "block_rank"), mask)
    _check_values(file, layout)
    key = _keep(core.storage, order.upload, file)
    mask_key = _keep_mask(core, order.upload, mask) if sent is not None else None
    found = updates.Verified(key, mask_key, mask.digest, mask.personal, meta.examples)
    with core.db.transaction(ACTOR) as tx:
        updates.accept_update(tx, lease, found)


def _plan(storage: Storage, order: Order) -> wire.UpdatePlan:
    if order.assignment is None or order.settings is None:
        raise RuntimeError("an update without an assignment cannot be verified")
    lower, upper = order.settings.policy.bounds(order.space)
    known = None
    if order.mask is not None:
        known = Mask.from_bytes(order.space.dim, storage.read(order.mask.object_key))
    return wire.UpdatePlan(
        space=order.space.digest,
        run=str(order.assignment.run_id),
        round=order.round_number,
        assignment=str(order.assignment.id),
        base_version=order.base_sha256,
        lower=lower,
        upper=upper,
        known_mask=known,
        known_mask_version=order.mask.number if order.mask else 0,
    )


def _head(file: IO[bytes]) -> bytes:
    file.seek(0)
    first = file.read(8)
    return first + file.read(wire.header_size(first) - 8)


def _section(file: IO[bytes], layout: wire.Layout, name: str) -> bytes:
    section = layout.sections[name]
    file.seek(section.start)
    return file.read(section.stop - section.start)


def _check_values(file: IO[bytes], layout: wire.Layout) -> None:
    section = layout.sections["values"]
    file.seek(section.start)
    left = section.count
    while left:
        count = min(left, VALUES_AT_ONCE)
        wire.check_finite(np.frombuffer(file.read(4 * count), dtype="<f4"))
        left -= count


def _key(upload: Upload) -> str:
    return f"accepted/{upload.project_id}/{upload.sha256}"


def _keep(storage: Storage, upload: Upload, file: BinaryIO) -> str:
    key = _key(upload)
    file.seek(0)
    storage.put(key, file, upload.size)
    return key


def _keep_mask(core: Coordinator, upload: Upload, mask: Mask) -> str:
    key = f"masks/{upload.project_id}/{mask.digest}"
    with core.db.transaction(ACTOR) as tx:
        objects.claim(tx, key, project=upload.project_id, size=mask.packed.size)
    core.storage.put(key, io.BytesIO(mask.to_bytes()), mask.packed.size)
    return key
