"""GradSelect: the golden vectors of ALGORITHM §1.4 and §1.8, and what must hold for any input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedselect.errors import MaskError, TrainingError
from fedselect.growth import quota
from fedselect.masks import Mask
from fedselect.personal import PersonalState
from fedselect.policies import Policy
from fedselect.scores import Seen
from fedselect.selection import choose, next_mask
from fedselect.space import Kind, ParameterSpace, Role

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "selection.json").read_text())


def space(*sizes, role=Role.SELECTABLE):
    rows = [(f"layer{i}.weight", (size,), Kind.WEIGHT, role) for i, size in enumerate(sizes)]
    return ParameterSpace.of([*rows, ("out.bias", (3,), Kind.BIAS, Role.SHARED)])


def grow(policy, theta, reference, *, mask, space, seed):
    return choose(policy, Seen(theta, reference, seed), mask=mask, space=space)


def grown(policy, delta, *, sizes=None, personal=(), seed=0):
    """Indices that are personal after one step; the bias behind the weights moved a lot."""
    here = space(*(sizes or [len(delta)]))
    theta = np.concatenate([np.asarray(delta, dtype=np.float32), [99, 99, 99]]).astype(np.float32)
    bits = np.zeros(here.dim, dtype=bool)
    bits[list(personal)] = True
    reference = np.zeros(here.dim, dtype=np.float32)
    mask = grow(policy, theta, reference, mask=Mask.from_bool(bits), space=here, seed=seed)
    return np.flatnonzero(mask.to_bool()).tolist()


@pytest.mark.parametrize("step", GOLDEN["steps"], ids=lambda step: step["name"])
def test_golden_steps(step):
    policy = Policy(growth=step["growth"], limit=1)
    assert grown(policy, step["delta"]) == step["chosen"]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_size_of_the_change_counts_not_its_sign(sign):
    assert grown(Policy(growth=0.25, limit=1), [sign * d for d in (5, 1, -9, 2)]) == [2]


@pytest.mark.parametrize(
    "row", GOLDEN["tables"]["rows"], ids=lambda r: f"{r['growth']}-{r['limit']}"
)
def test_official_growth_table(row):
    size, owned, fractions = GOLDEN["tables"]["size"], 0, []
    policy = Policy(growth=row["growth"], limit=row["limit"], limit_mode="official")
    while step := quota(policy, size=size, shared=size - owned):
        owned += step
        fractions.append(round(owned / size, 3))
    assert fractions == row["fractions"]


@pytest.mark.parametrize(
    "row", GOLDEN["tables"]["rows"], ids=lambda r: f"{r['growth']}-{r['limit']}"
)
def test_a_cap_is_reached_and_never_passed(row):
    size, owned, policy = (
        GOLDEN["tables"]["size"],
        0,
        Policy(growth=row["growth"], limit=row["limit"]),
    )
    while step := quota(policy, size=size, shared=size - owned):
        owned += step
    assert owned == int(row["limit"] * size)


def test_a_cap_means_its_decimal_value():
    assert 0.29 * 100 < 29
    assert quota(Policy(growth=1, limit=0.29), size=100, shared=100) == 29


def test_nothing_left_to_take_is_no_error():
    assert quota(Policy(growth=1, limit=1), size=0, shared=0) == 0
    assert quota(Policy(growth=1, limit=1, limit_mode="official"), size=0, shared=0) == 0
    assert grown(Policy(growth=1, limit=1), [1, 2], personal=[0, 1]) == [0, 1]


def test_the_clock_of_the_golden_vectors():
    clock = GOLDEN["clock"]
    policy = Policy(interval=clock["interval"], start_round=clock["start_round"])
    due = [t for t in range(clock["rounds"]) if policy.due(t)]
    assert due == clock["growth_after_rounds"]
    assert [t + 1 for t in due] == clock["first_used_in_rounds"]


def test_next_mask_follows_the_clock_and_moves_the_reference():
    here = space(4)
    theta = np.array([1, 2, 3, 4, 9, 9, 9], dtype=np.float32)
    start = PersonalState.start(np.zeros(7, dtype=np.float32), Mask.empty(7))
    policy = Policy(growth=0.5, limit=1)

    mask, reference = next_mask(policy, start, theta=theta, space=here, seed=0)
    assert mask is start.mask
    assert reference is start.reference

    later = PersonalState(1, theta, start.reference, start.mask, start.mask)
    mask, reference = next_mask(policy, later, theta=theta, space=here, seed=0)
    assert np.flatnonzero(mask.to_bool()).tolist() == [2, 3]
    assert reference is theta


@pytest.mark.parametrize("personal", ["none", "all", "head"])
def test_fixed_masks_never_grow(personal):
    here = space(4)
    policy = Policy(personal=personal, growth=1, limit=1)
    mask = policy.bounds(here)[0]
    state = PersonalState(5, np.ones(7, np.float32), np.zeros(7, np.float32), mask, mask)
    assert next_mask(policy, state, theta=state.theta, space=here, seed=0)[0] is mask


@pytest.mark.parametrize("personal", ["all", "head"])
def test_a_fixed_mask_waits_for_its_participation(personal):
    here = space(4)
    policy = Policy(personal=personal, start_round=2)
    state = PersonalState.start(np.zeros(7, np.float32), policy.first_mask(here))
    masks = []
    for number in range(4):
        state = replace(state, participations=number)
        mask, reference = next_mask(policy, state, theta=state.theta, space=here, seed=0)
        assert reference is state.theta
        state = replace(state, mask=mask)
        masks.append(mask.personal)
    assert masks == [0, 7 if personal == "all" else 4, *[masks[1]] * 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_change_that_is_not_finite_is_refused_by_name(value):
    with pytest.raises(TrainingError, match=r"layer0\.weight"):
        grown(Policy(), [1, value, 2])


def test_an_overflowing_change_is_refused():
    here, huge = space(2), np.full(5, 3e38, dtype=np.float32)
    with pytest.raises(TrainingError):
        grow(Policy(), huge, -huge, mask=Mask.empty(5), space=here, seed=0)


def test_sizes_must_fit():
    here, flat = space(2), np.zeros(5, dtype=np.float32)
    with pytest.raises(MaskError):
        grow(Policy(), flat, flat, mask=Mask.empty(4), space=here, seed=0)
    with pytest.raises(MaskError):
        grow(Policy(), flat[:3], flat, mask=Mask.empty(5), space=here, seed=0)


def test_tensors_are_counted_apart_and_only_selectable_ones():
    policy = Policy(growth=0.5, limit=1)
    assert grown(policy, [1, 2, 100, 200, 300, 400], sizes=[2, 4]) == [1, 4, 5]


# --- for any input ------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=4)
policies = st.builds(
    Policy,
    growth=st.sampled_from([0.0, 0.03, 0.05, 0.25, 0.3, 0.5, 1.0]),
    limit=st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.8, 1.0]),
    limit_mode=st.sampled_from(["cap", "official"]),
    score=st.sampled_from(["delta", "random"]),
)


@st.composite
def cases(draw):
    here = space(*draw(SIZES))
    # Few distinct values, so that ties and zeros are common.
    values = hnp.arrays(np.float32, here.dim, elements=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 2.0]))
    personal = draw(hnp.arrays(np.bool_, here.dim))
    personal[-3:] = False
    return here, draw(values), draw(values), Mask.from_bool(personal)


@given(policies, cases(), st.integers(0, 2**63 - 1))
def test_growth_keeps_its_promises(policy, case, seed):
    here, theta, reference, mask = case
    after = grow(policy, theta, reference, mask=mask, space=here, seed=seed)

    assert mask <= after
    assert after == grow(policy, theta, reference, mask=mask, space=here, seed=seed)
    new = (after - mask).to_bool()
    delta = np.abs(theta - reference)
    assert (delta[new] > 0).all()
    assert not new[-3:].any()
    for slot in here.with_role(Role.SELECTABLE):
        part = slice(slot.offset, slot.stop)
        before, taken, moved = mask.to_bool()[part], new[part], delta[part]
        shared = int((~before).sum())
        movable = int((~before & (moved > 0)).sum())
        k = shared - round((1 - policy.growth) * shared)
        if policy.limit_mode == "cap":
            k = max(0, min(k, int(policy.limit * slot.size + 1e-9) - int(before.sum())))
        elif slot.size and before.sum() / slot.size > policy.limit:
            k = 0
        assert taken.sum() == min(k, movable)
        if policy.score == "delta":
            order = sorted(np.flatnonzero(~before & (moved > 0)), key=lambda j: (-moved[j], j))
            assert sorted(order[: int(taken.sum())]) == np.flatnonzero(taken).tolist()


@given(cases(), st.integers(0, 100))
def test_the_random_control_takes_as_many_of_each_tensor(case, seed):
    here, theta, reference, mask = case
    counts = [
        grow(
            Policy(growth=0.3, limit=0.8, score=score),
            theta,
            reference,
            mask=mask,
            space=here,
            seed=seed,
        ).per_slot(here)
        for score in ("delta", "random")
    ]
    assert counts[0] == counts[1]


def test_the_random_control_depends_on_seed_and_tensor_only():
    policy = Policy(growth=0.1, limit=1, score="random")
    delta = np.arange(1, 401)
    one = grown(policy, delta, sizes=[200, 200], seed=1)
    assert one == grown(policy, delta[::-1], sizes=[200, 200], seed=1)
    assert one != grown(policy, delta, sizes=[200, 200], seed=2)
    assert [j for j in one if j < 200] != [j - 200 for j in one if j >= 200]
    assert len(one) == 40
