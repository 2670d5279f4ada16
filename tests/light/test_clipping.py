"""Clipping: one number for every cut of the range, bounds that are kept, ranks as quantiles."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.clipping import LANES, SquareSum, clip_factor, norm, quantile, round_bound

FAST = settings(max_examples=60, deadline=None, derandomize=True)


def changes_of(seed: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size) * 10.0 ** rng.integers(-8, 8, size)


@FAST
@given(st.integers(0, 2**32), st.integers(0, 5 * LANES + 3), st.integers(1, 4))
def test_the_norm_is_the_same_bits_over_every_cut(seed, size, pieces):
    changes = changes_of(seed, size)
    total = SquareSum()
    for start in range(0, size, pieces * LANES):
        total.add(changes[start : start + pieces * LANES])
    assert total.norm() == norm(changes)


def test_the_norm_is_that_of_exact_arithmetic_to_the_last_digits():
    changes = changes_of(1, 3 * LANES + 17)
    exact = sum(Fraction(float(each)) ** 2 for each in changes)
    assert math.isclose(norm(changes), math.sqrt(exact), rel_tol=1e-14)


@FAST
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_a_clipped_change_is_no_longer_than_the_bound(length, bound):
    factor = clip_factor(length, bound)
    assert length * factor <= bound * (1 + 1e-15)
    assert (factor == 1) == (length <= bound)


def test_without_a_bound_and_without_a_change_nothing_is_clipped():
    assert clip_factor(1e30, None) == 1
    assert clip_factor(0.0, 1.0) == 1


@pytest.mark.parametrize(
    ("share", "rank"), [(0.0, 1), (0.1, 3), (0.5, 15), (0.51, 16), (0.9, 27), (1.0, 30)]
)
def test_a_quantile_is_one_of_the_norms_by_its_rank(share, rank):
    norms = [float(number) for number in range(30, 0, -1)]
    assert quantile(norms, share) == rank


def test_the_bound_follows_the_round_before_and_first_its_own():
    before, own = [1.0, 2.0, 3.0], [10.0, 20.0, 30.0]
    assert round_bound(None, 0.5, before=before, own=own) == 2
    assert round_bound(None, 0.5, before=[], own=own) == 20
    assert round_bound(5.0, 0.5, before=[], own=own) == 5
    assert round_bound(5.0, None, before=before, own=own) == 5
    assert round_bound(None, None, before=before, own=own) is None
    assert round_bound(None, 0.5, before=[], own=[]) is None
    with pytest.raises(ValueError, match="nothing"):
        quantile([], 0.5)
