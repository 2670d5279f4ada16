"""Clients trained all at once: the same course as one by one, but for rounding."""

import numpy as np
import pytest
import torch
from learning_tasks import Awkward, BlobTask, mlp
from torch import nn

from fedselect import Policy, RunSettings, Training, preset_run
from fedselect.batched import Together
from fedselect.errors import TrainingError
from fedselect.simulate import Execution, SimulatedRun, sampled
from fedselect.simulate import simulate as simulated
from fedselect.training import TorchLearner

STEPS = Training(steps=7, batch_size=10)
# What rounding may do over 8 rounds of 7 steps: parameters are of the order of 0.1 to 1.
CLOSE = {"rtol": 0, "atol": 2e-5}


def tasks(count=9, model=mlp, **changes):
    return {f"site-{i}": BlobTask(model, site=i % 4, **changes) for i in range(count)}


def settings(name, **changes):
    return preset_run(name, rounds=8, **{"training": STEPS, **changes})


def simulate(clients, rule, *, vectorized=False, checkpoint=None, **how):
    return simulated(clients, rule, execution=Execution(vectorized, checkpoint), **how)


def both(clients, rule, **how):
    """One by one, and all at once."""
    alone = simulate(clients, rule, **how)
    found = simulate(clients, rule, vectorized=True, **how)
    assert found.one_by_one is None
    return alone, found


def agree(alone, found):
    """Parameters within ``CLOSE`` where masks are equal, and those in nearly all elements.

    Ties: a mask may differ only where rounding decides, at elements whose scores are equal but for
    it; such an element then goes another way.
    """
    differ = total = 0
    for name, state in alone.states.items():
        other = found.states[name]
        assert state.participations == other.participations
        assert state.gated == other.gated
        same = (state.mask ^ other.mask).to_bool() | (state.merge_mask ^ other.merge_mask).to_bool()
        differ, total = differ + int(same.sum()), total + same.size
        np.testing.assert_allclose(state.theta[~same], other.theta[~same], **CLOSE)
        if state.own is not None:
            np.testing.assert_allclose(state.own, other.own, **CLOSE)
        for kind, score in alone.scores[name].items():
            assert abs(score.correct - found.scores[name][kind].correct) <= 1, kind
    assert differ <= total / 500
    if not differ:
        np.testing.assert_allclose(alone.values, found.values, **CLOSE)
        assert alone.bytes_up == found.bytes_up


@pytest.mark.parametrize(
    "name",
    ["fedselect", "fedavg-ft", "share-then-local", "fedrep", "fedbabu", "ditto", "fisher"],
)
def test_all_at_once_is_what_one_by_one_is_but_for_rounding(name):
    alone, found = both(tasks(), settings(name))
    agree(alone, found)
    moved = np.abs(found.values - TorchLearner(tasks()["site-0"]).initial()).max()
    assert moved > 100 * CLOSE["atol"]  # so that standing still would be seen


def test_own_moves_choose_the_same():
    policy = Policy(score="local_delta", growth=0.1, start_round=2, interval=2, window=2)
    alone, found = both(tasks(), settings("fedselect", policy=policy))
    agree(alone, found)
    assert all(state.mask.personal for state in found.states.values())


def test_a_gate_judges_the_same():
    policy = Policy(score="fisher", fraction=0.3, start_round=4, gate="holdout", window=2)
    alone, found = both(tasks(), settings("fedselect", policy=policy))
    agree(alone, found)
    judged = [{name: state.gated for name, state in run.states.items()} for run in (alone, found)]
    assert judged[0] == judged[1]


@pytest.mark.parametrize(
    "policy",
    [
        Policy(score="fisher", fraction=0.3, start_round=3, personal_rate=3, pooled=1, window=2),
        Policy(growth=0.2, start_round=2, schedule="alternating", personal_rate=2, pooled=2),
        Policy(personal="all", start_round=4, personal_rate=3),
    ],
    ids=["fisher", "growing", "everything"],
)
def test_longer_steps_and_agreement_are_the_same_together(policy):
    clients = {f"site-{n}": BlobTask(mlp, site=n % 3, train=n) for n in (24, 23, 17, 10, 11)}
    alone, found = both(clients, settings("fedselect", policy=policy))
    agree(alone, found)
    plain = policy.model_copy(update={"personal_rate": 1.0})
    other, _ = both(clients, settings("fedselect", policy=plain))
    one, two = (run.states["site-17"].theta for run in (other, alone))
    assert np.abs(one - two).max() > 100 * CLOSE["atol"]


def test_clipping_epochs_alternating_parts_and_batches_of_every_size_are_batched_too():
    training = Training(epochs=2, batch_size=10, clip_norm=0.5)
    policy = Policy(growth=0.3, limit=0.6, schedule="alternating")
    clients = {f"site-{n}": BlobTask(mlp, site=n % 3, train=n) for n in (5, 24, 24, 17, 10, 11)}
    agree(*both(clients, settings("fedselect", policy=policy, training=training)))


def test_who_is_drawn_takes_part():
    alone, found = both(tasks(), settings("fedper"), order=sampled(0.4, seed=3))
    agree(alone, found)


class Sometimes(BlobTask):
    """Of one site, whose batches name a weight from the second on."""

    def train_batches(self):
        for number, (inputs, labels) in enumerate(super().train_batches()):
            more = {"w": torch.full((len(labels),), 3.0)} if self.odd and number else {}
            yield {"x": inputs, "y": labels, **more}

    def eval_batches(self):
        return [{"x": inputs, "y": labels} for inputs, labels in super().eval_batches()]

    def loss(self, model, batch):
        each = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return (each * batch["w"]).mean() if "w" in batch else each.mean()

    def outcome(self, model, batch):
        return super().outcome(model, (batch["x"], batch["y"]))


@pytest.mark.parametrize("odd", [0, 2])
def test_batches_that_are_made_otherwise_are_stacked_apart(odd):
    def some():
        found = {f"site-{n}": Sometimes(mlp, site=n) for n in range(3)}
        for number, task in enumerate(found.values()):
            task.odd = number == odd
        return found

    rule = settings("fedavg", training=Training(steps=4, batch_size=8))
    alone = simulate(some(), rule)
    agree(alone, simulate(some(), rule, vectorized=True))
    plain = simulate({f"site-{n}": BlobTask(mlp, site=n) for n in range(3)}, rule)
    assert np.abs(plain.values - alone.values).max() > 100 * CLOSE["atol"]


@pytest.mark.parametrize("gate", ["none", "holdout"])
@pytest.mark.parametrize("score", ["fisher", "drift", "local_delta"])
def test_who_is_drawn_gathers_by_its_own_clock(score, gate):
    """Clients are at different participations: some gather in a round, others do not any more."""
    policy = Policy(score=score, fraction=0.3, start_round=3, window=2, gate=gate)
    order = sampled(0.5, seed=3)
    alone, found = both(tasks(), settings("fedselect", policy=policy), order=order)
    agree(alone, found)
    for name, state in alone.states.items():
        assert state.evidence.terms == found.states[name].evidence.terms
    counts = {state.participations for state in alone.states.values()}
    assert min(counts) < max(counts)
    assert any(state.merge_mask.personal or state.gated for state in alone.states.values())


def test_more_clients_than_fit_abreast(monkeypatch):
    together = simulate(tasks(), settings("fedselect"), vectorized=True)
    monkeypatch.setattr("fedselect.batched.ABREAST", 4)
    agree(simulate(tasks(), settings("fedselect"), vectorized=True), together)


class Dropping(BlobTask):
    """Draws random numbers in its forward pass."""

    def __init__(self, **how):
        super().__init__(
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), **how
        )


class Branching(BlobTask):
    """Looks at numbers to decide what to compute."""

    def loss(self, model, batch):
        found = super().loss(model, batch)
        return found if found > 1 else 2 * found


class Weighing(BlobTask):
    """A loss of its own at every site."""

    def __init__(self, model, *, site=0):
        super().__init__(model, site=site)
        self.site = site

    def loss(self, model, batch):
        return (1 + self.site) * super().loss(model, batch)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = nn.Parameter(self.first.weight.data)

    def forward(self, points):
        return self.second(torch.tanh(self.first(points)))


class Precise(nn.Linear):
    def __init__(self):
        super().__init__(6, 3, dtype=torch.float64)

    def forward(self, points):
        return super().forward(points.double())


@pytest.mark.parametrize(
    ("clients", "reason"),
    [
        ({f"s{i}": BlobTask(Awkward, site=i) for i in range(3)}, "buffers"),
        ({f"s{i}": Dropping(site=i) for i in range(3)}, "random"),
        ({f"s{i}": Branching(mlp, site=i) for i in range(3)}, "torch cannot batch"),
        ({f"s{i}": Weighing(mlp, site=i) for i in range(3)}, "first client's"),
        ({f"s{i}": BlobTask(Tied, site=i) for i in range(3)}, "share memory"),
        ({f"s{i}": BlobTask(Precise, site=i) for i in range(3)}, "float32"),
    ],
)
def test_what_cannot_be_batched_is_trained_one_by_one_and_said(clients, reason):
    rule = settings("fedselect")
    found = simulate(clients, rule, vectorized=True)
    assert reason in str(found.one_by_one)
    assert found.versions == simulate(clients, rule).versions
    assert simulate(clients, rule).one_by_one is None


def test_a_model_that_is_no_number_is_refused():
    rule = settings("fedavg", training=Training(steps=7, learning_rate=100))
    with pytest.raises(TrainingError, match="not finite"):
        simulate(tasks(model=Steep), rule, vectorized=True)


class Steep(nn.Linear):
    """Fine at first, and beyond all bounds after a few steps."""

    def __init__(self):
        super().__init__(6, 3)

    def forward(self, points):
        return (2 * super().forward(points)) ** 5


def test_only_what_the_policy_says_moves():
    rule = RunSettings(rounds=4, policy=Policy(personal="head", trains="body"), training=STEPS)
    run = SimulatedRun(tasks(), rule, vectorized=True)
    start = run.space.unflatten(run.values)
    run.round(run.names)
    for state in run.states().values():
        moved = run.space.unflatten(state.theta)
        assert (moved["0.weight"] != start["0.weight"]).any()
        np.testing.assert_array_equal(moved["2.weight"], start["2.weight"])


def test_the_callers_chance_is_left_alone():
    learners = [TorchLearner(task) for task in tasks().values()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Together(learners, settings("fedavg"))
    assert torch.equal(torch.rand(3), expected)
