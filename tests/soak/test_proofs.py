"""The smallest form of every proof that needs a stack of its own; the register and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import report
from .answers_proof import lost_answers
from .failpoints_proof import failpoints
from .kills_proof import kills
from .network_proof import network
from .proofs import Figures, Room, all_proofs
from .stragglers_proof import stragglers

pytestmark = pytest.mark.e2e


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path, seed=5)


def holds(figures: Figures) -> dict[str, Any]:
    assert figures.met, (figures.measured, figures.numbers)
    return figures.numbers


def test_nothing_is_lost_or_double_under_a_few_kills(room):
    numbers = holds(kills(room, rounds=2, sites=4, kills=6))
    assert numbers["uploads"] == 8


def test_dying_at_some_failpoints_does_no_harm(room):
    # It also holds the list of points in docs/RELIABILITY.md to what a whole round passes.
    numbers = holds(failpoints(room, times=1, at_once=6, most=6))
    assert numbers["crashes"] == 6


def test_faults_of_the_network_change_nothing(room):
    holds(network(room, runs=2, least=40))


def test_a_lost_answer_costs_nothing(room):
    numbers = holds(lost_answers(room, turns=1, least=14))
    assert len(numbers["calls"]) == 18


def test_stragglers_do_not_stop_a_round(room):
    holds(stragglers(room, rounds=1, deadline=3))


def test_every_proof_is_registered_with_both_sizes():
    found = list(all_proofs())
    assert {"kills", "failpoints", "network", "stragglers", "redis", "recomputable"} <= {
        each.name for each in found
    }
    for each in found:
        assert each.quick.keys() == each.full.keys(), each.name


def test_the_table_prefers_the_newest_full_result():
    proof = next(all_proofs())
    base = {"proof": proof.name, "date": "d", "commit": "c", "seed": 1, "machine": "m"}
    results = [
        {**base, "form": form, "met": met, "measured": text, "seconds": 1.0}
        for form, met, text in [
            ("full", False, "outdated"),
            ("full", True, "a|b"),
            ("quick", True, "q"),
        ]
    ]
    page = report.render(
        f"before\n{report.BEGIN}\nold table\n{report.END}\nafter", [proof], results
    )
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert "| a/b | met |" in page
    assert "outdated" not in page
    assert "old table" not in page
    with pytest.raises(ValueError, match="marks"):
        report.render("no marks", [proof], results)
