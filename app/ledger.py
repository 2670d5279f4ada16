"""The ledger: entries in the transaction of the change, sealed into a signed Merkle tree.

Owns entries, seals, checkpoints, the keys that sign them and the proofs that are read from them.
Must not decide what is worth an entry, nor know the object store (``heads``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import func, select

from app.db import Tx, Values
from app.errors import Invalid, Missing
from app.tables import CheckpointRecord, Entry, Seal
from fedselect import audit, merkle
from fedselect.audit import KEY_ROTATED
from fedselect.errors import LedgerError
from fedselect.ledgerdocs import ConsistencyProof, InclusionProof

BATCH = 512
# An entry's number is drawn before its transaction commits, so a late one may stand behind others.
# Nearly all are found among the newest ids; a look at all of them, once a minute, finds the rest.
WINDOW = 10_000
LOOK_AT_ALL = timedelta(seconds=60)


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


def append_each(
    tx: Tx, action: str, subjects: Sequence[str], *, project: UUID, body: dict[str, Any]
) -> None:
    """The same fact of many subjects, in one statement."""
    same: Values = {
        Entry.project_id: project,
        Entry.at: tx.now,
        Entry.actor: tx.actor,
        Entry.action: action,
        Entry.body: body,
    }
    tx.insert_each({Entry.subject: subjects}, same)


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
        self.origin = origin
        self._looked_at_all: datetime | None = None

    @property
    def public_key(self) -> str:
        """The verifier key in the C2SP signed-note form."""
        return audit.verifier_key(self._key.public_key(), self.origin)

    def seal(self, tx: Tx) -> int:
        """Seal what is not yet sealed, at most one batch; returns how many entries that were.

        Raises:
            LedgerError: ``ledger_key_unknown`` if the ledger does not know our key as its own.
        """
        found = self._unsealed(tx)
        if not found:
            return 0
        last = newest_checkpoint(tx)
        if self.public_key != signing_key(tx, self.public_key):
            raise LedgerError(
                "LEDGER_KEY under the name LEDGER_ORIGIN is not the key of this ledger: nothing is "
                "sealed. Put both back, or to change the key give the old one as "
                "LEDGER_KEY_PREVIOUS and run `fedselect admin rotate-ledger-key`",
                code="ledger_key_unknown",
            )
        frontier = audit.Frontier.from_json(last.frontier) if last else audit.Frontier()
        for entry in found:
            seq, leaf = frontier.size, audit.entry_leaf(document(frontier.size, entry))
            subtrees = b"".join(frontier.append(leaf))
            tx.session.add(Seal(seq=seq, entry_id=entry.id, leaf=leaf, subtrees=subtrees))
        self._sign(tx, frontier)
        return len(found)

    def _unsealed(self, tx: Tx) -> Sequence[Entry]:
        sealed = select(Seal.entry_id).where(Seal.entry_id == Entry.id).exists()
        query = select(Entry).where(~sealed).order_by(Entry.id).limit(BATCH)
        before = self._looked_at_all
        if before is not None and tx.now - before < LOOK_AT_ALL:
            newest = tx.session.scalar(select(func.max(Seal.entry_id))) or 0
            return tx.session.scalars(query.where(Entry.id > newest - WINDOW)).all()
        found = tx.session.scalars(query).all()
        if len(found) < BATCH:
            self._looked_at_all = tx.now
        return found

    def _sign(self, tx: Tx, frontier: audit.Frontier) -> None:
        body = audit.checkpoint_body(self.origin, frontier.size, frontier.root())
        tx.session.add(
            CheckpointRecord(
                size=frontier.size,
                frontier=frontier.to_json(),
                text=audit.sign_checkpoint(body, self._key, self.origin),
                created_at=tx.now,
            )
        )


# --- keys --------------------------------------------------------------------------------------


def rotations(tx: Tx) -> list[dict[str, Any]]:
    """What the ledger says of its changes of key: ``old``, ``new`` and the old key's statement."""
    # The condition on the project is for the index: few entries belong to none.
    query = select(Entry.body).where(Entry.project_id.is_(None), Entry.action == KEY_ROTATED)
    return list(tx.session.scalars(query.order_by(Entry.id)))


def signing_key(tx: Tx, ours: str) -> str | None:
    """The verifier key that this ledger is signed with now; None: not ours, and no other is known.

    A ledger whose key was never changed does not name it: then its newest checkpoint decides.
    """
    known = rotations(tx)
    if known:
        return str(known[-1]["new"])
    head = newest_checkpoint(tx)
    return ours if head is None or _signed_by(head.text, ours) else None


def known_keys(tx: Tx, ours: str) -> list[str]:
    """The verifier keys that have signed this ledger, the present one first."""
    known = rotations(tx)
    keys = [body["old"] for body in known] + [known[-1]["new"] if known else ours]
    return keys[::-1]


def key_of(tx: Tx, head: CheckpointRecord, ours: str) -> str:
    """The verifier key behind a checkpoint of this ledger."""
    return next((key for key in known_keys(tx, ours) if _signed_by(head.text, key)), ours)


def _signed_by(text: str, key: str) -> bool:
    try:
        audit.verify_checkpoint(text, key)
    except LedgerError:
        return False
    return True


def rotate(tx: Tx, *, old: bytes, new: bytes, origin: str) -> str:
    """Write down that another key signs from now on; returns its verifier key. Seeds, 32 bytes.

    Raises:
        LedgerError: ``ledger_key_unknown`` if the old key is not the one that signs now.
    """
    before, after = (Ed25519PrivateKey.from_private_bytes(seed) for seed in (old, new))
    was = audit.verifier_key(before.public_key(), origin)
    key = audit.verifier_key(after.public_key(), origin)
    now = signing_key(tx, was)
    if now == key:
        return key
    if now != was:
        raise LedgerError(
            "LEDGER_KEY_PREVIOUS is not the key that signs this ledger now",
            code="ledger_key_unknown",
        )
    statement = audit.rotation_statement(before, after.public_key(), origin)
    body = {"old": was, "new": key, "statement": statement}
    append(tx, KEY_ROTATED, "ledger", project=None, body=body)
    return key


# --- reading -----------------------------------------------------------------------------------


def newest_checkpoint(tx: Tx) -> CheckpointRecord | None:
    """The last signed head, None before anything was sealed."""
    query = select(CheckpointRecord).order_by(CheckpointRecord.size.desc()).limit(1)
    return tx.session.scalars(query).first()


def waiting(tx: Tx) -> tuple[int, datetime | None]:
    """How many entries are not sealed yet, and since when the oldest of them waits."""
    newest = tx.session.scalar(select(func.max(Seal.entry_id))) or 0
    sealed = select(Seal.entry_id).where(Seal.entry_id == Entry.id).exists()
    query = select(func.count(), func.min(Entry.at)).where(~sealed, Entry.id > newest - WINDOW)
    count, oldest = tx.session.execute(query).one()
    return count, oldest


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


def sealed_size(tx: Tx) -> int:
    """How many entries are sealed and signed."""
    return tx.session.scalar(select(func.max(CheckpointRecord.size))) or 0


# --- proofs ------------------------------------------------------------------------------------


def prove_inclusion(tx: Tx, *, seq: int, size: int) -> InclusionProof:
    """That entry ``seq`` is in the tree of ``size`` entries.

    Raises:
        Missing: not so many entries are sealed.
        Invalid: there is no such entry in a tree of this size.
    """
    _check_size(tx, size)
    if not 0 <= seq < size:
        raise Invalid(f"there is no entry {seq} among {size}", code="proof_invalid")
    leaf, *path = _roots(tx, [range(seq, seq + 1), *merkle.inclusion_nodes(seq, size)])
    return InclusionProof(seq=seq, size=size, leaf=leaf.hex(), hashes=[h.hex() for h in path])


def prove_consistency(tx: Tx, *, first: int, second: int) -> ConsistencyProof:
    """That the tree of ``first`` entries is a prefix of the one of ``second``.

    Raises:
        Missing: not so many entries are sealed.
        Invalid: the first is the larger one.
    """
    _check_size(tx, second)
    if first > second:
        raise Invalid(
            f"a ledger of {second} entries cannot extend one of {first}", code="proof_invalid"
        )
    path = _roots(tx, merkle.consistency_nodes(first, second))
    return ConsistencyProof(first=first, second=second, hashes=[h.hex() for h in path])


def root_at(tx: Tx, size: int) -> bytes:
    """The root over the first ``size`` entries, from the tree's inner nodes.

    Raises:
        Missing: not so many entries are sealed.
    """
    _check_size(tx, size)
    return _roots(tx, [range(size)])[0] if size else merkle.EMPTY_ROOT


def _check_size(tx: Tx, size: int) -> None:
    sealed = sealed_size(tx)
    if size > sealed:
        raise Missing(f"only {sealed} entries are sealed, not {size}", code="ledger_shorter")


def _roots(tx: Tx, nodes: Sequence[range]) -> list[bytes]:
    """The hash of each node: one query, for at most 2·log2(size) rows and some."""
    parts = [merkle.full_subtrees(node) for node in nodes]
    wanted = {last for each in parts for _, last in each}
    query = select(Seal.seq, Seal.leaf, Seal.subtrees).where(Seal.seq.in_(wanted))
    rows = {seq: leaf + subtrees for seq, leaf, subtrees in tx.session.execute(query)}
    return [
        merkle.fold([rows[last][32 * level : 32 * level + 32] for level, last in each])
        for each in parts
    ]
