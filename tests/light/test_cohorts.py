"""Cohorts and the groups of rollouts: stable, nested, disjoint, of the promised size."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedselect.cohortdocs import CohortRule
from fedselect.cohorts import Candidate, belongs, group_size, place, split
from fedselect.errors import SettingsError

SHARES = st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True).map(sorted)


def client(number: int, *tags: str) -> Candidate:
    return Candidate(f"id-{number}", tags)


def test_a_place_is_the_same_for_ever():
    assert place("salt", "id-1") == 9569937679582309784
    assert place("other", "id-1") != place("salt", "id-1") != place("salt", "id-2")


def test_rules_by_client_and_by_tag():
    named, tagged = CohortRule(clients=["id-1"]), CohortRule(tag="site:a")
    assert [belongs(named, "", client(n)) for n in (1, 2)] == [True, False]
    assert [belongs(tagged, "", client(1, *t)) for t in ((), ("b",), ("site:a", "b"))] == [0, 0, 1]


def test_a_larger_percentage_keeps_who_was_in_and_is_about_as_large_as_it_says():
    clients = [client(n) for n in range(10_000)]
    found = [
        {c.id for c in clients if belongs(CohortRule(percent=p), "salt", c)}
        for p in (0.5, 5, 25, 100)
    ]
    assert found[0] < found[1] < found[2] < found[3]
    assert [len(part) for part in found] == pytest.approx([50, 500, 2500, 10_000], rel=0.3)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"tag": "a", "percent": 5},
        {"clients": []},
        {"percent": 0},
        {"percent": 100.1},
        {"percent": math.nan},
        {"percent": "5"},
    ],
)
def test_rules_that_say_nothing_or_two_things_are_refused(rule):
    with pytest.raises(ValidationError):
        CohortRule(**rule)


@pytest.mark.parametrize(
    ("percent", "clients", "minimum", "size"),
    [(5, 100, 3, 5), (5, 101, 3, 6), (5, 10, 3, 3), (25, 12, 3, 3), (25, 13, 3, 4), (100, 7, 1, 7)],
)
def test_a_group_has_the_larger_of_minimum_and_share_rounded_up(percent, clients, minimum, size):
    assert group_size(percent, clients, minimum) == size


def test_a_share_that_comes_out_even_is_not_rounded_up_by_an_error_of_floats():
    assert group_size(7, 100, 1) == 7  # 0.07 * 100 is 7.000000000000001
    assert group_size(0.1, 1000, 1) == math.ceil(Fraction(0.1) * 10)


@given(SHARES, st.integers(1, 50), st.integers(1, 5), st.integers(6, 200), st.text(max_size=5))
def test_stages_are_nested_and_apart_from_the_control_group(shares, control, least, n, salt):
    clients = [f"id-{k}" for k in range(n)]
    held_back = group_size(control, n, least)
    if n - held_back < least:
        with pytest.raises(SettingsError) as failed:
            split(clients, salt=salt, stages=[*shares, 100], control=control, minimum=least)
        assert failed.value.code == "rollout_too_small"
        return
    groups = split(clients, salt=salt, stages=[*shares, 100], control=control, minimum=least)
    stages = [groups.stage(k) for k in range(len(shares) + 1)]
    assert len(groups.control) == held_back
    for smaller, larger in pairwise(stages):
        assert set(smaller) <= set(larger)
    for percent, stage in zip(shares, stages, strict=False):
        assert len(stage) == min(n - held_back, max(least, math.ceil(Fraction(percent * n, 100))))
    assert sorted([*stages[-1], *groups.control]) == sorted(clients)


def test_the_order_of_the_clients_does_not_matter_but_the_salt_does():
    clients = [f"id-{k}" for k in range(30)]
    rules = {"stages": [10, 100], "control": 10, "minimum": 3}
    one = split(clients, salt="a", **rules)
    assert split(reversed(clients), salt="a", **rules) == one
    assert split(clients, salt="b", **rules) != one
