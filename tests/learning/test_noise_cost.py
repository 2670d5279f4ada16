"""Differential privacy in one process: a whole run, and what its noise alone costs."""

import numpy as np
import pytest
from learning_tasks import BlobTask, mlp

from fedselect import RoundPolicy, Training, preset_run
from fedselect.dryrun import measure, noise_cost
from fedselect.policies import Dp, Privacy, Wire
from fedselect.simulate import simulate
from fedselect.training import TorchLearner


def tasks(count=4):
    return {f"site-{i}": BlobTask(mlp, site=i) for i in range(count)}


def settings(policy="fedselect", encoding="f32", goal=4, rounds=4, **dp):
    rule = {"clip": 5.0, "noise": 0.01, "epsilon": 100.0} | dp
    return preset_run(
        policy,
        rounds=rounds,
        training=Training(steps=4),
        round=RoundPolicy(goal=goal),
        wire=Wire(encoding=encoding),
        privacy=Privacy(dp=Dp(**rule)),
    )


@pytest.mark.parametrize("encoding", ["f32", "int8"])
def test_a_private_run_repeats_to_the_bit_and_differs_from_a_plain_one(encoding):
    rule = settings(encoding=encoding)
    first, second = (simulate(tasks(), rule) for _ in range(2))
    assert first.versions == second.versions
    plain = simulate(tasks(), rule.model_copy(update={"privacy": Privacy()}))
    assert set(first.versions) & set(plain.versions) == {first.versions[0]}
    assert np.all(np.isfinite(first.values))


def test_what_is_clipped_to_almost_nothing_hardly_moves():
    rule = settings("fedavg", rounds=3)
    plain = simulate(tasks(), rule.model_copy(update={"privacy": Privacy()})).values
    held = simulate(tasks(), settings("fedavg", rounds=3, clip=0.001)).values
    start = TorchLearner(tasks()["site-0"]).initial()
    assert np.linalg.norm(plain - start) > 0.1
    assert 0 < np.linalg.norm(held - start) < 0.01


def test_noise_alone_costs_more_with_fewer_clients():
    few, many = (
        noise_cost(tasks(), settings(noise=4.0, goal=goal, rounds=8)) for goal in (4, 4000)
    )
    assert few > many + 5
    assert abs(many) < 5
    assert noise_cost(tasks(), settings().model_copy(update={"privacy": Privacy()})) is None


def test_a_dry_run_measures_it():
    found = measure(tasks(2), settings(noise=1.0, goal=2000)).measured
    assert found.accuracy_cost == pytest.approx(0, abs=10)
