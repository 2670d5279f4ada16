"""How differently clients pull: an index from the updates of one round, with its uncertainty.

Owns the arithmetic alone. It is *not a prediction* of what personalization gains: on the splits we
have measured no number taken from a single round tells which policy wins; only the pilot decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedselect.errors import SettingsError
from fedselect.space import FloatVector

RESAMPLES = 2000
LABEL = "not a prediction: only the pilot decides"
Products = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """0: all clients move alike. 1: at right angles, nobody's step is of use to the others. Above
    1: against each other.

    ``low`` and ``high`` bound 95 % (bootstrap over clients). ``noise`` is the same index between
    two trainings of one client that differ in the order of the batches alone: what lies between
    ``noise`` and ``index`` comes from the data.
    """

    clients: int
    index: float
    low: float
    high: float
    noise: float


def divergence(
    first: Sequence[FloatVector], second: Sequence[FloatVector], *, seed: int = 0
) -> Divergence:
    """The index of clients' updates (each (D,)), trained twice from the same version.

    1 − mean over pairs of <u_i, u_j> / mean over clients of |u_i|². Only pairs of different
    clients count, so that it does not depend on their number.

    Raises:
        SettingsError: fewer than 3 clients, or nobody's model moved.
    """
    clients = len(first)
    if clients < 3 or len(second) != clients:
        raise SettingsError(f"divergence needs at least 3 clients, got {clients}")
    products = np.array([[_dot(one, other) for other in first] for one in first])
    if not np.diag(products).any():
        raise SettingsError("no client's model moved, so nothing can be told of their data")
    rng = np.random.default_rng(seed)
    draws = [_index(products, rng.integers(clients, size=clients)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    again = sum(_dot(one, two) for one, two in zip(first, second, strict=True))
    lengths = sum(_dot(one, one) + _dot(two, two) for one, two in zip(first, second, strict=True))
    index = _index(products, np.arange(clients))
    return Divergence(clients, index, float(low), float(high), 1 - 2 * again / lengths)


def _dot(one: FloatVector, other: FloatVector) -> float:
    return float(np.dot(one.astype(np.float64), other.astype(np.float64)))


def _index(products: Products, chosen: npt.NDArray[np.int64]) -> float:
    """NaN if one client alone was drawn: it has no pair."""
    pairs = chosen[:, None] != chosen[None, :]
    drawn = products[np.ix_(chosen, chosen)]
    scale = float(np.mean(products[chosen, chosen]))
    return 1 - float(drawn[pairs].mean()) / scale if pairs.any() and scale else float("nan")
