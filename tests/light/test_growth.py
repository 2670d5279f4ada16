"""The course of a mask, counted without training, is the one that growing gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedselect.growth import MOST_QUOTAS, bounds, course, quota
from fedselect.policies import PRESETS, Policy, preset
from fedselect.space import Kind, ParameterSpace, Role

SPACE = ParameterSpace.of(
    [
        ("a.weight", (40, 10), Kind.WEIGHT, Role.SELECTABLE),
        ("a.bias", (40,), Kind.BIAS, Role.SHARED),
        ("n.weight", (40,), Kind.NORM, Role.SELECTABLE),
        ("n.running_mean", (40,), Kind.BUFFER, Role.PERSONAL),
        ("b.weight", (3, 40), Kind.WEIGHT, Role.SELECTABLE),
    ]
)


def one_by_one(policy, participations):
    """(personal elements, whether the mask is sent) of every participation, by the agent's rule."""
    lower = policy.bounds(SPACE)[0].personal
    sizes = [slot.size for slot in SPACE.with_role(Role.SELECTABLE)]
    owned, sent, found = [0] * len(sizes), True, []
    for number in range(participations):
        found.append((lower + sum(owned), sent))
        sent = False
        if policy.due(number):
            more = [quota(policy, size=s, shared=s - o) for s, o in zip(sizes, owned, strict=True)]
            owned = [o + m for o, m in zip(owned, more, strict=True)]
            sent = any(more)
    return found


def spelled_out(stages):
    found = []
    for stage in stages:
        assert stage.first == len(found)
        assert stage.stop == stage.first + 1 or not stage.sent
        found += [(stage.personal, stage.sent)] * (stage.stop - stage.first)
    return found


@given(
    st.builds(
        Policy,
        growth=st.sampled_from([0, 0.01, 0.05, 0.25, 0.5, 1]),
        limit=st.sampled_from([0, 0.1, 0.3, 0.8, 1]),
        limit_mode=st.sampled_from(["cap", "official"]),
        interval=st.integers(1, 5),
        start_round=st.integers(0, 8),
    ),
    st.integers(1, 40),
)
def test_the_course_is_that_of_growing_step_by_step(policy, participations):
    stages = course(policy, SPACE, participations)
    assert spelled_out(stages) == one_by_one(policy, participations)
    for before, after in pairwise(stages):
        assert after.personal - before.personal == after.grown


@pytest.mark.parametrize("name", PRESETS)
def test_the_counts_are_those_of_the_masks(name):
    policy = preset(name)
    assert bounds(policy, SPACE) == tuple(mask.personal for mask in policy.bounds(SPACE))


@pytest.mark.parametrize("name", PRESETS)
def test_fixed_masks_stay(name):
    policy = preset(name)
    if policy.personal == "learned":
        pytest.skip("grows")
    assert not policy.late
    first, rest = course(policy, SPACE, 9)
    assert (first.sent, rest.sent) == (True, False)
    assert first.personal == rest.personal == policy.bounds(SPACE)[0].personal


@pytest.mark.parametrize("name", ["fedper-late", "share-then-local"])
def test_a_fixed_mask_that_waits_comes_at_once(name):
    policy = preset(name, rounds=9)
    least, most = (mask.personal for mask in policy.bounds(SPACE))
    shown = [(s.first, s.stop, s.personal, s.grown, s.sent) for s in course(policy, SPACE, 9)]
    assert shown == [
        (0, 1, least, 0, True),
        (1, 4, least, 0, False),
        (4, 5, most, most - least, True),
        (5, 9, most, 0, False),
    ]
    assert len(course(policy, SPACE, 4)) == 2


def test_many_tensors_that_grow_slowly_count_as_one():
    rows = [(f"{n}.weight", (n,), Kind.WEIGHT, Role.SELECTABLE) for n in range(1, 500)]
    space, policy = ParameterSpace.of(rows), Policy(growth=0.001, limit=0.5)
    participations = MOST_QUOTAS // 400
    stages = course(policy, space, participations)
    exact = sum(slot.size for slot in space.slots) * (1 - 0.999 ** (participations - 2))
    assert stages[-1].personal == pytest.approx(exact, rel=0.01)
    assert np.all(np.diff([stage.personal for stage in stages]) >= 0)
