"""Gains and their intervals, against published tables and against another way to compute them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedselect import effects
from fedselect.effects import (
    ENOUGH_CLIENTS,
    accuracies,
    correlation,
    gain,
    gains,
    jain,
    mean_interval,
    population,
    wilson,
)
from fedselect.evaluations import EvaluationReport, ScoreReport

Z = 1.959963984540054  # of a 95 % interval


def score(correct: int, total: int, both: int | None = None) -> ScoreReport:
    return ScoreReport(correct=correct, total=total, loss=0, both=both)


def bounds(post: ScoreReport, base: ScoreReport) -> tuple[float, float]:
    found = gain(post, base, judged=True).interval
    return found.low / 100, found.high / 100


# --- one share ---------------------------------------------------------------------------------


def by_the_test(correct: int, total: int, *, upper: bool) -> float:
    """Wilson's bound as he defines it: the share at which the score test just rejects."""
    p = correct / total
    low, high = (p, 1.0) if upper else (0.0, p)
    for _ in range(200):
        middle = (low + high) / 2
        spread = math.sqrt(middle * (1 - middle) / total)
        beyond = abs(p - middle) > Z * spread
        if upper == beyond:
            high = middle
        else:
            low = middle
    return (low + high) / 2


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_bounds_are_where_the_score_test_turns(counts):
    correct, total = counts
    low, high = wilson(correct, total)
    assert low == pytest.approx(by_the_test(correct, total, upper=False), abs=1e-9)
    assert high == pytest.approx(by_the_test(correct, total, upper=True), abs=1e-9)
    assert 0 <= low <= correct / total <= high <= 1


# --- a difference ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "published"),
    [  # Newcombe, Statistics in Medicine 17:873 (1998), table II, method 10
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
    ],
)
def test_independent_shares_as_published(first, second, published):
    assert bounds(score(*first), score(*second)) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize(
    ("cells", "published"),
    [  # the same author on paired data, 17:2635, method 10: both, first, second, neither
        ((36, 12, 2, 0), (0.0569, 0.3404)),
    ],
)
def test_paired_shares_as_published(cells, published):
    both, first, second, _neither = cells
    total = sum(cells)
    post, base = score(both + first, total, both + first), score(both + second, total, both)
    assert bounds(post, base) == pytest.approx(published, abs=5e-5)


def table(draw_from: int = 60):
    return st.tuples(*[st.integers(0, draw_from)] * 4).filter(lambda cells: sum(cells) > 0)


@given(table())
def test_pairs_give_what_their_table_gives(cells):
    """Recomputed from the four cells, without a look at the code's own order of steps."""
    both, first, second, neither = cells
    n = sum(cells)
    post, base = score(both + first, n, both + first), score(both + second, n, both)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = 0.0
    if product:
        determinant = both * neither - first * second
        corrected = max(determinant - n / 2, 0) if determinant > 0 else determinant
        phi = corrected / math.sqrt(product)
    p, q = (both + first) / n, (both + second) / n
    lp, up = by_the_test(both + first, n, upper=False), by_the_test(both + first, n, upper=True)
    lq, uq = by_the_test(both + second, n, upper=False), by_the_test(both + second, n, upper=True)
    down = (p - lp) ** 2 - 2 * phi * (p - lp) * (uq - q) + (uq - q) ** 2
    above = (up - p) ** 2 - 2 * phi * (up - p) * (q - lq) + (q - lq) ** 2
    expected = (p - q - math.sqrt(max(down, 0)), p - q + math.sqrt(max(above, 0)))
    assert bounds(post, base) == pytest.approx(expected, abs=1e-6)
    assert correlation(post, base) == pytest.approx(phi)


@given(table())
def test_the_interval_holds_the_difference_and_turns_with_it(cells):
    both, first, second, _neither = cells
    n = sum(cells)
    found = bounds(score(both + first, n), score(both + second, n, both))
    turned = bounds(score(both + second, n), score(both + first, n, both))
    assert found[0] <= (first - second) / n + 1e-9
    assert found[1] >= (first - second) / n - 1e-9
    assert found == pytest.approx((-turned[1], -turned[0]), abs=1e-9)


def test_what_both_get_right_narrows_the_interval():
    alone = bounds(score(90, 100), score(80, 100))
    paired = bounds(score(90, 100), score(80, 100, 79))
    assert alone[0] < paired[0] < paired[1] < alone[1]
    assert gain(score(90, 100), score(80, 100, 79), judged=True).paired
    assert not gain(score(90, 100), score(80, 99, 79), judged=True).paired


# --- worse, harmed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("post", "base", "worse"),
    [
        ((98, 100), (100, 100), False),
        ((979, 1000), (1000, 1000), True),
        ((49, 50), (50, 50), False),
    ],
)
def test_worse_is_below_two_points_and_not_at_them(post, base, worse):
    assert gain(score(*post), score(*base), judged=True).worse is worse


@given(table(400), table(400))
def test_worse_and_harmed_are_what_the_design_says(one, other):
    post, base = score(one[0], sum(one)), score(other[0], sum(other))
    found = gain(post, base, judged=True)
    points = Fraction(one[0], sum(one)) - Fraction(other[0], sum(other))
    assert found.worse is (points < Fraction(-2, 100))
    assert found.harmed is (found.interval.high < 0)
    assert (found.sign == "gain") is (found.interval.low > 0)
    unjudged = gain(post, base, judged=False)
    assert (unjudged.worse, unjudged.harmed) == (None, None)


def test_words_of_harm_belong_to_two_baselines():
    every = gains({n: score(5, 10) for n in ("local_only", "start", "global", "pre", "post")})
    assert {n: g.worse is not None for n, g in every.items()} == {
        "local_only": True,
        "start": False,
        "global": False,
        "pre": False,
    }
    assert gains({"local_only": score(5, 10)}) == {}


def test_accuracies_are_in_percent():
    (found,) = accuracies({"post": score(8, 10)}).values()
    assert (found.percent, found.correct, found.examples) == (80, 8, 10)
    assert (found.interval.low / 100, found.interval.high / 100) == pytest.approx(wilson(8, 10))


# --- over clients ------------------------------------------------------------------------------


def test_fewer_than_ten_clients_have_no_interval():
    assert mean_interval([1.0] * (ENOUGH_CLIENTS - 1), 0) is None
    few = population(
        {str(n): gain(score(9, 10), score(8, 10), judged=True) for n in range(9)}, seed=0
    )
    assert (few.interval, few.evidence) == (None, "insufficient")


def test_the_bootstrap_is_a_function_of_its_seed_and_near_theory():
    values = list(np.random.default_rng(5).normal(3, 8, 400))
    one, again, other = (mean_interval(values, seed) for seed in (1, 1, 2))
    assert one == again != other
    half = Z * np.std(values) / math.sqrt(len(values))
    assert (one.low, one.high) == pytest.approx(
        (np.mean(values) - half, np.mean(values) + half), abs=0.05
    )


def test_the_bootstrap_is_recomputed_resample_by_resample():
    values = [1.0, 5.0, -3.0, 2.0, 2.0, 8.0, 0.0, -1.0, 4.0, 7.0, 3.0]
    rng = np.random.Generator(np.random.PCG64(11))
    means = [np.mean([values[i] for i in row]) for row in rng.integers(0, 11, size=(10_000, 11))]
    found = mean_interval(values, 11)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_a_population_is_what_its_clients_are():
    lead = [12, 3, 0, -1, -4, 7, 9, 2, 1, 5, 30, -60]
    found = {
        f"c{n:02}": gain(score(60 + each, 100), score(60, 100), judged=True)
        for n, each in enumerate(lead)
    }
    all_of_them = population(found, seed=3)
    assert all_of_them.clients == 12
    assert all_of_them.mean_points == pytest.approx(sum(lead) / 12)
    spread = (all_of_them.lowest_points, all_of_them.median_points, all_of_them.highest_points)
    assert spread == pytest.approx((-60, 2.5, 30))
    assert all_of_them.lower_quartile_points == pytest.approx(np.percentile(lead, 25))
    assert all_of_them.upper_quartile_points == pytest.approx(np.percentile(lead, 75))
    assert all_of_them.worst_decile == ["c11", "c04"], "a tenth of 12 clients are two"
    assert all_of_them.worst_decile_points == pytest.approx(-32)
    assert all_of_them.worse == ["c04", "c11"]
    assert all_of_them.harmed == all_of_them.lost == ["c11"]
    assert all_of_them.gained == ["c10"]
    assert all_of_them.interval == mean_interval([found[n].points for n in found], 3)


def test_jains_index():
    assert jain([7.0, 7.0, 7.0]) == pytest.approx(1)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain([0.0, 0.0]) is None


# --- what is reported --------------------------------------------------------------------------


def report(**scores: ScoreReport) -> EvaluationReport:
    spent = {"participations": 1, "personal_share": 0, "bytes_sent": 0, "bytes_received": 0}
    return EvaluationReport(scores=scores, **spent)


@pytest.mark.parametrize(
    ("post", "base"),
    [
        (None, (5, 10, 5)),
        ((5, 11), (5, 10, 5)),
        ((4, 10), (5, 10, 5)),
        ((9, 10), (9, 10, 7)),  # both and neither would be more than there are
    ],
)
def test_counts_that_cannot_be_are_refused(post, base):
    scores = {"pre": score(*base)} | ({"post": score(*post)} if post else {})
    with pytest.raises(ValueError, match="both"):
        report(**scores)


def test_both_are_among_the_correct():
    with pytest.raises(ValueError, match="both"):
        score(5, 10, 6)


def test_scores_of_few_examples_are_withheld():
    found = report(pre=score(5, 9), post=score(5, 10))
    assert set(found.withholding(10).scores) == {"post"}
    assert set(found.withholding(9).scores) == {"pre", "post"}
    assert found.withholding(11).scores == {}


# --- one figure against another -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_rank_correlation_is_that_of_scipy(seed):
    from scipy.stats import spearmanr

    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, size=(2, 12)).astype(float).tolist()
    assert effects.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_rank_correlation_of_what_has_no_spread():
    assert effects.rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert effects.correlation_interval([1.0] * 12, list(range(12)), 1) is None


def test_an_interval_of_a_rank_correlation():
    x = list(range(12))
    y = [value + (-1) ** value for value in x]
    found = effects.correlation_interval(x, y, seed=1)
    assert found is not None
    assert 0 < found.low < effects.rank_correlation(x, y) <= found.high <= 1
    assert found == effects.correlation_interval(x, y, seed=1)
    assert effects.correlation_interval(x[:9], y[:9], seed=1) is None
