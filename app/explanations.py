"""What an explanation of a client's mask is made of: its rows, and the masks of the arm.

Owns these queries; reading the store is ``runreports``', what follows is ``fedselect.explaining``.
Must not write. The store is read when the transaction is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import select

from app import runreports, runs
from app.auth import Principal
from app.db import Tx
from app.errors import Gone, Missing
from app.tables import AblationRecord, Model, Version
from app.wiring import Coordinator
from fedselect.explaindocs import AblationReport, Explanation
from fedselect.explaining import Ablated, Known, Subject, explain
from fedselect.masks import packed_size
from fedselect.policies import RunSettings
from fedselect.space import ParameterSpace


@dataclass(frozen=True, slots=True)
class Found:
    """The rows behind one explanation; ``keys`` are the objects of the masks, the own one first,
    by digest; ``masks`` are digests, one for each client.
    """

    subject: Subject
    settings: RunSettings
    space: ParameterSpace
    ablated: Ablated | None
    masks: list[str]
    keys: dict[str, str]
    now: datetime


def find(
    tx: Tx, principal: Principal, run_id: UUID, client_id: UUID, *, arm: str | None = None
) -> Found:
    """All rows that the explanation of a client's last mask in a run is made of.

    Raises:
        Missing: no such run in the principal's project, or no mask of this client.
        Invalid: ``arm_unknown``.
    """
    info = runs.of_arm(runs.info(tx, runs.get(tx, principal, run_id)), arm)
    rows = tx.session.execute(runreports.last_masks(info.arm_id, client_id)).all()
    if not rows or rows[0].id != client_id:
        raise Missing(f"client {client_id} has no mask in this run")
    own, model = rows[0], tx.session.get_one(Model, info.model_id)
    return Found(
        subject=Subject(own.name, model.name, own.number, client_id, info.id, info.name),
        settings=info.settings,
        space=ParameterSpace.from_json(model.space),
        ablated=_ablated(tx, info.arm_id, client_id),
        masks=[row.sha256 for row in rows],
        keys={row.sha256: row.object_key for row in reversed(rows)},  # of equal ones its own
        now=tx.now,
    )


def _ablated(tx: Tx, arm_id: UUID, client_id: UUID) -> Ablated | None:
    """The client's newest ablation of a version of the arm."""
    query = (
        select(AblationRecord, Version.number)
        .join(Version, Version.id == AblationRecord.version_id)
        .where(Version.arm_id == arm_id, AblationRecord.client_id == client_id)
        .order_by(AblationRecord.created_at.desc())
        .limit(1)
    )
    row = tx.session.execute(query).first()
    if row is None:
        return None
    record, number = row
    return Ablated(AblationReport.model_validate(record.report), number, record.created_at)


def explanation(core: Coordinator, found: Found) -> Explanation:
    """The explanation of what :func:`find` has found.

    Raises:
        Gone: the client's mask was deleted.
        Unavailable: the store is away, or other reports are being made (``report_busy``).
    """
    order, dim = list(dict.fromkeys(found.masks)), found.space.dim
    # Always the client's own mask, whatever one report may read.
    limit = max(core.settings.report_mask_bytes, packed_size(dim))
    with runreports.room():
        read, reading = runreports.read_masks(core.storage, order, found.keys, dim=dim, limit=limit)
        own, *others = found.masks
        if own not in read:
            raise Gone("the client's last mask was deleted", code="object_deleted")
        theirs = [read[digest] for digest in others if digest in read]
        known = Known(found.space, read[own], theirs, found.ablated, reading)
        return explain(found.subject, found.settings, known, made_at=found.now)
