"""Aggregation: the streaming form equals the reference bit for bit; both keep their promises."""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.aggregate import (
    GROUP,
    Accumulator,
    Contribution,
    aggregate,
    reference,
    value_range,
)
from fedselect.deltas import DELTA_ENCODINGS, SCALE_BLOCK, quantise, scale_counts
from fedselect.errors import MaskError
from fedselect.kernels import LANES, Part, Sums, add_group
from fedselect.masks import BLOCK, Mask

FAST = settings(max_examples=150, deadline=None, derandomize=True)
SLOW = settings(max_examples=12, deadline=None, derandomize=True)
WAYS = [n for n in (1, 8, 16) if n <= LANES]
WEIGHTS = st.one_of(st.just(1.0), st.integers(1, 10**6).map(float), st.floats(0.01, 100))


def part_of(rng: np.random.Generator, dim: int, weight: float) -> Contribution:
    """A random client whose numbers span many magnitudes, so that order and rounding show."""
    mask = Mask.from_bool(rng.random(dim) < rng.choice([0.0, 0.3, 0.9, 1.0]))
    values = rng.standard_normal(mask.shared) * 10.0 ** rng.integers(-20, 20, mask.shared)
    values[rng.random(mask.shared) < 0.1] = -0.0
    return Contribution(mask, values.astype(np.float32), weight)


def round_of(seed: int, dim: int, weights: list[float]) -> tuple:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim).astype(np.float32)
    base[rng.random(dim) < 0.1] = -0.0
    return base, [part_of(rng, dim, weight) for weight in weights]


def streamed(base, parts, k: int, *, shard: int, lanes: int = LANES) -> np.ndarray:
    """The accumulator over any byte-aligned ranges, not only over whole blocks."""
    out = np.empty_like(base)
    for start in range(0, base.size, shard):
        stop = min(start + shard, base.size)
        accumulator = Accumulator(stop - start, lanes=lanes)
        for part in parts:
            shared = ~part.mask.to_bool()
            first, last = int(shared[:start].sum()), int(shared[:stop].sum())
            packed = np.packbits(~shared[start:stop], bitorder="little")
            accumulator.add(packed, part.values[first:last], part.weight)
        out[start:stop] = accumulator.finish(base[start:stop], k)
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


@FAST
@given(
    st.integers(0, 2**32),
    st.integers(1, 70),
    st.lists(WEIGHTS, max_size=20),
    st.integers(1, 5),
    st.sampled_from([8, 16, 64, 1000]),
)
def test_streaming_is_the_reference_bit_for_bit(seed, dim, weights, k, shard):
    base, parts = round_of(seed, dim, weights)
    expected = reference(base, parts, k)
    assert same_bits(streamed(base, parts, k, shard=shard), expected)
    assert same_bits(aggregate(base, parts, k), expected)


@pytest.mark.parametrize("lanes", WAYS)
@FAST
@given(
    st.integers(0, 2**32),
    st.integers(1, 400),
    st.lists(st.just(1.0), max_size=20) | st.lists(WEIGHTS, max_size=20),
    st.integers(1, 3),
)
def test_every_way_of_spreading_gives_the_same_bits(lanes, seed, dim, weights, k):
    base, parts = round_of(seed, dim, weights)
    assert same_bits(streamed(base, parts, k, shard=dim, lanes=lanes), reference(base, parts, k))


KINDS = ("f4", "f2", "u2", "i1", "f8")
SIZES = [1, 63, 64, 65, 1000, SCALE_BLOCK - 1, SCALE_BLOCK, SCALE_BLOCK + 1, 3 * SCALE_BLOCK + 70]


def finite_of(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """Every finite number of a format may come, the subnormal ones too."""
    if kind == "i1":
        return rng.integers(-127, 128, size).astype(np.int8)
    if kind == "f8":
        return rng.standard_normal(size) * 10.0 ** rng.integers(-20, 20, size)
    if kind == "f4":
        bits = rng.integers(0, 2**32, size).astype(np.uint32)
        return np.where((bits >> 23) & 0xFF < 0xFE, bits, 1).astype(np.uint32).view(np.float32)
    largest = {"f2": 0x7C00, "u2": 0x7F00}[kind]
    bits = rng.integers(0, 2**16, size).astype(np.uint16)
    bits = np.where(bits & 0x7FFF < largest, bits, 1).astype(np.uint16)
    return bits.view(np.float16) if kind == "f2" else bits


def coded_part(rng: np.random.Generator, kind: str, dim: int, weight: float) -> Contribution:
    mask = Mask.from_bool(rng.random(dim) < rng.choice([0.0, 0.3, 0.9, 1.0]))
    values = finite_of(rng, kind, mask.shared)
    scales = rng.standard_exponential(-(-dim // SCALE_BLOCK)).astype(np.float32)
    return Contribution(mask, values, weight, scales if kind == "i1" else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", WAYS)
@SLOW
@given(
    st.integers(0, 2**32),
    st.sampled_from(SIZES),
    st.lists(st.just(1.0), max_size=20) | st.lists(WEIGHTS, max_size=20),
    st.integers(1, 3),
)
def test_every_format_gives_the_bits_of_the_reference(lanes, kind, seed, dim, weights, k):
    rng = np.random.default_rng(seed)
    base = np.zeros(dim, dtype=np.float32)
    parts = [coded_part(rng, kind, dim, weight) for weight in weights]
    expected = reference(base, parts, k)
    assert same_bits(aggregate(base, parts, k, lanes=lanes), expected)
    accumulator = Accumulator(dim, lanes=lanes)
    for part in parts:
        accumulator.add(part.mask.packed, part.values, part.weight, part.scales)
    assert same_bits(accumulator.finish(base, k), expected)


def test_codes_of_the_wire_mean_here_what_they_mean_there():
    rng = np.random.default_rng(5)
    dim = 2 * SCALE_BLOCK + 100
    delta = rng.standard_normal(dim).astype(np.float32)
    mask = Mask.from_bool(rng.random(dim) < 0.4)
    shared = ~mask.to_bool()
    for encoding in DELTA_ENCODINGS:
        codes = quantise(delta, encoding, mask)
        part = Contribution(mask, codes.codes, 1.0, codes.scales)
        found = aggregate(np.zeros(dim, np.float32), [part], 1)
        wanted = codes.values(scale_counts(mask.packed, dim)).astype(np.float32)
        assert same_bits(found[shared], wanted)


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        (np.zeros(8, np.int64), None),
        (np.zeros(8, np.int8), None),
        (np.zeros(8, np.int8), np.ones(2, np.float32)),
        (np.zeros(8, np.float32), np.ones(1, np.float32)),
    ],
)
def test_a_format_that_is_none_is_refused(values, scales):
    packed = np.zeros(1, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"values must be|scales for 8 elements"):
        Accumulator(8).add(packed, values, 1.0, scales)
    with pytest.raises(ValueError, match=r"values must be|scales for 8 elements"):
        aggregate(np.zeros(8, np.float32), [Contribution(Mask.empty(8), values, 1.0, scales)], 1)


def test_two_formats_do_not_mix():
    accumulator = Accumulator(8)
    accumulator.add(np.zeros(1, np.uint8), np.ones(8, np.float32))
    with pytest.raises(ValueError, match="one type"):
        accumulator.add(np.zeros(1, np.uint8), np.ones(8, np.float16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", WAYS)
def test_nothing_is_read_behind_the_last_value_or_mask_byte(lanes, kind):
    """Both arrays end where a page ends, and the next page may not be touched."""
    rng = np.random.default_rng(3)
    # The first shares hardly anything at its end, the second everything, to the last element.
    for dim in (64, SCALE_BLOCK, 3 * SCALE_BLOCK, 3 * SCALE_BLOCK + 72):
        for personal in (np.arange(dim) > 40, np.arange(dim) % 5 == 0):
            mask = Mask.from_bool(personal)
            values = finite_of(rng, kind, mask.shared)
            scales = np.ones(-(-dim // SCALE_BLOCK), np.float32) if kind == "i1" else None
            part = Contribution(mask, values, 1.0, scales)
            sums = Sums.zeros(dim)
            own = Part(guarded(mask.packed), guarded(values), 1.0, scales)
            add_group([own], sums, lanes=lanes)
            expected = reference(np.zeros(dim, np.float32), [part], 1)
            assert same_bits(sums.total.astype(np.float32) + np.float32(0), expected)


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy that ends where a page ends, before one that may not be read."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    memory[size - array.nbytes : size] = array.tobytes()
    _forbid(memory, size)
    return np.frombuffer(memory, np.uint8)[size - array.nbytes : size].view(array.dtype)


def _forbid(memory: mmap.mmap, start: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + start
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0


def test_an_element_may_have_more_sharers_than_a_byte_can_count():
    parts = shared_by_all(20, *[[1.0] * 20 for _ in range(300)])
    base = np.zeros(20, dtype=np.float32)
    assert same_bits(aggregate(base, parts, 300), np.ones(20, dtype=np.float32))
    assert same_bits(aggregate(base, parts, 301), base)


@SLOW
@given(
    st.integers(0, 2**32),
    st.integers(BLOCK - 3, 3 * BLOCK + 3),
    st.lists(WEIGHTS, max_size=20),
    st.integers(1, 3),
)
def test_no_range_and_no_number_of_threads_changes_a_bit(seed, dim, weights, k):
    base, parts = round_of(seed, dim, weights)
    expected = reference(base, parts, k)
    out = np.empty_like(base)
    for threads in (1, 2, 5, 99):
        assert aggregate(base, parts, k, threads=threads, out=out) is out
        assert same_bits(out, expected)
    assert same_bits(streamed(base, parts, k, shard=BLOCK), expected)


def naive(base, parts, k: int) -> list[float]:
    """Exact arithmetic on Python floats, one element at a time."""
    out = []
    for j, kept in enumerate(base):
        terms = []
        for part in parts:
            shared = ~part.mask.to_bool()
            if shared[j]:
                terms.append((part.weight, float(part.values[int(shared[:j].sum())])))
        if len(terms) < k:
            out.append(float(kept))
        else:
            out.append(math.fsum(w * x for w, x in terms) / math.fsum(w for w, _ in terms))
    return out


@FAST
@given(st.integers(0, 2**32), st.integers(1, 12), st.lists(WEIGHTS, max_size=12), st.integers(1, 3))
def test_the_reference_is_the_weighted_mean_of_the_sharers(seed, dim, weights, k):
    base, parts = round_of(seed, dim, weights)
    largest = max((float(np.abs(p.values).max(initial=0)) for p in parts), default=0.0)
    found = reference(base, parts, k)
    assert np.allclose(found, naive(base, parts, k), rtol=1e-6, atol=largest * 1e-12 + 1e-45)


def shared_by_all(dim: int, *rows: list[float]) -> list[Contribution]:
    return [Contribution(Mask.empty(dim), np.array(row, dtype=np.float32)) for row in rows]


def test_what_nobody_shares_is_kept_to_the_bit():
    base = np.array([-0.0, 1e-45, 3.4028234663852886e38, 0.1], dtype=np.float32)
    hidden = Contribution(Mask.full(4), np.empty(0, dtype=np.float32))
    for parts in ([], [hidden], [hidden] * 20):
        assert same_bits(reference(base, parts, 1), base)
        assert same_bits(aggregate(base, parts, 1), base)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_fewer_than_k_sharers_freeze_an_element(k):
    base = np.zeros(4, dtype=np.float32)
    masks = [[0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]]  # sharers per element: 1, 2, 3, 0
    parts = []
    for bits in masks:
        mask = Mask.from_bool(np.array(bits, dtype=np.bool_))
        parts.append(Contribution(mask, np.full(mask.shared, 5, dtype=np.float32)))
    moved = [5.0 if count >= k else 0.0 for count in (1, 2, 3, 0)]
    assert reference(base, parts, k).tolist() == moved
    assert aggregate(base, parts, k).tolist() == moved


def test_negative_zero_is_summed_like_any_number():
    base = np.ones(2, dtype=np.float32)
    for count in (1, 8, 9):
        parts = shared_by_all(2, *[[-0.0, 0.0]] * count)
        found = reference(base, parts, 1)
        assert same_bits(found, np.zeros(2, dtype=np.float32))
        assert same_bits(aggregate(base, parts, 1), found)


def test_weights_count():
    base = np.zeros(1, dtype=np.float32)
    parts = [
        Contribution(Mask.empty(1), np.array([1], dtype=np.float32), 3.0),
        Contribution(Mask.empty(1), np.array([5], dtype=np.float32), 1.0),
    ]
    assert reference(base, parts, 1).tolist() == [2.0] == aggregate(base, parts, 1).tolist()


def test_the_canonical_tree_is_groups_of_eight_folded_from_the_left():
    values = [2.0**53, *[1.0] * 8, -(2.0**53)]
    # In one row every 1 is lost beside 2^53; the second group saves the one it starts with.
    assert sum(values) == 0
    tree = sum(values[:GROUP]) + sum(values[GROUP:])
    assert (GROUP, tree) == (8, 1.0)
    base, parts = np.zeros(1, dtype=np.float32), shared_by_all(1, *[[v] for v in values])
    assert reference(base, parts, 1)[0] == np.float32(tree / len(values))
    assert aggregate(base, parts, 1)[0] == np.float32(tree / len(values))


@FAST
@given(st.integers(0, 2**32), st.integers(2, 20))
def test_the_result_depends_on_the_order_only_through_the_tree(seed, clients):
    base, parts = round_of(seed, 24, [1.0] * clients)
    order = np.random.default_rng(seed).permutation(clients)
    shuffled = [parts[i] for i in order]
    assert same_bits(aggregate(base, shuffled, 1), reference(base, shuffled, 1))
    # Two updates whose numbers stand next to each other at the start of a group commute.
    swapped = [parts[1], parts[0], *parts[2:]]
    assert same_bits(aggregate(base, swapped, 1), aggregate(base, parts, 1))


def test_group_boundaries_change_the_sum_and_both_forms_agree():
    """Numbers chosen so that moving one update across a boundary gives another float."""
    base = np.zeros(1, dtype=np.float32)
    values = [2.0**53, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -(2.0**53)]
    found = set()
    for shift in range(3):
        rows = [[0.0]] * shift + [[value] for value in values]
        parts = shared_by_all(1, *rows)
        result = float(reference(base, parts, 1)[0]) * len(rows)
        assert same_bits(aggregate(base, parts, 1), reference(base, parts, 1))
        found.add(round(result))
    assert len(found) > 1


def test_the_accumulator_refuses_values_that_do_not_fit_the_mask():
    accumulator = Accumulator(16)
    packed = np.array([0b1111_0000, 0xFF], dtype=np.uint8)
    accumulator.add(packed, np.ones(4, dtype=np.float32))
    for count in (0, 3, 5):
        with pytest.raises(MaskError, match="4 shared elements"):
            accumulator.add(packed, np.ones(count, dtype=np.float32))
    base = np.zeros(16, dtype=np.float32)
    assert accumulator.finish(base, 1).tolist() == [1.0] * 4 + [0.0] * 12


def test_values_straight_from_a_file_are_read_only_and_fine():
    values = np.frombuffer(np.ones(3, dtype="<f4").tobytes(), dtype="<f4")
    packed = np.frombuffer(b"\xf8", dtype=np.uint8)
    accumulator = Accumulator(8)
    accumulator.add(packed, values)
    assert accumulator.finish(np.zeros(8, dtype=np.float32), 1).tolist() == [1.0] * 3 + [0.0] * 5


@FAST
@given(
    st.integers(0, 2**32),
    st.integers(1, 70),
    st.lists(st.just(1.0) | WEIGHTS, min_size=GROUP, max_size=3 * GROUP),
    st.integers(1, 3),
)
def test_sums_of_whole_groups_can_be_stored_and_gone_on_from(seed, dim, weights, k):
    base, parts = round_of(seed, dim, weights)
    accumulator = Accumulator(dim)
    for number, part in enumerate(parts, start=1):
        accumulator.add(part.mask.packed, part.values, part.weight)
        if number % GROUP == 0:
            accumulator = Accumulator.resume(copied(accumulator.sums))
    assert same_bits(accumulator.finish(base, k), reference(base, parts, k))


def copied(sums: Sums) -> Sums:
    """As if they had been bytes in between."""
    stored = [None if a is None else a.tobytes() for a in (sums.total, sums.counts, sums.weights)]
    types = (np.float64, np.int32, np.float64)
    back = (
        None if data is None else np.frombuffer(bytearray(data), dtype=dtype)
        for data, dtype in zip(stored, types, strict=True)
    )
    return Sums(*back)


def test_sums_of_an_open_group_are_not_given_out():
    accumulator = Accumulator(8)
    accumulator.add(np.zeros(1, np.uint8), np.ones(8, np.float32))
    with pytest.raises(ValueError, match="1 updates of an open group"):
        _ = accumulator.sums


@pytest.mark.parametrize(
    "sums",
    [
        Sums(np.zeros(8), np.zeros(7, np.int32)),
        Sums(np.zeros(8), np.zeros(8, np.int64)),
        Sums(np.zeros(8), np.zeros(8, np.int32), np.zeros(8, np.float32)),
        Sums(np.zeros(16)[::2], np.zeros(8, np.int32)),
        Sums(np.frombuffer(bytes(64)), np.zeros(8, np.int32)),
    ],
)
def test_sums_that_compiled_code_could_not_add_to_are_refused(sums):
    with pytest.raises(ValueError, match="sums"):
        Accumulator.resume(sums)


def test_value_range_finds_a_shard_in_the_compact_values():
    personal = np.zeros(2 * BLOCK + 10, dtype=np.bool_)
    personal[:5] = personal[BLOCK] = personal[-1] = True
    rank = Mask.from_bool(personal).block_rank()
    assert value_range(rank, 0, BLOCK) == (0, BLOCK - 5)
    assert value_range(rank, BLOCK, 2 * BLOCK) == (BLOCK - 5, 2 * BLOCK - 6)
    assert value_range(rank, 2 * BLOCK, 2 * BLOCK + 10) == (2 * BLOCK - 6, 2 * BLOCK + 3)
    assert value_range(rank, 0, 2 * BLOCK + 10) == (0, 2 * BLOCK + 3)


def test_whoever_is_warm_compiles_nothing_more() -> None:
    """What workers then read is of no type that compiled code has not seen."""
    script = """
import numpy as np
from fedselect import aggregate, kernels
aggregate.warm()
compiled = [kernels.add_blocks, kernels.divide, kernels._personal_in]
before = [len(each.signatures) for each in compiled]
size = 3 * 65536 + 1234
mask = np.frombuffer(np.random.default_rng(1).bytes(-(-size // 8)), dtype=np.uint8).copy()
mask[-1] &= 0xFF >> (-size % 8)
shared = size - int(np.bitwise_count(mask).sum())
mask = np.frombuffer(mask.tobytes(), dtype=np.uint8)
base = np.frombuffer(bytes(4 * size), dtype="<f4")
for kind in ("<f4", "<u2", "i1"):
    scales = np.ones(-(-size // 4096), dtype=np.float32) if kind == "i1" else None
    values = np.frombuffer(bytes(shared * np.dtype(kind).itemsize), dtype=kind)
    for weights in ([1.0] * 9, [3, 7]):
        accumulator = aggregate.Accumulator(size)
        for weight in weights:
            accumulator.add(mask, values, weight, scales)
        accumulator.finish(base, 2)
assert before == [len(each.signatures) for each in compiled], before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
