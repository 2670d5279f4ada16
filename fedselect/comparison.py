"""From the evaluations of a run's arms to their comparison: pooled accuracy, differences, cost.

Owns which clients are compared and how. The figures are of ``post``, the client's own model: what
it would use, whatever the policy (of FedAvg it is the fine-tuned one). In parallel arms the clients
with a score in *every* arm are compared, so that differences are within clients; in randomized ones
each group is its own. Intervals:

- over clients, from 10 on: the percentile bootstrap, clients resampled (Efron and Tibshirani 1993,
  §13), jointly in all arms if they are parallel, each group by itself if not;
- over these clients' examples: Newcombe's for independent shares (Statistics in Medicine 17:873,
  1998, method 10). Which examples two arms both got right nobody knows, and models mostly fail on
  the same ones, so it is too wide rather than too narrow;
- between randomized groups of fewer than 10 clients nothing decides: what the clients of one group
  find easier than those of the other is no effect of an arm;
- what decides is corrected for the number of pairs (Bonferroni; O. J. Dunn, JASA 56, 1961), as the
  leader is picked from the same figures.

What follows from it is ``recommend``. Must not read rows, files or a clock; chance is a seed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import combinations
from statistics import fmean, median
from uuid import UUID

import numpy as np
import numpy.typing as npt

from fedselect import effects
from fedselect.comparedoc import (
    ArmResult,
    ClientInArm,
    ComparedRun,
    Comparison,
    Difference,
    WorstClient,
)
from fedselect.evaluations import EvaluationReport, ScoreReport
from fedselect.policies import Policy, RunSettings
from fedselect.recommend import recommend
from fedselect.reportdoc import Accuracy, Interval, Population
from fedselect.reporting import Evaluated, unlike

Shares = npt.NDArray[np.float64]
ANYTHING = Interval(low=-100, high=100)


@dataclass(frozen=True, slots=True)
class Scored:
    """One arm with the evaluations of its clients, as they were reported."""

    id: UUID
    policy: Policy
    published: int
    version: int | None
    evaluations: Sequence[Evaluated]


def compare(
    run: ComparedRun, settings: RunSettings, arms: Sequence[Scored], *, made_at: datetime
) -> Comparison:
    """The comparison; what is said of fewer clients than the run's ``report.min_clients`` is left
    out.
    """
    least = settings.told.min_examples
    arms = _with_fedavg(settings, arms) if run.mode == "parallel" else list(arms)
    told = {arm.policy.name: _scores(arm, least) for arm in arms}
    if run.mode == "parallel":
        every = set.intersection(*(set(found) for found in told.values()))
        told = {
            name: {k: v for k, v in found.items() if k in every} for name, found in told.items()
        }
    enough = all(len(found) >= settings.told.min_clients for found in told.values())
    draws = _draws(told, run) if enough else {}
    results = [_result(each, told, draws, settings) for each in arms]
    differences = _differences(arms, told, draws, run) if enough else []
    return Comparison(
        made_at=made_at,
        run=run,
        suppression=settings.told,
        arms=results,
        differences=differences,
        recommendation=recommend(results, differences, state=run.state),
        clients=_clients(arms, least),
    )


def is_control(policy: Policy) -> bool:
    """Whether a policy draws what another one chooses: it is there to be beaten."""
    return policy.personal == "learned" and (policy.score == "random" or policy.shuffled)


def _with_fedavg(settings: RunSettings, arms: Sequence[Scored]) -> list[Scored]:
    """Each arm's evaluations beside those of the arm that is FedAvg at equal gradient steps."""
    return [replace(arm, evaluations=beside_fedavg(settings, arm, arms)) for arm in arms]


def beside_fedavg(settings: RunSettings, arm: Scored, arms: Sequence[Scored]) -> list[Evaluated]:
    """An arm's evaluations with those of the run's own FedAvg arm, if it is another one."""
    own = settings.of_arm(arm.policy.name)
    for other in arms:
        if other.id != arm.id and unlike(own, settings.of_arm(other.policy.name)) is None:
            tuned: dict[UUID, EvaluationReport] = {e.client_id: e.report for e in other.evaluations}
            return [replace(e, tuned=tuned.get(e.client_id)) for e in arm.evaluations]
    return list(arm.evaluations)


Told = Mapping[str, Mapping[UUID, tuple[Evaluated, ScoreReport]]]


def _scores(arm: Scored, least: int) -> dict[UUID, tuple[Evaluated, ScoreReport]]:
    """The clients of an arm that have a personal model's score, by name."""
    ordered = sorted(arm.evaluations, key=lambda each: each.name)
    pairs = ((each, each.report.withholding(least).scores.get("post")) for each in ordered)
    return {each.client_id: (each, post) for each, post in pairs if post is not None}


# --- one arm -----------------------------------------------------------------------------------


def _result(
    arm: Scored, told: Told, draws: Mapping[str, Shares], settings: RunSettings
) -> ArmResult:
    name, reports = arm.policy.name, [each.report for each in arm.evaluations]
    found = list(told[name].values()) if draws else []
    least = settings.told.min_examples
    posts = [score for _, score in found]
    pres = [each.report.withholding(least).scores.get("pre") for each, _ in found]
    percents = {each.name: 100 * score.correct / score.total for each, score in found}
    last = min(percents, key=lambda client: (percents[client], client)) if percents else None
    sent = [report.bytes_sent for report in reports]
    return ArmResult(
        id=arm.id,
        name=name,
        policy=arm.policy,
        control=is_control(arm.policy),
        published=arm.published,
        version=arm.version,
        clients=len(told[name]),
        withheld=len(reports) - len(_scores(arm, least)),
        pooled=_pooled(posts),
        pooled_over_clients=_interval(draws.get(name), len(found), effects.LEVEL),
        pooled_pre=_pooled([score for score in pres if score is not None]),
        mean_percent=fmean(percents.values()) if percents else None,
        worst=None if last is None else WorstClient(name=last, percent=percents[last]),
        effects=_effects([each for each, _ in found], settings),
        participations=median(r.participations for r in reports) if reports else None,
        sent_bytes=sum(sent),
        received_bytes=sum(report.bytes_received for report in reports),
        control_bytes=sum(report.control_sent + report.control_received for report in reports),
        sent_bytes_each=fmean(sent) if sent else None,
    )


def _effects(found: Sequence[Evaluated], settings: RunSettings) -> dict[str, Population]:
    gains = {e.name: effects.gains(e.scores(settings.told.min_examples)) for e in found}
    result = {}
    for baseline in effects.BASELINES:
        known = {name: each[baseline] for name, each in gains.items() if baseline in each}
        if len(known) >= settings.told.min_clients:
            result[baseline] = effects.population(known, seed=settings.seed)
    return result


def _pooled(scores: Sequence[ScoreReport]) -> Accuracy | None:
    return effects.accuracy(_together(scores)) if scores else None


def _together(scores: Sequence[ScoreReport]) -> ScoreReport:
    """All held-out examples as one."""
    total = sum(score.total for score in scores)
    return ScoreReport(correct=sum(score.correct for score in scores), total=total, loss=0)


# --- between arms ------------------------------------------------------------------------------


def _draws(told: Told, run: ComparedRun) -> dict[str, Shares]:
    """Of every arm, its pooled share in each resample of clients; in parallel arms of the same."""
    rng = np.random.Generator(np.random.PCG64(run.seed))
    names = list(told)
    groups = [names] if run.mode == "parallel" else [[name] for name in names]
    found: dict[str, Shares] = {}
    for group in groups:
        columns = [_columns(told[name], group, told) for name in group]
        sums = _resampled(np.concatenate(columns, axis=1), rng)
        shares = sums[:, ::2] / sums[:, 1::2]
        found |= {name: shares[:, place] for place, name in enumerate(group)}
    return found


def _columns(
    arm: Mapping[UUID, tuple[Evaluated, ScoreReport]], group: Sequence[str], told: Told
) -> Shares:
    """(clients, 2): correct and total, the clients in the order of the group's first arm."""
    rows = [arm[client][1] for client in told[group[0]]]
    return np.array([[score.correct, score.total] for score in rows], dtype=np.float64)


def _resampled(columns: Shares, rng: np.random.Generator) -> Shares:
    """(resamples, columns): sums over as many clients as there are, drawn with replacement."""
    clients = len(columns)
    step = max(1, effects.AT_ONCE // clients)
    even = np.full(clients, 1 / clients)
    pieces = [
        rng.multinomial(clients, even, size=min(step, effects.RESAMPLES - done)) @ columns
        for done in range(0, effects.RESAMPLES, step)
    ]
    return np.concatenate(pieces)


def _interval(shares: Shares | None, clients: int, level: float) -> Interval | None:
    """The percentile interval of resampled shares, in points; None of fewer than 10 clients."""
    if shares is None or clients < effects.ENOUGH_CLIENTS:
        return None
    low, high = np.quantile(100 * shares, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high))


def _differences(
    arms: Sequence[Scored], told: Told, draws: Mapping[str, Shares], run: ComparedRun
) -> list[Difference]:
    names = [arm.policy.name for arm in arms]
    pairs = list(combinations(names, 2))
    level = 1 - (1 - effects.LEVEL) / max(1, len(pairs))
    return [_difference(one, other, told, draws, run, level) for one, other in pairs]


def _difference(
    arm: str, against: str, told: Told, draws: Mapping[str, Shares], run: ComparedRun, level: float
) -> Difference:
    mine, theirs = ([score for _, score in told[name].values()] for name in (arm, against))
    one, other = _together(mine), _together(theirs)
    fewest = min(len(mine), len(theirs))
    shares = draws[arm] - draws[against]
    over_clients = _interval(shares, fewest, effects.LEVEL)
    wide = _interval(shares, fewest, level)
    paired = run.mode == "parallel"
    of_examples = effects.difference(one, other, level=level) if paired else ANYTHING
    decisive = wide or of_examples
    accuracy = [[100 * s.correct / s.total for s in each] for each in (mine, theirs)]
    return Difference(
        arm=arm,
        against=against,
        paired=paired,
        clients=len(mine),
        against_clients=len(theirs),
        uneven=_uneven(told[arm], told[against]) if paired else 0,
        pooled_points=100 * (one.correct / one.total - other.correct / other.total),
        mean_points=fmean(accuracy[0]) - fmean(accuracy[1]),
        worst_points=min(accuracy[0]) - min(accuracy[1]),
        over_clients=over_clients,
        over_examples=effects.difference(one, other),
        unit="clients" if wide or not paired else "examples",
        level_percent=100 * level,
        decisive=decisive,
        verdict="better" if decisive.low > 0 else "worse" if decisive.high < 0 else "undecided",
    )


def _uneven(
    one: Mapping[UUID, tuple[Evaluated, ScoreReport]],
    other: Mapping[UUID, tuple[Evaluated, ScoreReport]],
) -> int:
    times = ((one[client][0].report, other[client][0].report) for client in one)
    return sum(a.participations != b.participations for a, b in times)


# --- one line per client and arm ---------------------------------------------------------------


def _clients(arms: Sequence[Scored], least: int) -> list[ClientInArm]:
    rows = [
        ClientInArm(
            client_id=each.client_id,
            name=each.name,
            arm=arm.policy.name,
            accuracy=effects.accuracy(post),
            participations=each.report.participations,
            sent_bytes=each.report.bytes_sent,
            received_bytes=each.report.bytes_received,
            control_bytes=each.report.control_sent + each.report.control_received,
        )
        for arm in arms
        for each, post in _scores(arm, least).values()
    ]
    return sorted(rows, key=lambda row: row.name)  # stable: the arms keep their order


COLUMNS = (
    *("client_id", "name", "arm", "participations"),
    *("correct", "examples", "percent", "low", "high"),
    *("sent_bytes", "received_bytes", "control_bytes"),
)


def table(comparison: Comparison) -> str:
    """The clients as CSV (RFC 4180), one line for each in each of its arms."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    for client in comparison.clients:
        row = client.model_dump(exclude={"accuracy"})
        score = client.accuracy
        row |= {"correct": score.correct, "examples": score.examples, "percent": score.percent}
        writer.writerow(row | {"low": score.interval.low, "high": score.interval.high})
    return out.getvalue()
