"""Scores by hand, and that a new one is one function and one registration."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from fedselect.evidence import (
    DRIFT,
    NOTHING,
    OWN_MOVE,
    SQUARED_DRIFT,
    SQUARED_GRADIENT,
    Evidence,
)
from fedselect.policies import Policy
from fedselect.scores import SCORES, Seen, score
from fedselect.space import Kind, ParameterSpace, Role

SPACE = ParameterSpace.of([("a.weight", (3,), Kind.WEIGHT, Role.SELECTABLE)])
(SLOT,) = SPACE.slots


def vector(*values):
    return np.array(values, dtype=np.float32)


def judged(name, evidence=NOTHING, *, theta=(0, 0, 0), reference=(0, 0, 0), seed=0):
    seen = Seen(vector(*theta), vector(*reference), seed, evidence)
    return SCORES[name].rule(seen, SLOT)


def test_delta_is_the_size_of_the_change():
    np.testing.assert_array_equal(
        judged("delta", theta=(1, -2, 3), reference=(1, 1, 1)), vector(0, 3, 2)
    )


def test_local_delta_is_the_mean_move_of_own_training():
    evidence = NOTHING.with_terms(OWN_MOVE, vector(1, 0, 3)).with_terms(OWN_MOVE, vector(2, 0, 1))
    found = judged("local_delta", evidence, theta=(9, 9, 9))
    np.testing.assert_array_equal(found, vector(1.5, 0, 2))


def test_fisher_is_the_mean_of_squared_gradients():
    evidence = NOTHING.with_terms(SQUARED_GRADIENT, vector(1, 4, 9), 2)
    evidence = evidence.with_terms(SQUARED_GRADIENT, vector(1, 0, 3), 2)
    np.testing.assert_array_equal(judged("fisher", evidence), vector(0.5, 1, 3))
    np.testing.assert_array_equal(judged("fisher"), vector(0, 0, 0))


def drifts(*rows):
    evidence = NOTHING.with_terms(SQUARED_GRADIENT, vector(2, 2, 2), 1)
    for row in rows:
        evidence = evidence.with_terms(DRIFT, vector(*row))
        evidence = evidence.with_terms(SQUARED_DRIFT, vector(*row) ** 2)
    return evidence


def test_drift_is_what_it_costs_to_be_overwritten():
    np.testing.assert_array_equal(judged("drift", drifts((1, -2, 0))), vector(2, 8, 0))


def test_drift_that_is_noise_counts_for_nothing():
    rows = np.array([(1, 3, -1), (1, 1, 1), (1, 2, 0)], dtype=np.float64)
    mean, noise = rows.mean(0), rows.var(0, ddof=1) / len(rows)
    expected = 2 * np.maximum(mean**2 - noise, 0)
    assert expected[2] == 0 < expected[1]
    np.testing.assert_allclose(judged("drift", drifts(*rows)), expected, rtol=1e-6)


def test_chance_knows_only_what_moved():
    one = judged("random", theta=(1, 0, 5), seed=3)
    assert one[1] == 0 < min(one[0], one[2])
    np.testing.assert_array_equal(one, judged("random", theta=(9, 0, -1), seed=3))
    assert (one != judged("random", theta=(1, 0, 5), seed=4)).any()


@pytest.mark.parametrize("name", SCORES)
def test_every_score_says_where_it_comes_from(name):
    text = SCORES[name].rule.__doc__
    assert text is not None
    assert name == "random" or "Source:" in text


def test_a_new_score_is_one_function_and_one_registration():
    @score("size")
    def size(seen, slot):
        return np.abs(seen.theta[slot.offset : slot.stop])

    try:
        assert Policy(score="size").score == "size"
        np.testing.assert_array_equal(judged("size", theta=(-3, 1, 2)), vector(3, 1, 2))
    finally:
        del SCORES["size"]
    with pytest.raises(
        ValidationError, match="there is no score 'size'; there are delta, local_delta, fisher"
    ):
        Policy(score="size")


def test_a_score_that_needs_what_nobody_gathers_is_refused():
    with pytest.raises(ValueError, match="'odd' needs squared_gradients, which no client gathers"):
        score("odd", "squared_gradients")
    assert "odd" not in SCORES


def test_evidence_survives_its_file():
    evidence = drifts((1, 2, 3), (4, 5, 6)).with_pair(vector(1, 1, 1), vector(2, 2, 2))
    evidence = evidence.with_pair(vector(3, 3, 3), vector(4, 4, 4))
    evidence = Evidence(evidence.sums, evidence.terms, evidence.trained, evidence.shared, "f" * 64)
    read = Evidence.read({**evidence.tensors(), "theta": vector(0, 0, 0)}, evidence.facts())
    assert (read.terms, read.fold) == (evidence.terms, evidence.fold)
    assert read.terms[DRIFT] == 2
    assert read.tensors().keys() == evidence.tensors().keys()
    for name, tensor in evidence.tensors().items():
        np.testing.assert_array_equal(read.tensors()[name], tensor)
    assert Evidence.read({}, {}) == NOTHING
    assert (NOTHING.tensors(), NOTHING.facts()) == ({}, {})
