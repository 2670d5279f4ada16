"""What auditors and witnesses call: sealed ledger entries, signed heads and proofs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app import ledger, reports
from app.auth import Scope
from app.db import Tx
from app.routes import problems
from app.web import Call, Page, require
from fedselect.ledgerdocs import (
    Checkpoint,
    ConsistencyProof,
    InclusionProof,
    LedgerEntry,
    LedgerKeys,
)

router = APIRouter(prefix="/v1/ledger", tags=["audit"])
AUDIT, WITNESS = require(Scope.AUDIT_READ), require(Scope.LEDGER_WITNESS)
Size = Annotated[int, Query(ge=0, lt=2**62)]


@router.get(
    "/entries",
    operation_id="listLedgerEntries",
    summary="Read the ledger",
    responses=problems(401, 403),
)
def entries(
    cursor: Size = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    call: Call = AUDIT,
) -> Page[LedgerEntry]:
    """Sealed entries in order; `cursor` is the first `seq` wanted. Of other projects only the hash.

    With `limit` 1000 and `cursor` the number of entries that you have, you read on where you were.
    """

    def work(tx: Tx) -> Page[LedgerEntry]:
        found = reports.entries(tx, call.who, start=cursor, limit=limit)
        more = len(found) == limit
        return Page(items=found, next=str(cursor + limit) if more else None)

    return call.run(work)


@router.get(
    "/checkpoint",
    operation_id="getCheckpoint",
    summary="Get the newest signed head of the ledger",
    responses=problems(401, 403, 404, codes={404: ["ledger_empty"]}),
)
def checkpoint(call: Call = WITNESS) -> Checkpoint:
    """A C2SP checkpoint: origin, size, root, signature."""
    public_key = call.core.sealer.public_key
    return call.run(lambda tx: reports.checkpoint(tx, public_key=public_key))


@router.get(
    "/keys",
    operation_id="getLedgerKeys",
    summary="Get the key that signs the ledger, and the changes that led to it",
    responses=problems(401, 403),
)
def keys(call: Call = WITNESS) -> LedgerKeys:
    """Each statement is signed by the key before; who trusts one key can follow to the newest."""
    public_key = call.core.sealer.public_key
    return call.run(lambda tx: reports.ledger_keys(tx, public_key=public_key))


@router.get(
    "/proofs/inclusion",
    operation_id="proveInclusion",
    summary="Prove that an entry is in the ledger",
    responses=problems(401, 403, 404, codes={404: ["ledger_shorter"], 422: ["proof_invalid"]}),
)
def inclusion(seq: Size, size: Size, call: Call = WITNESS) -> InclusionProof:
    """The audit path of entry `seq` in the tree of `size` entries."""
    return call.run(lambda tx: ledger.prove_inclusion(tx, seq=seq, size=size))


@router.get(
    "/proofs/consistency",
    operation_id="proveConsistency",
    summary="Prove that the ledger only grew",
    responses=problems(401, 403, 404, codes={404: ["ledger_shorter"], 422: ["proof_invalid"]}),
)
def consistency(first: Size, second: Size, call: Call = WITNESS) -> ConsistencyProof:
    """That the tree of `second` entries extends that of `first`."""
    return call.run(lambda tx: ledger.prove_consistency(tx, first=first, second=second))
