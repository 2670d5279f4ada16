"""The aggregation vectors of ALGORITHM §1.8: what the authors' arithmetic gives, and what ours."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedselect.aggregate import Contribution, aggregate, reference
from fedselect.masks import Mask

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "aggregation.json").read_text())


def floats(values):
    return np.array([np.nan if v is None else v for v in values], dtype=np.float32)


@pytest.fixture
def clients():
    return [(floats(c["theta"]), np.array(c["mask"], dtype=bool)) for c in GOLDEN["clients"]]


def test_the_official_arithmetic_turns_a_personal_nan_into_a_shared_one(clients):
    counts = sum((~mask).astype(int) for _, mask in clients)
    with np.errstate(invalid="ignore"):
        total = sum(theta * (1 - mask) for theta, mask in clients)
    official = np.divide(total, counts, out=total.copy(), where=counts > 0)

    assert counts.tolist() == GOLDEN["official"]["counts"]
    np.testing.assert_array_equal(official, floats(GOLDEN["official"]["values"]))


@pytest.mark.parametrize("rule", [reference, aggregate])
def test_ours_selects_and_keeps_what_nobody_shares(clients, rule):
    parts = [Contribution(Mask.from_bool(mask), theta[~mask]) for theta, mask in clients]

    got = rule(floats(GOLDEN["old"]), parts, GOLDEN["min_contributors"])

    np.testing.assert_array_equal(got, floats(GOLDEN["ours"]["values"]))
    shared = sum((~part.mask.to_bool()).astype(int) for part in parts)
    assert shared.tolist() == GOLDEN["ours"]["counts"]


@pytest.mark.parametrize("rule", [reference, aggregate])
def test_fewer_sharers_than_k_keep_the_old_value(clients, rule):
    parts = [Contribution(Mask.from_bool(mask), theta[~mask]) for theta, mask in clients]

    got = rule(floats(GOLDEN["old"]), parts, 2)

    np.testing.assert_array_equal(got, floats([2, 20, 30]))
