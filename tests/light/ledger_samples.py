"""A ledger for the tests: a key, leaves, entries and exports, built by plain functions."""

from __future__ import annotations

import hashlib
import json

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedselect import audit, merkle

ORIGIN = "fedselect.example/ledger"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = audit.verifier_key(KEY.public_key(), ORIGIN)
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


def some_leaves(count: int, salt: int = 0) -> list[bytes]:
    return [merkle.leaf_hash(f"{salt}:{i}".encode()) for i in range(count)]


ROOT = merkle.tree_root(some_leaves(5))


def signed(size: int = 5, *, key: Ed25519PrivateKey = KEY, name: str = ORIGIN) -> str:
    return audit.sign_checkpoint(audit.checkpoint_body(ORIGIN, size, ROOT), key, name)


def entry(seq: int) -> dict:
    return {
        "seq": seq,
        "id": 3 * seq + 1,
        "at": f"2026-11-23T10:{seq // 60:02d}:{seq % 60:02d}.5Z",
        "actor": f"client:ward-{seq % 7}",
        "action": ["update.accepted", "round.published"][seq % 2],
        "subject": f"0198f5a0-0000-7000-8000-{seq:012x}",
        "project": None if seq % 5 == 0 else "0198f5a0-0000-7000-8000-000000000001",
        "body": {
            "sha256": hashlib.sha256(bytes([seq % 256])).hexdigest(),
            "größe": seq,
            "ok": True,
        },
    }


def export(count: int, *, key: Ed25519PrivateKey = KEY, size: int | None = None) -> list[dict]:
    """The documents of an honest export."""
    entries = [entry(seq) for seq in range(count)]
    leaves = [audit.entry_leaf(e) for e in entries]
    body = audit.checkpoint_body(ORIGIN, count if size is None else size, merkle.tree_root(leaves))
    head = {
        "checkpoint": audit.sign_checkpoint(body, key, ORIGIN),
        "public_key": audit.verifier_key(key.public_key(), ORIGIN),
    }
    lines = [
        {"seq": e["seq"], "leaf": leaf.hex(), "entry": e}
        for e, leaf in zip(entries, leaves, strict=True)
    ]
    return [*lines, head]


def written(documents: list) -> list[str]:
    return [json.dumps(document) + "\n" for document in documents]
