"""The Merkle tree of RFC 6962 over leaf hashes, and its proofs (RFC 9162 §2.1).

Owns the hashing, the frontier of a growing tree, making and checking proofs. Must not know what a
leaf stands for. Leaves and inner nodes are hashed under different prefixes, so that neither can
pass for the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from fedselect.errors import LedgerError

EMPTY_ROOT = hashlib.sha256().digest()


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 || data) (RFC 6962 §2.1)."""
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """What an append-only RFC 6962 tree needs to grow: the roots of its full subtrees.

    One hash per bit of ``size``, so appending costs O(1) on average and memory is O(log n).
    """

    def __init__(self) -> None:
        self.size = 0
        self._levels: list[bytes] = []  # [i]: root of the full subtree of 2**i leaves, or b""

    def append(self, leaf: bytes) -> list[bytes]:
        """Add the next leaf hash (32 bytes); returns the roots of the subtrees that it completes.

        They are those of 2, 4, 8 … leaves that end with this one; half of all leaves complete none.
        """
        self.size += 1
        node = leaf
        completed: list[bytes] = []
        for level, left in enumerate(self._levels):
            if not left:
                self._levels[level] = node
                return completed
            self._levels[level] = b""
            node = _node(left, node)
            completed.append(node)
        self._levels.append(node)
        return completed

    def root(self) -> bytes:
        """The Merkle tree hash of everything appended (RFC 6962 §2.1)."""
        return fold(list(filter(None, reversed(self._levels))))

    def to_json(self) -> list[str]:
        """Hex by level, "" where there is no full subtree: ``size`` follows from the places."""
        return [node.hex() for node in self._levels]

    @classmethod
    def from_json(cls, levels: Sequence[str]) -> Frontier:
        """Read what :meth:`to_json` wrote.

        Raises:
            LedgerError: not such a list.
        """
        frontier = cls()
        try:
            frontier._levels = [bytes.fromhex(text) for text in levels]
        except (TypeError, ValueError) as error:
            raise LedgerError(f"not the frontier of a tree: {error}") from error
        if any(len(node) not in {0, 32} for node in frontier._levels) or levels[-1:] == [""]:
            raise LedgerError("not the frontier of a tree: a level holds no SHA-256")
        frontier.size = sum(1 << level for level, node in enumerate(levels) if node)
        return frontier


def tree_root(leaves: Iterable[bytes]) -> bytes:
    """The Merkle tree hash of a list of leaf hashes (RFC 6962 §2.1)."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def _split(size: int) -> int:
    """The largest power of two below ``size`` (at least 2)."""
    return 1 << (size - 1).bit_length() - 1


def fold(roots: Sequence[bytes]) -> bytes:
    """The root over full subtrees that stand side by side, the largest first."""
    root = b""
    for left in reversed(roots):
        root = _node(left, root) if root else left
    return root or EMPTY_ROOT


def full_subtrees(leaves: range) -> list[tuple[int, int]]:
    """(level, last leaf) of the full subtrees that a node over ``leaves`` is folded from.

    ``leaves`` must be a node's: as :func:`inclusion_nodes` gives them, or from 0 on.
    """
    found, start = [], leaves.start
    while start < leaves.stop:
        level = (leaves.stop - start).bit_length() - 1
        start += 1 << level
        found.append((level, start - 1))
    return found


def inclusion_nodes(index: int, size: int) -> list[range]:
    """The leaves under each node of the audit path of leaf ``index`` (RFC 9162 §2.1.3.1).

    Raises:
        LedgerError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise LedgerError(f"there is no entry {index} among {size}")
    path: list[range] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            path.append(range(middle, stop))
            stop = middle
        else:
            path.append(range(start, middle))
            start = middle
    return path[::-1]


def consistency_nodes(old_size: int, size: int) -> list[range]:
    """The leaves under each node of a consistency proof (RFC 9162 §2.1.4.1).

    Raises:
        LedgerError: the old tree is larger than this one.
    """
    if not 0 <= old_size <= size:
        raise LedgerError(f"a ledger of {size} entries cannot extend one of {old_size}")
    path: list[range] = []
    start, stop = 0, size if old_size else 0
    while old_size < stop:
        middle = start + _split(stop - start)
        if old_size <= middle:
            path.append(range(middle, stop))
            stop = middle
        else:
            path.append(range(start, middle))
            start = middle
    # The verifier already holds the old root, so it is left out when it is a node of this tree.
    if start:
        path.append(range(start, stop))
    return path[::-1]


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of leaf ``index`` in the tree over ``leaves``.

    Raises:
        LedgerError: there is no such leaf.
    """
    nodes = inclusion_nodes(index, len(leaves))
    return [tree_root(leaves[n.start : n.stop]) for n in nodes]


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> list[bytes]:
    """That the tree over the first ``old_size`` leaves is a prefix of the one over ``leaves``.

    Raises:
        LedgerError: the old tree is larger than this one.
    """
    nodes = consistency_nodes(old_size, len(leaves))
    return [tree_root(leaves[n.start : n.stop]) for n in nodes]


def verify_inclusion(
    leaf: bytes, proof: Sequence[bytes], *, index: int, size: int, root: bytes
) -> None:
    """Check that ``leaf`` is entry ``index`` of the tree given (RFC 9162 §2.1.3.2).

    Raises:
        LedgerError: it is not.
    """
    if not 0 <= index < size:
        raise LedgerError(f"there is no entry {index} among {size}")
    place, last, node = index, size - 1, leaf
    for sibling in proof:
        if not last:
            _refuse_proof("inclusion")
        if place & 1 or place == last:
            node = _node(sibling, node)
            place, last = _skip_right_edge(place, last)
        else:
            node = _node(node, sibling)
        place, last = place >> 1, last >> 1
    if last or node != root:
        _refuse_proof("inclusion")


def verify_consistency(
    proof: Sequence[bytes], *, old_size: int, old_root: bytes, size: int, root: bytes
) -> None:
    """Check that the old tree is a prefix of the new one (RFC 9162 §2.1.4.2).

    Raises:
        LedgerError: it is not, so the ledger was rewritten or forked.
    """
    if not 0 <= old_size <= size:
        raise LedgerError(f"a ledger of {size} entries cannot extend one of {old_size}")
    if old_size in {0, size}:
        expected = root if old_size else EMPTY_ROOT
        if proof or old_root != expected:
            _refuse_proof("consistency")
        return
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    if not path:
        _refuse_proof("consistency")
    place, last = old_size - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old_node = node = path[0]
    for sibling in path[1:]:
        if not last:
            _refuse_proof("consistency")
        if place & 1 or place == last:
            old_node, node = _node(sibling, old_node), _node(sibling, node)
            place, last = _skip_right_edge(place, last)
        else:
            node = _node(node, sibling)
        place, last = place >> 1, last >> 1
    if last or old_node != old_root or node != root:
        _refuse_proof("consistency")


def _skip_right_edge(place: int, last: int) -> tuple[int, int]:
    """Climb past the levels at which a right-edge node has no sibling."""
    while not place & 1 and place:
        place, last = place >> 1, last >> 1
    return place, last


def _refuse_proof(kind: str) -> NoReturn:
    raise LedgerError(f"the {kind} proof does not lead to the given root")
