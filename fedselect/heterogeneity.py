"""How differently clients pull, and how different their labels are: indices without their data.

Owns the arithmetic alone: of the updates of one round with its uncertainty (:func:`divergence`), of
one client's own against all together (:func:`apart`), and of counts of labels (:func:`unlike`).
None is a *prediction* of what personalization gains: on the splits we have measured no number taken
from a single round tells which policy wins; only the pilot decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def apart(own: FloatVector, together: FloatVector) -> float | None:
    """1 − cosine of a client's own step (n,) and the step of all together from the same start (n,).

    0: it moves as all do; 1: at right angles; 2: against them. Its own step is one of those that
    the common one is made of, so that of n equal clients with nothing in common each is at
    1 − 1/√n. None: one of them did not move. The cosine of updates is what F. Sattler, K.-R. Müller
    and W. Samek (Clustered Federated Learning, IEEE TNNLS 32:3710, 2021) tell clients apart by.
    """
    length = np.sqrt(_dot(own, own) * _dot(together, together))
    if not length:
        return None
    return float(np.clip(1 - _dot(own, together) / length, 0, 2))


def unlike(own: Mapping[str, int], others: Sequence[Mapping[str, int]]) -> float | None:
    """How far a client's label shares are from the mean ones of others: total variation, 0 to 1.

    Half of what Y. Zhao et al. (Federated Learning with Non-IID Data, arXiv 1806.00582, 2018)
    measure label skew by. None: somebody has no label counted.
    """
    totals = [sum(each.values()) for each in (own, *others)]
    if not others or not all(totals):
        return None
    mine, *theirs = (
        {name: count / total for name, count in each.items()}
        for each, total in zip((own, *others), totals, strict=True)
    )
    names = set().union(mine, *theirs)
    mean = {name: sum(each.get(name, 0) for each in theirs) / len(theirs) for name in names}
    return sum(abs(mine.get(name, 0) - mean[name]) for name in names) / 2


def _dot(one: FloatVector, other: FloatVector) -> float:
    return float(np.dot(one.astype(np.float64), other.astype(np.float64)))


def _index(products: Products, chosen: npt.NDArray[np.int64]) -> float:
    """NaN if one client alone was drawn: it has no pair."""
    pairs = chosen[:, None] != chosen[None, :]
    drawn = products[np.ix_(chosen, chosen)]
    scale = float(np.mean(products[chosen, chosen]))
    return 1 - float(drawn[pairs].mean()) / scale if pairs.any() and scale else float("nan")
