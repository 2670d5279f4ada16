"""Figures of a study: means over seeds, and paired differences with intervals.

Owns the statistics of many seeds. A seed's figure is a mean, or the worst, over its clients; what
is paired are the same seeds, that is the same data, starting weights and clients. Intervals are the
95 % t-intervals of the mean over seeds (Student, Biometrika 6, 1908); nothing is corrected for the
number of comparisons. Where one contains 0 the two are *not distinguishable*. *Worse* and *harmed*
are those of ``effects``, for each client and seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy.stats import t as student

from fedselect.effects import LEVEL, gain
from fedselect.study.cells import Result
from fedselect.study.grid import Grid, Pair, Reading

BASELINES = {"local": "training alone", "fedavg": "FedAvg with fine-tuning"}
Verdict = Literal["higher", "lower", "not distinguishable", "one seed"]
Seeds = Mapping[int, Result]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` seeds, ± the half-width of its interval (NaN of one seed alone)."""

    mean: float
    half: float
    sd: float
    count: int

    @property
    def verdict(self) -> Verdict:
        """What may be said of a difference."""
        if self.count < 2:
            return "one seed"
        if self.mean - self.half > 0:
            return "higher"
        return "lower" if self.mean + self.half < 0 else "not distinguishable"


@dataclass(frozen=True)
class Row:
    """One policy on one split. Accuracies in percent, shares from 0 to 1.

    ``better`` is the reading, pre or post, with the higher mean over seeds; ``accuracy`` and
    ``worst`` (client) are in it. ``worse`` and ``harmed`` count clients and seeds together, by
    baseline. ``sent`` is the share of what dense float32 updates weigh.
    """

    split: str
    policy: str
    pre: float
    post: float
    better: Reading
    accuracy: Estimate
    worst: Estimate
    worse: Mapping[str, float]
    harmed: Mapping[str, float]
    sent: float
    steps: int
    gated: float
    kept: float | None
    again: float | None
    others: float | None


@dataclass(frozen=True)
class Difference:
    """``policy`` − ``against`` on a split, in points, over the seeds that both have."""

    split: str
    policy: str
    against: str
    reading: Reading
    mean: Estimate
    worst: Estimate
    won: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and t-interval of at least one value."""
    count = len(values)
    if count < 2:
        return Estimate(fmean(values), math.nan, math.nan, count)
    sd = stdev(values)
    half = float(student.ppf(0.5 + LEVEL / 2, count - 1)) * sd / math.sqrt(count)
    return Estimate(fmean(values), half, sd, count)


def rows(grid: Grid, results: Iterable[Result]) -> list[Row]:
    """A row for each split and policy that has results, in the grid's order."""
    known = by_cell(results)
    names = [(s.name, p.name) for s in grid.split for p in grid.policy]
    return [_row(name, known) for name in names if name in known]


def differences(
    grid: Grid, results: Iterable[Result], pairs: Iterable[Pair] | None = None
) -> list[Difference]:
    """Every pair, those of the grid if None, on every split where both have a seed in common."""
    known = by_cell(results)
    found = [
        difference(known, split.name, pair.policy, pair.against, pair.reading)
        for pair in (grid.pairs if pairs is None else pairs)
        for split in grid.split
    ]
    return [each for each in found if each is not None]


@dataclass(frozen=True)
class Rank:
    """A policy's mean over splits, each in the better reading there, over the seeds that ran on all
    of them.
    """

    policy: str
    mean: Estimate
    worst: Estimate


def ranking(grid: Grid, results: Iterable[Result]) -> list[Rank]:
    """The policies with a seed that has run on all splits of the grid's ranking, the best mean
    first. Equals: in the grid's order.
    """
    known = by_cell(results)
    found = []
    for policy in grid.policy if grid.ranking else ():
        mine = [known.get((split, policy.name), {}) for split in grid.ranking]
        common = sorted(set.intersection(*map(set, mine)))
        if common:
            means, worst = (
                [fmean(figure(seeds[s], better(seeds)) for seeds in mine) for s in common]
                for figure in (_mean, _worst)
            )
            found.append(Rank(policy.name, estimate(means), estimate(worst)))
    return sorted(found, key=lambda rank: -rank.mean.mean)


def by_cell(results: Iterable[Result]) -> dict[tuple[str, str], dict[int, Result]]:
    """Results by split and policy, then by seed."""
    found: dict[tuple[str, str], dict[int, Result]] = {}
    for each in results:
        found.setdefault((each.split, each.policy), {})[each.seed] = each
    return found


def difference(
    known: Mapping[tuple[str, str], Seeds], split: str, policy: str, against: str, reading: Reading
) -> Difference | None:
    """One paired difference; None without a common seed. ``better``: the better reading of each."""
    one, other = known.get((split, policy), {}), known.get((split, against), {})
    common = sorted(one.keys() & other.keys())
    if not common:
        return None
    mine = better(one) if reading == "better" else reading
    theirs = better(other) if reading == "better" else reading
    means = _paired(common, one, other, lambda r, read: _mean(r, read), (mine, theirs))
    worst = _paired(common, one, other, lambda r, read: _worst(r, read), (mine, theirs))
    won = sum(value > 0 for value in means)
    return Difference(split, policy, against, reading, estimate(means), estimate(worst), won)


def better(seeds: Seeds) -> Reading:
    """The reading with the higher mean over seeds; pre if they are equal."""
    pre, post = (fmean(_mean(r, read) for r in seeds.values()) for read in ("pre", "post"))
    return "pre" if pre >= post else "post"


def _paired(
    seeds: Sequence[int],
    one: Seeds,
    other: Seeds,
    figure: Callable[[Result, str], float],
    readings: tuple[str, str],
) -> list[float]:
    return [figure(one[s], readings[0]) - figure(other[s], readings[1]) for s in seeds]


def _mean(result: Result, reading: str) -> float:
    return float(result.accuracies(reading).mean())


def _worst(result: Result, reading: str) -> float:
    return float(result.accuracies(reading).min())


def _row(name: tuple[str, str], known: Mapping[tuple[str, str], Seeds]) -> Row:
    seeds, split = known[name], name[0]
    every, read = list(seeds.values()), better(seeds)
    judged = {
        baseline: _judged(seeds, known[split, baseline])
        for baseline in BASELINES
        if (split, baseline) in known and baseline != name[1]
    }
    dense = [4 * r.elements * r.rounds * len(r.clients) for r in every]
    return Row(
        split=split,
        policy=name[1],
        pre=fmean(_mean(r, "pre") for r in every),
        post=fmean(_mean(r, "post") for r in every),
        better=read,
        accuracy=estimate([_mean(r, read) for r in every]),
        worst=estimate([_worst(r, read) for r in every]),
        worse={baseline: pair[0] for baseline, pair in judged.items() if pair},
        harmed={baseline: pair[1] for baseline, pair in judged.items() if pair},
        sent=sum(sum(r.sent) for r in every) / sum(dense),
        steps=every[0].steps,
        gated=fmean(len(r.gated) / len(r.clients) for r in every),
        kept=_known_mean(r.kept for r in every),
        again=_known_mean(r.again for r in every),
        others=_known_mean(r.others for r in every),
    )


def _judged(mine: Seeds, baseline: Seeds) -> tuple[float, float] | None:
    """The shares of clients, over all common seeds, that are worse and that are harmed."""
    found = [
        gain(
            mine[seed].score(client),
            baseline[seed].score(client, beside=mine[seed]),
            judged=True,
        )
        for seed in sorted(mine.keys() & baseline.keys())
        for client in range(len(mine[seed].clients))
    ]
    if not found:
        return None
    return fmean(bool(g.worse) for g in found), fmean(bool(g.harmed) for g in found)


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
