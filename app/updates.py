"""Uploads and updates: reserve, complete, accept, reject.

Owns the ``uploads``, ``updates`` and ``masks`` rows. Bytes never pass through here: clients PUT
to the object store, ``workers.verify`` reads it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Literal, cast
from uuid import UUID, uuid4

from sqlalchemy import func, select

from app import catalog, checkins, clients, conduct, jobs, ledger, metrics, objects, quotas, rounds
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Missing, TooLarge
from app.settings import AppSettings
from app.tables import Assignment, MaskRecord, Model, Round, Run, Update, Upload
from app.wiring import Coordinator
from fedselect.lifecycle import AssignmentEvent, AssignmentState
from fedselect.masks import BLOCK
from fedselect.uploads import UploadReserve, UploadStatus, UploadTicket
from fedselect.wire import HEADER_CAP

VERIFY = "verify"


@dataclass(frozen=True, slots=True)
class Verified:
    """What verification found out about an update."""

    object_key: str
    mask_key: str | None  # None: the mask was left out, the known one counts
    mask_sha256: str
    personal: int
    examples: int
    change_norm: float | None = None  # both only where influence is bounded
    sketch: bytes | None = None


def reserve_update(
    tx: Tx, principal: Principal, assignment_id: UUID, body: UploadReserve, *, core: Coordinator
) -> Upload:
    """Announce an assignment's update; announcing another file replaces the reservation.

    Raises:
        Conflict: the round takes no more updates, or this one is already in.
        TooLarge: no update of this model is that large.
        TooMany: the client's quota is used up.
    """
    client = clients.admit(tx, principal)
    assignment = checkins.own_assignment(tx, principal.client, assignment_id)
    if assignment.kind != "train":
        raise Conflict("this assignment is an evaluation: it has no upload", code="assignment_kind")
    rounds.hold_runs(tx, [assignment.run_id])
    tx.session.refresh(assignment, with_for_update=True)
    if not rounds.gathering(tx, assignment):
        raise Conflict("the round takes no more updates", code="assignment_expired")
    run = tx.session.get_one(Run, assignment.run_id)
    _check_size(body.size, tx.session.get_one(Model, run.model_id).elements)
    rounds.move_assignment(tx, assignment, AssignmentEvent.RESERVE)
    query = select(Upload).where(Upload.assignment_id == assignment.id)
    upload = tx.session.scalars(query.with_for_update()).first()
    if client is not None:
        quotas.count_call(tx, client, core.settings)
    if upload is not None and _resumes(upload, body):
        return upload
    if client is not None:
        quotas.count_bytes(tx, client, body.size, core.settings)
    if upload is None:
        upload = Upload(id=uuid4(), project_id=assignment.project_id, assignment_id=assignment.id)
    elif upload.multipart_id is not None:
        old = (upload.staging_key, upload.multipart_id)
        tx.after_commit(partial(core.storage.abort_multipart, *old))
    return _stage(tx, upload, body)


def reserve_weights(
    tx: Tx, principal: Principal, model_id: UUID, body: UploadReserve, *, core: Coordinator
) -> Upload:
    """Announce a model's initial weights; announcing the same large file again resumes it.

    Raises:
        Conflict: the model has its weights already.
        TooLarge: more bytes than the model has.
    """
    model = catalog.get_model(tx, principal, model_id, lock=True)
    if catalog.initial_version(tx, model.id) is not None:
        raise Conflict("the model has its initial weights already", code="model_has_weights")
    _check_size(body.size, model.elements)
    # Half the time that it is kept: what is being swept is never taken up again.
    fresh = Upload.created_at > tx.now - timedelta(seconds=core.settings.multipart_keep / 2)
    query = select(Upload).where(Upload.model_id == model.id, Upload.state == "reserved", fresh)
    for upload in tx.session.scalars(query.order_by(Upload.created_at.desc()).limit(10)):
        if _resumes(upload, body):
            return upload
    return _stage(tx, Upload(id=uuid4(), project_id=model.project_id, model_id=model.id), body)


def _resumes(upload: Upload, body: UploadReserve) -> bool:
    """Whether this is the file in parts that is under way: what the store has of it counts."""
    if upload.part_size is None or upload.state != "reserved":
        return False
    known = (upload.size, upload.sha256, upload.part_size, upload.parts)
    return known == (body.size, body.sha256, body.part_size, body.parts)


def _check_size(size: int, elements: int) -> None:
    most = HEADER_CAP + 4 * elements + elements // 8 + 8 * (elements // BLOCK + 3)
    if size > most:
        raise TooLarge(
            f"{size} bytes: a file of this model with {elements} elements has at most {most}",
            code="upload_too_large",
        )


def _stage(tx: Tx, upload: Upload, body: UploadReserve) -> Upload:
    # A new key each time: an address that was given out before must not reach the new file.
    upload.staging_key = f"staging/{secrets.token_hex(16)}"
    upload.size, upload.sha256, upload.md5 = body.size, body.sha256, body.md5
    upload.part_size, upload.parts = body.part_size, body.parts or None
    upload.multipart_id = None
    upload.state, upload.created_at = "reserved", tx.now
    tx.session.add(upload)
    tx.session.flush()
    ledger.append(
        tx,
        "upload.reserved",
        f"upload:{upload.id}",
        project=upload.project_id,
        body={"sha256": upload.sha256, "size": upload.size},
    )
    return upload


def ticket(tx: Tx, upload: Upload, *, core: Coordinator) -> UploadTicket:
    """The signed address of a reservation: short-lived, and never past the deadline.

    A file in parts gets none here: ``app.parts`` asks the store first, outside any transaction.
    """
    if upload.part_size is not None:
        ending = ends(tx, upload, core.settings)
        return UploadTicket(id=upload.id, url=None, headers={}, expires_at=ending)
    until = expiry(tx, upload, core.settings)
    url, headers = core.storage.sign_put(
        upload.staging_key, size=upload.size, md5=upload.md5, until=until
    )
    return UploadTicket(id=upload.id, url=url, headers=headers, expires_at=until)


def ends(tx: Tx, upload: Upload, settings: AppSettings) -> datetime:
    """When a reservation lapses: at its assignment's deadline, or when it is swept."""
    if upload.assignment_id is not None:
        return tx.session.get_one(Assignment, upload.assignment_id).deadline
    return upload.created_at + timedelta(seconds=settings.multipart_keep)


def expiry(tx: Tx, upload: Upload, settings: AppSettings) -> datetime:
    """When an address that is signed now ends: soon, and never behind the reservation's end.

    Raises:
        Conflict: less than a second is left, the shortest life of an address.
    """
    until = min(tx.now + timedelta(seconds=settings.url_lifetime), ends(tx, upload, settings))
    if until - tx.now < timedelta(seconds=1):
        raise Conflict("there is no time left to send a file", code="assignment_expired")
    return until


def arrived(tx: Tx, upload: Upload, place: tuple[Assignment, Round] | None) -> UploadStatus:
    """Note that a file is in the store; all rows are locked. ``place`` None: initial weights.

    Raises:
        LifecycleError: the assignment was declined.
    """
    if upload.state != "reserved":
        return status(upload)
    if place is not None and not rounds.takes_updates(tx, *place):
        reason = "behind the deadline"
        rounds.move_assignment(tx, place[0], AssignmentEvent.MISS, reason=reason)
        upload.state, upload.reason = "late", "late"
        return status(upload)
    if place is not None:
        rounds.move_assignment(tx, place[0], AssignmentEvent.COMPLETE)
    upload.state, upload.completed_at = "uploaded", tx.now
    tx.after_commit(partial(metrics.UPLOADED.inc, upload.size))
    jobs.enqueue(tx, VERIFY, upload.id, project=upload.project_id)
    return status(upload)


def accept_update(tx: Tx, lease: jobs.Lease, found: Verified, *, fold_from: int) -> None:
    """Number a verified update and let its round know.

    Raises:
        LeaseLost: another worker holds the job.
    """
    run, upload, assignment = _verified_rows(tx, lease)
    if run is None or assignment is None or assignment.round_id is None:
        return
    if assignment.state != AssignmentState.UPLOADED:  # the round ended while the file was read
        return
    if _refused_alike(tx, run, assignment, found):
        return
    objects.keep(tx, *filter(None, (found.object_key, found.mask_key)))
    count = select(func.count()).where(Update.round_id == assignment.round_id)
    key = found.mask_key
    mask_id = assignment.mask_id if key is None else _add_mask(tx, assignment, found, key)
    update = Update(
        id=uuid4(),
        project_id=assignment.project_id,
        round_id=assignment.round_id,
        assignment_id=assignment.id,
        client_id=assignment.client_id,
        mask_id=mask_id,
        number=(tx.session.scalar(count) or 0) + 1,
        object_key=found.object_key,
        sha256=upload.sha256,
        size=upload.size,
        examples=found.examples,
        change_norm=found.change_norm,
        sketch=found.sketch,
        created_at=tx.now,
    )
    tx.session.add(update)
    upload.state = "accepted"
    rounds.move_assignment(tx, assignment, AssignmentEvent.ACCEPT)
    ledger.append(
        tx,
        "update.accepted",
        f"assignment:{assignment.id}",
        project=assignment.project_id,
        body={
            "number": update.number,
            "sha256": update.sha256,
            "mask": found.mask_sha256,
            "size": update.size,
        },
    )
    rounds.accepted(tx, run, assignment.round_id, fold_from=fold_from)


def _refused_alike(tx: Tx, run: Run, assignment: Assignment, found: Verified) -> bool:
    """Refuse an update that changes the same way as another client's, where the run asks that."""
    rules = conduct.rules_of(run) if found.sketch is not None else None
    if rules is None or found.sketch is None or assignment.round_id is None:
        return False
    other = conduct.resembles(tx, assignment.round_id, found.sketch, rules)
    if other is None:
        return False
    reason, detail = "update_alike", "it changes the model as another update of this round does"
    rounds.reject(tx, assignment, reason=reason, detail=detail)
    conduct.struck(tx, run, assignment, reason)
    rounds.settle(tx, assignment)
    return True


def _add_mask(tx: Tx, assignment: Assignment, found: Verified, mask_key: str) -> UUID:
    known = tx.session.get(MaskRecord, assignment.mask_id) if assignment.mask_id else None
    mask = MaskRecord(
        id=uuid4(),
        project_id=assignment.project_id,
        arm_id=assignment.arm_id,
        client_id=assignment.client_id,
        number=(known.number if known else 0) + 1,
        sha256=found.mask_sha256,
        object_key=mask_key,
        personal=found.personal,
        created_at=tx.now,
    )
    tx.session.add(mask)
    tx.session.flush()
    return mask.id


def accepted_key(core: Coordinator, upload: Upload) -> str:
    """Where a verified file is kept. A model's weights stay in plain: agents fetch this object."""
    key = f"accepted/{upload.project_id}/{upload.sha256}"
    return key if upload.assignment_id is None else core.ring.named(key)


def mask_key(core: Coordinator, assignment: Assignment, digest: str) -> str:
    """Where the mask of a client is kept. Encrypted, its name is not its digest: there are few
    masks of whole rows, so that whoever lists the store could find out which one it is.
    """
    name = core.ring.blinded(f"mask of {assignment.client_id}: {digest}") or digest
    return core.ring.named(f"masks/{assignment.project_id}/{name}")


def quarantine_key(upload: Upload) -> str:
    """Where a refused file is kept for a while; ``KeyRing.named`` says how it is called there."""
    return f"quarantine/{upload.project_id}/{upload.id}"


def reject(tx: Tx, lease: jobs.Lease, *, reason: str, detail: str) -> bool:
    """Refuse an upload for good, with a stable reason; False if its round or client has ended.

    Raises:
        LeaseLost: another worker holds the job.
    """
    run, upload, assignment = _verified_rows(tx, lease)
    if run is None or assignment is None:
        _reject_weights(tx, upload, reason=reason, detail=detail)
        return True
    if assignment.state != AssignmentState.UPLOADED:
        return False
    rounds.reject(tx, assignment, reason=reason, detail=detail)
    conduct.struck(tx, run, assignment, reason)
    rounds.settle(tx, assignment)
    return True


def _reject_weights(tx: Tx, upload: Upload, *, reason: str, detail: str | None = None) -> None:
    upload.state, upload.reason, upload.detail = "rejected", reason, detail
    ledger.append(
        tx,
        "upload.rejected",
        f"upload:{upload.id}",
        project=upload.project_id,
        body={"reason": reason, "detail": detail},
    )


def give_up(tx: Tx, lease: jobs.Lease) -> None:
    """Refuse an upload whose verification failed in all its attempts; the job has ended already."""
    upload = tx.session.get_one(Upload, lease.subject_id)
    if upload.assignment_id is None:
        _reject_weights(tx, upload, reason="verification_failed")
        return
    assignment = tx.session.get_one(Assignment, upload.assignment_id)
    if assignment.state == AssignmentState.UPLOADED:
        rounds.reject(tx, assignment, reason="verification_failed")
        rounds.settle(tx, assignment)


def lock(tx: Tx, upload_id: UUID) -> Run | None:
    """Lock the run an upload belongs to, if it belongs to one."""
    query = (
        select(Run)
        .join(Assignment, Assignment.run_id == Run.id)
        .join(Upload, Upload.assignment_id == Assignment.id)
        .where(Upload.id == upload_id)
        .with_for_update(of=Run)
    )
    return tx.session.scalars(query, execution_options={"populate_existing": True}).first()


def accept_weights(tx: Tx, lease: jobs.Lease, *, object_key: str) -> None:
    """Make a verified file a model's initial version.

    Raises:
        LeaseLost: another worker holds the job.
    """
    _, upload, _ = _verified_rows(tx, lease)
    model = tx.session.get_one(Model, upload.model_id, with_for_update=True)
    if catalog.initial_version(tx, model.id) is not None:
        _reject_weights(tx, upload, reason="model_has_weights")
        return
    objects.keep(tx, object_key)
    upload.state = "accepted"
    catalog.add_initial_version(
        tx, model, object_key=object_key, sha256=upload.sha256, size=upload.size
    )


def _verified_rows(tx: Tx, lease: jobs.Lease) -> tuple[Run | None, Upload, Assignment | None]:
    """The rows of a verification job, locked in order; the job ends with this transaction."""
    run = lock(tx, lease.subject_id)
    jobs.finish(tx, lease)
    query = (
        select(Upload, Assignment)
        .outerjoin(Assignment, Assignment.id == Upload.assignment_id)
        .where(Upload.id == lease.subject_id)
        .with_for_update(of=Upload)
    )
    fresh = {"populate_existing": True}
    upload, assignment = tx.session.execute(query, execution_options=fresh).one()
    return run, upload, assignment


def own(tx: Tx, principal: Principal, upload_id: UUID) -> Upload:
    """An upload this principal may see: a client its own, an administrator its project's.

    Raises:
        Missing: there is none.
    """
    query = (
        select(Upload, Assignment.client_id)
        .outerjoin(Assignment, Assignment.id == Upload.assignment_id)
        .where(Upload.id == upload_id, Upload.project_id == principal.project_id)
    )
    row = tx.session.execute(query).first()
    if row is None or (principal.client_id is not None and row[1] != principal.client_id):
        raise Missing(f"there is no upload {upload_id}")
    return row[0]


def sendable(tx: Tx, principal: Principal, upload_id: UUID) -> Upload:
    """An upload that this principal may send: a client's update is its client's alone.

    Raises:
        Missing: there is none that it may see.
        Forbidden: it is another's.
    """
    upload = own(tx, principal, upload_id)
    if upload.assignment_id is not None:
        _ = principal.client
    return upload


def status(upload: Upload) -> UploadStatus:
    """The upload as the interface shows it."""
    state = cast(Literal["reserved", "uploaded", "accepted", "rejected", "late"], upload.state)
    return UploadStatus(id=upload.id, state=state, reason=upload.reason, detail=upload.detail)
