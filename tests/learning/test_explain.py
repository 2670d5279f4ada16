"""Ablations on a real model: what is reported is scored again, with the values put back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_tasks import Awkward, BlobTask, mlp

from fedselect import Mask, RunSettings, Task, Training, preset
from fedselect.choices import of_upload
from fedselect.errors import SpaceError, TrainingError
from fedselect.explain import TorchExplainer
from fedselect.personal import PersonalState
from fedselect.training import TorchLearner

SETTINGS = RunSettings(
    rounds=20,
    policy=preset("fedselect", start_round=1, growth=0.3, limit=0.9),
    training=Training(steps=6),
)


def trained(task: Task, settings: RunSettings = SETTINGS, *, times: int = 4):
    """A learner after some participations, its state, and the shared values of that moment."""
    learner = TorchLearner(task)
    state, base = None, learner.initial()
    rng = np.random.default_rng(0)
    for number in range(times):
        base = base + rng.normal(0, 0.05, base.size).astype(np.float32)
        state = learner.participate(state, base, settings=settings, seed=number).state
    return learner, state, base


def hits(task: Task, learner: TorchLearner, theta) -> torch.Tensor:
    """Scored by hand: a fresh model, loaded by name."""
    model = task.build_model()
    values = {n: torch.from_numpy(v.copy()) for n, v in learner.space.unflatten(theta).items()}
    model.load_state_dict(values, strict=False)
    model.eval()
    inputs, labels = task.held_out
    with torch.no_grad():
        return model(inputs).argmax(-1) == labels


@pytest.mark.parametrize("model", [mlp, Awkward])
def test_each_score_is_of_the_model_with_the_shared_values_back(model):
    task = BlobTask(model, site=1)
    learner, state, base = trained(task)
    space = learner.space
    report = TorchExplainer(learner).ablate(state, base, settings=SETTINGS)
    own = (state.merge_mask - Mask.initial(space)).to_bool()
    merged = np.where(state.merge_mask.to_bool(), state.theta, base)
    whole = hits(task, learner, merged)
    assert (report.whole.correct, report.whole.total) == (int(whole.sum()), 30)
    without = hits(task, learner, np.where(own, base, merged))
    assert report.without.correct == int(without.sum())
    assert report.without.both == int((without & whole).sum())
    chosen = [s.name for s in space.slots if own[s.offset : s.stop].any()]
    assert [t.name for t in report.tensors] == sorted(
        chosen, key=lambda n: -own[space.by_name[n].offset : space.by_name[n].stop].sum()
    )
    assert len(chosen) > 1
    for tensor in report.tensors:
        slot, theta = space.by_name[tensor.name], merged.copy()
        part = slice(slot.offset, slot.stop)
        theta[part] = np.where(own[part], base[part], merged[part])
        found = hits(task, learner, theta)
        assert tensor.score.correct == int(found.sum())
        assert tensor.score.both == int((found & whole).sum())
        if own[part].sum() < 10:
            assert tensor.distance_percent is tensor.delta_chosen is None
            continue
        gap = np.linalg.norm((merged - base)[part][own[part]]) / np.linalg.norm(
            base[part][own[part]]
        )
        assert tensor.distance_percent == pytest.approx(100 * gap, rel=5e-3)
        choice = of_upload(state.choices, space)[tensor.name]
        assert tensor.threshold == pytest.approx(choice.threshold, rel=5e-3)
        assert tensor.delta_chosen == pytest.approx(choice.delta / choice.chosen, rel=5e-3)
        assert tensor.delta_chosen > tensor.threshold > 0


def test_it_changes_nothing_of_the_learner():
    """What trains afterwards is what would have been trained without."""
    task = BlobTask(Awkward, site=1)
    learner, state, base = trained(task)
    TorchExplainer(learner).ablate(state, base, settings=SETTINGS)
    after = learner.participate(state, base, settings=SETTINGS, seed=9).state
    again = TorchLearner(task).participate(state, base, settings=SETTINGS, seed=9).state
    np.testing.assert_array_equal(after.theta, again.theta)


def test_the_record_counts_the_elements_of_the_mask():
    learner, state, _ = trained(BlobTask(mlp))
    counts = (state.merge_mask - Mask.initial(learner.space)).per_slot(learner.space)
    kept = of_upload(state.choices, learner.space)
    assert {name: c.chosen for name, c in kept.items()} == {n: c for n, c in counts.items() if c}


@pytest.mark.parametrize(
    "policy",
    [preset("fedper"), preset("local"), preset("random", start_round=1, growth=0.3, limit=0.9)],
    ids=lambda policy: policy.name,
)
def test_where_delta_did_not_decide_it_is_not_told(policy):
    settings = SETTINGS.model_copy(update={"policy": policy})
    learner, state, base = trained(BlobTask(mlp, site=1), settings)
    report = TorchExplainer(learner).ablate(state, base, settings=settings)
    assert report.tensors
    assert {(t.threshold, t.delta_chosen, t.delta_shared) for t in report.tensors} == {
        (None, None, None)
    }
    assert any(t.distance_percent for t in report.tensors)


def test_nothing_chosen_nothing_to_take_away():
    settings = SETTINGS.model_copy(update={"policy": preset("fedavg")})
    learner, state, base = trained(BlobTask(mlp), settings)
    report = TorchExplainer(learner).ablate(state, base, settings=settings)
    assert report.tensors == []
    assert report.without.correct == report.whole.correct == report.without.both


def test_of_many_tensors_those_with_the_most_elements(monkeypatch):
    monkeypatch.setattr("fedselect.explain.MOST_ABLATED", 1)
    learner, state, base = trained(BlobTask(mlp))
    (tensor,) = TorchExplainer(learner).ablate(state, base, settings=SETTINGS).tensors
    counts = (state.merge_mask - Mask.initial(learner.space)).per_slot(learner.space)
    assert tensor.name == max(counts, key=counts.get)


class Empty(BlobTask):
    def eval_batches(self):
        return []


def test_without_held_out_examples_there_are_no_scores():
    learner, state, base = trained(Empty(mlp))
    report = TorchExplainer(learner).ablate(state, base, settings=SETTINGS)
    assert report.whole is report.without is None
    assert {tensor.score for tensor in report.tensors} == {None}


class Endless(BlobTask):
    def loss(self, model, batch):
        return super().loss(model, batch) * (1 if model.training else float("nan"))


def test_losses_that_are_not_finite_are_not_reported():
    learner, state, base = trained(Endless(mlp))
    with pytest.raises(TrainingError, match="cannot be reported"):
        TorchExplainer(learner).ablate(state, base, settings=SETTINGS)


def test_another_model_is_refused():
    learner, state, base = trained(BlobTask(mlp))
    with pytest.raises(SpaceError):
        TorchExplainer(learner).ablate(state, base[:-1], settings=SETTINGS)
    short = replace(state, theta=state.theta[:-1])
    with pytest.raises(SpaceError):
        TorchExplainer(learner).ablate(short, base, settings=SETTINGS)


def test_a_state_of_an_earlier_agent_is_explained_without_a_record():
    learner, state, base = trained(BlobTask(mlp))
    old = PersonalState.from_bytes(
        replace(state, choices=None).to_bytes(learner.space), learner.space
    )
    report = TorchExplainer(learner).ablate(old, base, settings=SETTINGS)
    assert {tensor.threshold for tensor in report.tensors} == {None}
    grown = learner.participate(old, base, settings=SETTINGS, seed=5).state
    assert grown.choices is None, "half a record would mislead"


# --- labels ------------------------------------------------------------------------------------


def test_labels_are_told_by_consent_alone():
    learner = TorchLearner(BlobTask(mlp))
    assert TorchExplainer(learner).labels() is None
    assert TorchExplainer(learner, tell_labels=True).labels() == {"0": 8, "1": 8, "2": 8}


class Regression(BlobTask):
    def train_batches(self):
        for inputs, labels in super().train_batches():
            yield inputs, labels.float()


class Bare(BlobTask):
    def train_batches(self):
        for inputs, _ in super().train_batches():
            yield inputs


@pytest.mark.parametrize("task", [Regression, Bare])
def test_what_are_no_labels_is_not_counted(task):
    assert TorchExplainer(TorchLearner(task(mlp)), tell_labels=True).labels() is None
