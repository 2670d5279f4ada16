"""Completed uploads: a client says that its file is in the store, and verification becomes due.

Owns the one transaction in which many of them are noted together. Nobody asks the store here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from sqlalchemy import select

from app import clients, rounds, updates
from app.auth import Principal
from app.db import Tx, among
from app.errors import Missing
from app.tables import Assignment, Round, Upload
from fedselect.errors import FedSelectError
from fedselect.uploads import UploadStatus


def complete(
    tx: Tx, asked: Sequence[tuple[Principal, UUID]]
) -> list[UploadStatus | FedSelectError]:
    """Note of each upload that its file is in the store, and make its verification due.

    An update is on time if this commits before its round closes; otherwise it is late. Repeating a
    call is harmless: a file that is not all there is refused by its verification. The answers are
    in the order of the calls, an error in place of a call that is refused:

    - ``Unauthorized``, ``Forbidden``: the client was revoked or suspended, or it is another's;
    - ``Missing``: there is no such upload;
    - ``LifecycleError``: its assignment was declined.
    """
    shut_out = clients.admit_all(tx, [who for who, _ in asked])
    wanted = [upload_id for _, upload_id in asked]
    owners = _owners(tx, wanted)
    rounds.hold_runs(tx, {run for _, _, run in owners.values() if run is not None})
    places, uploads = _places(tx, wanted), _uploads(tx, wanted)
    answers: list[UploadStatus | FedSelectError] = []
    for who, upload_id in asked:
        try:
            if who.client_id in shut_out:
                raise shut_out[who.client_id]
            _check_owner(who, upload_id, owners)
            upload = uploads[upload_id]
            place = None if upload.assignment_id is None else places[upload.assignment_id]
            answers.append(updates.arrived(replace(tx, actor=who.actor), upload, place))
        except FedSelectError as refusal:
            answers.append(refusal)
    return answers


def _owners(tx: Tx, uploads: Sequence[UUID]) -> dict[UUID, tuple[UUID, UUID | None, UUID | None]]:
    """(project, client, run) of each upload; client and run are None for initial weights."""
    query = (
        select(Upload.id, Upload.project_id, Assignment.client_id, Assignment.run_id)
        .outerjoin(Assignment, Assignment.id == Upload.assignment_id)
        .where(among(Upload.id, uploads))
    )
    return {row[0]: (row[1], row[2], row[3]) for row in tx.session.execute(query)}


def _check_owner(
    who: Principal, upload_id: UUID, owners: dict[UUID, tuple[UUID, UUID | None, UUID | None]]
) -> None:
    project, client, _ = owners.get(upload_id, (None, None, None))
    if project != who.project_id or (who.client_id is not None and client != who.client_id):
        raise Missing(f"there is no upload {upload_id}")
    if client is not None:
        _ = who.client  # an update is its client's alone


def _places(tx: Tx, uploads: Sequence[UUID]) -> dict[UUID, tuple[Assignment, Round]]:
    """Assignments, locked in order, and their rounds as they are under the lock of the run."""
    query = (
        select(Assignment, Round)
        .join(Round, Round.id == Assignment.round_id)
        .join(Upload, Upload.assignment_id == Assignment.id)
        .where(among(Upload.id, uploads))
        .order_by(Assignment.id)
        .with_for_update(of=Assignment)
    )
    found = tx.session.execute(query, execution_options={"populate_existing": True})
    return {assignment.id: (assignment, current) for assignment, current in found}


def _uploads(tx: Tx, uploads: Sequence[UUID]) -> dict[UUID, Upload]:
    query = select(Upload).where(among(Upload.id, uploads)).order_by(Upload.id).with_for_update()
    found = tx.session.scalars(query, execution_options={"populate_existing": True})
    return {upload.id: upload for upload in found}
