"""The index of how differently clients pull, at its known points."""

from __future__ import annotations

import numpy as np
import pytest

from fedselect.errors import SettingsError
from fedselect.heterogeneity import apart, divergence, unlike

RNG = np.random.default_rng(0)
STEP = RNG.standard_normal(1000).astype(np.float32)


def test_the_known_points():
    same = [STEP] * 5
    found = divergence(same, same)
    assert (found.index, found.noise) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    across = list(np.eye(6, 1000, dtype=np.float32))
    found = divergence(across, across)
    assert (found.index, found.low, found.high) == (pytest.approx(1),) * 3
    against = [STEP, -STEP, STEP, -STEP]
    assert divergence(against, against).index == pytest.approx(1 + 1 / 3)


def test_it_does_not_depend_on_the_number_of_clients():
    def clients(count):
        own = RNG.standard_normal((count, 4000)).astype(np.float32)
        return list(own + 0.7 * np.tile(STEP, 4))

    few, many = (divergence(made, made) for made in (clients(5), clients(60)))
    expected = 1 / (1 + 0.49)
    assert few.index == pytest.approx(expected, abs=0.05)
    assert many.index == pytest.approx(expected, abs=0.05)
    assert few.low <= few.index <= few.high
    assert many.high - many.low < few.high - few.low + 0.1


def test_the_order_of_batches_is_told_apart():
    noise = [[RNG.standard_normal(1000).astype(np.float32) for _ in range(4)] for _ in range(2)]
    found = divergence(*[[STEP + each for each in row] for row in noise])
    assert found.noise == pytest.approx(0.5, abs=0.05)
    assert found.index == pytest.approx(found.noise, abs=0.08)


def test_too_little_to_say():
    with pytest.raises(SettingsError, match="3 clients"):
        divergence([STEP] * 2, [STEP] * 2)
    with pytest.raises(SettingsError, match="moved"):
        divergence([0 * STEP] * 3, [0 * STEP] * 3)


@pytest.mark.parametrize(
    ("own", "together", "expected"),
    [
        ([1, 0], [2, 0], 0),
        ([1, 0], [0, 3], 1),
        ([1, 0], [-1, 0], 2),
        ([3, 4], [4, 3], 1 - 24 / 25),
        ([0, 0], [1, 1], None),
        ([1, 1], [0, 0], None),
        ([], [], None),
    ],
)
def test_how_far_apart_two_steps_are(own, together, expected):
    found = apart(np.array(own, np.float32), np.array(together, np.float32))
    assert found == pytest.approx(expected) if expected is not None else found is None


def test_independent_clients_are_where_the_docs_say():
    """Of n equal clients with nothing in common each is at 1 − 1/√n."""
    rng = np.random.default_rng(1)
    steps = rng.normal(size=(16, 20_000)).astype(np.float32)
    mean = steps.mean(0)
    found = [apart(step, mean) for step in steps]
    assert found == pytest.approx([1 - 1 / 4] * 16, abs=0.03)


def test_labels_are_compared_by_their_shares():
    assert unlike({"a": 5, "b": 5}, [{"a": 50, "b": 50}]) == pytest.approx(0)
    assert unlike({"a": 5}, [{"b": 50}, {"c": 1}]) == pytest.approx(1)
    assert unlike({"a": 3, "b": 1}, [{"a": 1, "b": 1}, {"b": 7}]) == pytest.approx(0.5)
    assert unlike({"a": 3}, []) is None
    assert unlike({}, [{"a": 1}]) is None
    assert unlike({"a": 3}, [{"a": 0}]) is None
