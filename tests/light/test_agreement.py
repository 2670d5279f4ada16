"""How much clients agree, by hand."""

from __future__ import annotations

import numpy as np

from fedselect.aggregate import Contribution
from fedselect.agreement import agreement, dissent
from fedselect.masks import Mask

NAN = np.nan


def vector(*values):
    return np.array(values, dtype=np.float32)


def part(values, *, personal=(), weight=1.0):
    """A client with these values, some elements of which it does not share."""
    own = np.isin(np.arange(len(values)), personal)
    return Contribution(Mask.from_bool(own), vector(*values)[~own], weight)


def test_agreement_is_the_sums_length_over_the_way_gone():
    base = vector(1, 1, 1, 1, 1)
    parts = [
        part([2, 2, 1, 5, 1], personal=[3]),
        part([3, 0, 1, 5, 2], personal=[3]),
        part([2, 1, 1, 0, 0], weight=2),
    ]
    # moved: 1+2+2, 1−1+0, nobody, one client alone, 0+1−2
    np.testing.assert_allclose(agreement(base, parts, 2), [1, 0, NAN, NAN, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(agreement(base, parts, 1)[3], 1)


def test_deltas_are_moved_from_nothing():
    base = vector(5, -3)
    values = [(6.0, -3.5), (4.5, -4.0), (7.0, -2.0)]
    deltas = [part(np.subtract(each, base)) for each in values]
    np.testing.assert_array_equal(
        agreement(base, [part(each) for each in values], 2),
        agreement(np.zeros_like(base), deltas, 2),
    )


def test_only_rounds_with_an_opinion_count():
    rounds = [vector(0.5, NAN, NAN, 1), vector(0.25, 0.75, NAN, 1)]
    np.testing.assert_allclose(dissent(rounds), [1 - 0.375, 0.25, 1, 0])
    np.testing.assert_allclose(dissent(rounds[1:]), [0.75, 0.25, 1, 0])
