"""Whether the ledger, its heads and the rows that it tells of fit together (invariants I7 and I8).

Owns the check alone, for operators (`fedselect admin check-ledger`) and for the tests, which call
it after every fault. Reads everything, changes nothing; must not repair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from sqlalchemy import func, select, text

from app import ledger
from app.db import Tx
from app.tables import CheckpointRecord, Entry, Seal
from app.wiring import Coordinator
from fedselect import audit
from fedselect.errors import LedgerError

MOST = 100  # findings that are told; a rewritten ledger has as many as it has entries
AT_ONCE = 1000  # rows in memory

# Each gives a line per finding. A transition and its entry are written by the same statement
# sequence in app/rounds.py or app/rollouts.py, so they agree in everything that both of them say
# (an entry of a rollout is named by what happened: passing leads to `running`, as starting does).
TRANSITIONS = """
    SELECT project_id, subject_kind || ':' || subject_id AS subject, subject_kind || '.' || to_state
        AS action, from_state, to_state, reason, actor, created_at FROM transitions"""
TOLD = """
    SELECT project_id, subject, CASE WHEN action LIKE 'rollout.%' THEN 'rollout.' || (body->>'to')
        ELSE action END, body->>'from', body->>'to', body->>'reason', actor, at
    FROM ledger_entries WHERE body ? 'from' AND split_part(action, '.', 1) IN
        ('run', 'round', 'assignment', 'rollout')"""
UNMATCHED = "SELECT '{what}: ' || subject || ' ' || action FROM ({these} EXCEPT ALL {those}) x"
MOVED = """
    SELECT '{kind} ' || id || ' is ' || state || ', not as its last transition says' FROM {table} s
    WHERE state IS DISTINCT FROM coalesce((SELECT to_state FROM transitions t WHERE
        t.subject_id = s.id AND t.subject_kind = '{kind}' ORDER BY t.id DESC LIMIT 1), {first})
"""
STORY = (
    UNMATCHED.format(what="transition without its entry", these=TRANSITIONS, those=TOLD),
    UNMATCHED.format(what="entry without its transition", these=TOLD, those=TRANSITIONS),
    MOVED.format(kind="run", table="runs", first="'created'"),
    MOVED.format(kind="round", table="rounds", first="NULL"),
    MOVED.format(kind="assignment", table="assignments", first="NULL"),
    MOVED.format(kind="rollout", table="rollouts", first="NULL"),
    """SELECT 'version ' || v.id || ' without its entry' FROM versions v
        WHERE (v.arm_id IS NULL OR v.round_id IS NOT NULL) AND NOT EXISTS (SELECT 1
        FROM ledger_entries e WHERE e.subject = 'version:' || v.id AND e.action =
        CASE WHEN v.arm_id IS NULL THEN 'version.imported' ELSE 'version.published' END
        AND e.body->>'sha256' = v.sha256)""",
    """SELECT 'update ' || u.id || ' without its entry' FROM updates u WHERE NOT EXISTS (
        SELECT 1 FROM ledger_entries e WHERE e.subject = 'assignment:' || u.assignment_id
        AND e.action = 'update.accepted')""",
)


@dataclass(frozen=True, slots=True)
class LedgerCheck:
    """What was looked at, and what is wrong with it, in words: nothing, one hopes."""

    entries: int
    sealed: int
    checkpoints: int
    stored: int
    findings: tuple[str, ...]

    @property
    def unsealed(self) -> int:
        """Entries that wait for the sealer."""
        return self.entries - self.sealed


@dataclass(frozen=True, slots=True)
class _Head:
    where: str
    text: str
    frontier: list[str] | None = None


class _Signed(NamedTuple):
    head: _Head
    root: bytes


def check_ledger(core: Coordinator) -> LedgerCheck:
    """Recompute the whole ledger and compare it with what it tells of.

    I7: numbers without a gap, every leaf and inner node follows from the entries, every checkpoint
    (in the database and in the object store) is signed and is the root of its entries, none is
    larger than the ledger. I8: every transition has its entry and every such entry its transition,
    rows stand where the last transition has put them, versions and updates have their entries.

    Raises:
        Unavailable: the object store does not answer.
    """
    # Before the transaction: what is stored by now is in the database for long.
    stored = [_Head(key, head) for key, head in core.heads.all()]
    with core.db.transaction("ledger-check", "ledgercheck.read") as tx:
        tx.session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        rows = tx.session.scalars(select(CheckpointRecord).order_by(CheckpointRecord.size)).all()
        signed = [_Head(f"checkpoint {row.size}", row.text, row.frontier) for row in rows]
        findings = _findings(tx, [*signed, *stored], ours=core.sealer.public_key)
        with closing(findings):
            found = list(islice(findings, MOST))
        return LedgerCheck(
            entries=_count(tx, Entry),
            sealed=_count(tx, Seal),
            checkpoints=len(signed),
            stored=len(stored),
            findings=tuple(found),
        )


def _count(tx: Tx, table: type[Entry | Seal]) -> int:
    return tx.session.scalar(select(func.count()).select_from(table)) or 0


def _findings(tx: Tx, heads: list[_Head], *, ours: str) -> Generator[str]:
    keys = ledger.known_keys(tx, ours)
    signed: defaultdict[int, list[_Signed]] = defaultdict(list)
    for head in heads:
        try:
            found = _opened(head.text, keys)
        except LedgerError as error:
            yield f"{head.where}: {error}"
        else:
            signed[found.size].append(_Signed(head, found.root))
    yield from _tree(tx, signed)
    yield from _ends(tx, signed)
    for query in STORY:
        yield from tx.session.scalars(text(query))


def _opened(checkpoint: str, keys: list[str]) -> audit.Checkpoint:
    """A checkpoint that one of the ledger's keys has signed."""
    for key in keys[:-1]:
        try:
            return audit.verify_checkpoint(checkpoint, key)
        except LedgerError:
            continue
    return audit.verify_checkpoint(checkpoint, keys[-1])


def _tree(tx: Tx, signed: Mapping[int, list[_Signed]]) -> Iterator[str]:
    """Grow the tree from the entries; compare every node with the seals, every root with heads."""
    tree = audit.Frontier()
    yield from _roots(tree, signed)
    query = select(Seal, Entry).join(Entry, Entry.id == Seal.entry_id).order_by(Seal.seq)
    with closing(tx.session.execute(query.execution_options(yield_per=AT_ONCE))) as rows:
        for seal, entry in rows:
            if seal.seq != tree.size:
                yield f"entry {tree.size} is missing: {seal.seq} stands in its place"
                return
            yield from _grow(tree, seal, entry)
            yield from _roots(tree, signed)
    sealed = _count(tx, Seal)
    if sealed != tree.size:
        yield f"{sealed} entries are sealed, {tree.size} of them are there"


def _grow(tree: audit.Frontier, seal: Seal, entry: Entry) -> Iterator[str]:
    leaf = audit.entry_leaf(ledger.document(seal.seq, entry))
    if leaf != seal.leaf:
        yield f"entry {seal.seq} does not match its leaf hash"
    if b"".join(tree.append(leaf)) != seal.subtrees:
        yield f"entry {seal.seq}: the inner nodes do not follow from the entries"


def _ends(tx: Tx, signed: Mapping[int, list[_Signed]]) -> Iterator[str]:
    """Every stored head is in the database, and the newest one is of all that is sealed."""
    rows = {size for size, heads in signed.items() if any(h.head.frontier for h in heads)}
    for size in sorted(signed.keys() - rows - {0}):
        yield f"{signed[size][0].head.where}: the database does not know this head"
    sealed = _count(tx, Seal)
    if max(rows, default=0) != sealed:
        yield f"the newest head signs {max(rows, default=0)} entries, {sealed} are sealed"


def _roots(tree: audit.Frontier, signed: Mapping[int, list[_Signed]]) -> Iterator[str]:
    for each in signed.get(tree.size, []):
        if each.root != tree.root() or each.head.frontier not in (None, tree.to_json()):
            yield f"{each.head.where} is not the head of the first {tree.size} entries"
