"""The comparison of arms: each figure against the raw evaluations, and the rule at its edges."""

from __future__ import annotations

import csv
import io
import math
from datetime import UTC, datetime
from itertools import combinations
from statistics import NormalDist, fmean
from uuid import UUID

import numpy as np
import pytest

from fedselect import comparisonpage
from fedselect.comparedoc import ComparedRun, Comparison
from fedselect.comparison import Scored, compare, is_control, table
from fedselect.evaluations import EvaluationReport
from fedselect.lifecycle import RunState
from fedselect.policies import PRESETS, Arms, Policy, RunSettings, preset
from fedselect.reporting import Evaluated

NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
FEDAVG, FEDPER, LOCAL = preset("fedavg"), preset("fedper"), preset("local")
RANDOM = preset("random", start_round=2)
Counts = list[tuple[int, int]]  # (correct of post, examples) by client


def renamed(policy: Policy, name: str) -> Policy:
    return policy.model_copy(update={"name": name})


def report(post: int, total: int, **changes: object) -> EvaluationReport:
    given = {
        "scores": {
            name: {"correct": min(max(count, 0), total), "total": total, "loss": 1}
            for name, count in {"post": post, "pre": post - 1, "local_only": total // 2}.items()
        },
        "participations": 40,
        "personal_share": 0.2,
        "bytes_sent": 1_000_000,
        "bytes_received": 2_000_000,
        "control_sent": 300,
        "control_received": 400,
        **changes,
    }
    return EvaluationReport.model_validate(given)


def scored(
    number: int, policy: Policy, counts: Counts, *, first: int = 0, **changes: object
) -> Scored:
    found = [
        Evaluated(UUID(int=first + n), f"site-{first + n:02}", report(*each, **changes))
        for n, each in enumerate(counts)
    ]
    return Scored(UUID(int=500 + number), policy, 40, 40, found)


def compared(
    *arms: Scored, mode: str = "parallel", state: RunState = RunState.FINISHED, **rules: int
) -> Comparison:
    policies = tuple(arm.policy for arm in arms)
    settings = RunSettings(rounds=40, seed=9, arms=Arms(mode=mode, policies=policies), report=rules)
    run = ComparedRun(
        id=UUID(int=1),
        name="pilot",
        model="watch-cnn",
        state=state,
        mode=mode,
        rounds=40,
        seed=9,
        budget="20 gradient steps of 20 examples",
    )
    return compare(run, settings, list(arms), made_at=NOW)


def drawn(mean: float, *, clients: int = 12, seed: int = 0) -> Counts:
    rng = np.random.default_rng(seed)
    totals = rng.integers(80, 200, clients)
    shares = np.clip(rng.normal(mean, 0.05, clients), 0, 1)
    return [(round(s * t), int(t)) for s, t in zip(shares, totals, strict=True)]


def shifted(counts: Counts, by: float) -> Counts:
    return [(min(t, max(0, c + round(by * t))), t) for c, t in counts]


# --- every figure from the raw evaluations -----------------------------------------------------


def roots(correct: int, n: int, z: float) -> tuple[float, float]:
    """The two roots of (p − π)² = z² π (1 − π) / n."""
    p = correct / n
    found = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])
    return float(min(found)), float(max(found))


def newcombe(a: tuple[int, int], b: tuple[int, int], level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    (la, ua), (lb, ub) = roots(*a, z), roots(*b, z)
    p, q = a[0] / a[1], b[0] / b[1]
    return (
        100 * (p - q - math.hypot(p - la, ub - q)),
        100 * (p - q + math.hypot(ua - p, q - lb)),
    )


def ends(found: object) -> tuple[float, float]:
    return (found.low, found.high)


@pytest.mark.parametrize("clients", [5, 12])
def test_figures_of_parallel_arms_follow_from_the_raw_evaluations(clients: int) -> None:
    data = {
        "fedavg": drawn(0.7, clients=clients),
        "fedper": shifted(drawn(0.7, clients=clients), 0.06),
        "local": shifted(drawn(0.7, clients=clients), -0.03),
    }
    arms = [
        scored(n, policy, data[policy.name]) for n, policy in enumerate((FEDAVG, FEDPER, LOCAL))
    ]
    found = compared(*arms)
    sums = {name: tuple(map(sum, zip(*counts, strict=True))) for name, counts in data.items()}
    for arm in found.arms:
        correct, total = sums[arm.name]
        percents = [100 * c / t for c, t in data[arm.name]]
        assert (arm.pooled.correct, arm.pooled.examples) == (correct, total)
        assert arm.pooled.percent == pytest.approx(100 * correct / total)
        z = NormalDist().inv_cdf(0.975)
        assert ends(arm.pooled.interval) == pytest.approx(
            [100 * end for end in roots(correct, total, z)]
        )
        assert arm.pooled_pre.correct == correct - clients
        assert arm.mean_percent == pytest.approx(fmean(percents))
        assert arm.worst.percent == pytest.approx(min(percents))
        assert arm.worst.name == f"site-{percents.index(min(percents)):02}"
        assert (arm.clients, arm.withheld, arm.participations) == (clients, 0, 40)
        assert (arm.sent_bytes, arm.received_bytes) == (clients * 10**6, 2 * clients * 10**6)
        assert (arm.control_bytes, arm.sent_bytes_each) == (700 * clients, 10**6)
        alone = arm.effects["local_only"]
        leads = [c - t // 2 for c, t in data[arm.name]]
        points = [100 * lead / t for lead, (_, t) in zip(leads, data[arm.name], strict=True)]
        assert alone.mean_points == pytest.approx(fmean(points))
        assert alone.worse == [f"site-{n:02}" for n, p in enumerate(points) if p < -2]
    assert [(d.arm, d.against) for d in found.differences] == list(combinations(data, 2))
    for each in found.differences:
        a, b = sums[each.arm], sums[each.against]
        assert each.pooled_points == pytest.approx(100 * (a[0] / a[1] - b[0] / b[1]))
        mine, theirs = ([100 * c / t for c, t in data[n]] for n in (each.arm, each.against))
        assert each.mean_points == pytest.approx(
            fmean(m - t for m, t in zip(mine, theirs, strict=True))
        )
        assert each.worst_points == pytest.approx(min(mine) - min(theirs))
        assert ends(each.over_examples) == pytest.approx(newcombe(a, b, 0.95))
        assert each.level_percent == pytest.approx(100 * (1 - 0.05 / 3))
        assert each.paired
        if clients < 10:
            assert (each.over_clients, each.unit) == (None, "examples")
            assert ends(each.decisive) == pytest.approx(newcombe(a, b, 1 - 0.05 / 3))
        else:
            one, other = np.array(data[each.arm]), np.array(data[each.against])
            again = bootstrap(one, other, paired=True)
            assert each.unit == "clients"
            expected = np.quantile(again, [0.025, 0.975])
            assert ends(each.over_clients) == pytest.approx(expected, abs=0.25)
            wide = np.quantile(again, [0.05 / 6, 1 - 0.05 / 6])
            assert ends(each.decisive) == pytest.approx(wide, abs=0.35)


def bootstrap(one: np.ndarray, other: np.ndarray, *, paired: bool) -> np.ndarray:
    """Pooled differences over clients drawn one by one, another way than in the product."""
    rng, found = np.random.default_rng(77), []
    for _ in range(6000):
        mine = rng.integers(0, len(one), len(one))
        theirs = mine if paired else rng.integers(0, len(other), len(other))
        a, b = one[mine].sum(0), other[theirs].sum(0)
        found.append(100 * (a[0] / a[1] - b[0] / b[1]))
    return np.array(found)


def test_randomized_groups_are_resampled_by_themselves() -> None:
    one, other = drawn(0.8, clients=20), drawn(0.7, clients=25, seed=3)
    found = compared(scored(0, FEDPER, one), scored(1, LOCAL, other, first=100), mode="randomized")
    (each,) = found.differences
    assert (each.paired, each.clients, each.against_clients) == (False, 20, 25)
    again = bootstrap(np.array(one), np.array(other), paired=False)
    assert ends(each.over_clients) == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.3)
    assert ends(each.decisive) == ends(each.over_clients), "one pair needs no correction"
    assert each.mean_points == pytest.approx(
        fmean(100 * c / t for c, t in one) - fmean(100 * c / t for c, t in other)
    )


def test_few_clients_of_different_groups_tell_nothing() -> None:
    """Twenty were drawn for each arm, nine of one have answered: easier clients are no effect."""
    easy = [(95, 100)] * 9, [(60, 100)] * 20
    groups = (scored(0, FEDPER, easy[0]), scored(1, LOCAL, easy[1], first=100))
    (each,) = compared(*groups, mode="randomized").differences
    assert (each.verdict, each.unit, each.over_clients) == ("undecided", "clients", None)
    assert ends(each.decisive) == (-100, 100)
    assert each.over_examples.low > 0, "of these clients' examples alone it would be clear"
    assert not compared(*groups, mode="randomized").recommendation.can_tell
    pair = (scored(0, FEDPER, easy[0]), scored(1, LOCAL, easy[1][:9]))
    assert compared(*pair).differences[0].verdict == "better"


def test_pairs_make_the_interval_narrower_than_groups() -> None:
    counts = [(n * 9, 100) for n in range(1, 12)]
    pair = (scored(0, FEDPER, shifted(counts, 0.01)), scored(1, LOCAL, counts))
    together = compared(*pair).differences[0].over_clients
    apart = compared(*pair, mode="randomized").differences[0].over_clients
    assert together.high - together.low < 0.1 * (apart.high - apart.low)


def test_only_clients_with_a_score_in_every_arm_are_compared() -> None:
    counts = drawn(0.7)
    few = [(5, 9), *counts[1:]]  # its first client has too few examples
    found = compared(scored(0, FEDPER, counts), scored(1, LOCAL, few))
    assert [arm.clients for arm in found.arms] == [11, 11]
    assert [arm.withheld for arm in found.arms] == [0, 1]
    assert found.differences[0].clients == 11
    assert found.arms[0].pooled.correct == sum(c for c, _ in counts[1:])
    assert len(found.clients) == 23, "a line for every score"


def test_the_fedavg_arm_is_the_baseline_of_the_others() -> None:
    counts = drawn(0.6)
    found = compared(scored(0, FEDPER, shifted(counts, -0.3)), scored(1, FEDAVG, counts))
    one, other = found.arms
    assert len(one.effects["fedavg_ft"].harmed) == 12
    assert "fedavg_ft" not in other.effects
    apart = compared(
        scored(0, FEDPER, counts), scored(1, FEDAVG, counts, first=50), mode="randomized"
    )
    assert all("fedavg_ft" not in arm.effects for arm in apart.arms), "other clients did it"


def test_figures_of_few_clients_are_left_out() -> None:
    found = compared(
        scored(0, FEDPER, drawn(0.7, clients=2)), scored(1, LOCAL, drawn(0.7, clients=2))
    )
    assert [arm.pooled for arm in found.arms] == [None, None]
    assert [arm.effects for arm in found.arms] == [{}, {}]
    assert (found.differences, found.recommendation.policy) == ([], None)
    assert found.reasons[0].code == "no_scores"


# --- the recommendation ------------------------------------------------------------------------


def codes(found: Comparison) -> list[str]:
    return [reason.code for reason in found.reasons]


def test_a_clear_leader_is_recommended() -> None:
    counts = drawn(0.6)
    found = compared(scored(0, LOCAL, counts), scored(1, FEDPER, shifted(counts, 0.15)))
    said = found.recommendation
    assert (said.policy, said.leader, said.tied, said.can_tell) == ("fedper", "fedper", [], True)
    assert (said.scope, said.short) == ("population", False)
    assert codes(found) == ["leader", "distinguishable", "limits"]


def test_arms_that_cannot_be_told_apart_are_said_to_be() -> None:
    counts = drawn(0.7)
    mixed = [(c + (2 if n % 2 else -2), t) for n, (c, t) in enumerate(counts)]
    cheap = scored(1, LOCAL, counts, bytes_sent=10)
    found = compared(scored(0, FEDPER, mixed), cheap)
    said = found.recommendation
    assert (said.policy, said.can_tell) == ("local", False)
    assert {"not_distinguishable", "cheaper"} <= set(codes(found))
    assert "contains 0" in next(r.text for r in found.reasons if r.code == "not_distinguishable")
    same = compared(scored(0, FEDPER, counts), scored(1, LOCAL, counts))
    assert (same.recommendation.policy, same.recommendation.can_tell) == ("fedper", False)
    assert "first" in codes(same)


def test_harm_weighs_more_than_bytes() -> None:
    """The cheap arm harms two clients of twelve, where chance would show none."""
    counts = [(75, 100)] * 12
    uneven = [(20, 100), (25, 100), *[(85, 100)] * 10]
    found = compared(
        scored(0, LOCAL, uneven, bytes_sent=10), scored(1, FEDPER, counts, bytes_sent=10**7)
    )
    said = found.recommendation
    assert said.policy == "fedper"
    assert said.tied, "the two cannot be told apart in the mean"
    assert "safer" in codes(found)


@pytest.mark.parametrize(("harmed", "beyond"), [(0, False), (1, False), (2, True)])
def test_one_harmed_client_of_twelve_may_be_chance(harmed: int, beyond: bool) -> None:
    worse = [(20, 100)] * harmed + [(90, 100)] * (12 - harmed)
    found = compared(scored(0, LOCAL, worse), scored(1, FEDPER, [(10, 100)] * 12))
    assert ("harms" in codes(found)) is beyond


@pytest.mark.parametrize(("participations", "short"), [(29, True), (30, False)])
def test_a_short_trial_is_flagged_and_tells_nothing(participations: int, short: bool) -> None:
    counts = drawn(0.6)
    found = compared(
        scored(0, LOCAL, counts, participations=participations),
        scored(1, FEDPER, shifted(counts, 0.15)),
    )
    said = found.recommendation
    assert (said.policy, said.short, said.can_tell) == ("fedper", short, not short)
    assert ("short_trial" in codes(found)) is short
    assert "uneven" in codes(found), "one arm trained more often"


@pytest.mark.parametrize(("clients", "scope"), [(9, "these_clients"), (10, "population")])
def test_few_clients_speak_for_themselves_alone(clients: int, scope: str) -> None:
    counts = drawn(0.5, clients=clients)
    found = compared(scored(0, LOCAL, counts), scored(1, FEDPER, shifted(counts, 0.3)))
    assert found.recommendation.scope == scope
    assert found.recommendation.can_tell
    assert ("few_clients" in codes(found)) is (scope == "these_clients")


def test_a_control_is_never_recommended_and_a_warning_if_it_does_as_well() -> None:
    counts = drawn(0.6)
    ahead = shifted(counts, 0.15)
    found = compared(scored(0, RANDOM, ahead), scored(1, FEDPER, ahead), scored(2, LOCAL, counts))
    assert found.recommendation.policy == "fedper"
    assert "control_as_good" in codes(found)
    assert [arm.control for arm in found.arms] == [True, False, False]
    behind = compared(scored(0, RANDOM, counts), scored(1, FEDPER, ahead))
    assert "control_as_good" not in codes(behind)
    alone = compared(scored(0, RANDOM, counts), scored(1, renamed(RANDOM, "r2"), counts))
    assert codes(alone) == ["controls_only"]


def test_a_better_worst_client_elsewhere_is_said() -> None:
    leader = [(30, 100), *[(95, 100)] * 11]
    even = [(60, 100)] * 12
    found = compared(scored(0, LOCAL, leader), scored(1, FEDPER, even))
    assert found.recommendation.policy == "local"
    assert "worst_client" in codes(found)


@pytest.mark.parametrize("state", [s for s in RunState if s is not RunState.FINISHED])
def test_a_run_that_has_not_finished_recommends_nothing(state: RunState) -> None:
    counts = drawn(0.6)
    found = compared(scored(0, LOCAL, counts), scored(1, FEDPER, shifted(counts, 0.2)), state=state)
    assert (found.recommendation.policy, codes(found)) == (None, ["not_finished"])
    assert found.differences, "its figures are shown"


def test_one_arm_is_no_comparison() -> None:
    found = compared(scored(0, LOCAL, drawn(0.6)))
    assert (found.recommendation.policy, codes(found)) == (None, ["one_arm"])
    assert found.arms[0].pooled is not None


def test_what_is_a_control() -> None:
    found = {name for name in PRESETS if is_control(preset(name))}
    assert found == {"random", "shuffled"}


def test_no_effect_is_rarely_found_where_there_is_none() -> None:
    """Two arms that are the same but for chance are told apart in at most about 1 of 20 trials."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        shares = rng.uniform(0.5, 0.9, 15)
        one, other = ([(int(rng.binomial(100, share)), 100) for share in shares] for _ in range(2))
        found = compared(scored(0, LOCAL, one), scored(1, FEDPER, other))
        wrong += found.recommendation.can_tell
    assert wrong <= 6, "the percentile bootstrap of 15 clients is a little too narrow, not more"


# --- forms -------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_client_in_every_arm() -> None:
    counts = drawn(0.6)
    found = compared(scored(0, LOCAL, counts), scored(1, FEDPER, shifted(counts, 0.1)))
    lines = list(csv.DictReader(io.StringIO(table(found))))
    assert [(line["name"], line["arm"]) for line in lines[:3]] == [
        ("site-00", "local"),
        ("site-00", "fedper"),
        ("site-01", "local"),
    ]
    assert [(int(line["correct"]), int(line["examples"])) for line in lines[::2]] == counts


def test_the_page_says_what_the_document_says() -> None:
    counts = drawn(0.6)
    named = scored(0, renamed(LOCAL, "all-mine"), counts)
    found = compared(named, scored(1, FEDPER, shifted(counts, 0.2)), scored(2, RANDOM, counts))
    page = comparisonpage.page(found)
    assert "<script" not in page
    assert page.count("<svg") == 3
    for words in ("all-mine", "fedper", "random (control)", "The data can tell", "site-11"):
        assert words in page
    for reason in found.reasons:
        assert reason.text.split("'")[0][:40] in page


def test_a_page_of_nothing_is_a_page() -> None:
    empty = [scored(n, policy, []) for n, policy in enumerate((LOCAL, FEDPER))]
    page = comparisonpage.page(compared(*empty, state=RunState.RUNNING))
    assert "Nothing can be said" in page
