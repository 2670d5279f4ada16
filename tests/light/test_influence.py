"""Conduct: which refusals are strikes, when they suspend, which updates are alike, whose group."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fedselect import RunSettings
from fedselect.influence import Influence, group_of, is_strike, suspended
from fedselect.likeness import Sketch, cosine

NOW = datetime(2026, 11, 26, tzinfo=UTC)
RULES = Influence(strikes=3, strike_window=3600)


def refusals(*minutes: float, reason: str = "values_not_finite"):
    return [(NOW - timedelta(minutes=each), reason) for each in minutes]


def test_a_run_that_bounds_nothing_is_written_as_before():
    assert "influence" not in RunSettings(rounds=60).model_dump(mode="json")
    written = RunSettings(rounds=60, influence=RULES).model_dump(mode="json")
    assert RunSettings.model_validate(written).influence == RULES


def test_enough_strikes_in_the_window_suspend():
    assert suspended(refusals(1, 2, 59), RULES, since=None, now=NOW)
    assert not suspended(refusals(1, 2, 61), RULES, since=None, now=NOW)
    assert not suspended(refusals(1, 2), RULES, since=None, now=NOW)
    assert not suspended(refusals(1, 2, 3), Influence(), since=None, now=NOW)


def test_what_an_administrator_forgave_does_not_count():
    before = refusals(10, 11, 12)
    assert not suspended(before, RULES, since=NOW - timedelta(minutes=5), now=NOW)
    again = [*before, *refusals(1, 2, 3)]
    assert suspended(again, RULES, since=NOW - timedelta(minutes=5), now=NOW)


@pytest.mark.parametrize(
    ("reason", "counts"),
    [
        ("values_not_finite", True),
        ("update_unchanged", True),
        ("update_alike", True),
        ("values_norm", True),
        ("round_cancelled", False),
        ("client_erased", False),
        ("upload_missing", False),
        ("verification_timeout", False),
        ("verification_failed", False),
        (None, False),
    ],
)
def test_only_what_a_client_is_at_fault_for_is_a_strike(reason, counts):
    assert is_strike(reason) is counts
    assert suspended(refusals(1, 2, 3, reason=reason), RULES, since=None, now=NOW) is counts


def test_a_group_is_the_first_tag_of_its_kind():
    assert group_of(["beds:9", "site:north", "site:south"], "site") == "site:north"
    assert group_of(["beds:9", "sites:north"], "site") is None


def sketch(changes: np.ndarray, pieces: int = 1) -> bytes:
    found = Sketch()
    for piece in np.array_split(changes, pieces):
        found.add(piece)
    return found.to_bytes()


def test_sketches_tell_copies_from_what_has_nothing_in_common():
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 50_000))
    assert sketch(one) == sketch(one, pieces=7)
    assert cosine(sketch(one), sketch(3 * one)) == pytest.approx(1, abs=1e-5)
    assert cosine(sketch(one), sketch(-one)) == pytest.approx(-1, abs=1e-5)
    assert cosine(sketch(one), sketch(one + 0.1 * other)) > 0.98
    estimates = [cosine(sketch(a), sketch(b)) for a, b in rng.standard_normal((40, 2, 20_000))]
    assert max(map(abs, estimates)) < 0.3
    assert np.std(estimates) == pytest.approx(1 / 16, rel=0.4)
    half = cosine(sketch(one), sketch(one + other))
    assert half == pytest.approx(np.sqrt(0.5), abs=0.15)


def test_nothing_is_like_no_change_at_all():
    zeros = sketch(np.zeros(100))
    assert cosine(zeros, zeros) == 0
