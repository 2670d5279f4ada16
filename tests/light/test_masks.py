"""Masks: the bit layout, the algebra and the statistics, each against a naive count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedselect.errors import MaskError
from fedselect.masks import BLOCK, Mask, packed_size
from fedselect.space import Kind, ParameterSpace, Role

DIMS = st.integers(1, 200)
FAST = settings(max_examples=100, deadline=None, derandomize=True)
SLOW = settings(max_examples=25, deadline=None, derandomize=True)


def bits(dim: int) -> st.SearchStrategy:
    return hnp.arrays(np.bool_, dim)


@st.composite
def several(draw: st.DrawFn, count: int) -> list:
    dim = draw(DIMS)
    return [draw(bits(dim)) for _ in range(count)]


@FAST
@given(DIMS.flatmap(bits))
def test_pack_and_unpack(personal):
    mask = Mask.from_bool(personal)
    assert np.array_equal(mask.to_bool(), personal)
    assert Mask.from_bytes(personal.size, mask.to_bytes()) == mask
    assert mask.personal == int(personal.sum())
    assert mask.shared == personal.size - mask.personal
    assert len(mask.to_bytes()) == packed_size(personal.size)


@FAST
@given(DIMS.flatmap(bits))
def test_the_bit_layout_is_the_documented_one(personal):
    packed = Mask.from_bool(personal).to_bytes()
    for j, bit in enumerate(personal):
        assert packed[j // 8] >> (j % 8) & 1 == bit


@FAST
@given(several(2))
def test_algebra(pair):
    a, b = (Mask.from_bool(x) for x in pair)
    x, y = pair
    assert np.array_equal((a | b).to_bool(), x | y)
    assert np.array_equal((a & b).to_bool(), x & y)
    assert np.array_equal((a - b).to_bool(), x & ~y)
    assert np.array_equal((a ^ b).to_bool(), x ^ y)
    assert (a <= b) == bool((x <= y).all())
    assert (a == b) == np.array_equal(x, y)
    if a == b:
        assert hash(a) == hash(b)
        assert a.digest == b.digest
    else:
        assert a.digest != b.digest


@FAST
@given(several(3))
def test_laws(three):
    a, b, c = (Mask.from_bool(x) for x in three)
    empty, full = Mask.empty(a.dim), Mask.full(a.dim)
    assert a & (b | c) == (a & b) | (a & c)
    assert (a ^ b) ^ b == a
    assert a - b <= a <= a | b
    assert empty <= a <= full
    assert full - (full - a) == a
    assert (a | b).personal + (a & b).personal == a.personal + b.personal


@FAST
@given(several(2))
def test_jaccard(pair):
    x, y = pair
    union = int((x | y).sum())
    expected = int((x & y).sum()) / union if union else 1.0
    a, b = Mask.from_bool(x), Mask.from_bool(y)
    assert a.jaccard(b) == expected == b.jaccard(a)
    assert 0 <= expected <= 1
    assert a.jaccard(a) == 1.0


@pytest.mark.parametrize(
    "dim", [1, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 13, 3 * BLOCK]
)
def test_block_rank_against_a_naive_count(dim):
    personal = np.random.default_rng(dim).random(dim) < 0.4
    ranks = Mask.from_bool(personal).block_rank()
    assert ranks.dtype == np.uint64
    assert ranks.shape == (-(-dim // BLOCK) + 1,)
    expected = [int((~personal[: BLOCK * b]).sum()) for b in range(ranks.size)]
    assert ranks.tolist() == expected
    assert ranks[-1] == dim - personal.sum()


@SLOW
@given(st.integers(1, 3 * BLOCK), st.sampled_from([0.0, 0.001, 0.5, 1.0]), st.integers(0, 99))
def test_block_rank_at_any_size(dim, share, seed):
    mask = Mask.from_bool(np.random.default_rng(seed).random(dim) < share)
    ranks = mask.block_rank().astype(np.int64)
    assert ranks[0] == 0
    assert ranks[-1] == mask.shared
    steps = np.diff(ranks)
    assert steps.min() >= 0
    assert steps.max() <= BLOCK


@FAST
@given(DIMS.filter(lambda dim: dim % 8), st.data())
def test_any_padding_bit_is_refused(dim, data):
    packed = bytearray(Mask.empty(dim).to_bytes())
    packed[-1] |= 1 << data.draw(st.integers(dim % 8, 7))
    with pytest.raises(MaskError) as caught:
        Mask.from_bytes(dim, bytes(packed))
    assert caught.value.code == "mask_padding"


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_wrong_size_is_refused(size):
    with pytest.raises(MaskError) as caught:
        Mask.from_bytes(16, bytes(size))
    assert caught.value.code == "mask_size"
    with pytest.raises(MaskError):
        Mask(16, np.zeros(2, dtype=np.uint16))


def test_masks_over_different_spaces_do_not_combine():
    for combine in (Mask.__or__, Mask.__and__, Mask.__sub__, Mask.__xor__, Mask.jaccard):
        with pytest.raises(MaskError, match="do not combine"):
            combine(Mask.empty(8), Mask.empty(9))
    assert Mask.empty(8) != Mask.empty(7)
    assert Mask.empty(8) != "mask"


def space() -> ParameterSpace:
    return ParameterSpace.of(
        [
            ("w", (5,), Kind.WEIGHT, Role.SELECTABLE),
            ("b", (3,), Kind.BIAS, Role.SHARED),
            ("m", (2,), Kind.BUFFER, Role.PERSONAL),
            ("e", (7,), Kind.WEIGHT, Role.FROZEN),
        ]
    )


def test_over_initial_and_per_slot():
    s = space()
    initial = Mask.initial(s)
    assert np.flatnonzero(initial.to_bool()).tolist() == list(range(8, 17))
    assert initial.per_slot(s) == {"w": 0, "b": 0, "m": 2, "e": 7}
    grown = initial | Mask.over(s, (s.by_name["w"],))
    assert grown.per_slot(s) == {"w": 5, "b": 0, "m": 2, "e": 7}
    with pytest.raises(MaskError, match="does not fit"):
        Mask.empty(3).per_slot(s)


def test_the_share_leaves_frozen_elements_out():
    s = space()
    assert Mask.initial(s).share(s) == 2 / 10
    assert Mask.full(s.dim).share(s) == 1.0
    assert Mask.empty(s.dim).share(s) == 0.0
