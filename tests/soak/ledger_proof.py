"""Tampering is evident: every single change of a sealed ledger, against a head kept elsewhere."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pymerkle import InmemoryTree, verify_consistency, verify_inclusion

from fedselect import audit, merkle
from fedselect.errors import LedgerError

from .proofs import Figures, Json, Room, proof

ORIGIN = "soak.test/ledger"
KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"soak").digest())
PUBLIC = audit.verifier_key(KEY.public_key(), ORIGIN)
LEAVES = 400  # at most, of a random tree
SPEED = 50_000  # entries a second


@proof(
    promise="tampering is evident",
    test="every edit, removal, exchange, insertion and truncation of a sealed ledger, in its "
    "export and signed anew by the holder of the key, against a kept head; proofs of random trees "
    "against pymerkle",
    target="100 % detected; 50,000 entries/s; all proofs agree",
    quick={"entries": 1_000, "every": 20, "trees": 300},
    full={"entries": 1_000, "every": 1, "trees": 10_000},
    minutes=(2, 30),
)
def tampering(room: Room, *, entries: int, every: int, trees: int) -> Figures:
    """Every ``every``-th row of a ledger of ``entries`` is tampered with in all ways."""
    book = Ledger(room.rng, entries)
    tried: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for place in range(0, entries, every):
        for kind, lines in [*book.edits(place), *book.forgeries(place)]:
            tried[kind] += 1
            missed[kind] += book.verifies(lines)
    agreeing = sum(agrees(room.rng, number) for number in range(trees))
    speed = _speed(book)
    total = tried.total()
    text = (
        f"{total - missed.total():,} of {total:,} detected; {agreeing:,} of {trees:,} trees agree; "
        f"{speed:,.0f} entries/s"
    )
    numbers = {"tried": dict(tried), "missed": dict(+missed), "trees": trees, "speed": speed}
    met = not missed.total() and agreeing == trees and book.verifies(book.lines)
    return Figures(met and speed >= SPEED, text, numbers)


class Ledger:
    """A sealed ledger, its export, and its head as a witness has kept it."""

    def __init__(self, rng: Random, count: int) -> None:
        self.entries = [_entry(rng, seq) for seq in range(count)]
        self.leaves = [audit.entry_leaf(entry) for entry in self.entries]
        self.lines = self.export(self.entries, self.leaves)
        self.head = _signed(self.leaves)

    @staticmethod
    def export(entries: list[Json], leaves: list[bytes]) -> list[str]:
        head = {"checkpoint": _signed(leaves), "public_key": PUBLIC}
        pairs = zip(entries, leaves, strict=True)
        lines = [audit.export_line(seq, leaf, e) for seq, (e, leaf) in enumerate(pairs)]
        return [*lines, audit.canonical_json(head).decode()]

    def verifies(self, lines: list[str]) -> bool:
        try:
            audit.verify_export(lines, public_key=PUBLIC, heads=[self.head])
        except LedgerError:
            return False
        return True

    def edits(self, place: int) -> Iterator[tuple[str, list[str]]]:
        """Changes of the file; the head stays."""
        lines, document = self.lines, json.loads(self.lines[place])
        entry = document["entry"]
        changes = [{"entry": entry | {name: "other"}} for name in entry]
        changes += [{"leaf": "00" * 32}, {"entry": None}, {"seq": document["seq"] + 1}]
        for change in changes:
            line = audit.canonical_json(document | change).decode()
            yield "a line edited", [*lines[:place], line, *lines[place + 1 :]]
        yield "a line removed", lines[:place] + lines[place + 1 :]
        yield "a line repeated", lines[: place + 1] + lines[place:]
        yield "the file cut", lines[:place]
        yield "the middle cut out", [*lines[:place], lines[-1]]
        if place + 1 < len(self.entries):
            yield "lines exchanged", _exchanged(lines, place, place + 1)
            yield "lines exchanged", _exchanged(lines, place, len(self.entries) - 1)

    def forgeries(self, place: int) -> Iterator[tuple[str, list[str]]]:
        """Changes of the rows, numbered, hashed and signed anew: honest but for the kept head."""
        rows = self.entries
        changed = rows[place] | {"actor": "other"}
        forged = {
            "edited and signed": [*rows[:place], changed, *rows[place + 1 :]],
            "removed and signed": rows[:place] + rows[place + 1 :],
            "removed, signed, refilled": [*rows[:place], *rows[place + 1 :], changed],
            "inserted and signed": [*rows[:place], changed, *rows[place:]],
            "cut and signed": rows[:place],
        }
        if place + 1 < len(rows):
            forged["exchanged and signed"] = _exchanged(rows, place, place + 1)
        for kind, entries in forged.items():
            numbered = [e if e["seq"] == i else e | {"seq": i} for i, e in enumerate(entries)]
            known = enumerate(numbered)
            leaves = [
                self.leaves[i] if i < len(rows) and e is rows[i] else audit.entry_leaf(e)
                for i, e in known
            ]
            yield kind, self.export(numbered, leaves)


def _entry(rng: Random, seq: int) -> Json:
    return {
        "seq": seq,
        "id": 2 * seq + 1,
        "at": f"2026-11-25T10:{seq // 60 % 60:02}:{seq % 60:02}.{rng.randrange(10**6):06}Z",
        "actor": f"client:{rng.getrandbits(128):032x}",
        "action": rng.choice(["assignment.assigned", "update.accepted", "round.published"]),
        "subject": f"assignment:{rng.getrandbits(128):032x}",
        "project": f"{rng.getrandbits(128):032x}",
        "body": {"sha256": f"{rng.getrandbits(256):064x}", "number": seq, "größe": True},
    }


def _signed(leaves: list[bytes]) -> str:
    body = audit.checkpoint_body(ORIGIN, len(leaves), merkle.tree_root(leaves))
    return audit.sign_checkpoint(body, KEY, ORIGIN)


def _exchanged(items: list[Any], one: int, other: int) -> list[Any]:
    found = list(items)
    found[one], found[other] = found[other], found[one]
    return found


def _speed(book: Ledger, rounds: int = 20) -> float:
    """Entries a second of the best of some verifications: others use this machine, too."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        book.verifies(book.lines)
        times.append(time.perf_counter() - start)
    return len(book.entries) / min(times)


def agrees(rng: Random, number: int) -> bool:
    """Whether an independent library finds the same roots and believes the same proofs."""
    rng = Random(f"{rng.random()}/{number}")
    size = rng.randint(1, LEAVES)
    data = [rng.randbytes(8) for _ in range(size)]
    other = InmemoryTree(algorithm="sha256")
    for each in data:
        other.append_entry(each)
    leaves = [merkle.leaf_hash(each) for each in data]
    root, index, old = merkle.tree_root(leaves), rng.randrange(size), rng.randint(1, size)
    old_root = merkle.tree_root(leaves[:old])
    path, theirs = merkle.inclusion_proof(leaves, index), other.prove_inclusion(index + 1, size)
    merkle.verify_inclusion(leaves[index], path, index=index, size=size, root=root)
    verify_inclusion(leaves[index], root, theirs, index=index + 1, size=size)
    steps = merkle.consistency_proof(leaves, old)
    merkle.verify_consistency(steps, old_size=old, old_root=old_root, size=size, root=root)
    verify_consistency(old_root, root, other.prove_consistency(old, size))
    return bool(root == other.get_root(size) and path == theirs.path[1:])
