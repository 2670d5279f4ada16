"""Clipping: how long an update's change is, and the factor that brings it within a bound.

Owns the norm of a change, the bound of a round (fixed, or a quantile of norms) and the factor. All
of it is the same number on every machine, whatever the ranges it is formed over. Must not know
rounds, files or where norms are kept.

A change is an update's value less its base, element by element, 0 where the element is personal.
Every sum over clients that must not follow a single one of them clips changes with these functions:
bounded influence and differential privacy alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LANES = 4096  # partial sums of squares: a piece of a range has a multiple of so many elements

Changes = npt.NDArray[np.float64]


class SquareSum:
    """Σ d² over an update's changes, in an order that no cut of the range alters.

    Element j is added to lane j mod 4,096, each lane in ascending j; the lanes are then added
    without rounding. Nothing is left to a library's choice of order.
    """

    def __init__(self) -> None:
        self._lanes = np.zeros(LANES)

    def add(self, changes: Changes) -> None:
        """The changes of the next elements, shape (n,); n is a multiple of 4,096 but at the end."""
        whole = changes.size // LANES * LANES
        for row in changes[:whole].reshape(-1, LANES):
            self._lanes += row * row
        rest = changes[whole:]
        self._lanes[: rest.size] += rest * rest

    def norm(self) -> float:
        """The Euclidean length of what was added."""
        return math.sqrt(math.fsum(self._lanes))


def norm(changes: Changes) -> float:
    """The Euclidean length of a whole change, shape (D,)."""
    total = SquareSum()
    total.add(changes)
    return total.norm()


def clip_factor(length: float, bound: float | None) -> float:
    """What a change of this length is multiplied by so that it is no longer than ``bound``."""
    return 1.0 if bound is None or length <= bound else bound / length


def quantile(norms: Sequence[float], share: float) -> float:
    """The smallest of ``norms`` that at least ``share`` (0 to 1) of them do not exceed.

    Nearest rank: the bound is one of the norms, so no interpolation has to be agreed on.

    Raises:
        ValueError: there are no norms.
    """
    if not norms:
        raise ValueError("there is no quantile of nothing")
    rank = math.ceil(round(share * len(norms), 9))
    return sorted(norms)[max(rank, 1) - 1]


def round_bound(
    fixed: float | None, share: float | None, *, before: Sequence[float], own: Sequence[float]
) -> float | None:
    """The bound of a round; None where nothing is clipped.

    With ``share`` it follows the norms that the round before accepted, in the first round this
    round's own, and never exceeds ``fixed`` if that is given, too.
    """
    norms = before or own
    if share is None or not norms:
        return fixed
    found = quantile(norms, share)
    return found if fixed is None else min(found, fixed)
