"""Differencing: nothing leaves the coordinator that fewer than k clients made (docs/SECURITY.md).

An attacker has all versions, all delta files and all differences of them; clients join, leave and
change their masks. A thousand rounds on the code that the service aggregates with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from fedselect.aggregate import Contribution, aggregate
from fedselect.bounded import Bounds, bounded
from fedselect.comparing import Comparison
from fedselect.deltafiles import advance
from fedselect.masks import Mask
from fedselect.space import Kind, ParameterSpace, Role

DIM, POOL, ROUNDS = 97, 9, 1000
SPACE = ParameterSpace.of(
    [
        ("a.weight", (DIM - 7,), Kind.WEIGHT, Role.SELECTABLE),
        ("a.bias", (7,), Kind.BIAS, Role.SHARED),
    ]
)
Average = Callable[[np.ndarray, list[Contribution], int], np.ndarray]


@dataclass
class Step:
    """One round: what was published before and by it, and how many stood behind each element."""

    before: np.ndarray
    after: np.ndarray
    sharers: np.ndarray
    movers: np.ndarray
    k: int


def rounds(average: Average, *, seed: int, least: int = 2, count: int = ROUNDS) -> Iterator[Step]:
    """A line of versions, each from a random set of clients that changes by a few at a time."""
    rng = np.random.default_rng(seed)
    version = rng.standard_normal(DIM).astype(np.float32)
    here = set(range(4))
    masks = rng.random((POOL, DIM)) < 0.5
    for _ in range(count):
        here ^= {int(rng.integers(POOL))}  # one joins, or leaves
        here = here or {0}
        changed = int(rng.integers(POOL))
        masks[changed] ^= rng.random(DIM) < 0.1
        k = int(rng.integers(least, least + 3))
        sharers, movers = np.zeros(DIM, int), np.zeros(DIM, int)
        parts = []
        for client in sorted(here):
            mask = Mask.from_bool(masks[client])
            moves = rng.random(DIM) < 0.4  # elsewhere it sends the base as it got it
            values = np.where(moves, version + rng.standard_normal(DIM), version)
            values = values.astype(np.float32)
            sharers += ~masks[client]
            movers += ~masks[client] & (values != version)
            weight = float(rng.integers(1, 50))
            parts.append(Contribution(mask, values[~masks[client]], weight))
        after = average(version, parts, k)
        yield Step(version, after, sharers, movers, k)
        version = after


def deltas(encoding) -> Average:
    """As a run of deltas goes on: the mean of deltas, rounded to what the delta file says."""

    def average(base, parts, k):
        own = []
        for part in parts:
            shared = ~part.mask.to_bool()
            own.append(Contribution(part.mask, part.values - base[shared], part.weight))
        mean = aggregate(np.zeros_like(base), own, k)
        return advance(base, mean, encoding)[0]

    return average


def ruled(bounds: Bounds) -> Average:
    return lambda base, parts, k: bounded(base, parts, [0.5] * len(parts), bounds, k)


WAYS: dict[str, Average] = {
    "f32": aggregate,
    "bf16": deltas("bf16"),
    "int8": deltas("int8"),
    "mean": ruled(Bounds()),
    "trimmed": ruled(Bounds("trimmed_mean", 0.3)),
    "median": ruled(Bounds("median", max_change=0.5)),
}


@pytest.mark.parametrize("name", WAYS)
def test_no_element_changes_that_fewer_than_k_clients_share(name):
    """The definition that holds in every run: k clients sent a value of the element."""
    lone = moved = 0
    for step in rounds(WAYS[name], seed=1):
        changed = step.after.view(np.uint32) != step.before.view(np.uint32)
        moved += int(changed.sum())
        lone += int((changed & (step.sharers < step.k)).sum())
    assert moved > 10_000
    assert lone == 0


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "median"])
def test_with_movers_no_element_changes_that_fewer_than_k_clients_moved(rule):
    """The stronger one: whoever sends the base back hides nobody."""
    lone = moved = 0
    for step in rounds(ruled(Bounds(rule, movers=True)), seed=2):
        changed = step.after != step.before
        moved += int(changed.sum())
        lone += int((changed & (step.movers < step.k)).sum())
    assert moved > 5_000
    assert lone == 0


def test_any_two_versions_differ_by_what_k_clients_sent_in_some_round_between():
    """Joins and leaves: the difference of two versions any number of rounds apart."""
    steps = list(rounds(ruled(Bounds(movers=True)), seed=3))
    rng = np.random.default_rng(4)
    lone = 0
    for _ in range(ROUNDS):
        first = int(rng.integers(ROUNDS - 8))
        between = steps[first : first + int(rng.integers(1, 8))]
        changed = between[0].before != between[-1].after
        backed = np.logical_or.reduce([step.movers >= step.k for step in between])
        lone += int((changed & ~backed).sum())
    assert lone == 0


def test_the_comparison_of_two_versions_counts_no_element_that_fewer_share():
    for step in rounds(aggregate, seed=5, count=50):
        comparison = Comparison(SPACE)
        comparison.add(step.before.tobytes(), step.after.tobytes())
        assert comparison.total().changed <= int((step.sharers >= step.k).sum())


def test_the_test_finds_what_it_is_for():
    """Without a threshold lone contributors are exposed, without movers lone movers are."""
    exposed = alone = 0
    for step in rounds(lambda base, parts, _: aggregate(base, parts, 1), seed=1, count=100):
        exposed += int(((step.after != step.before) & (step.sharers < step.k)).sum())
    for step in rounds(aggregate, seed=1, count=100):
        alone += int(((step.after != step.before) & (step.movers < step.k)).sum())
    assert exposed > 0
    assert alone > 0
