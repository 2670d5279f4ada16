"""What auditors call: sealed ledger entries and the signed checkpoint."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app import reports
from app.auth import Scope
from app.db import Tx
from app.routes import problems
from app.web import Call, Page, require
from fedselect.protocol import Checkpoint, LedgerEntry

router = APIRouter(prefix="/v1/ledger", tags=["audit"])
AUDIT = require(Scope.AUDIT_READ)


@router.get(
    "/entries",
    operation_id="listLedgerEntries",
    summary="Read the ledger",
    responses=problems(401, 403),
)
def entries(
    cursor: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    call: Call = AUDIT,
) -> Page[LedgerEntry]:
    """Sealed entries in order; `cursor` is the first `seq` wanted."""

    def work(tx: Tx) -> Page[LedgerEntry]:
        found = reports.entries(tx, start=cursor, limit=limit)
        more = len(found) == limit
        return Page(items=found, next=str(cursor + limit) if more else None)

    return call.run(work)


@router.get(
    "/checkpoint",
    operation_id="getCheckpoint",
    summary="Get the newest signed head of the ledger",
    responses=problems(401, 403, 404),
)
def checkpoint(call: Call = AUDIT) -> Checkpoint:
    """A C2SP checkpoint: origin, size, root, signature."""
    public_key = call.core.sealer.public_key
    return call.run(lambda tx: reports.checkpoint(tx, public_key=public_key))
