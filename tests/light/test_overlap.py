"""Figures about masks, against sets of element numbers."""

from __future__ import annotations

from itertools import combinations
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedselect import Kind, Mask, ParameterSpace, Role
from fedselect.overlap import History, Masks, Stage, personal_percent, wanted

SPACE = ParameterSpace.of(
    [
        ("first.weight", (9, 3), Kind.WEIGHT, Role.SELECTABLE),
        ("first.bias", (3,), Kind.BIAS, Role.SHARED),
        ("stem.weight", (5,), Kind.WEIGHT, Role.FROZEN),
        ("empty.weight", (0,), Kind.WEIGHT, Role.SELECTABLE),
        ("norm.running_mean", (7,), Kind.BUFFER, Role.PERSONAL),
        ("last.weight", (11,), Kind.WEIGHT, Role.SELECTABLE),
    ]
)
FREE = [*range(27), *range(42, 53)]  # elements that a policy may choose


def mask_of(chosen: set[int]) -> Mask:
    bits = Mask.initial(SPACE).to_bool().copy()
    bits[sorted(chosen)] = True
    return Mask.from_bool(bits)


def masks(*chosen: set[int]) -> Masks:
    return Masks(SPACE, {m.digest: m for m in map(mask_of, chosen)})


def history(name: str, *chosen: set[int]) -> History:
    made = [mask_of(each) for each in chosen]
    stages = [Stage(n, m.personal, m.digest) for n, m in enumerate(made, start=1)]
    return History(UUID(int=len(name)), name, stages)


sets = st.sets(st.sampled_from(FREE))


@given(sets, sets)
def test_jaccard_is_that_of_the_chosen_elements(one, other):
    found = masks(one, other).jaccard(mask_of(one).digest, mask_of(other).digest)
    expected = len(one & other) / len(one | other) if one | other else None
    assert found == pytest.approx(expected) if expected is not None else found is None


@given(sets)
def test_the_share_counts_what_can_be_personal_or_shared(chosen):
    mask = mask_of(chosen)
    expected = 100 * (len(chosen) + 7) / (SPACE.dim - 5)
    assert personal_percent(SPACE, mask.personal) == pytest.approx(expected)
    assert personal_percent(SPACE, mask.personal) == pytest.approx(100 * mask.share(SPACE))


@given(st.integers(1, 300).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
def test_counting_a_range_of_bits(bits):
    space = ParameterSpace.of(
        [(f"t{n}", (size,), Kind.WEIGHT, Role.SELECTABLE) for n, size in enumerate(_cut(len(bits)))]
    )
    vector = np.array(bits)
    expected = {s.name: int(vector[s.offset : s.stop].sum()) for s in space.slots}
    assert Mask.from_bool(vector).per_slot(space) == expected


def _cut(length: int) -> list[int]:
    """Sizes 1, 2, 3 … that add up to a length."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(len(sizes) + 1, length - sum(sizes)))
    return sizes


def test_over_time_each_mask_is_compared_with_the_one_before():
    one, two = {0, 1, 2}, {1, 2, 3, 4}
    line = history("a", one, one, two, set())
    found = masks(one, two).over_time(line)
    assert found.rounds == [1, 2, 3, 4]
    assert found.jaccard == [None, 1.0, pytest.approx(2 / 5), None], "the last one was not read"
    assert found.personal_percent == pytest.approx([100 * (k + 7) / 48 for k in (3, 3, 4, 0)])


def test_a_first_choice_keeps_nothing_and_is_not_compared():
    found = masks(set(), {0, 1}).over_time(history("a", set(), {0, 1}, {0, 1}))
    assert found.jaccard == [None, None, 1.0]


def test_the_last_masks_are_wanted_first():
    a, b = history("a", {0}, {1}, {1}), history("b", {2}, {0})
    digest = {k: mask_of({k}).digest for k in (0, 1, 2)}
    assert wanted([a, b]) == [digest[1], digest[0], digest[2]]
    assert wanted([]) == []


def test_the_matrix_and_blind_choice_against_sets():
    chosen = {"a": {0, 1, 2, 3, 42}, "b": {2, 3, 4, 43}, "c": set(), "d": set()}
    kept = masks(*chosen.values())
    last = kept.comparable([history(name, each) for name, each in chosen.items()])
    found = kept.overlap(last)
    assert found.clients == list(chosen)
    values, blind = [], []
    for (i, one), (j, other) in combinations(enumerate(chosen.values()), 2):
        expected = len(one & other) / len(one | other) if one | other else None
        assert found.jaccard[i][j] == found.jaccard[j][i] == expected
        if expected is not None:
            values.append(expected)
            inside = [range(27), range(42, 53)]
            met = sum(len(one & {*t}) * len(other & {*t}) / len(t) for t in inside)
            blind.append(met / (len(one) + len(other) - met))
    assert [found.jaccard[n][n] for n in range(4)] == [1.0, 1.0, None, None]
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.by_chance == pytest.approx(sum(blind) / len(blind))


def test_blind_choice_meets_as_often_as_said():
    rng = np.random.default_rng(3)
    pairs = []
    for _ in range(300):
        one, other = ({*rng.choice(27, size, replace=False).tolist()} for size in (9, 15))
        kept = masks(one, other)
        last = kept.comparable([history("a", one), history("b", other)])
        found = kept.overlap(last)
        pairs.append((found.mean, found.by_chance))
    means = np.mean(pairs, axis=0)
    assert means[0] == pytest.approx(means[1], abs=0.02)


def test_tensors_are_shared_out():
    chosen = {"a": {0, 1, 2}, "b": {0, 42}}
    kept = masks(*chosen.values())
    found = kept.tensors(kept.comparable([history(n, each) for n, each in chosen.items()]))
    table = {t.name: (t.elements, t.clients_percent, t.mean_percent) for t in found}
    assert list(table) == ["first.weight", "first.bias", "norm.running_mean", "last.weight"]
    assert table["first.weight"] == (
        27,
        pytest.approx([300 / 27, 100 / 27]),
        pytest.approx(200 / 27),
    )
    assert table["first.bias"] == (3, [0, 0], 0)
    assert table["norm.running_mean"] == (7, [100, 100], 100)
    assert table["last.weight"][1] == pytest.approx([0, 100 / 11])
