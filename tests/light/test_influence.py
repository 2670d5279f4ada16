"""Conduct: which refusals are strikes, when they suspend, which updates are alike, whose group."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fedselect import RunSettings
from fedselect.deltas import quantise
from fedselect.influence import Influence, Judgement, group_of, is_strike, strikes, suspended
from fedselect.likeness import Sketch, cosine

NOW = datetime(2026, 11, 26, tzinfo=UTC)
RULES = Influence(strikes=3, strike_window=3600)


def refusals(*minutes: float, reason: str | None = "values_not_finite"):
    """Of one round each, so many minutes ago."""
    return [
        Judgement(NOW - timedelta(minutes=each), reason, round=(1000 - round(each), 1))
        for each in minutes
    ]


def test_a_run_that_bounds_nothing_is_written_as_before():
    assert "influence" not in RunSettings(rounds=60).model_dump(mode="json")
    written = RunSettings(rounds=60, influence=RULES).model_dump(mode="json")
    assert RunSettings.model_validate(written).influence == RULES


def test_enough_strikes_in_the_window_suspend():
    assert suspended(refusals(1, 2, 59), RULES, since=None, now=NOW)
    assert not suspended(refusals(1, 2, 61), RULES, since=None, now=NOW)
    assert not suspended(refusals(1, 2), RULES, since=None, now=NOW)
    assert not suspended(refusals(1, 2, 3), Influence(), since=None, now=NOW)


def found(*judged: tuple[str | None, int, int]):
    """Reason, round and the client's attempt in it, a minute from each to the next; the strikes'
    places in the list.
    """
    times = [NOW + timedelta(minutes=n) for n in range(len(judged))]
    made = [
        Judgement(at, reason, round=(number, 1), attempt=attempt)
        for at, (reason, number, attempt) in zip(times, judged, strict=True)
    ]
    return [times.index(strike.at) for strike in strikes(reversed(made))]


def test_arms_of_a_run_share_a_fault():
    bad = "values_not_finite"
    assert found((bad, 1, 1), (bad, 1, 1), ("update_alike", 1, 1), (bad, 2, 1)) == [0, 3]
    assert found((bad, 1, 1), (bad, 1, 2)) == [0, 1], "who is told and does it again is struck"
    again = [Judgement(NOW, bad, round=(1, attempt)) for attempt in (1, 2)]
    assert len([*strikes(again)]) == 2, "a round that is done anew is another one"


def test_changing_nothing_is_a_strike_from_the_third_round_in_a_row_on():
    still, bad = "update_unchanged", "values_not_finite"
    assert found((still, 1, 1), (still, 1, 2), (still, 1, 3), (still, 2, 1), (still, 2, 2)) == []
    assert found(*((still, n, 1) for n in range(1, 6))) == [2, 3, 4]
    assert found(*((still, n, a) for n in (1, 2, 3) for a in (1, 2))) == [4]
    assert found((still, 1, 1), (still, 2, 1), (None, 3, 1), (still, 4, 1), (still, 5, 1)) == []
    assert found(
        (still, 1, 1), (bad, 2, 1), (still, 3, 1), ("round_failed", 4, 1), (still, 5, 1)
    ) == [1, 4], "what is not accepted ends no row"


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-20, 1e-38, 1e-40, 1e-42])
def test_rounding_leaves_no_honest_update_without_a_change(encoding, size):
    """However small the move: it is in the codes, or in the remainder that the agent adds next."""
    delta = np.zeros(10_000, dtype=np.float32)
    delta[7] = size
    rest, sent, rounds = np.zeros_like(delta), np.zeros(delta.size), 0
    while rounds < 100 and not sent.any():
        left = np.empty_like(delta)
        sent += quantise(delta + rest, encoding, rest=left).values()
        rest, rounds = left, rounds + 1
    assert sent[7] > 0
    assert rounds == 1 or size < 1e-40, "only what is next to nothing in float32 itself waits"
    assert sent[7] + float(rest[7]) == pytest.approx(rounds * float(delta[7]), rel=1e-6)


def test_what_an_administrator_forgave_does_not_count():
    before = refusals(10, 11, 12)
    assert not suspended(before, RULES, since=NOW - timedelta(minutes=5), now=NOW)
    again = [*before, *refusals(1, 2, 3)]
    assert suspended(again, RULES, since=NOW - timedelta(minutes=5), now=NOW)
    idle = refusals(1, 2, 10, 11, 12, reason="update_unchanged")
    assert suspended(idle, RULES, since=None, now=NOW)
    assert not suspended(idle, RULES, since=NOW - timedelta(minutes=5), now=NOW)


@pytest.mark.parametrize(
    ("reason", "counts"),
    [
        ("values_not_finite", True),
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
