"""What a client gathers on its way, for its next mask to be judged by."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from learning_tasks import BlobTask, counted, mlp

from fedselect import RunSettings, Training, preset
from fedselect.evidence import NOTHING
from fedselect.training import TorchLearner


def fisher(**changes):
    rule = preset("fisher", start_round=4, window=2, **changes)
    return RunSettings(rounds=9, policy=rule, training=Training(steps=3))


def test_squared_gradients_are_those_of_the_steps():
    """With plain SGD, grad = (θ before − θ after) / η."""
    task = BlobTask(mlp)
    learner, rule, base = TorchLearner(task), fisher(), TorchLearner(task).initial()
    state = None
    for number in range(3):
        state = learner.participate(state, base, settings=rule, seed=number).state
    assert state.evidence.terms == {"squared_gradient": 3}
    watched = counted(task)
    start = replace(state, participations=2, evidence=NOTHING)
    done = learner.participate(start, base, settings=rule, seed=7)
    steps = [np.concatenate([v.reshape(-1).numpy() for v in s.values()]) for s in watched]
    steps.append(done.theta)
    expected = sum(((a - b) / 0.05) ** 2 for a, b in pairwise(steps))
    found = done.state.evidence.sums["squared_gradient"]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


def test_evidence_is_gathered_in_the_window_and_dropped_with_the_choice():
    learner, rule = TorchLearner(BlobTask(mlp)), fisher(score="drift")
    state, base, seen = None, TorchLearner(BlobTask(mlp)).initial(), []
    for number in range(6):
        state = learner.participate(state, base, settings=rule, seed=number).state
        seen.append(dict(state.evidence.terms))
        base = (base + state.theta) / 2
    # Due after participation 3: the statistics are those of 2 and 3.
    one = {"drift": 1, "squared_drift": 1, "squared_gradient": 3}
    assert seen == [{}, {}, one, {}, {}, {}]
    assert state.mask.personal == int(0.02 * learner.space.dim)
    default = RunSettings(rounds=20, training=Training(steps=4))
    assert learner.participate(None, base, settings=default, seed=0).state.evidence == NOTHING


def test_own_moves_are_those_of_the_training_alone_and_choose_the_mask():
    """What the federation moves, here by 10 in every element, is no part of them."""
    learner, rule = TorchLearner(BlobTask(mlp)), fisher(score="local_delta")
    state, base = None, learner.initial()
    moves, masks = [], []
    for number in range(4):
        shared = base + 10 * (number % 2)
        done = learner.participate(state, shared, settings=rule, seed=number)
        moves.append(np.abs(done.theta - shared))
        masks.append(done.state.mask.personal)
        state = done.state
        assert state.evidence.terms == ({"own_move": 1} if number == 2 else {})
    score = (moves[2] + moves[3]) / 2
    expected = np.zeros(learner.space.dim, dtype=bool)
    expected[np.argsort(-score, kind="stable")[: int(0.02 * score.size)]] = True
    assert masks[:3] == [0, 0, 0]
    np.testing.assert_array_equal(state.mask.to_bool(), expected)
