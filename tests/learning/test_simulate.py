"""Whole runs in one process: each policy does what its name says, and runs repeat to the bit."""

from collections import Counter

import numpy as np
import pytest
from learning_tasks import Awkward, BlobTask, mlp

from fedselect import Mask, Policy, RoundPolicy, RunSettings, Training, preset, preset_run
from fedselect.aggregate import Contribution, reference
from fedselect.deltafiles import step
from fedselect.deltas import quantise, scale_counts
from fedselect.errors import FedSelectError, SpaceError
from fedselect.personal import derive_seed
from fedselect.policies import Arms, Wire
from fedselect.simulate import sampled, simulate, simulate_arms
from fedselect.training import TorchLearner
from fedselect.wire import encode_version, file_digest

STEPS = Training(steps=3)


def tasks(count=3, model=mlp, **changes):
    return {f"site-{i}": BlobTask(model, site=i, **changes) for i in range(count)}


def settings(name, *, rounds=6, **changes):
    return preset_run(name, rounds=rounds, **{"training": STEPS, **changes})


def test_fedavg_is_the_plain_mean_of_what_the_clients_trained():
    rule = settings("fedavg", rounds=2)
    result = simulate(tasks(), rule)

    learners = {name: TorchLearner(task) for name, task in tasks().items()}
    values = learners["site-0"].initial()
    for number in (1, 2):
        trained = [
            learner.participate(
                None, values, settings=rule, seed=derive_seed(rule, name, number)
            ).theta
            for name, learner in learners.items()
        ]
        values = np.mean([theta.astype(np.float64) for theta in trained], axis=0)
        values = values.astype(np.float32)
    np.testing.assert_array_equal(result.values, values)
    assert result.versions[-1] == file_digest(encode_version(result.space.digest, values))
    assert len(result.versions) == len(set(result.versions)) == 3


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_a_run_of_deltas_follows_the_same_course_in_other_bytes(encoding):
    plain = simulate(tasks(), settings("fedselect"))
    rule = settings("fedselect", wire=Wire(encoding=encoding))
    coded = simulate(tasks(), rule)
    assert coded.versions[0] == plain.versions[0]
    assert not set(coded.versions[1:]) & set(plain.versions)
    start = TorchLearner(tasks()["site-0"]).initial()
    gap = np.linalg.norm(coded.values - plain.values) / np.linalg.norm(plain.values - start)
    assert gap < {"bf16": 0.02, "int8": 0.2}[encoding]
    assert simulate(tasks(), rule).versions == coded.versions
    for state in coded.states.values():
        assert state.residual is not None
        assert not state.residual[state.merge_mask.to_bool()].any()
    assert all(state.residual is None for state in plain.states.values())


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_every_version_of_a_run_of_deltas_is_the_base_and_the_quantised_mean(encoding):
    rule = settings("fedavg", rounds=1, wire=Wire(encoding=encoding))
    result = simulate(tasks(), rule)
    start = TorchLearner(tasks()["site-0"]).initial()
    parts = []
    for name, task in tasks().items():
        learner = TorchLearner(task)
        seed = derive_seed(rule, name, 1)
        theta = learner.participate(None, start, settings=rule, seed=seed).theta
        mask = Mask.initial(learner.space)
        codes = quantise(theta - start, encoding, mask)
        values = codes.values(scale_counts(mask.packed, mask.dim))
        parts.append(Contribution(mask, values))
    mean = reference(np.zeros_like(start), parts, rule.round.min_contributors)
    file = encode_version(result.space.digest, start)
    expected, delta = step(file, mean, space=result.space.digest, encoding=encoding)
    assert result.versions[1] == file_digest(expected)
    assert result.bytes_down["site-0"] == len(file) + min(len(delta), len(expected))


def test_examples_weigh_the_mean_when_asked():
    rule = settings("fedavg", rounds=1, round=RoundPolicy(weighting="examples"))
    sizes = {"a": 24, "b": 12, "c": 6}
    result = simulate({n: BlobTask(mlp, site=1, train=k) for n, k in sizes.items()}, rule)

    parts = []
    for name, size in sizes.items():
        learner = TorchLearner(BlobTask(mlp, site=1, train=size))
        theta = learner.participate(
            None, learner.initial(), settings=rule, seed=derive_seed(rule, name, 1)
        ).theta
        parts.append(Contribution(Mask.empty(theta.size), theta, float(size)))
    np.testing.assert_array_equal(result.values, reference(learner.initial(), parts, 2))


def test_local_is_training_alone_and_publishes_nothing():
    rule = settings("local", rounds=3)
    result = simulate(tasks(), rule)

    assert len(set(result.versions)) == 1
    for name, task in tasks().items():
        learner, state = TorchLearner(task), None
        for number in (1, 2, 3):
            seed = derive_seed(rule, name, number)
            state = learner.participate(state, result.values, settings=rule, seed=seed).state
        np.testing.assert_array_equal(state.theta, result.states[name].theta)
        assert result.personal[name] == 1
        assert result.scores[name]["pre"] == result.scores[name]["post"]


def test_head_keeps_the_head_personal_and_shares_the_rest():
    result = simulate(tasks(), settings("fedper"))
    start = result.space.unflatten(TorchLearner(BlobTask(mlp)).initial())
    end = result.space.unflatten(result.values)
    own = [result.space.unflatten(state.theta) for state in result.states.values()]

    for name in ("2.weight", "2.bias"):
        np.testing.assert_array_equal(end[name], start[name])
        assert (own[0][name] != own[1][name]).any()
    for name in ("0.weight", "0.bias"):
        assert (end[name] != start[name]).all()
    head = 8 * 3 + 3
    assert set(result.personal.values()) == {head / result.space.dim}


def test_fedselect_shares_first_and_then_grows_to_its_limit():
    rule = settings("fedselect", rounds=20)
    result = simulate(tasks(), rule)
    for state in result.states.values():
        counts = state.mask.per_slot(result.space)
        assert counts["0.weight"] > 0
        assert counts["0.weight"] <= 0.3 * 48
        assert counts["0.bias"] == counts["2.bias"] == 0
    fedavg = simulate(tasks(), settings("fedavg", rounds=20))
    assert result.versions[:12] == fedavg.versions[:12]
    assert result.versions[12:] != fedavg.versions[12:]


@pytest.mark.parametrize(("late", "fixed"), [("fedper-late", "head"), ("share-then-local", "all")])
def test_a_late_mask_shares_first_and_then_keeps_what_it_is_named_for(late, fixed):
    result = simulate(tasks(), settings(late, rounds=12))
    fedavg = simulate(tasks(), settings("fedavg", rounds=12))
    assert result.versions[:7] == fedavg.versions[:7]
    assert result.versions[7:] != fedavg.versions[7:]
    mask = Policy(personal=fixed).first_mask(result.space)
    assert {state.merge_mask.digest for state in result.states.values()} == {mask.digest}
    local = Policy(personal="all").first_mask(result.space)
    assert (len(set(result.versions[6:])) == 1) == (mask == local)
    assert result.bytes_up["site-0"] < fedavg.bytes_up["site-0"]


def test_random_takes_as_many_elements_as_fedselect_but_others():
    runs = [simulate(tasks(), settings(name, rounds=12)) for name in ("fedselect", "random")]
    for name in runs[0].states:
        one, two = (run.states[name].mask for run in runs)
        assert one.per_slot(runs[0].space) == two.per_slot(runs[1].space)
        assert one != two
    masks = [state.mask for state in runs[1].states.values()]
    assert masks[0] != masks[1]


def test_the_official_preset_runs():
    changes = {"training": Training(epochs=2, batch_size=12)}
    result = simulate(tasks(), settings("fedselect-official", rounds=8, **changes))
    weights = {slot.name: slot.size for slot in result.space.slots if "weight" in slot.name}
    for state in result.states.values():
        counts = state.mask.per_slot(result.space)
        for name, size in weights.items():
            first = size - round(0.75 * size)
            assert counts[name] == first + (size - first) - round(0.75 * (size - first))


def test_a_run_repeats_to_the_bit():
    one, two = (simulate(tasks(), settings("fedselect")) for _ in range(2))
    assert one.versions == two.versions
    assert one.scores == two.scores
    for name, state in one.states.items():
        np.testing.assert_array_equal(state.theta, two.states[name].theta)
    other = simulate(tasks(), settings("fedselect", seed=1))
    assert other.versions[0] == one.versions[0]
    assert other.versions[1] != one.versions[1]


def test_the_order_of_acceptance_is_the_order_of_the_sum():
    clients = tasks(11)
    asked = []

    def backwards(number, names):
        asked.append(number)
        return names[::-1]

    rule = settings("fedavg", rounds=2)
    ahead, back = simulate(clients, rule), simulate(clients, rule, order=backwards)
    assert asked == [1, 2]
    np.testing.assert_allclose(ahead.values, back.values, rtol=1e-5, atol=1e-6)

    parts = {}
    for name in clients:
        learner = TorchLearner(clients[name])
        seed = derive_seed(rule, name, 1)
        theta = learner.participate(None, learner.initial(), settings=rule, seed=seed).theta
        parts[name] = Contribution(Mask.empty(theta.size), theta)
    first = [parts[name] for name in sorted(parts)[::-1]]
    values = reference(learner.initial(), first, 2)
    assert back.versions[1] == file_digest(encode_version(back.space.digest, values))


@pytest.mark.parametrize(
    "order",
    [
        lambda n, names: [],
        lambda n, names: [*names, "x"],
        lambda n, names: [names[0], *names],
    ],
)
def test_an_order_names_clients_once(order):
    with pytest.raises(FedSelectError, match="order"):
        simulate(tasks(), settings("fedavg", rounds=1), order=order)


def test_who_is_not_drawn_does_not_take_part():
    rule = settings("fedselect", rounds=20)
    draw = sampled(0.3, seed=1)
    result = simulate(tasks(10), rule, order=draw)
    names = sorted(tasks(10))
    took = {name: sum(name in draw(n, names) for n in range(1, 21)) for name in names}
    assert {n: state.participations for n, state in result.states.items()} == took
    assert sum(took.values()) == 3 * 20
    assert min(took.values()) < 5 < max(took.values())
    assert simulate(tasks(10), rule, order=draw).versions == result.versions


def test_clocks_and_references_are_a_clients_own():
    """Who takes part every other round grows half as often."""
    policy = Policy(growth=0.2, limit=1, start_round=2, interval=2)
    rule = RunSettings(rounds=12, policy=policy, training=STEPS)
    others = ["site-0", "site-1"]
    result = simulate(tasks(), rule, order=lambda n, names: names if n % 2 else others)
    learner = TorchLearner(tasks()["site-2"])
    grown = []
    for state in (result.states["site-2"], result.states["site-0"]):
        size = 48
        left = size
        for number in range(state.participations):
            if policy.due(number):
                left -= left - round(0.8 * left)
        counts = state.mask.per_slot(learner.space)
        grown.append(counts["0.weight"])
        assert counts["0.weight"] == size - left
    assert grown[0] < grown[1]


def test_who_joins_late_starts_from_the_shared_model_of_that_round():
    rule = settings("fedper", rounds=4)
    late = "site-2"
    result = simulate(tasks(), rule, order=lambda n, names: names[: 3 if n == 4 else 2])
    three = simulate(tasks(), settings("fedper", rounds=3), order=lambda n, names: names[:2])
    learner = TorchLearner(tasks()[late])
    seed = derive_seed(rule, late, 4)
    state = learner.participate(None, three.values, settings=rule, seed=seed).state
    np.testing.assert_array_equal(state.theta, result.states[late].theta)
    assert result.states[late].participations == 1
    assert three.states[late].participations == 0
    np.testing.assert_array_equal(three.states[late].theta, three.values)
    version = len(encode_version(result.space.digest, result.values))
    # It fetches the third version, the last one and the first.
    assert result.bytes_down[late] == 3 * version


@pytest.mark.parametrize("share", [0, -1, 1.1])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(FedSelectError, match="share"):
        sampled(share, seed=0)


def test_the_order_of_the_mapping_does_not_matter():
    rule = settings("fedselect", rounds=3)
    ahead = simulate(tasks(), rule)
    assert simulate(dict(reversed(tasks().items())), rule).versions == ahead.versions


def test_progress_is_told_after_each_round():
    rounds = []
    simulate(tasks(), settings("fedavg", rounds=3), progress=rounds.append)
    assert rounds == [1, 2, 3]


def test_bytes_are_those_of_the_files():
    result = simulate(tasks(), settings("fedavg", rounds=2))
    version = len(encode_version(result.space.digest, result.values))
    assert set(result.bytes_down.values()) == {3 * version}
    grown = simulate(tasks(), settings("fedselect", rounds=12))
    flat = simulate(tasks(), settings("fedavg", rounds=12))
    # Growth replaces values by mask bits, which are sent again whenever the mask has changed.
    assert grown.bytes_up["site-0"] < flat.bytes_up["site-0"] + 12 * 200
    local = simulate(tasks(), settings("local", rounds=2))
    assert max(local.bytes_up.values()) < 2 * 1000


def test_clients_must_have_the_same_model():
    with pytest.raises(SpaceError, match="'odd'"):
        simulate({**tasks(2), "odd": BlobTask(Awkward)}, settings("fedavg", rounds=1))


def test_there_must_be_a_client():
    with pytest.raises(FedSelectError, match="no client"):
        simulate({}, settings("fedavg", rounds=1))


def test_too_few_sharers_keep_every_element():
    rule = RunSettings(rounds=2, policy=preset("fedavg"), training=STEPS)
    assert len(set(simulate(tasks(1), rule).versions)) == 1
    rule = rule.model_copy(update={"round": RoundPolicy(min_contributors=1)})
    assert len(set(simulate(tasks(1), rule).versions)) == 3


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_an_awkward_model_goes_all_the_way(schedule):
    """No ``fc``, a frozen layer, tied weights and batch norm (ALGORITHM §1.7, 11 to 14)."""
    policy = Policy(growth=0.2, limit=0.5, interval=2, schedule=schedule)
    rule = RunSettings(rounds=8, policy=policy, training=Training(steps=6, learning_rate=0.1))
    result = simulate(tasks(model=Awkward), rule)

    start = result.space.unflatten(TorchLearner(BlobTask(Awkward)).initial())
    end = result.space.unflatten(result.values)
    kept = {name for name in start if np.array_equal(start[name], end[name])}
    assert kept == {"stem.weight", "stem.bias", "norm.running_mean", "norm.running_var"}
    assert "second.weight" not in start
    for state in result.states.values():
        counts = Counter(state.mask.per_slot(result.space))
        assert 0 < counts["first.weight"] <= 32
        assert counts["stem.weight"] == 48
        assert state.buffers["norm.num_batches_tracked"] == 8 * 6
        assert 0 < state.mask.share(result.space) < 0.6
    means = [result.space.unflatten(s.theta)["norm.running_mean"] for s in result.states.values()]
    assert (means[0] != means[1]).any()
    again = simulate(tasks(model=Awkward), rule)
    assert again.versions == result.versions
    assert again.scores == result.scores


def several(*names, mode="parallel", **changes):
    policies = tuple(preset(name) for name in names)
    return RunSettings(rounds=6, training=STEPS, arms=Arms(mode=mode, policies=policies), **changes)


def test_each_arm_is_what_a_run_of_its_own_is():
    rule = several("fedper", "fedavg")
    seen = []
    both = simulate_arms(tasks(), rule, progress=lambda arm, number: seen.append((arm, number)))
    assert list(both) == ["fedper", "fedavg"]
    for name, found in both.items():
        alone = simulate(tasks(), settings(name))
        assert (found.versions, found.scores) == (alone.versions, alone.scores)
    assert both["fedper"].versions[0] == both["fedavg"].versions[0]
    assert both["fedper"].versions[1] != both["fedavg"].versions[1]
    assert seen == [(arm, n) for arm in both for n in range(1, 7)]
    with pytest.raises(FedSelectError, match="simulate_arms"):
        simulate(tasks(), rule)


def test_the_order_of_an_arm_is_its_own():
    rule = several("fedper", "fedavg")

    def order(arm, number, names):
        return names[:2] if arm == "fedavg" else names

    fewer = simulate_arms(tasks(), rule, order=order)
    plain = simulate_arms(tasks(), rule)
    assert fewer["fedper"].versions == plain["fedper"].versions
    assert fewer["fedavg"].versions != plain["fedavg"].versions


def test_randomized_arms_split_the_clients_by_their_ids():
    rule = several("fedper", "fedavg", mode="randomized").model_copy(update={"rounds": 1})
    many = tasks(count=48)
    ids = {name: f"id-{name}" for name in many}
    found = simulate_arms(many, rule, ids=ids)
    for arm, result in found.items():
        assert set(result.states) == {n for n in many if rule.arms_of(ids[n]) == (arm,)}
    assert sum(len(result.states) for result in found.values()) == 48
    with pytest.raises(FedSelectError, match="at least 20 clients each"):
        simulate_arms(tasks(), rule)
