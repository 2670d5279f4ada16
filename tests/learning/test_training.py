"""Local training: which tensors there are, which parts move, and that it repeats to the bit."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from learning_tasks import Awkward, BlobTask, counted, mlp
from torch import nn

from fedselect import Kind, Mask, Policy, Role, RunSettings, Training, preset
from fedselect.errors import SpaceError, TrainingError
from fedselect.evidence import NOTHING
from fedselect.modelspace import space_of
from fedselect.personal import PersonalState, Score, derive_seed
from fedselect.training import TorchLearner


def settings(personal="learned", *, rounds=20, schedule="joint", policy=None, **training):
    rule = preset("fedselect", personal=personal, schedule=schedule, **(policy or {}))
    return RunSettings(rounds=rounds, policy=rule, training=Training(**(training or {"steps": 4})))


def kinds(space):
    return {slot.name: (slot.kind, slot.role) for slot in space.slots}


def state_with(learner, personal):
    """A state whose mask has exactly these tensors (and what never travels) personal."""
    slots = tuple(s for s in learner.space.slots if s.name in personal)
    mask = Mask.initial(learner.space) | Mask.over(learner.space, slots)
    return PersonalState.start(learner.initial(), mask)


def moved(learner, before, after):
    one, two = learner.space.unflatten(before), learner.space.unflatten(after)
    return {name for name in one if not np.array_equal(one[name], two[name])}


def assert_same(one, two):
    assert (one.participations, one.merge_mask, one.mask) == (
        two.participations,
        two.merge_mask,
        two.mask,
    )
    np.testing.assert_array_equal(one.theta, two.theta)
    np.testing.assert_array_equal(one.reference, two.reference)
    assert one.buffers == two.buffers


# --- the parameter space -------------------------------------------------------------------------


def test_the_space_of_an_awkward_model():
    space = space_of(Awkward(), {})
    assert kinds(space) == {
        "stem.weight": (Kind.WEIGHT, Role.FROZEN),
        "stem.bias": (Kind.BIAS, Role.FROZEN),
        "norm.weight": (Kind.NORM, Role.SELECTABLE),
        "norm.bias": (Kind.BIAS, Role.SHARED),
        "norm.running_mean": (Kind.BUFFER, Role.PERSONAL),
        "norm.running_var": (Kind.BUFFER, Role.PERSONAL),
        "first.weight": (Kind.WEIGHT, Role.SELECTABLE),
        "first.bias": (Kind.BIAS, Role.SHARED),
        "second.bias": (Kind.BIAS, Role.SHARED),
        "answer.weight": (Kind.WEIGHT, Role.SELECTABLE),
        "answer.bias": (Kind.BIAS, Role.SHARED),
    }


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.BatchNorm2d(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norm_layers_are_recognised(layer):
    found = {slot.name: slot.kind for slot in space_of(layer, {}).slots}
    expected = {"weight": Kind.NORM, "bias": Kind.BIAS}
    statistics = dict.fromkeys(("running_mean", "running_var"), Kind.BUFFER)
    assert found == {k: v for k, v in {**expected, **statistics}.items() if k in found}
    assert found["weight"] is Kind.NORM


@pytest.mark.parametrize(
    "layer", [nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.Embedding(5, 3), nn.Conv2d(1, 2, 3)]
)
def test_ordinary_layers_need_no_declaration(layer):
    assert {s.kind for s in space_of(layer, {}).slots} <= {Kind.WEIGHT, Kind.BIAS}


class WithExtra(nn.Module):
    def __init__(self, frozen=False, buffer=False):
        super().__init__()
        self.body = nn.Linear(6, 3)
        if buffer:
            self.register_buffer("logit_scale", torch.ones(3))
        else:
            self.logit_scale = nn.Parameter(torch.ones(3), requires_grad=not frozen)

    def forward(self, points):
        return self.body(points) * self.logit_scale


@pytest.mark.parametrize("buffer", [False, True])
def test_an_unknown_tensor_is_an_error_that_says_what_to_do(buffer):
    with pytest.raises(SpaceError, match=r"'logit_scale'.*def roles\(self\)"):
        TorchLearner(BlobTask(lambda: WithExtra(buffer=buffer)))


@pytest.mark.parametrize("buffer", [False, True])
def test_a_declared_role_is_taken(buffer):
    space = space_of(WithExtra(buffer=buffer), {"logit_scale": Role.SHARED})
    assert kinds(space)["logit_scale"] == (Kind.BUFFER if buffer else Kind.WEIGHT, Role.SHARED)


def test_an_unknown_tensor_that_does_not_learn_is_frozen():
    assert kinds(space_of(WithExtra(frozen=True), {}))["logit_scale"][1] is Role.FROZEN


@pytest.mark.parametrize("name", ["body.wieght", "second.weight"])
def test_a_role_for_a_tensor_that_is_not_there_or_tied_is_an_error(name):
    with pytest.raises(SpaceError, match="roles"):
        space_of(Awkward(), {name: Role.SHARED})


def test_memory_shared_in_two_layouts_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(2, 3, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.data.T)
    with pytest.raises(SpaceError, match="share memory"):
        space_of(model, {})


def test_complex_tensors_are_refused():
    model = nn.Linear(2, 2)
    model.spectrum_weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(SpaceError, match="spectrum_weight"):
        space_of(model, {})


# --- what moves ----------------------------------------------------------------------------------


def test_a_newcomer_starts_from_the_shared_model():
    learner = TorchLearner(BlobTask(mlp))
    base = learner.initial() + np.float32(0.5)
    first = learner.participate(None, base, settings=settings(), seed=1)
    start = PersonalState.start(base, Mask.empty(learner.space.dim))
    again = learner.participate(start, base, settings=settings(), seed=1)

    np.testing.assert_array_equal(first.theta, again.theta)
    assert first.mask == Mask.empty(learner.space.dim)
    assert first.state.participations == 1
    assert first.examples == 24


def test_one_joint_step_is_plain_sgd():
    learner = TorchLearner(BlobTask(mlp))
    learner.task.batch_size = 24
    rule = settings(steps=1, batch_size=24, learning_rate=0.1)
    result = learner.participate(None, learner.initial(), settings=rule, seed=3)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp()
    learner.task.loss(model, learner.task.train_part).backward()
    by_hand = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    expected = torch.cat([p.reshape(-1) for p in by_hand]).numpy()
    np.testing.assert_allclose(result.theta, expected, rtol=1e-5, atol=1e-7)


def moves(seen):
    return [{n for n in one if not torch.equal(one[n], two[n])} for one, two in pairwise(seen)]


HEAD = {"2.weight", "2.bias"}
BODY = {"0.weight", "0.bias"}


def test_alternating_steps_move_first_the_personal_then_the_shared_part():
    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    rule = settings("head", schedule="alternating", steps=5)
    result = learner.participate(
        state_with(learner, HEAD), learner.initial(), settings=rule, seed=0
    )
    assert moves(seen) == [HEAD, HEAD, BODY, BODY]
    assert moved(learner, learner.initial(), result.theta) == HEAD | BODY


@pytest.mark.parametrize(("personal", "part"), [(set(), HEAD | BODY), (HEAD | BODY, HEAD | BODY)])
def test_alternating_steps_do_not_waste_any_on_an_empty_part(personal, part):
    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    rule = settings(schedule="alternating", steps=6)
    learner.participate(state_with(learner, personal), learner.initial(), settings=rule, seed=0)
    assert moves(seen) == [part] * 5


def test_alternating_epochs_are_two_passes_each_even_when_a_part_is_empty():
    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    rule = settings(schedule="alternating", epochs=2, batch_size=12)
    learner.participate(state_with(learner, HEAD), learner.initial(), settings=rule, seed=0)
    assert moves(seen) == [HEAD] * 2 + [BODY] * 2 + [HEAD] * 2 + [BODY]

    seen.clear()
    learner.participate(None, learner.initial(), settings=rule, seed=0)
    assert moves(seen) == [set()] * 2 + [HEAD | BODY] * 2 + [set()] * 2 + [HEAD | BODY]


def test_single_elements_move_in_their_own_phase_only():
    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    rng = np.random.default_rng(0)
    own = rng.random(learner.space.dim) < 0.3
    state = PersonalState.start(learner.initial(), Mask.from_bool(own))
    rule = settings(schedule="alternating", steps=4)
    result = learner.participate(state, learner.initial(), settings=rule, seed=0)

    flat = [torch.cat([p.reshape(-1) for p in step.values()]).numpy() for step in seen]
    np.testing.assert_array_equal(flat[2][~own], flat[0][~own])
    assert (flat[2][own] != flat[0][own]).any()
    np.testing.assert_array_equal(flat[3][own], flat[2][own])
    assert (result.theta[~own] != flat[2][~own]).any()
    np.testing.assert_array_equal(result.theta[own], flat[2][own])


def test_joint_steps_move_everything_whatever_the_mask():
    learner = TorchLearner(BlobTask(mlp))
    one = learner.participate(
        state_with(learner, HEAD), learner.initial(), settings=settings(), seed=0
    )
    two = learner.participate(None, learner.initial(), settings=settings(), seed=0)
    np.testing.assert_array_equal(one.theta, two.theta)


def test_steps_cycle_through_passes_and_epochs_count_them():
    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    learner.participate(None, learner.initial(), settings=settings(steps=7), seed=0)
    assert len(seen) == 7
    seen.clear()
    rule = settings(epochs=3, batch_size=10)
    learner.participate(None, learner.initial(), settings=rule, seed=0)
    assert len(seen) == 9


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_frozen_tied_and_normalised_tensors(schedule):
    learner = TorchLearner(BlobTask(Awkward))
    rule = settings(schedule=schedule, steps=6)
    state = state_with(learner, {"answer.weight"})
    result = learner.participate(state, learner.initial(), settings=rule, seed=0)

    names = moved(learner, learner.initial(), result.theta)
    assert names == {slot.name for slot in learner.space.slots} - {"stem.weight", "stem.bias"}
    assert result.state.buffers["norm.num_batches_tracked"] == 6
    later = learner.participate(result.state, learner.initial(), settings=rule, seed=1)
    assert later.state.buffers["norm.num_batches_tracked"] == 12
    again = learner.participate(None, learner.initial(), settings=rule, seed=0)
    assert again.state.buffers["norm.num_batches_tracked"] == 6


def test_a_declared_frozen_tensor_stays_still_buffers_too():
    roles = dict.fromkeys(["norm.weight", "norm.running_mean", "answer.bias"], Role.FROZEN)
    learner = TorchLearner(BlobTask(Awkward, roles=roles))
    result = learner.participate(None, learner.initial(), settings=settings(), seed=0)
    names = moved(learner, learner.initial(), result.theta)
    assert not names & set(roles)
    assert "norm.running_var" in names


class Unused(nn.Module):
    """Its first layer gets no gradient, which must not shift what happens to the others."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(6, 8)
        self.body = nn.Linear(6, 8)
        self.answer = nn.Linear(8, 3)

    def forward(self, points):
        return self.answer(torch.tanh(self.body(points)))


def test_a_parameter_without_gradient_shifts_nothing():
    task = BlobTask(Unused)
    learner, seen = TorchLearner(task), counted(task)
    rule = settings(schedule="alternating", steps=4)
    state = state_with(learner, {"answer.weight", "idle.weight"})
    learner.participate(state, learner.initial(), settings=rule, seed=0)
    rest = {"body.weight", "body.bias", "answer.bias"}
    assert moves(seen) == [{"answer.weight"}] * 2 + [rest]


class TiedByStorage(nn.Module):
    """Two parameters over one storage: both gradients belong to the same elements."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = nn.Parameter(self.first.weight.data)

    def forward(self, points):
        return self.second(torch.tanh(self.first(points)))[:, :3]


class TiedByName(TiedByStorage):
    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_both_ways_of_tying_train_alike(schedule):
    results = []
    for model in (TiedByName, TiedByStorage):
        learner = TorchLearner(BlobTask(model))
        assert [slot.name for slot in learner.space.slots] == ["first.weight"]
        own = np.arange(36) % 3 == 0
        state = PersonalState.start(learner.initial(), Mask.from_bool(own))
        rule = settings(schedule=schedule)
        results.append(learner.participate(state, learner.initial(), settings=rule, seed=0).theta)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert (results[0] != learner.initial()).all()


def test_clipping_bounds_the_whole_gradient_before_masking():
    learner = TorchLearner(BlobTask(mlp))
    rule = settings("head", schedule="alternating", steps=2, clip_norm=1e-3, learning_rate=1.0)
    everything = settings(steps=1, clip_norm=1e-3, learning_rate=1.0)
    full = learner.participate(None, learner.initial(), settings=everything, seed=0)
    assert np.linalg.norm(full.theta - learner.initial()) == pytest.approx(1e-3, rel=1e-3)

    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    learner.participate(state_with(learner, HEAD), learner.initial(), settings=rule, seed=0)
    steps = [torch.cat([p.reshape(-1) for p in step.values()]).numpy() for step in seen]
    head = Mask.over(learner.space, tuple(s for s in learner.space.slots if s.name in HEAD))
    expected = (full.theta - learner.initial())[head.to_bool()]
    np.testing.assert_allclose((steps[1] - steps[0])[head.to_bool()], expected, atol=1e-8)
    assert np.linalg.norm(steps[1] - steps[0]) < 0.999e-3


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_personal_elements_take_longer_steps_by_their_rate(schedule):
    """One step of each part: what moved is ρ times as far at personal elements, after clipping."""
    learner = TorchLearner(BlobTask(mlp))
    own = np.random.default_rng(1).random(learner.space.dim) < 0.3
    state = replace(state_with(learner, set()), mask=Mask.from_bool(own))
    budget = {"steps": 1 if schedule == "joint" else 2, "batch_size": 24, "clip_norm": 0.1}

    def moved_by(rate):
        rule = settings(schedule=schedule, policy={"personal_rate": rate}, **budget)
        result = learner.participate(state, learner.initial(), settings=rule, seed=3)
        return result.theta - learner.initial()

    plain, fast = moved_by(1), moved_by(3)
    np.testing.assert_allclose(fast[own], 3 * plain[own], rtol=0, atol=1e-6)
    assert np.abs(plain[own]).max() > 1e-3
    if schedule == "joint":  # the shared phase starts from where the personal one has led
        np.testing.assert_array_equal(fast[~own], plain[~own])


def test_a_rate_is_of_the_mask_and_not_of_what_is_gathered():
    learner = TorchLearner(BlobTask(mlp))
    base = learner.initial()
    one = {"score": "fisher", "fraction": 0.3, "start_round": 2, "window": 2}
    found = []
    for rate in (1, 5):
        rule = settings(policy={**one, "personal_rate": rate}, steps=4)
        first = learner.participate(None, base, settings=rule, seed=1)
        found.append(learner.participate(first.state, base, settings=rule, seed=2))
    assert_same(found[0].state, found[1].state)
    assert found[0].state.mask.personal > 0


# --- between rounds ------------------------------------------------------------------------------


def test_the_state_merges_with_the_old_mask_and_trains_with_the_new_one():
    learner = TorchLearner(BlobTask(mlp))
    rule = settings(policy={"growth": 0.5, "limit": 1}, steps=4, learning_rate=1e-6)
    one = learner.participate(None, learner.initial(), settings=rule, seed=0)
    two = learner.participate(one.state, learner.initial(), settings=rule, seed=1)
    assert one.state.mask == Mask.empty(learner.space.dim)
    assert two.mask == two.state.merge_mask == one.state.mask
    assert two.mask <= two.state.mask
    assert two.state.mask.personal > 0
    np.testing.assert_array_equal(two.state.reference, two.theta)

    far = learner.initial() + np.float32(100)
    three = learner.participate(two.state, far, settings=rule, seed=2)
    assert three.mask == two.state.mask
    # The new mask's elements are overwritten once more: they start from the shared model.
    np.testing.assert_allclose(three.theta, far, atol=1)


def test_equal_inputs_give_equal_bits_and_leave_the_callers_generator_alone():
    base = TorchLearner(BlobTask(Awkward)).initial()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (
        TorchLearner(BlobTask(Awkward)).participate(None, base, settings=settings(), seed=9)
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first.theta, second.theta)
    other = TorchLearner(BlobTask(Awkward)).participate(None, base, settings=settings(), seed=8)
    assert (other.theta != first.theta).any()


def test_a_participation_does_not_depend_on_what_the_learner_did_before():
    learner = TorchLearner(BlobTask(Awkward))
    base, rule = learner.initial(), settings(steps=3)
    first = learner.participate(None, base, settings=rule, seed=1)
    learner.participate(first.state, base + 1, settings=rule, seed=2)
    learner.evaluate(first.state, base, settings=rule, origin=base)
    again = learner.participate(None, base, settings=rule, seed=1)
    np.testing.assert_array_equal(first.theta, again.theta)
    assert_same(first.state, again.state)


def test_a_saved_state_goes_on_to_the_same_bits():
    learner = TorchLearner(BlobTask(Awkward))
    base, rule = learner.initial(), settings()
    state = learner.participate(None, base, settings=rule, seed=1).state
    loaded = PersonalState.from_bytes(state.to_bytes(learner.space), learner.space)
    one = learner.participate(state, base, settings=rule, seed=2)
    two = learner.participate(loaded, base, settings=rule, seed=2)
    assert_same(one.state, two.state)


def test_results_that_are_not_finite_are_refused_by_name():
    learner = TorchLearner(BlobTask(mlp))
    with pytest.raises(TrainingError, match=r"'0\.weight'.*learning_rate"):
        learner.participate(None, learner.initial() * np.float32(1e30), settings=settings(), seed=0)


def test_a_task_without_batches_is_refused():
    learner = TorchLearner(BlobTask(mlp))
    learner.task.train_batches = list
    with pytest.raises(TrainingError, match="train_batches"):
        learner.participate(None, learner.initial(), settings=settings(), seed=0)


def test_a_vector_of_another_model_is_refused():
    learner = TorchLearner(BlobTask(mlp))
    with pytest.raises(SpaceError, match="do not fit"):
        learner.participate(None, learner.initial()[1:], settings=settings(), seed=0)


# --- scoring -------------------------------------------------------------------------------------


def test_scores_are_weighted_by_examples_and_do_not_depend_on_the_batches():
    task = BlobTask(Awkward)
    learner = TorchLearner(task)
    base = learner.initial()
    state = learner.participate(None, base, settings=settings(steps=30), seed=0).state
    whole = learner.evaluate(state, base, settings=settings(steps=30), origin=base)

    inputs, labels = task.held_out
    task.eval_batches = lambda: [(inputs[:7], labels[:7]), (inputs[7:], labels[7:])]
    parts = learner.evaluate(state, base, settings=settings(steps=30), origin=base)
    for name, score in whole.items():
        assert (parts[name].correct, parts[name].total) == (score.correct, 30)
        assert parts[name].loss == pytest.approx(score.loss, rel=1e-5)


def test_scores_say_how_many_examples_both_models_got_right():
    task = BlobTask(Awkward)
    learner = TorchLearner(task)
    base, rule = learner.initial(), settings("head", steps=30)
    state = learner.participate(None, base, settings=rule, seed=0).state
    rights: list[torch.Tensor] = []
    kept = task.hits
    task.hits = lambda model, batch: rights.append(kept(model, batch)) or rights[-1]
    found = learner.evaluate(state, base, settings=rule, origin=base)
    for name, right in zip(found, rights, strict=True):
        assert found[name].correct == int(right.sum())
        assert found[name].both == int((right & rights[-1]).sum())
    assert found["post"].both == found["post"].correct


def test_a_task_that_tells_of_sums_alone_has_no_pairs():
    class Sums(BlobTask):
        def outcome(self, model, batch):
            return super().outcome(model, batch)

    learner, single = TorchLearner(Sums(Awkward)), TorchLearner(BlobTask(Awkward))
    base, rule = learner.initial(), settings("head", steps=30)
    state = learner.participate(None, base, settings=rule, seed=0).state
    sums = learner.evaluate(state, base, settings=rule, origin=base)
    pairs = single.evaluate(state, base, settings=rule, origin=base)
    assert {score.both for score in sums.values()} == {None}
    assert sums == {name: replace(score, both=None) for name, score in pairs.items()}


def test_the_five_models_that_are_scored():
    learner = TorchLearner(BlobTask(Awkward))
    base, rule = learner.initial(), settings("head", steps=30)
    state = learner.participate(None, base, settings=rule, seed=0).state
    scored = []
    learner._score = lambda theta: scored.append(theta) or (Score(0, 1, 0.0), None)
    learner.evaluate(state, base, settings=rule, origin=base)
    alone, start, shared, pre, post = (learner.space.unflatten(theta) for theta in scored)
    origin, theta = learner.space.unflatten(base), learner.space.unflatten(state.theta)

    statistics = {"norm.running_mean", "norm.running_var"}
    head = {"answer.weight", "answer.bias"}
    for name in origin:
        own = theta if name in statistics else origin
        np.testing.assert_array_equal(start[name], origin[name])
        np.testing.assert_array_equal(shared[name], own[name])
        own = theta if name in statistics | head else origin
        np.testing.assert_array_equal(pre[name], own[name])
        np.testing.assert_array_equal(post[name], theta[name])
    assert (alone["first.weight"] != origin["first.weight"]).any()


@pytest.mark.parametrize(
    ("schedule", "budget", "steps"),
    [
        ("joint", {"steps": 5}, 15),
        ("alternating", {"steps": 5}, 15),
        ("joint", {"epochs": 2}, 12),
        ("alternating", {"epochs": 2}, 24),
    ],
)
def test_local_only_gets_as_many_gradient_steps(schedule, budget, steps):
    task = BlobTask(mlp)
    learner, seen = TorchLearner(task), counted(task)
    rule, state = settings(schedule=schedule, batch_size=12, **budget), None
    for seed in range(3):
        state = learner.participate(state, learner.initial(), settings=rule, seed=seed).state
    assert len(seen) == steps

    seen.clear()
    learner.evaluate(state, learner.initial(), settings=rule, origin=learner.initial())
    assert len(seen) == steps


def test_local_only_is_training_alone():
    learner = TorchLearner(BlobTask(Awkward))
    rule, origin = settings("all"), learner.initial()
    state = None
    for number in (1, 2, 3):
        seed = derive_seed(rule, "local-only", number)
        state = learner.participate(state, origin, settings=rule, seed=seed).state
    scores = learner.evaluate(state, origin, settings=rule, origin=origin)
    assert scores["local_only"] == scores["post"] == scores["pre"]


def test_a_client_that_never_took_part_can_be_scored():
    learner = TorchLearner(BlobTask(mlp))
    base = learner.initial()
    state = PersonalState.start(base, Policy().bounds(learner.space)[0])
    scores = learner.evaluate(state, base, settings=settings(), origin=base)
    assert len(set(scores.values())) == 1


# --- other policies ------------------------------------------------------------------------------


def test_a_frozen_head_stays_and_is_tuned_at_the_end():
    learner = TorchLearner(BlobTask(mlp))
    rule = RunSettings(rounds=3, policy=preset("fedbabu"), training=Training(steps=4))
    base = learner.initial()
    done = learner.participate(None, base, settings=rule, seed=0)
    assert moved(learner, base, done.theta) == {"0.weight", "0.bias"}
    scored = []
    learner._score = lambda theta: scored.append(theta) or (Score(0, 1, 0.0), None)
    learner.evaluate(done.state, base, settings=rule, origin=base)
    _, _, shared, pre, post = scored
    np.testing.assert_array_equal(pre, shared)
    assert moved(learner, pre, post) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("budget", [{"steps": 5}, {"epochs": 2}])
@pytest.mark.parametrize("name", ["fedavg-ft", "fedbabu", "ditto", "fedrep"])
def test_training_alone_takes_as_many_steps_whatever_the_policy(name, budget):
    task = BlobTask(mlp)
    learner, seen, state = TorchLearner(task), counted(task), None
    rule = RunSettings(rounds=3, policy=preset(name), training=Training(batch_size=12, **budget))
    base = learner.initial()
    for number in range(3):
        state = learner.participate(state, base, settings=rule, seed=number).state
    own, tuned = len(seen), rule.policy.finetune
    assert own == 3 * (budget.get("steps") or 4 * rule.policy.passes)
    learner.evaluate(state, base, settings=rule, origin=base)
    each = own // 3
    assert len(seen) - own == (own + each) + each if tuned else own


def test_the_second_model_of_ditto_is_pulled_towards_the_shared_one():
    """One step from v: θ = v − η (∇F(v) + λ (v − w))."""
    task = BlobTask(mlp)
    learner = TorchLearner(task)
    training = Training(steps=2, batch_size=24, learning_rate=0.1)
    rule = RunSettings(rounds=3, policy=preset("ditto", proximal=0.5), training=training)
    base = learner.initial()
    first = learner.participate(None, base, settings=rule, seed=0)
    np.testing.assert_allclose(first.state.own, first.theta, rtol=1e-6)  # v = w: nothing pulls
    away = base + np.float32(1)
    done = learner.participate(first.state, away, settings=rule, seed=1)
    free = rule.model_copy(update={"policy": preset("ditto", proximal=1e-9)})
    alone = learner.participate(first.state, away, settings=free, seed=1)
    pull = 0.1 * 0.5 * (away - first.state.own)
    np.testing.assert_allclose(done.state.own - alone.state.own, pull, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(done.theta, alone.theta)
    assert (done.state.own != done.theta).all()
    assert done.mask.personal == 0


def test_the_second_model_is_what_is_scored_kept_and_served():
    learner = TorchLearner(BlobTask(Awkward))
    rule = RunSettings(rounds=3, policy=preset("ditto"), training=Training(steps=4))
    base = learner.initial()
    state = learner.participate(None, base, settings=rule, seed=0).state
    read = PersonalState.from_bytes(state.to_bytes(learner.space), learner.space)
    np.testing.assert_array_equal(read.own, state.own)
    np.testing.assert_array_equal(state.personalized(base), state.own)
    scores = learner.evaluate(state, base, settings=rule, origin=base)
    assert scores["pre"] == scores["post"]


def test_states_of_earlier_releases_are_read():
    learner = TorchLearner(BlobTask(mlp))
    state = learner.participate(None, learner.initial(), settings=settings(), seed=0).state
    data = state.to_bytes(learner.space)
    assert b"evidence" not in data[:2000]
    assert b"gated" not in data[:2000]
    read = PersonalState.from_bytes(data, learner.space)
    assert (read.evidence, read.gated, read.own) == (NOTHING, None, None)
