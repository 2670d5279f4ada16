"""The page that `make bench` writes: ratios, verdicts and plots, from lines of results."""

from __future__ import annotations

from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from bench.harness import Curve, Figure, Outcome
from bench.report import BEGIN, END, draw, render


def _line(name: str, *figures: Figure, curves: tuple[Curve, ...] = (), error: str = ""):
    outcome = asdict(Outcome(figures, curves, ("A note.",)))
    head = {"bench": name, "form": "full", "size": {"clients": 4}, "date": "2026-01-01"}
    return head | {"seconds": 3.2, "error": error} | outcome


def test_a_ratio_is_judged_against_what_was_wanted():
    assert Figure("a", 2, "b", 4, wanted=0.5).verdict == "met"
    assert Figure("a", 2.1, "b", 4, wanted=0.5).verdict == "missed"
    assert Figure("a", 310, "the limit", 300, wanted=1, at_least=True).verdict == "met"
    assert Figure("a", 290, "the limit", 300, wanted=1, at_least=True).verdict == "missed"
    assert Figure("a", 2, "b", 4).verdict == "–"


def test_the_page_shows_the_newest_result_of_each_benchmark():
    old = _line("first", Figure("old", 1, "b", 1))
    new = _line("first", Figure("new", 3, "b", 1, wanted=2))
    other = _line("second", error="TimeoutError: too slow")
    page = render(f"before {BEGIN} stale {END} after", [old, other, new])
    assert page.startswith(f"before {BEGIN}")
    assert page.endswith(f"{END} after")
    assert "| new | 3.00 ms | b | 1.00 ms | 3 | ≤ 2 | **missed** |" in page
    assert "**failed**: TimeoutError: too slow" in page
    assert "A note." in page
    assert "old" not in page
    assert "stale" not in page


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="marks"):
        render("no marks", [])


def test_plots_are_drawn_linked_and_cleared_away(tmp_path):
    curve = Curve("time & clients", "ours", (1, 2, 4), (10.0, 20.0, 40.0), ("clients", "s"))
    (tmp_path / "forgotten.svg").write_text("")
    lines = [_line("first", curves=(curve,))]
    draw(lines, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["time-clients.svg"]
    root = ElementTree.fromstring((tmp_path / "time-clients.svg").read_text())
    assert sum(1 for each in root.iter() if each.tag.endswith("circle")) == 3
    assert "(plots/time-clients.svg)" in render(f"{BEGIN}{END}", lines)
