"""Bounded averages: the arithmetic is that of plain Python element by element, whatever the cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect import bounded as module
from fedselect.aggregate import Contribution
from fedselect.bounded import Bounds, bounded, norm_of, sift, weight_cap
from fedselect.clipping import clip_factor
from fedselect.deltas import SCALE_BLOCK
from fedselect.errors import MaskError
from fedselect.influence import Influence
from fedselect.masks import Mask

FAST = settings(max_examples=60, deadline=None, derandomize=True)
BOUNDS = st.builds(
    Bounds,
    rule=st.sampled_from(["mean", "trimmed_mean", "median"]),
    trim=st.sampled_from([0.1, 0.2, 0.4]),
    max_change=st.sampled_from([None, 0.05, 1.0]),
    share_cap=st.booleans(),
    movers=st.booleans(),
)


def part_of(rng: np.random.Generator, base: np.ndarray, weight: float) -> Contribution:
    mask = Mask.from_bool(rng.random(base.size) < rng.choice([0.0, 0.3, 0.8]))
    moved = base + np.where(rng.random(base.size) < 0.7, rng.standard_normal(base.size), 0)
    return Contribution(mask, moved.astype(np.float32)[~mask.to_bool()], weight)


def round_of(seed: int, dim: int, weights: list[float]):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim).astype(np.float32)
    return base, [part_of(rng, base, weight) for weight in weights]


def capped(weights: list[float], k: int) -> list[float]:
    """Lower the heaviest together until none weighs more than 1/k of all."""
    low, high = 0.0, max(weights, default=0.0)
    if len(weights) < k or high * k <= math.fsum(weights):
        return weights
    for _ in range(200):
        middle = (low + high) / 2
        fits = middle * k <= math.fsum(min(each, middle) for each in weights)
        low, high = (middle, high) if fits else (low, middle)
    return [min(each, low) for each in weights]


def plain(base, parts, factors, bounds: Bounds, k: int) -> list[float]:
    """The rule told in plain Python, one element at a time."""
    dense = []
    for part in parts:
        row: list[float | None] = [None] * base.size
        for j, value in zip(np.flatnonzero(~part.mask.to_bool()), part.values, strict=True):
            row[j] = float(value)
        dense.append(row)
    out = []
    for j in range(base.size):
        here = [n for n, row in enumerate(dense) if row[j] is not None]
        steps = {n: float(dense[n][j]) - float(base[j]) for n in here}
        weights = [float(parts[n].weight) for n in here]
        if len(here) < max(k, 1) or not sum(weights):
            out.append(float(base[j]))
            continue
        most = math.inf if bounds.max_change is None else bounds.max_change
        moved = [min(max(steps[n] * factors[n], -most), most) for n in here]
        if bounds.rule == "mean":
            weights = capped(weights, k) if bounds.share_cap and k > 0 else weights
            mean = math.fsum(w * d for w, d in zip(weights, moved, strict=True)) / sum(weights)
            kept = moved
        else:
            share = 0.5 if bounds.rule == "median" else bounds.trim
            cut = min(math.floor(share * len(moved)), (len(moved) - 1) // 2)
            cut = min(cut, (len(moved) - k) // 2) if len(moved) >= 5 else 0
            kept = sorted(moved)[cut : len(moved) - cut]
            mean = math.fsum(kept) / len(kept)
        if bounds.movers and sum(step != 0 for step in kept) < max(k, 1):
            mean = 0.0
        out.append(float(base[j]) + mean)
    return out


@FAST
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from([1.0, 1.0, 3.0, 500.0]), min_size=0, max_size=9),
    BOUNDS,
    st.integers(1, 4),
)
def test_the_average_is_what_the_rule_says(seed, weights, bounds, k):
    base, parts = round_of(seed, 40, weights)
    factors = list(np.random.default_rng(seed).choice([1.0, 0.25], len(parts)))
    found = bounded(base, parts, factors, bounds, k)
    assert found.dtype == np.float32
    assert np.allclose(found, plain(base, parts, factors, bounds, k), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bounds", [Bounds("median"), Bounds("trimmed_mean", trim=0.45)])
@pytest.mark.parametrize(("k", "mean"), [(1, 3.0), (2, 3.0), (3, 3.0), (4, 3.2), (5, 3.2)])
def test_no_rule_publishes_the_value_of_fewer_than_k(bounds, k, mean):
    """Of 1, 2, 3, 4, 6 the middle three count for k = 3, and all for k above."""
    base = np.zeros(1, np.float32)
    sent = [Contribution(Mask.empty(1), np.float32([v])) for v in (1, 2, 3, 4, 6)]
    assert bounded(base, sent, [1.0] * 5, bounds, k) == np.float32(mean)


@pytest.mark.parametrize("rule", ["trimmed_mean", "median"])
def test_movers_that_were_trimmed_hide_nobody(rule):
    base = np.zeros(1, np.float32)
    values = [0.0] * 7 + [1.0, 2.0, 3.0]
    sent = [Contribution(Mask.empty(1), np.float32([value])) for value in values]
    for movers, moves in ((True, False), (False, rule == "trimmed_mean")):
        bounds = Bounds(rule, movers=movers)
        assert (bounded(base, sent, [1.0] * 10, bounds, 3)[0] != 0) == moves


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "median"])
def test_how_a_model_is_cut_changes_no_bit(monkeypatch, rule):
    base, parts = round_of(7, 3 * SCALE_BLOCK + 11, [1.0, 9.0, 2.0, 30.0, 1.0, 1.0])
    arguments = (base, parts, [1.0, 0.5, 1.0, 0.1, 1.0, 1.0], Bounds(rule, 0.2, 0.5), 2)
    whole = bounded(*arguments)
    monkeypatch.setattr(module, "TILE", SCALE_BLOCK)
    assert bounded(*arguments).tobytes() == whole.tobytes()


@FAST
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_no_client_weighs_more_than_a_kth(seed, weights, k):
    present = np.random.default_rng(seed).random((len(weights), 50)) < 0.7
    cap = weight_cap(present, [float(each) for each in weights], k)
    for j in np.flatnonzero(present.sum(axis=0) >= k):
        here = [min(w, cap[j]) for w, there in zip(weights, present[:, j], strict=True) if there]
        assert max(here) * k <= sum(here) * (1 + 1e-12)
        heaviest = max(w for w, there in zip(weights, present[:, j], strict=True) if there)
        unbound = sum(w for w, there in zip(weights, present[:, j], strict=True) if there)
        assert np.isinf(cap[j]) == (heaviest * k <= unbound)  # nobody is capped without need


def test_one_hostile_client_moves_an_average_no_further_than_its_bound():
    """Of n clients that share everything one is as hostile as floats allow: bound/n, no more."""
    base, honest = round_of(3, 500, [1.0] * 9)
    evil = Contribution(Mask.empty(500), np.full(500, 3e30, np.float32), 1.0)
    clip = 2.0
    everybody = [*honest, evil]
    factors = [clip_factor(norm_of(base, part), clip) for part in everybody]
    silent = Contribution(Mask.empty(500), base.copy(), 1.0)
    with_it = bounded(base, everybody, factors, Bounds(), 2).astype(np.float64)
    without = bounded(base, [*honest, silent], [*factors[:-1], 1.0], Bounds(), 2)
    assert np.linalg.norm(with_it - without) <= clip / 2 * (1 + 1e-6)  # k clients at every element
    unbounded = bounded(base, everybody, [1.0] * 10, Bounds(), 2)
    assert np.abs(unbounded).max() > 1e29


def test_zero_changes_and_copies_do_not_count():
    base, honest = round_of(5, 2000, [1.0] * 3)
    still = Contribution(Mask.empty(2000), base.copy(), 1.0)
    copy = Contribution(honest[1].mask, honest[1].values.copy(), 1.0)
    noise = np.random.default_rng(0).standard_normal(honest[2].values.size) * 0.01
    near = Contribution(honest[2].mask, (honest[2].values + noise).astype(np.float32), 1.0)
    private = Contribution(Mask.from_bool(np.ones(2000, bool)), np.empty(0, np.float32), 1.0)
    parts = [honest[0], still, honest[1], copy, honest[2], near, private]
    assert sift(base, parts, Influence(likeness=0.98)).kept == [0, 2, 4, 6]
    assert sift(base, parts, Influence()).kept == [0, 2, 3, 4, 5, 6]
    everything = Influence(refuse_unchanged=False)
    found = sift(base, parts, everything)
    assert found.kept == list(range(7))
    assert found.norms[1] == found.norms[6] == 0
    assert found.norms[0] == norm_of(base, honest[0])


def test_values_that_do_not_fit_the_mask_are_refused():
    base = np.zeros(10, np.float32)
    with pytest.raises(MaskError):
        bounded(base, [Contribution(Mask.empty(10), base[:9])], [1.0], Bounds(), 1)
