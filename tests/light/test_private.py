"""The private sum: what one client can change, its bits, and that its noise is as accounted."""

import hashlib
import math

import numpy as np
import pytest

from fedselect import Mask
from fedselect.aggregate import Contribution, reference, whole_part
from fedselect.deltas import quantise
from fedselect.manifestdocs import ManifestNoise
from fedselect.noise import gaussian
from fedselect.policies import Dp
from fedselect.private import PrivateSum, add_squares, noise_alone, private_mean, shrink

SIZE = 5003
KEY = hashlib.sha256(b"private").digest()


def rule(*, clip=1.0, noise=1.0, goal=4, still=(), **changes):
    grid = Dp(clip=clip, noise=noise, epsilon=1.0).grid._asdict() | changes
    return ManifestNoise(**grid, goal=goal, still=list(still), commitment="")


def client(seed, *, length=1.0, share=0.7):
    """A client whose mask depends on its data: it keeps its largest elements."""
    draw = np.random.default_rng(seed)
    delta = draw.standard_t(3, SIZE)
    delta *= length / np.linalg.norm(delta)
    kept = abs(delta) > np.quantile(abs(delta), share)
    mask = Mask.from_bool(kept)
    return Contribution(mask, delta[~kept].astype(np.float32))


def zeros(of):
    return Contribution(of.mask, np.zeros_like(of.values))


@pytest.mark.parametrize("length", [1e-6, 0.9, 1.4, 1e6])
@pytest.mark.parametrize("clip", [1.0, 0.37])
def test_a_client_moves_the_sum_by_its_clip_at_most_whatever_its_mask(length, clip):
    silent = rule(clip=clip, sigma=0, goal=1)
    others = [client(seed) for seed in range(3)]
    base = np.zeros(SIZE, np.float32)
    for seed in range(3, 8):
        one = client(seed, length=length, share=seed / 10)
        total = PrivateSum(silent, KEY, (0, SIZE))
        part = whole_part(one)
        total.add(part, None, shrink(add_squares(0.0, part, None, silent.step), silent.bound))
        steps = total.steps.astype(object)  # exact integers
        assert sum(s * s for s in steps) <= silent.bound**2
        means = [
            private_mean(base, [*others, each], silent, KEY, deltas=True)
            for each in (one, zeros(one))
        ]
        moved = np.linalg.norm(means[0].astype(float) - means[1])
        assert moved <= clip * (1 + 1e-6)
        assert moved > 0 or length < 1e-3


def test_leaving_somebody_out_is_the_same_as_zeros():
    base = np.zeros(SIZE, np.float32)
    one, two = client(1), client(2)
    with_zeros = private_mean(base, [one, zeros(two)], rule(), KEY, deltas=True)
    np.testing.assert_array_equal(with_zeros, private_mean(base, [one], rule(), KEY, deltas=True))


def test_noise_does_not_depend_on_clients_and_is_what_was_asked_for():
    base = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    clients = [client(seed, length=3) for seed in range(5)]
    loud, silent = rule(noise=2.0, goal=5), rule(noise=2.0, goal=5, sigma=0)
    found = private_mean(base, clients, loud, KEY, deltas=True).astype(float)
    found -= private_mean(base, clients, silent, KEY, deltas=True)
    wanted = np.ldexp(gaussian(KEY, 0, SIZE, loud.sigma), loud.step) / 5
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert np.std(found) == pytest.approx(2.0 / 5, rel=4 / math.sqrt(2 * SIZE))
    np.testing.assert_array_equal(noise_alone(loud, KEY, SIZE), wanted.astype(np.float32))


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "values"])
def test_shards_and_order_change_no_bit(kind):
    base = np.random.default_rng(7).normal(size=SIZE).astype(np.float32)
    clients = [_as(kind, client(seed, length=2), base) for seed in range(6)]
    noisy = rule(goal=6, still=[(100, 300), (4000, 4500)])
    deltas = kind != "values"
    whole = private_mean(base, clients, noisy, KEY, deltas=deltas)
    np.testing.assert_array_equal(
        private_mean(base, clients[::-1], noisy, KEY, deltas=deltas), whole
    )
    pieces = []
    for start, stop in ((0, 4096), (4096, SIZE)):
        total = PrivateSum(noisy, KEY, (start, stop))
        for each in clients:
            squares = 0.0
            for span in ((0, 4096), (4096, SIZE)):
                squares = add_squares(squares, *_cut(each, base, span, deltas), noisy.step)
            total.add(*_cut(each, base, (start, stop), deltas), shrink(squares, noisy.bound))
        before = np.zeros(stop - start, np.float32) if deltas else base[start:stop]
        pieces.append(total.finish(before, 1))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    kept = np.zeros_like(base) if deltas else base
    np.testing.assert_array_equal(whole[100:300], kept[100:300])
    assert not np.any(whole[300:4000] == kept[300:4000])


def _as(kind, of, base):
    """The same client's contribution as it comes in a run of this kind."""
    if kind == "f32":
        return of
    shared = ~of.mask.to_bool()
    if kind == "values":
        return Contribution(of.mask, base[shared] + of.values)
    dense = np.zeros(SIZE, np.float32)
    dense[shared] = of.values
    codes = quantise(dense, kind, of.mask)
    return Contribution(of.mask, codes.codes, 1.0, codes.scales if kind == "int8" else None)


def _cut(of, base, span, deltas):
    start, stop = span
    bits = of.mask.to_bool()
    before = np.count_nonzero(~bits[:start])
    values = of.values[before : before + np.count_nonzero(~bits[start:stop])]
    scales = None if of.scales is None else of.scales[start // 4096 : -(-stop // 4096)]
    part = whole_part(Contribution(Mask.from_bool(bits[start:stop]), values, 1.0, scales))
    return part, None if deltas else base[start:stop]


def test_without_noise_and_clipping_it_is_the_plain_mean():
    base = np.random.default_rng(3).normal(size=SIZE).astype(np.float32)
    everybody = Mask.from_bool(np.zeros(SIZE, bool))
    clients = [
        Contribution(everybody, np.random.default_rng(seed).normal(size=SIZE).astype(np.float32))
        for seed in range(4)
    ]
    found = private_mean(base, clients, rule(clip=1000.0, sigma=0, goal=4), KEY, deltas=False)
    np.testing.assert_allclose(found, reference(base, clients, 1), atol=1e-6)
