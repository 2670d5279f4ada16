"""The Merkle tree and its proofs, against pymerkle, known roots and the RFC's own words."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_samples import some_leaves
from pymerkle import InmemoryTree, verify_consistency, verify_inclusion

from fedselect import audit, merkle
from fedselect.errors import LedgerError

FAST = settings(max_examples=100, deadline=None, derandomize=True)
SLOW = settings(max_examples=60, deadline=None, derandomize=True)

# The tree of the certificate-transparency reference implementation: inputs, and roots by size.
CT_INPUTS = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def test_known_roots():
    leaves = [merkle.leaf_hash(bytes.fromhex(text)) for text in CT_INPUTS]
    assert [merkle.tree_root(leaves[:n]).hex() for n in range(9)] == CT_ROOTS


def other_tree(count: int, salt: int = 0) -> InmemoryTree:
    tree = InmemoryTree(algorithm="sha256")
    for i in range(count):
        tree.append_entry(f"{salt}:{i}".encode())
    return tree


@SLOW
@given(st.integers(1, 300), st.integers(0, 99), st.data())
def test_roots_and_proofs_agree_with_pymerkle(size, salt, data):
    leaves, other = some_leaves(size, salt), other_tree(size, salt)
    root, index = merkle.tree_root(leaves), data.draw(st.integers(0, size - 1))
    assert root == other.get_root(size)
    assert [other.get_leaf(i + 1) for i in range(size)] == leaves
    theirs = other.prove_inclusion(index + 1, size)
    assert audit.inclusion_proof(leaves, index) == theirs.path[1:]
    verify_inclusion(leaves[index], root, theirs, index=index + 1, size=size)
    audit.verify_inclusion(leaves[index], theirs.path[1:], index=index, size=size, root=root)
    old = data.draw(st.integers(1, size))
    old_root = merkle.tree_root(leaves[:old])
    # pymerkle spells consistency proofs another way, so it vouches for our two roots.
    verify_consistency(old_root, root, other.prove_consistency(old, size))
    proof = audit.consistency_proof(leaves, old)
    audit.verify_consistency(proof, old_size=old, old_root=old_root, size=size, root=root)


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word by word."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def naive_subproof(m: int, leaves: list[bytes], complete: bool) -> list[bytes]:
    """RFC 6962 §2.1.2, word by word."""
    if m == len(leaves):
        return [] if complete else [naive_root(leaves)]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    if m <= k:
        return [*naive_subproof(m, leaves[:k], complete), naive_root(leaves[k:])]
    return [*naive_subproof(m - k, leaves[k:], False), naive_root(leaves[:k])]


def test_every_proof_up_to_forty_leaves():
    for size in range(41):
        leaves = some_leaves(size)
        root = merkle.tree_root(leaves)
        assert root == naive_root(leaves)
        for index in range(size):
            proof = audit.inclusion_proof(leaves, index)
            audit.verify_inclusion(leaves[index], proof, index=index, size=size, root=root)
        for old in range(size + 1):
            proof = audit.consistency_proof(leaves, old)
            assert proof == (naive_subproof(old, leaves, True) if old else [])
            old_root = naive_root(leaves[:old])
            audit.verify_consistency(proof, old_size=old, old_root=old_root, size=size, root=root)


def spoiled(proof: list[bytes]) -> list[list[bytes]]:
    """Everything that can be wrong with a proof's length, order and content."""
    found = [[*proof, b"\0" * 32], [b"\0" * 32, *proof]]
    found += [proof[:i] + proof[i + 1 :] for i in range(len(proof))]
    found += [[*proof[:i], b"\0" * 32, *proof[i + 1 :]] for i in range(len(proof))]
    if len(set(proof)) > 1:
        found.append(proof[::-1])
    return [bad for bad in found if bad != proof]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 13])
def test_spoiled_inclusion_proofs_are_refused(size):
    leaves = some_leaves(size)
    root = merkle.tree_root(leaves)
    for index in range(size):
        proof, leaf = audit.inclusion_proof(leaves, index), leaves[index]
        claims = [{"leaf": leaf, "proof": bad} for bad in spoiled(proof)]
        claims += [{"leaf": b"\1" * 32}, {"root": b"\1" * 32}]
        claims += [{"index": wrong} for wrong in (-1, size, 2**64)]
        claims += [{"index": wrong} for wrong in range(size) if wrong != index]
        for claim in claims:
            stated = {"leaf": leaf, "proof": proof, "index": index, "size": size, "root": root}
            stated |= claim
            with pytest.raises(LedgerError):
                audit.verify_inclusion(stated.pop("leaf"), stated.pop("proof"), **stated)


@pytest.mark.parametrize(
    ("old", "size"), [(1, 2), (2, 3), (3, 7), (4, 8), (6, 8), (7, 13), (8, 13)]
)
def test_spoiled_consistency_proofs_are_refused(old, size):
    leaves = some_leaves(size)
    honest = {
        "old_size": old,
        "old_root": merkle.tree_root(leaves[:old]),
        "size": size,
        "root": merkle.tree_root(leaves),
    }
    proof = audit.consistency_proof(leaves, old)
    audit.verify_consistency(proof, **honest)
    for bad in [*spoiled(proof), []]:
        with pytest.raises(LedgerError):
            audit.verify_consistency(bad, **honest)
    forked = merkle.tree_root([*leaves[: old - 1], b"\1" * 32, *leaves[old:]])
    for claim in (
        {"old_root": b"\1" * 32},
        {"root": forked},
        {"old_size": size},
        {"old_size": size + 1},
        {"old_size": -1},
    ):  # other sizes may pass: a proof binds the roots, the checkpoints bind roots to sizes
        with pytest.raises(LedgerError):
            audit.verify_consistency(proof, **honest | claim)


def test_equal_and_empty_trees_are_consistent_only_with_themselves():
    root = merkle.tree_root(some_leaves(5))
    audit.verify_consistency([], old_size=5, old_root=root, size=5, root=root)
    empty = merkle.EMPTY_ROOT
    audit.verify_consistency([], old_size=0, old_root=empty, size=5, root=root)
    audit.verify_consistency([], old_size=0, old_root=empty, size=0, root=empty)
    for old_size, old_root in ((5, empty), (0, root)):
        with pytest.raises(LedgerError):
            audit.verify_consistency([], old_size=old_size, old_root=old_root, size=5, root=root)


def test_proofs_of_what_is_not_there():
    leaves = some_leaves(3)
    for index in (-1, 3):
        with pytest.raises(LedgerError):
            audit.inclusion_proof(leaves, index)
        with pytest.raises(LedgerError):
            audit.consistency_proof(leaves, index + 1 if index > 0 else index)


@FAST
@given(st.integers(0, 300), st.integers(0, 300))
def test_a_frontier_survives_json_and_grows_on(first, more):
    leaves = some_leaves(first + more)
    frontier = audit.Frontier()
    for leaf in leaves[:first]:
        frontier.append(leaf)
    text = json.dumps(frontier.to_json())
    resumed = audit.Frontier.from_json(json.loads(text))
    assert (resumed.size, resumed.root()) == (first, merkle.tree_root(leaves[:first]))
    for leaf in leaves[first:]:
        resumed.append(leaf)
    assert (resumed.size, resumed.root()) == (first + more, merkle.tree_root(leaves))
    assert resumed.size.bit_count() == sum(map(bool, resumed.to_json()))


@pytest.mark.parametrize(
    "levels", [[""], ["ab"], ["zz" * 32], ["ab" * 32, ""], ["ab" * 33], [None], [5], "ab", None]
)
def test_something_else_is_no_frontier(levels):
    with pytest.raises(LedgerError):
        audit.Frontier.from_json(levels)
