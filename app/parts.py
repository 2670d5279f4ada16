"""Files in parts: which parts the store lacks, and their signed addresses.

Owns the store's multipart upload behind a reservation: begun here, completed by a worker alone
(``workers.assemble``). The store is never called while a transaction is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from uuid import UUID

from sqlalchemy import update

from app import clients, quotas, rounds, updates
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Missing, Unavailable
from app.storage import Storage, StoredPart
from app.tables import Assignment, Upload
from app.wiring import Coordinator
from fedselect.uploads import MissingParts, PartAddress

AT_ONCE = 64  # addresses in one answer: they are short-lived, so more would expire unused


@dataclass(frozen=True, slots=True)
class Plan:
    """A reservation in parts as a transaction saw it; ``multipart_id`` None: not begun yet."""

    upload_id: UUID
    key: str
    multipart_id: str | None
    size: int
    part_size: int
    md5: list[str]

    def part(self, number: int) -> tuple[int, int]:
        """Start and size of a part, in bytes."""
        start = (number - 1) * self.part_size
        return start, min(self.part_size, self.size - start)

    def lacking(self, stored: dict[int, StoredPart]) -> list[int]:
        """Numbers of the parts that are not there in their full size."""
        sizes = {number: part.size for number, part in stored.items()}
        return [n for n in range(1, len(self.md5) + 1) if sizes.get(n) != self.part(n)[1]]


def plan_of(upload: Upload) -> Plan | None:
    """How an upload goes in parts; None: it goes in one piece."""
    if upload.part_size is None:
        return None
    file = (upload.staging_key, upload.multipart_id, upload.size, upload.part_size)
    return Plan(upload.id, *file, upload.parts or [])


def missing(core: Coordinator, principal: Principal, upload_id: UUID) -> MissingParts:
    """The parts that are still to be sent, with fresh addresses.

    Raises:
        Missing: there is no such upload.
        Conflict: it takes no parts (any more).
        TooMany: the client asks too often.
        Unavailable: the store does not answer, or another call is beginning the same upload.
    """
    with core.db.transaction(principal.actor, "plan_parts") as tx:
        plan, until = _plan(tx, principal, upload_id, core)
    multipart_id, stored = _begun(core.storage, plan)
    if multipart_id != plan.multipart_id:
        with core.db.transaction(principal.actor, "keep_multipart") as tx:
            kept = _keep(tx, plan, multipart_id)
        if not kept:
            core.storage.abort_multipart(plan.key, multipart_id)
            raise Unavailable("another call is beginning this upload; ask again")
    lacking = plan.lacking(stored)
    sign = partial(_address, core.storage, plan, multipart_id, until=until)
    parts = [sign(number) for number in lacking[:AT_ONCE]]
    return MissingParts(id=plan.upload_id, missing=len(lacking), parts=parts, expires_at=until)


def _plan(
    tx: Tx, principal: Principal, upload_id: UUID, core: Coordinator
) -> tuple[Plan, datetime]:
    client = clients.admit(tx, principal)
    upload = updates.sendable(tx, principal, upload_id)
    if client is not None:
        quotas.count_call(tx, client, core.settings)
    if upload.state != "reserved":
        raise Conflict(f"the upload is {upload.state}: it takes no parts", code="upload_over")
    if upload.assignment_id is not None:
        assignment = tx.session.get_one(Assignment, upload.assignment_id)
        if not rounds.gathering(tx, assignment):
            raise Conflict("the round takes no more updates", code="assignment_expired")
    plan = plan_of(upload)
    if plan is None:
        text = "this file goes in one piece; announce it again for a fresh address"
        raise Conflict(text, code="upload_whole")
    return plan, updates.expiry(tx, upload, core.settings)


def _begun(storage: Storage, plan: Plan) -> tuple[str, dict[int, StoredPart]]:
    """The multipart upload and its parts; a fresh one if there is none, or the store forgot it."""
    if plan.multipart_id is not None:
        try:
            return plan.multipart_id, storage.list_parts(plan.key, plan.multipart_id)
        except Missing:
            pass
    return storage.create_multipart(plan.key), {}


def _keep(tx: Tx, plan: Plan, multipart_id: str) -> bool:
    """Write down a new multipart upload, unless somebody else was quicker."""
    row = (
        (Upload.id == plan.upload_id)
        & (Upload.staging_key == plan.key)
        & (Upload.state == "reserved")
        & Upload.multipart_id.is_not_distinct_from(plan.multipart_id)
    )
    result = tx.session.execute(update(Upload).where(row).values(multipart_id=multipart_id))
    return bool(result.rowcount)  # type: ignore[attr-defined]  # what an UPDATE returns


def _address(
    storage: Storage, plan: Plan, multipart_id: str, number: int, *, until: datetime
) -> PartAddress:
    start, size = plan.part(number)
    md5 = plan.md5[number - 1]
    url, headers = storage.sign_part(
        plan.key, multipart_id, number=number, size=size, md5=md5, until=until
    )
    return PartAddress(number=number, start=start, size=size, url=url, headers=headers)
