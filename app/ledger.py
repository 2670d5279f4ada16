"""The ledger: entries in the transaction of the change, sealed into a signed Merkle tree.

Owns entries, seals and checkpoints. Must not decide what is worth an entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from app.db import Tx
from app.tables import CheckpointRecord, Entry, Seal
from fedselect import audit

BATCH = 512


def append(
    tx: Tx,
    action: str,
    subject: object,
    *,
    project: UUID | None,
    body: dict[str, Any] | None = None,
) -> None:
    """Write down one fact: ids, digests and settings only, never payloads or secrets."""
    tx.session.add(
        Entry(
            project_id=project,
            at=tx.now,
            actor=tx.actor,
            action=action,
            subject=str(subject),
            body=body or {},
        )
    )


def document(seq: int, entry: Entry) -> dict[str, Any]:
    """The JSON object that an entry's leaf hash is taken of."""
    return {
        "seq": seq,
        "id": entry.id,
        "at": entry.at.isoformat().replace("+00:00", "Z"),
        "actor": entry.actor,
        "action": entry.action,
        "subject": entry.subject,
        "project": str(entry.project_id) if entry.project_id else None,
        "body": entry.body,
    }


class Sealer:
    """Seals entries and signs checkpoints; only one may run at a time (see ``workers.sweep``)."""

    def __init__(self, seed: bytes, origin: str) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self._origin = origin

    @property
    def public_key(self) -> str:
        """The verifier key in the C2SP signed-note form."""
        return audit.verifier_key(self._key.public_key(), self._origin)

    def seal(self, tx: Tx) -> int:
        """Seal what is not yet sealed, at most one batch; returns how many entries that were."""
        last = newest_checkpoint(tx)
        frontier = audit.Frontier.from_json(last.frontier) if last else audit.Frontier()
        sealed = select(Seal.entry_id).where(Seal.entry_id == Entry.id).exists()
        found = tx.session.scalars(
            select(Entry).where(~sealed).order_by(Entry.id).limit(BATCH)
        ).all()
        for entry in found:
            leaf = audit.entry_leaf(document(frontier.size, entry))
            tx.session.add(Seal(seq=frontier.size, entry_id=entry.id, leaf=leaf))
            frontier.append(leaf)
        if found:
            self._sign(tx, frontier)
        return len(found)

    def _sign(self, tx: Tx, frontier: audit.Frontier) -> None:
        body = audit.checkpoint_body(self._origin, frontier.size, frontier.root())
        tx.session.add(
            CheckpointRecord(
                size=frontier.size,
                frontier=frontier.to_json(),
                text=audit.sign_checkpoint(body, self._key, self._origin),
                created_at=tx.now,
            )
        )


def newest_checkpoint(tx: Tx) -> CheckpointRecord | None:
    """The last signed head, None before anything was sealed."""
    query = select(CheckpointRecord).order_by(CheckpointRecord.size.desc()).limit(1)
    return tx.session.scalars(query).first()


def sealed_entries(tx: Tx, *, start: int, limit: int) -> Iterator[tuple[Seal, Entry]]:
    """Sealed entries from ``seq`` start on, in order."""
    query = (
        select(Seal, Entry)
        .join(Entry, Entry.id == Seal.entry_id)
        .where(Seal.seq >= start)
        .order_by(Seal.seq)
        .limit(limit)
    )
    yield from tx.session.execute(query)
