"""What is kept of how a mask grew, against elements looked at one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedselect import Kind, Mask, ParameterSpace, Role
from fedselect.choices import following, of_upload
from fedselect.personal import PersonalState

SPACE = ParameterSpace.of(
    [
        ("first.weight", (9, 3), Kind.WEIGHT, Role.SELECTABLE),
        ("first.bias", (3,), Kind.BIAS, Role.SHARED),
        ("norm.running_mean", (7,), Kind.BUFFER, Role.PERSONAL),
        ("last.weight", (11,), Kind.WEIGHT, Role.SELECTABLE),
    ]
)
FIRST, LAST = range(27), range(37, 48)
ALWAYS = Mask.initial(SPACE)


def mask_of(chosen: set[int]) -> Mask:
    bits = ALWAYS.to_bool().copy()
    bits[sorted(chosen)] = True
    return Mask.from_bool(bits)


def step(state: PersonalState, chosen: set[int], *, seed: int) -> PersonalState:
    """A participation that grows the mask to ``chosen``."""
    theta = np.random.default_rng(seed).normal(size=SPACE.dim).astype(np.float32)
    after = mask_of(chosen)
    kept = following(state, after, theta=theta, space=SPACE)
    return replace(
        state,
        participations=state.participations + 1,
        theta=theta,
        reference=theta if after != state.mask else state.reference,
        merge_mask=state.mask,
        mask=after,
        choices=kept,
    )


def test_two_growths_leave_the_numbers_of_both():
    start = PersonalState.start(np.zeros(SPACE.dim, np.float32), ALWAYS)
    assert following(start, ALWAYS, theta=start.theta, space=SPACE) is None
    one = step(start, {0, 1, 40}, seed=1)
    assert of_upload(one.choices, SPACE) == {}, "the mask of this upload had chosen nothing"
    two = step(one, {0, 1, 2, 40}, seed=2)
    found = of_upload(two.choices, SPACE)
    delta = np.abs(one.theta - start.theta).astype(np.float64)
    assert set(found) == {"first.weight", "last.weight"}
    assert found["first.weight"].chosen == 2
    assert found["first.weight"].delta == pytest.approx(delta[0] + delta[1])
    assert found["first.weight"].threshold == pytest.approx(min(delta[0], delta[1]))
    assert found["first.weight"].left == pytest.approx(np.mean([delta[j] for j in FIRST[2:]]))
    assert found["last.weight"].left == pytest.approx(np.mean([delta[j] for j in LAST if j != 40]))
    three = step(two, {0, 1, 2, 40}, seed=3)
    again = of_upload(three.choices, SPACE)
    second = np.abs(two.theta - one.theta).astype(np.float64)
    assert again["first.weight"].chosen == 3
    assert again["first.weight"].delta == pytest.approx(delta[0] + delta[1] + second[2])
    assert again["first.weight"].threshold == pytest.approx(second[2])
    assert again["last.weight"] == found["last.weight"], "nothing was chosen there since"


def test_a_mask_that_comes_from_elsewhere_has_no_record():
    fixed = PersonalState.start(np.zeros(SPACE.dim, np.float32), mask_of({40, 41}))
    assert step(fixed, {40, 41}, seed=1).choices is None
    assert step(fixed, {40, 41, 42}, seed=1).choices is None, "an earlier agent kept none"


def test_it_survives_the_file_of_the_state():
    state = step(PersonalState.start(np.zeros(SPACE.dim, np.float32), ALWAYS), {3}, seed=1)
    again = PersonalState.from_bytes(state.to_bytes(SPACE), SPACE)
    np.testing.assert_array_equal(again.choices, state.choices)
    bare = replace(state, choices=None)
    assert PersonalState.from_bytes(bare.to_bytes(SPACE), SPACE).choices is None
