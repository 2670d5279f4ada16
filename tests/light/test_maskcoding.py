"""Coded masks: round trips, sizes against the entropy, and what is refused."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect import maskcoding
from fedselect.errors import WireError
from fedselect.maskcoding import CHUNK, decode_mask, encode_mask
from fedselect.masks import Mask

FAST = settings(max_examples=100, deadline=None, derandomize=True)
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.38, 0.45, 0.5)


def random_mask(dim: int, density: float, seed: int = 0) -> Mask:
    return Mask.from_bool(np.random.default_rng(seed).random(dim, dtype=np.float32) < density)


def entropy(mask: Mask) -> float:
    """Bytes that no code for independent bits of this density can go below on average."""
    share = mask.personal / mask.dim
    return -mask.dim / 8 * sum(p * math.log2(p) for p in (share, 1 - share))


def code_of(*arguments) -> str:
    with pytest.raises(WireError) as caught:
        decode_mask(*arguments)
    return caught.value.code


@pytest.mark.parametrize("density", [d for p in DENSITIES for d in sorted({p, 1 - p})])
def test_a_random_mask_costs_its_entropy(density):
    mask = random_mask(1_000_000, density)
    data = encode_mask(mask)
    assert len(data) <= 1.05 * entropy(mask)
    assert decode_mask(mask.dim, data) == mask


@pytest.mark.parametrize("changed", [0.0, 0.0005, 0.02, 0.4])
def test_a_difference_costs_the_entropy_of_what_changed(changed):
    old, flips = random_mask(CHUNK + 100_000, 0.4), random_mask(CHUNK + 100_000, changed, seed=1)
    data = encode_mask(old ^ flips, old)
    least = entropy(flips) if changed else 0
    assert len(data) <= 1.05 * least + 60
    assert decode_mask(old.dim, data, old) == old ^ flips
    if changed < 0.4:
        assert code_of(old.dim, data) == "mask_missing"


def test_whole_tensors_cost_next_to_nothing():
    bits = np.zeros(3_000_000, dtype=bool)
    bits[10_000:1_900_000] = True
    bits[2_000_000:2_000_900] = True
    assert len(encode_mask(Mask.from_bool(bits))) < 5000
    for mask in (Mask.empty(3_000_000), Mask.full(3_000_001)):
        data = encode_mask(mask)
        assert len(data) < 40
        assert decode_mask(mask.dim, data) == mask


@FAST
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_any_mask_comes_back(dim, density, changed, seed):
    mask = random_mask(dim, density, seed)
    old = mask ^ random_mask(dim, changed, seed + 1)
    for known in (None, old):
        data = encode_mask(mask, known)
        assert len(data) <= maskcoding.longest(dim)
        assert decode_mask(dim, data, known) == mask


@FAST
@given(
    st.sampled_from([0.001, 0.02, 0.2, 0.5]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_damaged_bytes_are_refused_or_give_a_mask(density, changes):
    mask = random_mask(20_011, density)
    data = bytearray(encode_mask(mask))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        outcome = decode_mask(mask.dim, bytes(data), mask).dim
    except WireError as error:
        outcome = error.code
    assert outcome in {mask.dim, "mask_coding_invalid", "mask_padding"}


def gaps(size: int, low_bits: int, count: int, spelled: int, rest: bytes) -> bytes:
    body = struct.pack("<BII", low_bits, count, spelled) + rest
    return struct.pack("<BI", 2, len(body)) + body


def test_gaps_that_cannot_be():
    assert decode_mask(800, gaps(800, 0, 2, 2, b"\3\0")).to_bool().nonzero()[0].tolist() == [3, 4]
    assert decode_mask(800, gaps(800, 1, 1, 1, b"\3\1")).to_bool().nonzero()[0].tolist() == [7]
    assert decode_mask(800, gaps(800, 0, 1, 2, b"\xff\5")).to_bool().nonzero()[0].tolist() == [260]
    for bad in (
        gaps(800, 23, 1, 1, b"\0\0\0\0"),
        gaps(800, 0, 401, 401, bytes(401)),
        gaps(800, 0, 2**32 - 1, 2**32 - 1, b"\0"),
        gaps(800, 22, 2**32 - 1, 2**32 - 1, b"\0"),
        gaps(800, 0, 2, 1, b"\3"),
        gaps(800, 0, 1, 2, b"\3\0"),
        gaps(800, 0, 1, 1, b"\xff"),
        gaps(800, 0, 1, 2, b"\3\xff"),
        gaps(800, 0, 1, 2**31, b"\3\0"),
        gaps(800, 0, 2, 2, b"\3"),
        gaps(800, 0, 2, 2, b"\3\0\0"),
        gaps(800, 1, 1, 1, b"\3\3"),
        gaps(800, 1, 1, 1, b"\3"),
        gaps(800, 4, 1, 1, b"\xfe\0"),
        gaps(800, 0, 4, 6, b"\xff\xff\xff\xff\0\0"),
    ):
        assert code_of(800, bad) == "mask_coding_invalid"
