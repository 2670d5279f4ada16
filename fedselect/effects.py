"""What a run did for its clients: gains against baselines with 95 % intervals, from counts alone.

Owns the statistics and the words *worse* and *harmed*. Every method names its source:

- one share: Wilson's score interval (E. B. Wilson, JASA 22, 1927);
- a difference of shares: the square-and-add interval of R. G. Newcombe. Where it is known how many
  examples both models got right, the one for paired shares with its correlation φ (Statistics in
  Medicine 17:2635, 1998, method 10). Where it is not, φ = 0: the one for independent shares (ibid.
  17:873, method 10); models mostly fail on the same examples, so it is too wide rather than too
  narrow;
- a mean over clients: the percentile bootstrap, clients resampled (Efron and Tibshirani 1993, §13);
- evenness: Jain's index (Jain, Chiu and Hawe 1984);
- whether one figure rises with another: Spearman's ρ, with the same bootstrap.

Must not know rows, files or how a score came about. Chance comes in as a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean

import numpy as np
import numpy.typing as npt

from fedselect.evaluations import ScoreReport
from fedselect.reportdoc import Accuracy, Gain, Interval, Population, Sign

LEVEL = 0.95
WORSE_POINTS = 2  # a client is worse below −2 points
ENOUGH_CLIENTS = 10  # for an interval over clients
RESAMPLES = 10_000
RANK_RESAMPLES = 2000  # of a rank correlation
AT_ONCE = 1_000_000  # numbers that one step of the bootstrap draws
JUDGED = ("local_only", "fedavg_ft")  # the baselines of *worse* and *harmed*
BASELINES = {
    "local_only": "the same model trained alone, for as many gradient steps",
    "fedavg_ft": "the client's model of a FedAvg run, after as many steps on its shared model",
    "start": "the frozen model that the run started from",
    "global": "the last shared model, without anything personal but the client's own statistics",
    "pre": "the last shared model with this client's personal elements, before it trains on it",
}
UNMEASURED = {
    "fedavg_ft": "FedAvg with fine-tuning needs the shared model that full sharing would have led "
    "to, in all rounds and by all clients: no client can compute it alone. Run the policy `fedavg` "
    "with the same settings, and name that run when you ask for the report."
}
Scores = Mapping[str, ScoreReport]
Vector = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


def wilson(correct: int, total: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval for a share of ``total`` ≥ 1, both from 0 to 1."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, z2 = correct / total, z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    half = z * spread / (1 + z2 / total)
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half)


def correlation(post: ScoreReport, base: ScoreReport) -> float:
    """φ of the two models' hits, corrected for continuity; 0 if their overlap is not known."""
    if base.both is None or post.total != base.total:
        return 0.0
    both, total = base.both, post.total
    only_post, only_base = post.correct - both, base.correct - both
    neither = total - both - only_post - only_base
    found = float(both * neither - only_post * only_base)
    if found > 0:
        found = max(found - total / 2, 0.0)
    margins = (post.correct, total - post.correct, base.correct, total - base.correct)
    return found / math.sqrt(math.prod(margins)) if all(margins) else 0.0


def difference(
    post: ScoreReport, base: ScoreReport, *, phi: float = 0.0, level: float = LEVEL
) -> Interval:
    """Newcombe's interval of post − base, in points; ``phi`` is the correlation of their hits."""
    p, q = post.correct / post.total, base.correct / base.total
    (p_low, p_high), (q_low, q_high) = (
        wilson(score.correct, score.total, level=level) for score in (post, base)
    )
    down, up = _root(p - p_low, q_high - q, phi), _root(p_high - p, q - q_low, phi)
    return _interval(p - q - down, p - q + up)


def gain(post: ScoreReport, base: ScoreReport, *, judged: bool) -> Gain:
    """post − base in points; ``judged``: whether *worse* and *harmed* are said of this baseline."""
    p, q = post.correct / post.total, base.correct / base.total
    interval = difference(post, base, phi=correlation(post, base))
    # Counts, not fractions: −2 points exactly is not below −2 points.
    lead = post.correct * base.total - base.correct * post.total
    worse = 100 * lead < -WORSE_POINTS * post.total * base.total
    sign: Sign = "gain" if interval.low > 0 else "loss" if interval.high < 0 else "undecided"
    return Gain(
        points=100 * (p - q),
        interval=interval,
        examples=post.total,
        baseline_examples=base.total,
        paired=base.both is not None and post.total == base.total,
        sign=sign,
        worse=worse if judged else None,
        harmed=sign == "loss" if judged else None,
    )


def _root(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def _interval(low: float, high: float) -> Interval:
    """Fractions as points, within what a difference of shares can be."""
    return Interval(low=max(-100.0, 100 * low), high=min(100.0, 100 * high))


def accuracies(scores: Scores) -> dict[str, Accuracy]:
    """Every model's accuracy in percent."""
    return {name: accuracy(score) for name, score in sorted(scores.items())}


def accuracy(score: ScoreReport) -> Accuracy:
    """A model's accuracy in percent."""
    return Accuracy(
        correct=score.correct,
        examples=score.total,
        percent=100 * score.correct / score.total,
        interval=_interval(*wilson(score.correct, score.total)),
    )


def gains(scores: Scores) -> dict[str, Gain]:
    """The gain against every baseline that was reported; none without ``post``."""
    post = scores.get("post")
    if post is None:
        return {}
    known = [name for name in BASELINES if name in scores]
    return {name: gain(post, scores[name], judged=name in JUDGED) for name in known}


def mean_interval(values: Sequence[float], seed: int) -> Interval | None:
    """The percentile bootstrap of a mean over clients; None of fewer than 10."""
    if len(values) < ENOUGH_CLIENTS:
        return None
    return _percentiles(_means(values, np.random.Generator(np.random.PCG64(seed))))


def mean_difference(values: Sequence[float], others: Sequence[float], seed: int) -> Interval | None:
    """The same of the difference of two groups' means, each resampled; None if either is small."""
    if min(len(values), len(others)) < ENOUGH_CLIENTS:
        return None
    rng = np.random.Generator(np.random.PCG64(seed))
    return _percentiles(_means(values, rng) - _means(others, rng))


def _means(values: Sequence[float], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """The means (RESAMPLES,) of samples drawn with replacement."""
    every, step = np.asarray(values), max(1, AT_ONCE // len(values))
    means = [
        every[rng.integers(0, len(every), size=(min(step, RESAMPLES - done), len(every)))].mean(1)
        for done in range(0, RESAMPLES, step)
    ]
    return np.concatenate(means)


def _percentiles(means: npt.NDArray[np.float64]) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def worst_decile(points: Sequence[float]) -> float:
    """The mean of the worst tenth, rounded up to whole clients; there is at least one."""
    return fmean(sorted(points)[: math.ceil(len(points) / 10)])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's ρ (C. Spearman, Am. J. Psychology 15, 1904), equal values at their mean rank; None
    if one of them has no spread.
    """
    found = _correlations(_levels(x)[None], _levels(y)[None])
    return float(found[0]) if found.size else None


def correlation_interval(x: Sequence[float], y: Sequence[float], seed: int) -> Interval | None:
    """The percentile bootstrap of ρ, clients resampled; None of fewer than 10, or without spread.

    Resamples in which one of the two has no spread are left out.
    """
    count = len(x)
    if count < ENOUGH_CLIENTS:
        return None
    rng, step = np.random.Generator(np.random.PCG64(seed)), max(1, AT_ONCE // count)
    one, other = _levels(x), _levels(y)
    parts = []
    for done in range(0, RANK_RESAMPLES, step):
        drawn = rng.integers(0, count, size=(min(step, RANK_RESAMPLES - done), count))
        parts.append(_correlations(one[drawn], other[drawn]))
    found = np.concatenate(parts)
    if not found.size:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def _levels(values: Sequence[float]) -> Whole:
    """The place of each value among the different ones."""
    return np.unique(np.asarray(values), return_inverse=True)[1].astype(np.int64)


def _correlations(one: Whole, other: Whole) -> Vector:
    """Spearman's ρ of each row of levels (rows, n); rows without spread are left out."""
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in map(_ranks, (one, other)))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found: Vector = (a * b).sum(1)[scale > 0] / scale[scale > 0]
    return found


def _ranks(levels: Whole) -> Vector:
    rows, size = len(levels), int(levels.max(initial=0)) + 1
    flat = levels + size * np.arange(rows)[:, None]
    counts = np.bincount(flat.ravel(), minlength=rows * size).reshape(rows, size)
    mean: Vector = counts.cumsum(1) - (counts - 1) / 2
    return np.take_along_axis(mean, levels, 1)


def population(found: Mapping[str, Gain], *, seed: int) -> Population:
    """The gains of clients, by name, against one baseline; there is at least one."""
    points = [each.points for each in found.values()]
    interval = mean_interval(points, seed)
    worst = sorted(found, key=lambda name: (found[name].points, name))
    worst = worst[: math.ceil(len(worst) / 10)]
    names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
    spread = np.quantile(points, [0, 0.25, 0.5, 0.75, 1])
    judged = all(each.worse is not None for each in found.values())
    return Population(
        clients=len(points),
        mean_points=fmean(points),
        interval=interval,
        evidence="insufficient" if interval is None else "sufficient",
        **{f"{name}_points": float(value) for name, value in zip(names, spread, strict=True)},
        worst_decile_points=worst_decile(points),
        worst_decile=worst,
        gained=[name for name, each in found.items() if each.sign == "gain"],
        lost=[name for name, each in found.items() if each.sign == "loss"],
        worse=[name for name, each in found.items() if each.worse] if judged else None,
        harmed=[name for name, each in found.items() if each.harmed] if judged else None,
    )


def jain(values: Sequence[float]) -> float | None:
    """(Σx)² / (n Σx²): 1 if all are equal, 1/n if one has everything; None if all are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None
