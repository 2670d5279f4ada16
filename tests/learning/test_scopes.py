"""Scopes, budgets, directions and controls: what is chosen beside the authors' own rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedselect.errors import TrainingError
from fedselect.growth import course
from fedselect.masks import Mask
from fedselect.personal import PersonalState
from fedselect.policies import Policy
from fedselect.scores import SCORES, Score, Seen
from fedselect.selection import choose, next_mask
from fedselect.space import Kind, ParameterSpace, Role

SPACE = ParameterSpace.of(
    [
        ("body.weight", (3, 4), Kind.WEIGHT, Role.SELECTABLE),
        ("body.bias", (3,), Kind.BIAS, Role.SHARED),
        ("norm.running_mean", (2,), Kind.BUFFER, Role.PERSONAL),
        ("head.weight", (2, 3), Kind.WEIGHT, Role.SELECTABLE),
    ]
)
NEVER = Mask.initial(SPACE)


def step(policy, delta, *, mask=NEVER, seed=0):
    theta = np.asarray(delta, dtype=np.float32)
    seen = Seen(theta, np.zeros_like(theta), seed)
    return choose(policy, seen, mask=mask, space=SPACE)


def chosen(mask):
    return np.flatnonzero((mask - NEVER).to_bool()).tolist()


def by_element(**values):
    """Δ of single elements, 1 everywhere else."""
    delta = np.ones(SPACE.dim, dtype=np.float32)
    for name, value in values.items():
        delta[int(name[1:])] = value
    return delta


def test_a_global_scope_lets_the_score_say_how_much_of_each_tensor():
    delta = by_element(e17=9, e18=8, e19=7, e0=6)
    policy = Policy(scope="global", fraction=0.25)
    assert chosen(step(policy, delta)) == [0, 17, 18, 19]  # of 18 selectable elements
    each = Policy(scope="tensor", fraction=0.25)
    assert chosen(step(each, delta)) == [0, 1, 2, 17]


@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
def test_a_model_without_such_tensors_has_nothing_to_choose(scope):
    bare = ParameterSpace.of([("out.bias", (3,), Kind.BIAS, Role.SHARED)])
    theta = np.ones(3, dtype=np.float32)
    found = choose(
        Policy(scope=scope, fraction=0.5),
        Seen(theta, np.zeros_like(theta)),
        mask=Mask.initial(bare),
        space=bare,
    )
    assert found == Mask.initial(bare)


def test_a_score_of_another_length_is_refused(monkeypatch):
    monkeypatch.setitem(SCORES, "delta", Score(lambda seen, slot: seen.theta, frozenset()))
    with pytest.raises(TrainingError, match=r"gives shape \(23,\) for tensor 'body.weight'"):
        step(Policy(fraction=0.5), by_element())


def test_all_elements_are_weights_and_what_is_shared_otherwise():
    delta = by_element(e12=9, e13=8, e15=50)
    policy = Policy(scope="global", elements="all", fraction=0.1)
    assert chosen(step(policy, delta)) == [12, 13]  # of 21; a running mean is nobody's to choose
    weights = Policy(scope="global", fraction=0.1)
    assert chosen(step(weights, delta)) == [0]


def test_ties_over_tensors_go_to_the_lower_index():
    policy = Policy(scope="global", fraction=0.5)
    assert chosen(step(policy, by_element())) == list(range(9))


def test_rows_turn_as_a_whole_by_their_mean():
    # Means of rows: body 1, 2.5, 1; head 3, 1.
    delta = by_element(e4=7, e17=7)
    policy = Policy(scope="row", fraction=0.4)  # 7 of 18 elements
    assert chosen(step(policy, delta)) == [4, 5, 6, 7, 17, 18, 19]


def test_a_row_that_does_not_fit_is_passed_over():
    delta = by_element(e4=70, e17=7)
    policy = Policy(scope="row", fraction=0.2)  # 3 elements: not the best row, which has 4
    assert chosen(step(policy, delta)) == [17, 18, 19]


def test_of_all_elements_a_bias_is_a_row_by_itself():
    delta = by_element(e13=9)
    policy = Policy(scope="row", elements="all", fraction=0.05)
    assert chosen(step(policy, delta)) == [13]


def test_release_gives_the_smallest_back():
    policy = Policy(direction="release", growth=0.5, limit=0.25)
    mask = policy.first_mask(SPACE)
    assert chosen(mask) == [*range(12), *range(17, 23)]
    delta = np.arange(SPACE.dim, dtype=np.float32)
    mask = step(policy, delta, mask=mask)
    assert chosen(mask) == [*range(6, 12), *range(20, 23)]
    mask = step(policy, delta, mask=mask)
    assert chosen(mask) == [*range(9, 12), 21, 22]  # 6 − round(3); 3 − round_half_even(1.5)
    mask = step(policy, delta, mask=mask)
    assert chosen(mask) == [*range(9, 12), 22]  # floor(α · 12) = 3, floor(α · 6) = 1
    assert step(policy, delta, mask=mask) == mask


def test_what_did_not_move_is_released_first():
    policy = Policy(direction="release", fraction=0.5)
    delta = by_element(e0=0, e20=0)
    mask = step(policy, delta, mask=policy.first_mask(SPACE))
    assert not {0, 20} & set(chosen(mask))
    assert len(chosen(mask)) == 9


POLICIES = st.builds(
    dict,
    score=st.sampled_from(["delta", "random"]),
    scope=st.sampled_from(["tensor", "global", "row"]),
    elements=st.sampled_from(["weights", "all"]),
    direction=st.sampled_from(["grow", "release"]),
    fraction=st.sampled_from([None, 0.02, 0.3, 1.0]),
    growth=st.sampled_from([0.05, 0.3, 1.0]),
    limit=st.sampled_from([0.1, 0.5, 1.0]),
    limit_mode=st.sampled_from(["cap", "official"]),
    shuffled=st.booleans(),
)
DELTAS = hnp.arrays(np.float32, SPACE.dim, elements=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 2.0]))


@given(POLICIES, DELTAS, st.integers(0, 2**63 - 1))
def test_every_mask_keeps_to_its_bounds_and_its_course(facts, delta, seed):
    policy = Policy(**{**facts, "shuffled": facts["shuffled"] and facts["scope"] != "row"})
    lower, upper = policy.bounds(SPACE)
    mask = policy.first_mask(SPACE)
    grows = policy.direction == "grow"
    for stage in course(policy, SPACE, 5):
        if not stage.sent:
            continue
        assert lower <= mask <= upper
        # Elements without evidence and rows that do not fit stay as they are.
        assert mask.personal <= stage.personal if grows else mask.personal >= stage.personal
        if policy.scope == "row":
            for slot in policy.may_turn(SPACE):
                rows = mask.to_bool()[slot.offset : slot.stop].reshape(slot.shape[0], -1)
                assert (rows.all(1) | ~rows.any(1)).all()
        after = step(policy, delta, mask=mask, seed=seed)
        assert after == step(policy, delta, mask=mask, seed=seed)
        assert mask <= after if grows else after <= mask
        if grows:
            assert (np.abs(delta)[(after - mask).to_bool()] > 0).all() or policy.scope == "row"
        mask = after


@given(DELTAS, st.integers(0, 100), st.sampled_from(["global", "tensor"]))
def test_shuffling_keeps_how_many_of_each_tensor_but_not_which(delta, seed, scope):
    ours = Policy(scope=scope, elements="all", fraction=0.3)
    control = ours.model_copy(update={"shuffled": True})
    one, two = (step(policy, delta, seed=seed) for policy in (ours, control))
    assert one.per_slot(SPACE) == two.per_slot(SPACE)
    assert (np.abs(delta)[(two - NEVER).to_bool()] > 0).all()


def test_shuffling_is_by_chance():
    control = Policy(scope="global", fraction=0.5, shuffled=True)
    masks = {step(control, by_element(), seed=seed).digest for seed in range(8)}
    assert len(masks) > 4


def test_a_fraction_is_chosen_once_and_serves_from_its_round_on():
    policy = Policy(scope="global", fraction=0.25, start_round=3)
    state = PersonalState.start(np.zeros(SPACE.dim, np.float32), NEVER)
    counts = []
    for number in range(6):
        theta = state.theta + np.float32(1)
        state = PersonalState(number, theta, state.reference, state.mask, state.mask)
        mask, reference = next_mask(policy, state, theta=theta, space=SPACE, seed=0)
        assert (reference is theta) == (number >= 2)
        state = PersonalState(number + 1, theta, reference, state.mask, mask)
        counts.append(len(chosen(mask)))
    assert counts == [0, 0, 4, 4, 4, 4]
    assert policy.first_use() == 3


def test_a_score_that_needs_no_reference_keeps_none():
    policy = Policy(score="fisher", start_round=3)
    theta = np.ones(SPACE.dim, np.float32)
    state = PersonalState(1, theta, np.zeros(SPACE.dim, np.float32), NEVER, NEVER)
    assert next_mask(policy, state, theta=theta, space=SPACE, seed=0)[1] is theta
    kept = next_mask(Policy(start_round=3), state, theta=theta, space=SPACE, seed=0)[1]
    assert kept is state.reference


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_no_evidence_is_never_chosen(scope, monkeypatch):
    nothing = Score(lambda seen, slot: np.zeros(slot.size, np.float32), frozenset())
    monkeypatch.setitem(SCORES, "fisher", nothing)
    assert chosen(step(Policy(score="fisher", scope=scope, fraction=1), by_element())) == []
