"""An estimate from a dry run, against whole simulated runs in every encoding."""

import numpy as np
import pytest
from learning_tasks import BlobTask, mlp

from fedselect import RoundPolicy, RunSettings, Training, preset, preset_run
from fedselect.dryrun import _Federation, measure, pull
from fedselect.errors import FedSelectError
from fedselect.estimate import estimate
from fedselect.estimatedocs import EstimateCreate
from fedselect.growth import course
from fedselect.policies import Wire
from fedselect.simulate import simulate
from fedselect.tasks import client_tasks
from fedselect.training import TorchLearner

ROUNDS, CLIENTS = 12, 4


def digits():
    return dict(list(client_tasks("digits").items())[:CLIENTS])


def settings(encoding="f32"):
    return preset_run(
        "fedselect",
        rounds=ROUNDS,
        training=Training(steps=20),
        round=RoundPolicy(goal=CLIENTS, over_selection=1.0),
        wire=Wire(encoding=encoding),
    )


@pytest.mark.parametrize("encoding", ["f32", "bf16", "int8"])
def test_bytes_of_a_whole_run_are_within_five_percent(encoding):
    rule = settings(encoding)
    dry = measure(digits(), rule)
    asked = EstimateCreate(
        space=dry.space.to_json(),
        settings=rule,
        clients=CLIENTS,
        examples=dry.examples,
        measured=dry.measured,
    )
    found = estimate(asked, dry.space)
    done = simulate(digits(), rule)
    up, down = sum(done.bytes_up.values()), sum(done.bytes_down.values())
    assert found.run.up == pytest.approx(up, rel=0.05)
    assert found.run.down == pytest.approx(down, rel=0.05)
    assert (dry.measured.value_bytes_up is None) == (encoding == "f32")


@pytest.mark.parametrize("name", ["fisher", "fedper-late", "lg-fedavg"])
def test_bytes_of_other_policies_are_known_before(name):
    rule = settings().model_copy(
        update={"policy": preset(name, rounds=ROUNDS), "training": Training(steps=1)}
    )
    space = TorchLearner(digits()["site-00"]).space
    asked = EstimateCreate(space=space.to_json(), settings=rule, clients=CLIENTS, examples=100)
    found, done = estimate(asked, space), simulate(digits(), rule)
    assert found.run.up == pytest.approx(sum(done.bytes_up.values()), rel=0.05)
    assert found.run.down == pytest.approx(sum(done.bytes_down.values()), rel=0.05)


@pytest.mark.parametrize(
    "policy",
    [
        preset("fedselect", start_round=9),
        preset("fisher-gate", start_round=9),
        preset("fedper-late", start_round=9),
        preset("fedselect", direction="release", scope="global", growth=0.5),
    ],
    ids=lambda policy: f"{policy.name}-{policy.direction}",
)
def test_a_dry_run_comes_to_the_last_masks_at_once(policy, monkeypatch):
    masks = []
    real = _Federation._update

    def watched(self, name, base):
        data, mask = real(self, name, base)
        masks.append(mask.personal)
        return data, mask

    monkeypatch.setattr(_Federation, "_update", watched)
    task = BlobTask(mlp)
    rule = RunSettings(
        rounds=40, policy=policy, training=Training(steps=2), wire=Wire(encoding="int8")
    )
    measure({"one": task}, rule)
    stages = course(policy, TorchLearner(task).space, 40)
    first, last = stages[0].personal, stages[-1].personal
    assert masks == pytest.approx([first] * 5 + [last] * 2, abs=1)


def test_a_step_is_timed():
    assert 0 < measure({"one": BlobTask(mlp)}, settings()).measured.step_seconds < 1
    with pytest.raises(FedSelectError, match="no task"):
        measure({}, settings())


def test_clients_of_different_kinds_pull_apart_and_twins_do_not():
    rule = settings()
    skewed = pull(digits(), rule)
    twins = pull({f"twin-{n}": BlobTask(mlp, site=1, train=24) for n in range(4)}, rule)
    assert skewed.low <= skewed.index <= skewed.high
    assert twins.index == pytest.approx(twins.noise, abs=0.1)
    assert skewed.index - skewed.noise > 0.2
    again = pull(digits(), rule)
    assert np.allclose([skewed.index, skewed.noise], [again.index, again.noise])
