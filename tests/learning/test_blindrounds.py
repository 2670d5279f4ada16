"""Blinded rounds: masks as public units, and a whole run that is as if nothing had been blinded."""

import os

import numpy as np
import pytest
from learning_tasks import BlobTask, mlp

from fedselect import Kind, Mask, ParameterSpace, Role, RoundPolicy, RunSettings, Training, preset
from fedselect.blindrounds import blinded_mean, shared, units
from fedselect.errors import BlindingError
from fedselect.policies import Dp, Policy, Privacy, Secure, Wire
from fedselect.simulate import simulate

SPACE = ParameterSpace.of(
    [
        ("body.weight", (4, 3), Kind.WEIGHT, Role.SELECTABLE),
        ("body.bias", (4,), Kind.BIAS, Role.SHARED),
        ("norm.mean", (2,), Kind.BUFFER, Role.PERSONAL),
        ("head.weight", (2, 4), Kind.WEIGHT, Role.SELECTABLE),
    ]
)
ROWS = Policy(scope="row")


def settings(policy=ROWS, *, rounds=4, **changes):
    rule = {
        "rounds": rounds,
        "policy": policy,
        "training": Training(steps=4),
        "round": RoundPolicy(goal=5, min_contributors=3),
        "privacy": Privacy(secure=Secure(bound=4.0)),
    }
    return RunSettings(**rule | changes)


def test_units_are_rows_of_what_turns_by_rows_and_whole_tensors_else():
    rows = [(3 * n, 3 * n + 3) for n in range(4)]
    assert units(ROWS, SPACE) == [*rows, (12, 16), (18, 22), (22, 26)]
    assert units(Policy(personal="head"), SPACE) == [(0, 12), (12, 16), (18, 26)]


def test_a_unit_is_shared_as_a_whole_or_not_at_all():
    spans = units(ROWS, SPACE)
    personal = np.zeros(SPACE.dim, bool)
    personal[3:6] = personal[16:18] = True
    assert shared(Mask.from_bool(personal), spans) == {0, 2, 3, 4, 5, 6}
    personal[7] = True
    with pytest.raises(BlindingError, match="personal in part"):
        shared(Mask.from_bool(personal), spans)


def test_the_mean_is_that_of_those_who_share_and_of_nobody_else():
    draw = np.random.default_rng(2)
    base = draw.normal(size=SPACE.dim).astype(np.float32)
    kept = [(3, 6), (3, 6), (3, 6), (0, 0), (18, 22)]  # row 1 has two sharers left
    updates, dense = [], []
    for first, last in kept:
        personal = np.zeros(SPACE.dim, bool)
        personal[first:last] = personal[16:18] = True
        theta = (base + draw.uniform(-1, 1, SPACE.dim)).astype(np.float32)
        updates.append((Mask.from_bool(personal), theta[~personal]))
        dense.append(np.where(personal, np.nan, theta))
    found = blinded_mean(base, updates, settings(), SPACE, os.urandom)
    counts = np.sum(~np.isnan(dense), axis=0)
    wanted = np.where(counts >= 3, np.nansum(dense, axis=0) / np.maximum(counts, 1), base)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(found[counts < 3], base[counts < 3])
    assert set(counts) == {0, 2, 4, 5}


@pytest.mark.parametrize("policy", [ROWS, preset("fedper"), preset("fedavg")])
def test_a_blinded_run_is_a_plain_one_within_the_step(policy):
    tasks = {f"site-{i}": BlobTask(mlp, site=i) for i in range(5)}
    rule = settings(policy)
    blinded = simulate(tasks, rule)
    plain = simulate(tasks, rule.model_copy(update={"privacy": Privacy()}))
    np.testing.assert_allclose(blinded.values, plain.values, atol=2e-5)
    assert len(set(blinded.versions)) == len(blinded.versions) == 5
    assert simulate(tasks, rule).versions == blinded.versions  # with other keys


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": Privacy(secure=Secure(), dp=Dp(clip=1, noise=1, epsilon=1))}, "must clip"),
        ({"policy": Policy()}, "masks of single elements"),
        ({"wire": Wire(encoding="int8")}, "do not add up"),
        ({"round": RoundPolicy(weighting="examples", min_contributors=3)}, "weight 1"),
        ({"round": RoundPolicy(min_contributors=2)}, "of a sum of two"),
    ],
)
def test_what_needs_single_updates_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_the_threshold_is_more_than_half():
    assert [Secure().needed(n) for n in (3, 4, 5, 20)] == [2, 3, 3, 12]
    assert Secure(threshold=0.51).needed(20) == 11
    assert Secure(threshold=1).needed(7) == 7
