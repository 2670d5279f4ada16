"""How much clients agree on where an element should go, as the coordinator sees it.

Owns agreement and its mean over rounds. In a round, with w_i the weights of the clients that share
element j and Δ_ij what each of them has moved it by,

    agreement_j = |Σ_i w_i·Δ_ij| / Σ_i w_i·|Δ_ij|        in [0, 1]

where at least k clients share it and one of them moves it; elsewhere the round has no opinion. What
a version says is the mean over those of the last rounds before it that have one. Source: our own;
the sign consistency of gradients over environments (Parascandolo et al., ICLR 2021, arXiv
2009.00329), over clients and with magnitudes. Must not know how it is used (``selection``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedselect.aggregate import Contribution, exact
from fedselect.space import FloatVector


def agreement(base: FloatVector, parts: Sequence[Contribution], k: int) -> FloatVector:
    """Agreement of a round's clients, shape (D,), NaN without an opinion; sums in float64.

    ``base`` (D,) is what values are moved from: the version, or zeros if they are deltas.
    """
    total, way = np.zeros(base.size), np.zeros(base.size)
    counts = np.zeros(base.size, dtype=np.int64)
    for part in parts:
        shared = np.flatnonzero(~part.mask.to_bool())
        moved = part.weight * (exact(part.values, part.scales, shared) - base[shared])
        total[shared] += moved
        way[shared] += np.abs(moved)
        counts[shared] += 1
    known = (counts >= k) & (way > 0)
    found = np.divide(np.abs(total), way, out=np.full(base.size, np.nan), where=known)
    return np.asarray(found, dtype=np.float32)


def dissent(rounds: Sequence[FloatVector]) -> FloatVector:
    """1 − the mean agreement over at least one round, shape (D,); 1 where none has an opinion."""
    known = [~np.isnan(each) for each in rounds]
    counts = np.sum(known, axis=0)
    total = np.sum([np.where(k, each, 0.0) for k, each in zip(known, rounds, strict=True)], axis=0)
    mean = np.divide(total, counts, out=np.zeros(counts.shape), where=counts > 0)
    return np.asarray(np.maximum(1 - mean, 0), dtype=np.float32)
