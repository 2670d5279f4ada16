"""The documents of the ledger's interface: entries, heads, keys and proofs.

Owns their shape, as ``protocol`` does for everything else, and how entries become an export. Must
not verify anything (``audit``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from fedselect import audit
from fedselect.protocol import Answer


class LedgerEntry(Answer):
    """A sealed ledger entry: exactly the fields that its leaf hash is taken of, and the hash.

    ``entry`` is null for what belongs to somebody else: its hash alone completes the tree.
    """

    seq: int
    leaf: str
    entry: dict[str, Any] | None


class Checkpoint(Answer):
    """A signed head of the ledger in the C2SP tlog-checkpoint form, and the key to check it."""

    text: str
    public_key: str


class LedgerKeys(Answer):
    """The key that signs now, and every change of key as the old one signed it, oldest first."""

    public_key: str
    statements: list[str]


class InclusionProof(Answer):
    """That an entry is in the tree of ``size`` entries: RFC 9162 §2.1.3, hashes in hex."""

    seq: int
    size: int
    leaf: str
    hashes: list[str]


class ConsistencyProof(Answer):
    """That the ledger of ``first`` entries is a prefix of that of ``second``: RFC 9162 §2.1.4."""

    first: int
    second: int
    hashes: list[str]


def export_lines(entries: Iterable[LedgerEntry], head: Checkpoint) -> Iterator[str]:
    """An export: the entries up to a signed head, a line each, and the head."""
    for item in islice(entries, audit.read_checkpoint(head.text).size):
        yield audit.export_line(item.seq, bytes.fromhex(item.leaf), item.entry)
    last = {"checkpoint": head.text, "public_key": head.public_key}
    yield audit.canonical_json(last).decode()
