"""The rule that keeps a version recomputable."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedselect.retention import RetentionPolicy, VersionFacts, expired, protected

NOW = datetime(2026, 11, 25, tzinfo=UTC)
POLICY = RetentionPolicy()
WINDOW = POLICY.recompute_window
ID = UUID(int=1)


@pytest.mark.parametrize(
    ("number", "age", "pinned", "kept"),
    [
        (3, timedelta(0), False, True),
        (3, WINDOW - timedelta(seconds=1), False, True),
        (3, WINDOW, False, False),
        (3, 10 * WINDOW, False, False),
        (3, 10 * WINDOW, True, True),
        (0, 10 * WINDOW, False, True),
    ],
)
def test_a_version_is_protected_in_the_window_and_while_pinned(number, age, pinned, kept):
    version = VersionFacts(ID, number, NOW - age)
    assert protected(version, NOW, POLICY, {ID} if pinned else set()) is kept


@pytest.mark.parametrize(
    ("number", "age", "pinned", "kept"),
    [(3, 6, True, True), (3, 7, True, False), (3, 7, False, False), (0, 100, False, True)],
)
def test_a_run_that_promises_that_masks_go_is_kept_to_it(number, age, pinned, kept):
    version = VersionFacts(ID, number, NOW - timedelta(days=age), mask_days=7)
    assert protected(version, NOW, POLICY, {ID} if pinned else set()) is kept


def test_a_promise_beyond_the_window_prolongs_nothing():
    version = VersionFacts(ID, 3, NOW - WINDOW, mask_days=365)
    assert not protected(version, NOW, POLICY, set())
    assert protected(version, NOW, POLICY, {ID})


@given(
    number=st.integers(0, 5),
    age=st.integers(0, 400),
    later=st.integers(0, 400),
    window=st.integers(0, 200),
    pinned=st.booleans(),
)
def test_what_is_released_once_is_never_protected_by_time_again(number, age, later, window, pinned):
    policy = RetentionPolicy(recompute_window=timedelta(days=window))
    version = VersionFacts(ID, number, NOW - timedelta(days=age))
    pins = {ID} if pinned else set()
    now = protected(version, NOW, policy, pins)
    then = protected(version, NOW + timedelta(days=later), policy, pins)
    assert now or not then
    assert then or not (pinned or number == 0)


def test_no_age_means_for_good():
    assert not expired(NOW - timedelta(days=10_000), NOW, None)
    assert expired(NOW - timedelta(days=2), NOW, timedelta(days=2))
    assert not expired(NOW - timedelta(days=1), NOW, timedelta(days=2))
