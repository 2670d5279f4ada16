"""Median and trimmed mean: the compiled form equals the reference bit for bit."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.aggregate import Contribution
from fedselect.deltas import SCALE_BLOCK
from fedselect.errors import MaskError
from fedselect.masks import Mask
from fedselect.robust import MEDIAN, TILE, Trim, robust, robust_reference

FAST = settings(max_examples=100, deadline=None, derandomize=True)


def part_of(rng: np.random.Generator, dim: int, kind: str) -> Contribution:
    mask = Mask.from_bool(rng.random(dim) < rng.choice([0.0, 0.3, 0.9, 1.0]))
    if kind == "i1":
        scales = rng.standard_exponential(-(-dim // SCALE_BLOCK)).astype(np.float32)
        values = rng.integers(-127, 128, mask.shared).astype(np.int8)
        return Contribution(mask, values, 1.0, scales)
    if kind == "u2":
        return Contribution(mask, rng.integers(0, 0x7F00, mask.shared).astype(np.uint16))
    # Few different numbers, so that there are ties, also of zeros with either sign.
    values = rng.integers(-3, 4, mask.shared) * 0.1
    values[rng.random(mask.shared) < 0.2] = -0.0
    return Contribution(mask, values.astype(kind))


@pytest.mark.parametrize("kind", ["f4", "f2", "u2", "i1"])
@FAST
@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 255, 256, 257, SCALE_BLOCK + 1, TILE - 1, TILE + 9]),
    st.integers(0, 23),
    st.sampled_from([Trim(0.0), Trim(0.1), Trim(0.25, least=1), MEDIAN, Trim(0.5, least=2)]),
    st.integers(1, 3),
)
def test_the_compiled_form_is_the_reference_bit_for_bit(kind, seed, dim, clients, rule, k):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim).astype(np.float32)
    parts = [part_of(rng, dim, kind) for _ in range(clients)]
    found, expected = robust(base, parts, rule, k), robust_reference(base, parts, rule, k)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


def given_by(rows: list[list[float]]) -> list[Contribution]:
    return [
        Contribution(Mask.empty(len(row)), np.array(row, dtype=np.float32), 1e6 * number)
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("clients", range(1, 12))
def test_the_median_is_the_median_and_weights_do_not_count(clients):
    rng = np.random.default_rng(clients)
    column = rng.integers(-50, 50, clients).astype(float).tolist()
    parts = given_by([[value] for value in column])
    wanted = statistics.median(column) if clients >= 5 else statistics.fmean(column)
    assert robust(np.zeros(1, np.float32), parts, MEDIAN, 1)[0] == np.float32(wanted)
    assert robust(np.zeros(1, np.float32), parts, Trim(0.5, least=1), 1)[0] == np.float32(
        statistics.median(column)
    )


def test_one_liar_moves_the_mean_but_neither_rule():
    parts = given_by([[1.0], [1.0], [1.0], [1.0], [1e30]])
    base = np.zeros(1, np.float32)
    assert robust(base, parts, Trim(0.0), 1)[0] > 1e29
    assert (
        robust(base, parts, Trim(0.2), 1).tolist() == robust(base, parts, MEDIAN, 1).tolist() == [1]
    )


def test_what_too_few_share_is_kept():
    base = np.array([-0.0, 7.0], dtype=np.float32)
    mask = Mask.from_bool(np.array([True, False]))
    parts = [Contribution(mask, np.ones(1, np.float32))] * 2
    assert robust(base, parts, MEDIAN, 3).tobytes() == base.tobytes()
    assert robust(base, parts, MEDIAN, 2).tobytes() == np.array([-0.0, 1], np.float32).tobytes()
    assert robust(base, [], MEDIAN, 1).tobytes() == base.tobytes()


def test_values_that_do_not_fit_the_mask_and_cuts_that_are_none_are_refused():
    with pytest.raises(MaskError):
        robust(
            np.zeros(8, np.float32),
            [Contribution(Mask.empty(8), np.ones(7, np.float32))],
            MEDIAN,
            1,
        )
    with pytest.raises(ValueError, match="a cut"):
        Trim(0.6)
