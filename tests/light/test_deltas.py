"""Quantisers and frames: the specification in plain Python, round trips, ranges, bad bytes."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.deflate import deflate, expand, inflate, shrink
from fedselect.deltas import (
    BLOCK,
    DELTA_ENCODINGS,
    SCALE_BLOCK,
    Codes,
    Frames,
    check_scales,
    dense_rank,
    pack,
    quantise,
    scale_counts,
)
from fedselect.errors import WireError
from fedselect.masks import Mask

DIM = 2 * BLOCK + 5000
FAST = settings(max_examples=60, deadline=None, derandomize=True)


def random_delta(dim: int = DIM, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(dim) * rng.gamma(1.0, 1e-3, dim)).astype(np.float32)


def random_mask(dim: int = DIM, share: float = 0.5, seed: int = 1) -> Mask:
    return Mask.from_bool(np.random.default_rng(seed).random(dim) < share)


def counts_of(mask: Mask) -> np.ndarray:
    return scale_counts(mask.packed, mask.dim)


def code_of(call, *arguments) -> str:
    with pytest.raises(WireError) as caught:
        call(*arguments)
    return caught.value.code


# --- the quantiser -----------------------------------------------------------------------------


def plain_int8(values: list[float]) -> tuple[list[int], float]:
    """The specification, number by number; ``values`` are float32 of one scale block."""
    tree = [float(v) ** 2 for v in values] + [0.0] * (SCALE_BLOCK - len(values))
    while len(tree) > 1:
        half = len(tree) // 2
        tree = [a + b for a, b in zip(tree[:half], tree[half:], strict=True)]
    largest = max(abs(float(v)) for v in values)
    scale = np.float32(max(largest / 127, math.sqrt(tree[0] / len(values)) / 12))
    if scale == 0:
        return [0] * len(values), 0.0
    codes = [int(np.clip(np.rint(np.float32(v) / scale), -127, 127)) for v in values]
    return codes, float(scale)


def test_int8_is_the_specification():
    delta = random_delta(2 * SCALE_BLOCK + 77)
    codes = quantise(delta, "int8")
    for number, scale in enumerate(codes.scales):
        span = slice(number * SCALE_BLOCK, (number + 1) * SCALE_BLOCK)
        assert (codes.codes[span].tolist(), float(scale)) == plain_int8(list(delta[span]))


@FAST
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_int8_of_any_numbers(values):
    codes = quantise(np.array(values, np.float32), "int8")
    assert (codes.codes.tolist(), float(codes.scales[0])) == plain_int8(values)
    step = float(codes.scales[0])
    if step > 1e-40:  # subnormal scales are too coarse for this bound
        assert np.abs(codes.values() - np.array(values)).max() <= step * 0.5001


def test_only_shared_elements_count_for_a_scale():
    delta, mask = random_delta(), random_mask()
    loud = np.where(mask.to_bool(), np.float32(1e9), delta)
    ours, theirs = quantise(delta, "int8", mask), quantise(loud, "int8", mask)
    assert np.array_equal(ours.codes, theirs.codes)
    assert np.array_equal(ours.scales, theirs.scales)
    shared = np.flatnonzero(~mask.to_bool()[:SCALE_BLOCK])
    mean = math.sqrt(np.square(delta[shared], dtype=np.float64).mean())
    peak = np.abs(delta[shared]).max()
    assert float(ours.scales[0]) == pytest.approx(max(peak / 127, mean / 12), rel=1e-6)


def test_bf16_rounds_to_nearest_even():
    exact = np.array([1.0, -2.5, 0.0, -0.0, 2.0**-133], np.float32)
    assert np.array_equal(quantise(exact, "bf16").values(), exact)
    ties = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F80_7FFF], np.uint32)
    assert quantise(ties.view(np.float32), "bf16").codes.tolist() == [
        *(0x3F80, 0x3F82, 0x3F81, 0x3F80)
    ]


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
def test_what_is_not_finite_is_refused_where_it_is_shared(encoding):
    delta, mask = random_delta(), random_mask()
    personal = int(np.flatnonzero(mask.to_bool())[7])
    shared = int(np.flatnonzero(~mask.to_bool())[7])
    delta[personal] = np.nan
    assert np.isfinite(quantise(delta, encoding, mask).values(counts_of(mask))).all()
    delta[shared] = np.inf
    assert code_of(quantise, delta, encoding, mask) == "values_not_finite"
    if encoding == "bf16":
        delta[shared] = np.finfo(np.float32).max  # rounds to infinity
        assert code_of(quantise, delta, encoding, mask) == "values_not_finite"


def test_values_are_exact_products():
    mask = random_mask()
    codes = quantise(random_delta(), "int8", mask)
    scale = np.repeat(codes.scales, counts_of(mask))
    for code, step, value in zip(
        codes.codes[::997], scale[::997], codes.values(counts_of(mask))[::997], strict=True
    ):
        assert value == int(code) * float(step)


# --- frames ------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "half": random_mask(),
    "all but one": Mask.from_bool(np.arange(DIM) != 3),
    "everything": Mask.full(DIM),
    "a whole block": Mask.from_bool(np.arange(DIM) // BLOCK == 1),
}


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
@pytest.mark.parametrize("name", MASKS)
def test_frames_come_back_by_any_range(encoding, name):
    mask = MASKS[name]
    rank = dense_rank(DIM) if mask is None else mask.block_rank()
    codes = quantise(random_delta(), encoding, mask)
    lengths, payload = pack(codes, rank)
    frames = Frames(encoding, DIM, rank, lengths)
    assert frames.size == len(payload)
    for start, stop in ((0, DIM), (0, BLOCK), (BLOCK, 2 * BLOCK), (BLOCK, DIM), (2 * BLOCK, DIM)):
        first, last = frames.span(start, stop)
        found = frames.decode(payload[first:last], start, stop)
        low, high = int(rank[start // BLOCK]), int(rank[-(-stop // BLOCK)])
        assert found.codes.tobytes() == codes.codes[low:high].tobytes()
        if encoding == "int8":
            steps = codes.scales[start // SCALE_BLOCK : -(-stop // SCALE_BLOCK)]
            assert np.array_equal(found.scales, steps)
        counts = None if mask is None else counts_of(mask)
        part = None if counts is None else counts[start // SCALE_BLOCK : -(-stop // SCALE_BLOCK)]
        whole = codes.values(counts)[low:high]
        assert found.values(part).tobytes() == whole.tobytes()
        if part is not None:
            check_scales(found, part)


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
def test_a_dense_rank_is_that_of_the_empty_mask(encoding):
    assert np.array_equal(dense_rank(DIM), Mask.empty(DIM).block_rank())
    delta = random_delta()
    open_codes = quantise(delta, encoding, Mask.empty(DIM))
    assert np.array_equal(open_codes.codes, quantise(delta, encoding).codes)


def test_gaussian_deltas_cost_what_their_entropy_says():
    delta = np.random.default_rng(4).standard_normal(16 * BLOCK, dtype=np.float32)
    bits = {}
    for encoding in DELTA_ENCODINGS:
        lengths, payload = pack(quantise(delta, encoding), dense_rank(delta.size))
        bits[encoding] = 8 * (len(payload) + lengths.nbytes) / delta.size
    assert bits["int8"] < 5.70
    assert bits["bf16"] < 10.65


def test_frames_of_zeros_are_small():
    for encoding in DELTA_ENCODINGS:
        codes = quantise(np.zeros(4 * BLOCK, np.float32), encoding)
        assert len(pack(codes, dense_rank(4 * BLOCK))[1]) < 4 * 600


# --- bad bytes ---------------------------------------------------------------------------------


def test_lengths_that_cannot_be():
    rank = dense_rank(DIM)
    lengths, _ = pack(quantise(random_delta(), "int8"), rank)
    for place, length in ((0, 0), (0, BLOCK + 1), (2, 5001), (1, 2**32 - 1)):
        wrong = lengths.copy()
        wrong[place] = length
        assert code_of(Frames, "int8", DIM, rank, wrong) == "frames_invalid"
    assert code_of(Frames, "int8", DIM, rank, lengths[:-1]) == "frames_invalid"
    assert code_of(Frames, "bf16", DIM, rank, lengths) == "frames_invalid"
    nothing = Mask.full(DIM).block_rank()
    assert code_of(Frames, "int8", DIM, nothing, lengths) == "frames_invalid"


def decode_one(codes: np.ndarray, scales: list[float]) -> Codes:
    """A file of one raw frame with exactly these bytes."""
    dim = codes.size
    payload = struct.pack(f"<{len(scales)}f", *scales) + codes.tobytes()
    frames = Frames("int8", dim, dense_rank(dim), np.array([dim], np.uint32))
    return frames.decode(payload, 0, dim)


def test_bad_codes_and_scales():
    good = np.array([1, -127, 127, 0], np.int8)
    assert decode_one(good, [0.5]).values().tolist() == [0.5, -63.5, 63.5, 0]
    assert code_of(decode_one, np.array([1, -128], np.int8), [0.5]) == "code_invalid"
    assert code_of(decode_one, good, [math.nan]) == "values_not_finite"
    assert code_of(decode_one, good, [math.inf]) == "values_not_finite"
    assert code_of(decode_one, good, [-1.0]) == "code_invalid"
    assert code_of(decode_one, good, [-0.0]) == "code_invalid"
    four, none = np.array([4]), np.array([4, 0])
    assert code_of(check_scales, decode_one(good, [0.0]), four) == "code_invalid"
    unseen = Codes("int8", good, np.array([1, 2], np.float32))
    assert code_of(check_scales, unseen, none) == "code_invalid"


def test_a_bf16_that_is_not_finite_is_refused():
    rank = dense_rank(3)
    for bits in (0x7F80, 0xFF80, 0x7FC1):
        codes = Codes("bf16", np.array([0, bits, 0], np.uint16), np.empty(0, np.float32))
        lengths, payload = pack(codes, rank)
        frames = Frames("bf16", 3, rank, lengths)
        assert code_of(frames.decode, payload, 0, 3) == "values_not_finite"


def test_streams_that_are_not_exactly_what_they_should_be():
    plain = np.zeros(1000, np.uint8)
    good = deflate(plain)
    assert np.array_equal(inflate(good, 1000), plain)
    bomb = deflate(np.zeros(10_000_000, np.uint8), runs=True)
    for data, size in (
        (good, 999),
        (good, 1001),
        (good[:-1], 1000),
        (good + b"\0", 1000),
        (good + good, 1000),
        (b"", 1000),
        (b"\x07", 1000),  # no such kind of block
        (bomb, 65_536),
        (zlib.compress(plain), 1000),  # with the header of zlib
    ):
        assert code_of(inflate, data, size) == "frame_invalid"
    assert code_of(expand, bytes(1001), 1000) == "frame_invalid"


@FAST
@given(st.binary(max_size=2000))
def test_shrunk_bytes_come_back(data):
    array = np.frombuffer(data, np.uint8)
    small = shrink(array)
    assert len(small) <= len(data)
    assert expand(small, len(data)).tobytes() == data
