"""Figures about masks, against sets of element numbers."""

from __future__ import annotations

from itertools import combinations
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedselect import Kind, Mask, ParameterSpace, Role
from fedselect.overlap import History, Masks, Stage, average_linkage, personal_percent, wanted

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


def test_masks_besides_are_read_before_older_ones():
    one, other = history("a", {1}, {2}), history("bb", {3}, {4})
    last = [mask_of({2}).digest, mask_of({4}).digest]
    older = [mask_of({1}).digest, mask_of({3}).digest]
    assert wanted([one, other], besides=["x", "y"]) == [*last, "x", "y", *older]


# --- over the rounds, again, and alike ----------------------------------------------------------


def test_shares_over_the_rounds_are_means_of_what_was_read():
    one, other = history("a", {0, 1}, {0, 1, 2}), history("bb", {5}, {5, 42})
    found = masks({0, 1}, {0, 1, 2}, {5}, {5, 42})
    rounds, shares = found.over_rounds([one, other], ["first.weight", "last.weight"], least=2)
    assert rounds == [1, 2]
    assert shares["first.weight"] == pytest.approx([100 * 3 / 2 / 27, 100 * 4 / 2 / 27])
    assert shares["last.weight"] == pytest.approx([0, 100 / 2 / 11])
    _, few = found.over_rounds([one, other], ["last.weight"], least=3)
    assert few["last.weight"] == [None, None]
    unread = masks({0, 1}, {0, 1, 2}, {5})
    assert unread.over_rounds([one, other], ["last.weight"], least=2)[1]["last.weight"][1] is None


@given(sets, sets)
def test_what_is_chosen_again_is_counted_in_elements(one, other):
    found = masks(one, other).again(mask_of(one), mask_of(other))
    if not one:
        assert found is None
        return
    parts = (set(range(27)), set(range(42, 53)))
    blind = sum(len(one & part) * len(other & part) / len(part) for part in parts)
    assert found == pytest.approx((100 * len(one & other) / len(one), 100 * blind / len(one)))


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_is_that_of_scipy(seed):
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 12))
    similar = rng.random((count, count))
    similar = (similar + similar.T) / 2
    joins = average_linkage(similar.tolist())
    apart = 1 - similar
    np.fill_diagonal(apart, 0)
    expected = linkage(squareform(apart, checks=False), "average")
    ours = [(min(j.one, j.other), max(j.one, j.other), j.distance) for j in joins]
    assert np.array(ours) == pytest.approx(expected[:, :3])


def test_trees_of_few_and_of_nothing():
    assert average_linkage([]) == average_linkage([[1.0]]) == []
    (join,) = average_linkage([[None, None], [None, None]])
    assert (join.one, join.other, join.distance) == (0, 1, 0)
