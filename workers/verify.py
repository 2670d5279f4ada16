"""Verification: read a staged file once, let it be judged, keep the very bytes that were hashed.

Owns the way of a file from ``staging/`` to ``accepted/`` or ``quarantine/``. Nothing is parsed in
this process: every piece goes to a judge (``workers.court``), which may die of it. Whatever happens
to the staged object afterwards does not matter.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from sqlalchemy import Select, bindparam, func, select

from app import jobs, ledger, objects, updates
from app.db import Tx, per_thread
from app.errors import Missing
from app.jobs import Lease, Progress
from app.storage import Storage
from app.tables import Arm, Assignment, MaskRecord, Model, Round, Run, Upload, Version
from app.wiring import Coordinator
from fedselect import wire
from fedselect.errors import WireError
from fedselect.manifestdocs import ManifestUpdate
from fedselect.masks import Mask
from fedselect.policies import RunSettings
from fedselect.space import ParameterSpace
from workers import bounding
from workers.assemble import assemble
from workers.copying import Copy
from workers.court import COURT, Case, JudgeDied, Verdict

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
    base_key: str = ""
    settings: RunSettings | None = None


def verify(core: Coordinator, lease: Lease, progress: Progress) -> None:
    """Accept or reject one upload.

    Raises:
        Unavailable, JudgeDied: the job is given back, to try again.
    """
    order = _load(core, lease)
    upload = order.upload
    with Copy(core.storage, updates.accepted_key(core, upload), upload.size) as copy:
        try:
            assemble(core.storage, upload)
            verdict = _judge(core.storage, order, copy, progress, again=lease.attempt > 1)
        except WireError as error:
            _refuse(core, lease, copy, upload, error)
        except JudgeDied:
            _after_death(core, lease, copy, upload)
            raise
        else:
            copy.keep()
            _accept(core, lease, order, verdict, progress)
    core.storage.delete([upload.staging_key])


def _load(core: Coordinator, lease: Lease) -> Order:
    with core.db.transaction(ACTOR, "verify.load") as tx:
        row = tx.session.execute(_wanted(), {"upload": lease.subject_id}).one()
        upload, model, assignment, run, arm, current, version, mask = row
        key = updates.accepted_key(core, upload)
        objects.claim(tx, key, project=upload.project_id, size=upload.size)
    space = ParameterSpace.from_json(model.space)
    if assignment is None:
        return Order(upload, space)
    settings = RunSettings.model_validate(run.settings).of_arm(arm.name)
    base = (version.sha256, version.object_key)
    return Order(upload, space, assignment, mask, current.number, *base, settings)


@per_thread
def _wanted() -> Select[*tuple[Any, ...]]:
    """All about ``:upload`` in one question; a model's weights have no assignment."""
    return (
        select(Upload, Model, Assignment, Run, Arm, Round, Version, MaskRecord)
        .outerjoin(Assignment, Assignment.id == Upload.assignment_id)
        .outerjoin(Run, Run.id == Assignment.run_id)
        .join(Model, Model.id == func.coalesce(Upload.model_id, Run.model_id))
        .outerjoin(Arm, Arm.id == Assignment.arm_id)
        .outerjoin(Round, Round.id == Assignment.round_id)
        .outerjoin(Version, Version.id == Assignment.version_id)
        .outerjoin(MaskRecord, MaskRecord.id == Assignment.mask_id)
        .where(Upload.id == bindparam("upload"))
    )


def _judge(
    storage: Storage, order: Order, copy: Copy, progress: Progress, *, again: bool
) -> Verdict:
    upload = order.upload
    case = Case(upload.size, order.space, _plan(storage, order) if order.assignment else None)
    digest, size = hashlib.sha256(), 0
    chunks = _chunks(storage, upload)
    with COURT.judge(new=again) as judge:
        judge.open(case)
        for chunk in chunks:
            size += len(chunk)
            if size > upload.size:
                break
            digest.update(chunk)
            copy.write(chunk)
            judge.feed(chunk)
            progress()
        verdict = judge.decide()
    if size != upload.size:
        raise WireError(f"{size} bytes, {upload.size} were announced", code="upload_size")
    if digest.hexdigest() != upload.sha256:
        raise WireError("the file's SHA-256 is not the announced one", code="upload_digest")
    if verdict.refusal is not None:
        raise verdict.refusal
    return verdict


def _chunks(storage: Storage, upload: Upload) -> Iterator[bytes]:
    stream = storage.stream(upload.staging_key)
    try:
        first = next(stream, b"")
    except Missing as error:
        raise WireError(
            "complete was called, but the file is not in the store", code="upload_missing"
        ) from error
    return chain([first], stream)


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
        max_abs=order.settings.limits.max_abs,
        max_norm=order.settings.limits.max_norm,
        encoding=order.settings.wire.encoding,
    )


def _accept(
    core: Coordinator, lease: Lease, order: Order, verdict: Verdict, progress: Progress
) -> None:
    key = updates.accepted_key(core, order.upload)
    if order.assignment is None:
        with core.db.transaction(ACTOR, "verify.accept_weights") as tx:
            updates.accept_weights(tx, lease, object_key=key)
        return
    if verdict.mask:
        mask = Mask.from_bytes(order.space.dim, verdict.mask)
        mask_key = _keep_mask(core, order.assignment, mask)
        found = updates.Verified(key, mask_key, mask.digest, mask.personal, verdict.examples)
    elif order.mask is not None:
        known = order.mask
        found = updates.Verified(key, None, known.sha256, known.personal, verdict.examples)
    else:
        raise JudgeDied("the process that judges files forgot the mask")
    found, refusal = _measured(core.storage, order, found, progress)
    with core.db.transaction(ACTOR, "verify.accept") as tx:
        if refusal is not None:
            updates.reject(tx, lease, reason="update_unchanged", detail=refusal)
        else:
            updates.accept_update(tx, lease, found, fold_from=core.settings.fold_from)


def _measured(
    storage: Storage, order: Order, found: updates.Verified, progress: Progress
) -> tuple[updates.Verified, str | None]:
    """With the change that the update makes, where the run bounds it; and why it is refused."""
    rules = order.settings.influence if order.settings else None
    if order.settings is None or rules is None or not rules.measures:
        return found, None
    mask_key = found.mask_key or (order.mask.object_key if order.mask else "")
    stored = ManifestUpdate(
        number=0,
        client="",
        object=found.object_key,
        sha256=order.upload.sha256,
        mask_object=mask_key,
        mask_sha256=found.mask_sha256,
        examples=found.examples,
        weight=1,
    )
    base = order.base_key if order.settings.wire.encoding == "f32" else None
    change = bounding.measured(storage, stored, base, order.space.dim, progress)
    still = rules.refuse_unchanged and change.norm == 0 and found.personal < order.space.dim
    refusal = "it shares values, and not one of them differs from the version it began with"
    measured = replace(found, change_norm=change.norm, sketch=change.sketch)
    return measured, refusal if still else None


def _refuse(core: Coordinator, lease: Lease, copy: Copy, upload: Upload, error: WireError) -> None:
    held = _set_aside(core, copy, upload)
    with core.db.transaction(ACTOR, "verify.reject") as tx:
        refused = updates.reject(tx, lease, reason=error.code, detail=str(error))
        if refused:
            _note(tx, upload, held)
    if held and not refused:  # its client may have been erased meanwhile
        core.storage.delete([core.ring.named(updates.quarantine_key(upload))])


def _after_death(core: Coordinator, lease: Lease, copy: Copy, upload: Upload) -> None:
    """The last attempt rejects the update (``workers.running``): keep what killed the judge."""
    if lease.attempt >= core.settings.job_attempts:
        held = _set_aside(core, copy, upload)
        with core.db.transaction(ACTOR, "verify.note") as tx:
            jobs.renew(tx, lease, seconds=core.settings.lease)  # a zombie announces nothing
            _note(tx, upload, held)


def _set_aside(core: Coordinator, copy: Copy, upload: Upload) -> bytes | None:
    """Keep what was read of a refused file in ``quarantine/``; a large one is not kept."""
    held = copy.held
    if held:
        key = core.ring.named(updates.quarantine_key(upload))
        core.storage.put(key, io.BytesIO(held), len(held))
    return held


def _note(tx: Tx, upload: Upload, held: bytes | None) -> None:
    if held:
        body = {"sha256": hashlib.sha256(held).hexdigest(), "size": len(held)}
        subject = f"upload:{upload.id}"
        ledger.append(tx, "upload.quarantined", subject, project=upload.project_id, body=body)


def _keep_mask(core: Coordinator, assignment: Assignment, mask: Mask) -> str:
    key = updates.mask_key(core, assignment, mask.digest)
    with core.db.transaction(ACTOR, "verify.claim_mask") as tx:
        objects.claim(tx, key, project=assignment.project_id, size=mask.packed.size)
    core.storage.put(key, io.BytesIO(mask.to_bytes()), mask.packed.size)
    return key
