"""Agreement of all clients in a run: which rounds it is of, and what it does to masks."""

import numpy as np
import pytest
from learning_tasks import BlobTask, mlp

from fedselect import Policy, Training, preset_run
from fedselect.aggregate import Contribution
from fedselect.agreement import agreement, dissent
from fedselect.evidence import DISSENT, NOTHING, SQUARED_GRADIENT
from fedselect.masks import Mask
from fedselect.policies import Wire
from fedselect.scores import Seen
from fedselect.selection import choose
from fedselect.simulate import SimulatedRun
from fedselect.space import Kind, ParameterSpace, Role

SPACE = ParameterSpace.of([("body.weight", (2, 3), Kind.WEIGHT, Role.SELECTABLE)])


def tasks(count=4):
    return {f"site-{i}": BlobTask(mlp, site=i) for i in range(count)}


def settings(policy, *, rounds=6, **changes):
    return preset_run("fedavg", rounds=rounds, policy=policy, training=Training(steps=4), **changes)


def chosen(policy, scores, told):
    squares = np.asarray(scores, dtype=np.float32)
    evidence = NOTHING.with_terms(SQUARED_GRADIENT, squares)
    if told is not None:
        evidence = evidence.with_terms(DISSENT, np.asarray(told, dtype=np.float32))
    seen = Seen(np.ones(6, dtype=np.float32), np.zeros(6, dtype=np.float32), 0, evidence)
    mask = choose(policy, seen, mask=Mask.empty(6), space=SPACE)
    return np.flatnonzero(mask.to_bool()).tolist()


def test_a_score_is_weighed_by_dissent_to_the_power():
    scores, told = [8, 4, 3, 2, 1, 1], [0.1, 0.3, 0.9, 0.9, 0, 0]
    one = Policy(score="fisher", fraction=0.34, pooled=1)  # 0.8 1.2 2.7 1.8 0 0
    assert chosen(one, scores, told) == [2, 3]
    assert chosen(one.model_copy(update={"pooled": None}), scores, told) == [0, 1]
    assert chosen(one, scores, None) == [0, 1]
    half = one.model_copy(update={"pooled": 0.5})  # 2.5 2.2 2.8 1.9
    assert chosen(half, scores, told) == [0, 2]
    every = one.model_copy(update={"fraction": 1.0})
    assert chosen(every, scores, told) == [0, 1, 2, 3], "all agree: no evidence"
    rows = one.model_copy(update={"scope": "row", "fraction": 0.5})
    assert chosen(rows, [9, 0, 0, 1, 1, 1], [0.1, 1, 1, 1, 1, 1]) == [3, 4, 5]


@pytest.mark.parametrize("encoding", ["f32", "int8"])
def test_a_mask_is_chosen_by_the_rounds_of_the_window_before_it(encoding):
    """The mask that serves from participation 5 on is chosen in round 5, by rounds 3 and 4."""
    policy = Policy(scope="global", fraction=0.3, start_round=5, window=2, pooled=2)
    run = SimulatedRun(tasks(), settings(policy, wire=Wire(encoding=encoding)))
    rounds = []

    def watch(_, base, updates):
        start = base if encoding == "f32" else np.zeros_like(base)
        parts = [Contribution(u.mask, u.values) for _, u in sorted(updates.items())]
        rounds.append(agreement(start, parts, 2))
        return updates

    for _ in range(4):
        run.round(run.names, tamper=watch)
    told = dissent(rounds[2:])
    assert 0 <= told.min() < 0.1 < 0.5 < told.max() <= 1
    before = run.states()
    run.round(run.names)
    same = 0
    for name, state in run.states().items():
        assert state.evidence == NOTHING, "what judged a choice goes with it"
        masks = []
        for known in (NOTHING.with_terms(DISSENT, told), NOTHING):
            seen = Seen(state.theta, before[name].reference, 0, known)
            masks.append(choose(policy, seen, mask=before[name].mask, space=run.space))
        assert state.mask == masks[0]
        same += masks[0] == masks[1]
    assert same < 4, "agreement made no difference"


def test_who_joins_late_is_told_too():
    policy = Policy(scope="global", fraction=0.3, start_round=1, pooled=1)
    run = SimulatedRun(tasks(), settings(policy))
    run.round(run.names[:3])
    states = run.states()
    plain = SimulatedRun(tasks(), settings(policy.model_copy(update={"pooled": None})))
    plain.round(plain.names[:3])
    for name in run.names[:3]:  # nobody had moved anything before
        assert states[name].mask == plain.states()[name].mask
    late = run.names[3]
    run.round(run.names)
    plain.round(plain.names)
    assert run.values.shape == plain.values.shape
    np.testing.assert_array_equal(run.states()[late].theta, plain.states()[late].theta)
    assert run.states()[late].mask != plain.states()[late].mask
