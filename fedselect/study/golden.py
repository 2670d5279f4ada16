"""Holding a study to figures that are known: does each come out again within its interval?

Owns the form of golden figures and the check. A golden mean over n seeds with standard deviation s
foretells the mean of m other seeds within ± t · s · √(1/n + 1/m), t the 97.5 % point of Student's
distribution with n − 1 degrees of freedom: the 95 % prediction interval. The same m seeds of equal
quality fall outside once in twenty times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from scipy.stats import t as student

from fedselect.effects import LEVEL
from fedselect.errors import FedSelectError
from fedselect.policy import Settings
from fedselect.scalars import Real, Whole
from fedselect.study.cells import Result
from fedselect.study.figures import by_cell, difference, estimate
from fedselect.study.grid import Reading, Title

ROUNDING = 0.05  # points: golden figures are given to a tenth


class GoldenCell(Settings):
    """One policy on one split, in percent; ``sd`` over seeds and ``worst`` (client) belong to the
    better reading.
    """

    split: str
    policy: str
    pre: Real
    post: Real
    sd: Real
    worst: Real


class GoldenDifference(Settings):
    """A paired difference: mean and worst client, each a value and its interval's half-width."""

    split: str
    policy: str
    against: str
    reading: Reading
    mean: tuple[Real, Real]
    worst: tuple[Real, Real]
    won: Whole | None = None


class GoldenStability(Settings):
    """Jaccard index of a client's masks under two orders of batches."""

    split: str
    policy: str
    jaccard: Real


class GoldenBelow(Settings):
    """Shares of clients more than 2 points below each baseline, all seeds together."""

    split: str
    policy: str
    local: Real
    fedavg: Real


class Golden(Settings):
    """Known figures, means over ``seeds`` seeds; what has no interval is shown, not judged."""

    source: Title
    seeds: Whole
    cells: tuple[GoldenCell, ...]
    differences: tuple[GoldenDifference, ...]
    stability: tuple[GoldenStability, ...] = ()
    below: tuple[GoldenBelow, ...] = ()


@dataclass(frozen=True)
class Check:
    """One golden figure beside ours, in percent or points; ``half`` is how far ours may be off."""

    split: str
    what: str
    golden: float
    found: float
    half: float
    seeds: int

    @property
    def inside(self) -> bool:
        """Whether it came out again."""
        return abs(self.found - self.golden) <= self.half


def read_golden(path: Path) -> Golden:
    """Read golden figures.

    Raises:
        FedSelectError: ``study_invalid``.
    """
    try:
        return Golden.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise FedSelectError(
            f"{path} holds no golden figures: {error}", code="study_invalid"
        ) from error


def check(golden: Golden, results: Iterable[Result]) -> list[Check]:
    """Every golden figure that the results can be held to, in the order of the golden file."""
    known = list(results)
    return [*_cells(golden, known), *_differences(golden, known)]


def _cells(golden: Golden, results: list[Result]) -> Iterator[Check]:
    known = by_cell(results)
    for each in golden.cells:
        seeds = known.get((each.split, each.policy))
        if seeds is None:
            continue
        reading = "pre" if each.pre > each.post else "post"
        found = estimate([float(r.accuracies(reading).mean()) for r in seeds.values()])
        half = _half(each.sd, golden.seeds, found.count)
        value = max(each.pre, each.post)
        what = f"{each.policy}, {reading}"
        yield Check(each.split, what, value, found.mean, half, found.count)


def _differences(golden: Golden, results: list[Result]) -> Iterator[Check]:
    known = by_cell(results)
    for each in golden.differences:
        ours = difference(known, each.split, each.policy, each.against, each.reading)
        if ours is None:
            continue
        pairs = (("mean", each.mean, ours.mean), ("worst client", each.worst, ours.worst))
        for name, (value, half), found in pairs:
            sd = half * math.sqrt(golden.seeds) / _t(golden.seeds)
            what = f"{each.policy} − {each.against}, {each.reading}, {name}"
            allowed = _half(sd, golden.seeds, found.count)
            yield Check(each.split, what, value, found.mean, allowed, found.count)


def _half(sd: float, seeds: int, ours: int) -> float:
    return _t(seeds) * sd * math.sqrt(1 / seeds + 1 / ours) + ROUNDING


def _t(seeds: int) -> float:
    return float(student.ppf(0.5 + LEVEL / 2, seeds - 1))
