"""A small form of the proof that tampering with the ledger is evident."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedselect import audit

from . import ledger_proof
from .ledger_proof import tampering
from .proofs import Room


def test_tampering_is_evident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_proof, "SPEED", 0)  # this machine has other work to do as well
    figures = tampering(Room(tmp_path, seed=3), entries=1_000, every=100, trees=300)
    assert figures.met, figures
    assert sum(figures.numbers["tried"].values()) > 200


def test_the_proof_sees_a_verifier_that_overlooks_kept_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kept head is for: without it, a ledger that was signed anew passes."""
    honest = audit.verify_export
    monkeypatch.setattr(
        audit,
        "verify_export",
        lambda lines, *, public_key, heads: honest(lines, public_key=public_key),
    )
    figures = tampering(Room(tmp_path, seed=3), entries=40, every=10, trees=1)
    assert not figures.met
    assert set(figures.numbers["missed"]) == {
        "edited and signed",
        "removed and signed",
        "removed, signed, refilled",
        "inserted and signed",
        "cut and signed",
        "exchanged and signed",
    }
