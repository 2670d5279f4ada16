"""Every preset, end to end: its masks are what it is named for, and the simulation computes the
very versions and states that real agents and the service do.
"""

from __future__ import annotations

import numpy as np
import pytest
from learning.learning_tasks import Awkward, BlobTask

from fedselect import Mask, Policy, RoundPolicy, Training, preset, preset_run
from fedselect.policies import PRESETS, Influence, Reporting, Wire
from fedselect.simulate import sampled, simulate
from fedselect.space import Role
from fedselect.training import TorchLearner

from .factories import drain, ok
from .sites import federation, same

ROUNDS, SITES = 12, 4


def tasks(count=SITES):
    return {f"site-{i}": BlobTask(Awkward, site=i) for i in range(count)}


def settings(name, *, goal=SITES, rounds=ROUNDS, **changes):
    rules = RoundPolicy(goal=goal, quorum=goal, over_selection=1, retry_after=1, min_contributors=1)
    facts = {"training": Training(steps=4), "round": rules, "report": Reporting(min_examples=1)}
    return preset_run(name, rounds=rounds, **{**facts, **changes})


def expected(name, space):
    """The elements that may be personal at the end besides what never travels, and how many are."""
    slots = {slot.name: slot for slot in space.slots}
    head, norm = {"answer.weight", "answer.bias"}, {"norm.weight", "norm.bias"}
    trainable = {s.name for s in space.with_role(Role.SELECTABLE, Role.SHARED)}
    weights = {s.name for s in space.with_role(Role.SELECTABLE)}
    size = sum(slots[each].size for each in trainable)
    fixed = {
        **dict.fromkeys(("fedavg", "fedavg-ft", "ditto"), frozenset()),
        **dict.fromkeys(("local", "share-then-local"), trainable),
        **dict.fromkeys(("fedper", "fedper-late", "fedrep", "fedbabu"), head),
        "lg-fedavg": trainable - head,
        "fedbn": norm,
    }
    if name in fixed:
        count = sum(slots[each].size for each in fixed[name])
        return fixed[name], {count}
    if name in {"fisher", "shuffled"}:
        return trainable, {int(0.02 * size)}
    if name == "fisher-gate":
        return trainable, {0, int(0.02 * size)}
    # Growth of p of what is shared, in each tensor, after participations 6 to 10 or 3, 6, 9.
    p, steps, most = (0.25, 3, 0.8) if name == "fedselect-official" else (0.05, 5, 0.3)
    count = 0
    for each in weights:
        total = left = slots[each].size
        for _ in range(steps):
            if total - left <= most * total:
                left -= left - round((1 - p) * left)
        count += total - left
    return weights, {count}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_does_what_it_is_named_for_and_is_simulated_to_the_bit(name, project, tmp_path):
    rule, names = settings(name), sorted(tasks())
    with federation(project, tasks(), tmp_path) as sites:
        run = sites.run(rule)
        sites.play(rule, lambda number, names: names, names)
        sites.evaluate(names)
        result = simulate(tasks(), rule)
        assert sites.versions(run) == result.versions
        reports = sites.evaluations(run)
        space = sites.model.space
        may, counts = expected(name, space)
        found = set()
        for site in names:
            state = sites.state(site, run)
            assert same(state, result.states[site])
            own = state.merge_mask - Mask.initial(space)
            assert {n for n, count in own.per_slot(space).items() if count} <= may
            found.add(own.personal)
            assert reports[site]["participations"] == ROUNDS
            assert reports[site]["gated"] == state.gated
            # Ids are longer than the names of a simulation.
            more = reports[site]["bytes_sent"] - result.bytes_up[site]
            assert 0 < more < 150 * ROUNDS
            scores = {n: score.correct for n, score in result.scores[site].items()}
            assert {n: s["correct"] for n, s in reports[site]["scores"].items()} == scores
        assert found == counts, "with a gate: some have a mask, some do not"
        drain(project)
        assert ok(project.owner.get(f"/v1/runs/{run['id']}"))["state"] == "finished"
        report = ok(project.owner.get(f"/v1/runs/{run['id']}/report"))
        assert check_gates(report, result) == (name == "fisher-gate")


@pytest.mark.parametrize(
    "policy",
    [
        Policy(score="drift", scope="row", elements="all", growth=0.2, interval=2, window=2),
        Policy(score="local_delta", growth=0.2, start_round=1, interval=2, window=2),
        Policy(direction="release", scope="global", growth=0.5, limit=0.1, interval=2),
        preset("fedper-late", start_round=4, window=2, gate="holdout", name="head-gate"),
        preset("fisher", start_round=3, window=2, fraction=0.2, personal_rate=3),
    ],
    ids=["rows", "own moves", "release", "gated head", "longer steps"],
)
def test_other_parts_fit_together_in_runs_of_deltas(policy, project, tmp_path):
    names = sorted(tasks())
    rule = settings("fedavg", rounds=6, policy=policy, wire=Wire(encoding="int8"))
    with federation(project, tasks(), tmp_path) as sites:
        run = sites.run(rule)
        sites.play(rule, lambda number, names: names, names)
        sites.evaluate(names)
        result = simulate(tasks(), rule)
        assert sites.versions(run) == result.versions
        for site in names:
            assert same(sites.state(site, run), result.states[site])
    first = policy.first_mask(result.space)
    changed = {s.merge_mask != first or bool(s.gated) for s in result.states.values()}
    assert changed == {True}


@pytest.mark.parametrize("encoding", ["f32", "int8"])
def test_bounded_influence_is_simulated_to_the_bit(encoding, project, tmp_path):
    names = sorted(tasks(6))
    rule = settings(
        "fedavg",
        goal=6,
        rounds=3,
        policy=preset("fedselect", start_round=0, interval=1, growth=0.2),
        wire=Wire(encoding=encoding),
        influence=Influence(
            rule="trimmed_mean", trim=0.2, clip_quantile=0.5, max_change=0.02, movers=True
        ),
    )
    with federation(project, tasks(6), tmp_path) as sites:
        run = sites.run(rule)
        sites.play(rule, lambda number, names: names, names)
        result = simulate(tasks(6), rule)
        assert sites.versions(run) == result.versions
        sites.evaluate(names)
        assert all(same(sites.state(site, run), result.states[site]) for site in names)
    moved = np.abs(result.values - TorchLearner(tasks()["site-0"]).initial())
    assert 0 < moved.max() <= 3 * 0.02 * (1 + 1e-6), "the bound was reached and held"
    free = simulate(tasks(6), rule.model_copy(update={"influence": None}))
    assert free.versions[-1] != result.versions[-1]


def check_gates(report, result):
    """The report of the run says who was gated."""
    told = {client["name"]: client["gated"] for client in report["clients"]}
    assert told == {site: state.gated for site, state in result.states.items()}
    facts = [fact for fact in report["facts"] if fact["code"] == "gated"]
    if set(told.values()) == {None}:
        assert not facts
    else:
        assert [(fact["value"], fact["n"]) for fact in facts] == [(sum(told.values()), SITES)]
    return None not in told.values()


def test_three_of_ten_a_round_and_one_that_joins_late(project, tmp_path):
    """Clocks and references are a client's own; who comes late starts from the shared model."""
    policy = preset("fisher-gate", start_round=2, window=2)
    rule = settings("fedavg", goal=3, rounds=24, policy=policy)
    everybody, late = sorted(tasks(10)), "site-9"
    draw = sampled(0.3, seed=4)

    def order(number, names):
        drawn = [each for each in draw(number, names) if number > 12 or each != late]
        return drawn + [n for n in names if n not in {*drawn, late}][: 3 - len(drawn)]

    with federation(project, tasks(10), tmp_path) as sites:
        run = sites.run(rule)
        sites.play(rule, order, everybody)
        result = simulate(tasks(10), rule, order=order)
        assert sites.versions(run) == result.versions
        took = {name: sum(name in order(n, everybody) for n in range(1, 25)) for name in everybody}
        assert min(took.values()) >= 2
        assert len(set(took.values())) > 2
        sites.evaluate(everybody)
        reports = sites.evaluations(run)
        for site in everybody:
            state = sites.state(site, run)
            assert state.participations == took[site] == reports[site]["participations"]
            assert same(state, result.states[site])
            grown = state.mask.personal > Mask.initial(sites.model.space).personal
            reached = took[site] > 2
            assert grown == (reached and not state.gated)
            assert reports[site]["bytes_received"] == result.bytes_down[site]
    first = min(n for n in range(1, 25) if late in order(n, everybody))
    assert first > 12


def test_a_start_that_is_not_reached_warns_before_the_run(project, tmp_path):
    with federation(project, tasks(), tmp_path) as sites:
        for site in sorted(sites.tasks):
            sites.join(site)
        every, few = settings("fedselect"), settings("fedselect", goal=1)
        assert "most clients never use one" not in str(sites.run(every)["warnings"])
        assert "each takes part about 3.0 times" in str(sites.run(few)["warnings"])
