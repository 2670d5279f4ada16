"""The hold-out gate: what is set aside stays aside, and the rule is the one that is written."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from learning_tasks import Awkward, BlobTask, mlp

from fedselect import Mask, RunSettings, Training, preset
from fedselect.errors import TrainingError
from fedselect.holdout import gain, set_aside
from fedselect.personal import PersonalState
from fedselect.training import TorchLearner

WINDOW = 3


def settings(name="fisher-gate", *, start=4, **changes):
    policy = preset(name, start_round=start, gate="holdout", window=WINDOW, **changes)
    return RunSettings(rounds=12, policy=policy, training=Training(steps=6, batch_size=5))


class Watched(BlobTask):
    """Notes which training examples were in a training step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trained = []

    def loss(self, model, batch):
        if model.training:
            rows = {tuple(row) for row in self.train_part[0].tolist()}
            self.trained.append({tuple(row) for row in batch[0].tolist()})
            assert self.trained[-1] <= rows
        return super().loss(model, batch)


def play(task, rule, rounds, *, state=None, learner=None):
    """States after each participation; the shared model is what others would make of it."""
    learner = learner or TorchLearner(task)
    base, states, seen = learner.initial(), [], []
    for number in range(rounds):
        if isinstance(task, Watched):
            task.trained.clear()
        state = learner.participate(state, base, settings=rule, seed=number).state
        states.append(state)
        seen.append(set().union(*task.trained) if isinstance(task, Watched) else None)
        base = (0.5 * base + 0.5 * state.theta).astype(np.float32)
    return states, seen


def test_a_fixed_fifth_is_spared_in_the_whole_window_and_only_there():
    task = Watched(mlp)
    _, seen = play(task, settings(), 7)
    everything = {tuple(row) for row in task.train_part[0].tolist()}
    inside = [everything - trained for trained in seen[4 - WINDOW : 4]]
    spared = set.intersection(*inside)
    assert len(spared) == 5  # of 24
    for number, trained in enumerate(seen):
        if 4 - WINDOW <= number < 4:
            assert not trained & spared
    assert spared <= set().union(*seen[4:])
    assert spared & seen[0]


def test_the_state_keeps_what_the_gate_needs_until_it_has_judged():
    learner = TorchLearner(BlobTask(mlp))
    states, _ = play(None, settings(), 6, learner=learner)
    assert [len(state.evidence.trained) for state in states] == [0, 0, 1, 2, 0, 0]
    assert [bool(state.evidence.sums) for state in states] == [
        False,
        True,
        True,
        False,
        *[False] * 2,
    ]
    assert [bool(state.evidence.fold) for state in states] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert [state.gated is None for state in states] == [True] * 4 + [False] * 2
    assert states[3].mask.personal > 0


def test_a_saved_state_goes_on_as_if_it_had_never_been_saved():
    learner = TorchLearner(BlobTask(Awkward))
    rule, base = settings(), TorchLearner(BlobTask(Awkward)).initial()
    kept = saved = None
    for number in range(6):
        kept = learner.participate(kept, base, settings=rule, seed=number).state
        fresh = TorchLearner(BlobTask(Awkward))
        saved = fresh.participate(saved, base, settings=rule, seed=number).state
        data = saved.to_bytes(fresh.space)
        assert data == kept.to_bytes(learner.space)
        saved = PersonalState.from_bytes(data, fresh.space)
        base = (0.5 * base + 0.5 * kept.theta).astype(np.float32)
    assert kept.gated is not None


def test_the_gate_is_the_rule_that_is_written():
    """d = mean of L(M ? θ : g) − L(g) over the window, on the fold, with own running statistics."""
    learner = TorchLearner(BlobTask(Awkward))
    rule = settings(fraction=0.3)
    base, state, pairs = learner.initial(), None, []
    for number in range(5):
        before = state
        done = learner.participate(state, base, settings=rule, seed=number)
        state = done.state
        after = (0.5 * base + 0.5 * state.theta).astype(np.float32)
        if 4 - WINDOW <= number < 4:
            pairs.append((state.theta, after))
        base = after
    mask = before.mask
    fold = learner._fold(before, rule)
    never = Mask.initial(learner.space).to_bool()

    def loss(theta):
        learner._load(theta, {})
        learner.model.eval()
        with torch.no_grad():
            return float(learner.task.loss(learner.model, fold.held))

    d = np.mean(
        [
            loss(np.where(mask.to_bool(), own, shared)) - loss(np.where(never, own, shared))
            for own, shared in pairs
        ]
    )
    assert abs(d) > 1e-4
    assert state.gated == (d >= 0)
    assert (state.merge_mask == mask) == (d < 0)
    if state.gated:
        assert state.mask == Mask.initial(learner.space)


@pytest.mark.parametrize(("less", "kept"), [(0.1, True), (0.0, False), (-0.1, False)])
def test_a_mask_that_does_not_help_is_turned_down(less, kept, monkeypatch):
    monkeypatch.setattr("fedselect.training.gain", lambda *args, **kwargs: less)
    learner = TorchLearner(BlobTask(mlp))
    states, _ = play(None, settings(), 7, learner=learner)
    assert states[-1].gated is not kept
    assert bool(states[-1].mask.personal) is kept
    assert states[-1].mask == states[4].merge_mask


def test_a_gated_head_waits_and_falls(monkeypatch):
    monkeypatch.setattr("fedselect.training.gain", lambda *args, **kwargs: -1.0)
    learner = TorchLearner(BlobTask(mlp))
    states, _ = play(None, settings("fedper-late"), 6, learner=learner)
    assert [state.mask.personal for state in states] == [0, 0, 0, 27, 0, 0]
    assert {state.merge_mask.personal for state in states} == {0}


def test_the_gain_is_the_difference_of_losses():
    mask = Mask.from_bool(np.array([True, False, True]))
    never = Mask.from_bool(np.array([False, False, True]))
    own, shared = np.array([1, 2, 4], np.float32), np.array([10, 20, 40], np.float32)
    # With the mask: 1 + 20 + 4; without: 10 + 20 + 4.
    assert gain(lambda v: float(v.sum()), mask, never, trained=[own], shared=[shared]) == 9


def test_examples_that_change_under_the_same_seed_are_refused():
    class Own(BlobTask):
        """Shuffles by a generator of its own."""

        chance = torch.Generator().manual_seed(1)

        def train_batches(self):
            inputs, labels = self.train_part
            order = torch.randperm(len(labels), generator=self.chance)
            for rows in order.split(self.batch_size):
                yield inputs[rows], labels[rows]

    with pytest.raises(TrainingError, match="global generator"):
        play(None, settings(), 6, learner=TorchLearner(Own(mlp)))


# --- setting aside -------------------------------------------------------------------------------

Point = namedtuple("Point", "x y")
X, Y = torch.arange(22.0).view(11, 2), torch.arange(11)


@pytest.mark.parametrize(
    "batch",
    [
        lambda rows: X[rows],
        lambda rows: (X[rows], Y[rows]),
        lambda rows: [X[rows], Y[rows]],
        lambda rows: {"x": X[rows], "deep": (Y[rows],)},
        lambda rows: Point(X[rows], Y[rows]),
    ],
)
def test_batches_of_many_forms_are_split(batch):
    fold = set_aside(batch(rows) for rows in torch.arange(11).split(4))
    everything = batch(torch.arange(11))
    assert type(fold.kept) is type(everything)
    first = fold.held
    while not isinstance(first, torch.Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    assert torch.equal(first, X[[0, 5, 10]])
    assert [count for _, count in fold.batches(2)] == [2, 1]
    torch.manual_seed(0)
    assert len(list(fold.one_pass(3))) == 3


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "no batch"),
        ([X[:1]], "at least 2"),
        ([(X, Y[:3])], "one entry for each example"),
        ([("text", Y)], "batches of tensors"),
        ([torch.tensor(1.0)], "batches of tensors"),
        ([X, torch.zeros(3, 5)], "cannot be put together"),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(batches, text):
    with pytest.raises(TrainingError, match=text):
        set_aside(batches)


def test_a_gate_turns_no_empty_mask_down():
    """A thousandth of so small a tensor is no element at all."""
    states, _ = play(BlobTask(mlp), settings("fedselect", fraction=0.001), 6)
    never = Mask.initial(TorchLearner(BlobTask(mlp)).space)
    assert [state.mask == never for state in states] == [True] * 6
    assert [state.gated for state in states] == [None] * 4 + [False] * 2
