"""Noise: its keys, its bits and its distribution."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest

from fedselect.masks import BLOCK
from fedselect.noise import commitment, gaussian, round_key, run_secret, upper_quantile

KEY = hashlib.sha256(b"a test").digest()
SIGMA = 2**29
GOLDEN = "2c5d282679a9567c505a6039cdd1655a1e6cf7d7b330edfee827319be7bd6332"


def test_the_quantile_is_that_of_the_standard_library():
    tails = np.concatenate(
        [np.ldexp(1.0, -np.arange(1, 128)), np.linspace(1e-6, 0.5, 5001), [0.075, 0.0749999]]
    )
    wanted = [-NormalDist().inv_cdf(tail) for tail in tails]
    np.testing.assert_allclose(upper_quantile(tails), wanted, rtol=1e-13, atol=1e-15)
    assert upper_quantile(np.array([0.5]))[0] == 0
    assert upper_quantile(np.array([2.0**-128]))[0] > 13


def test_the_bits_are_the_same_on_every_machine():
    found = gaussian(KEY, 0, 100_000, SIGMA).astype("<i8")
    assert hashlib.sha256(found.tobytes()).hexdigest() == GOLDEN


def test_any_range_is_part_of_the_whole():
    whole = gaussian(KEY, 0, 3 * BLOCK + 17, SIGMA)
    for start, stop in (
        (0, 5),
        (BLOCK, 2 * BLOCK),
        (BLOCK - 3, 2 * BLOCK + 9),
        (3 * BLOCK, 3 * BLOCK + 17),
    ):
        np.testing.assert_array_equal(gaussian(KEY, start, stop, SIGMA), whole[start:stop])


def distance(sample):
    """Kolmogorov and Smirnov's distance to the normal distribution, times √n."""
    ordered = np.sort(sample)
    wanted = np.array([NormalDist().cdf(x) for x in ordered])
    steps = np.arange(sample.size + 1) / sample.size
    return max(np.max(wanted - steps[:-1]), np.max(steps[1:] - wanted)) * math.sqrt(sample.size)


def test_draws_are_normal():
    found = gaussian(KEY, 0, 200_000, SIGMA) / SIGMA
    assert distance(found) < 1.63  # exceeded by one sample in a hundred
    assert found.mean() == pytest.approx(0, abs=4 / math.sqrt(found.size))
    assert found.var() == pytest.approx(1, abs=4 * math.sqrt(2 / found.size))
    assert (found**4).mean() == pytest.approx(3, abs=4 * math.sqrt(96 / found.size))
    for limit in (2, 3, 4):
        share = 2 * NormalDist().cdf(-limit)
        spread = 4 * math.sqrt(share / found.size)
        assert np.mean(abs(found) > limit) == pytest.approx(share, abs=spread)


def test_draws_are_independent_of_their_neighbours_and_of_other_rounds():
    first = gaussian(KEY, 0, 200_000, SIGMA)
    second = gaussian(round_key(KEY, "ab"), 0, 200_000, SIGMA)
    limit = 4 / math.sqrt(200_000)
    pairs = [(first[:-1], first[1:]), (first[:-BLOCK], first[BLOCK:]), (first, second)]
    assert [abs(np.corrcoef(*pair)[0, 1]) < limit for pair in pairs] == [True] * 3


def test_whole_steps_and_no_noise_where_there_is_none():
    found = gaussian(KEY, 0, 1000, 3)
    np.testing.assert_array_equal(found, np.rint(found))
    assert not gaussian(KEY, 0, 1000, 0).any()


def test_every_run_and_every_manifest_has_its_own_key():
    one, other = run_secret(KEY, "run-1"), run_secret(KEY, "run-2")
    keys = {one, other, *(round_key(s, m) for s in (one, other) for m in ("aa", "ab"))}
    assert len(keys) == 6
    assert commitment(one) != commitment(other)
    assert len(commitment(one)) == 64
    with pytest.raises(ValueError, match="32 bytes"):
        run_secret(b"short", "run-1")
