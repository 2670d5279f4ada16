"""Masked aggregation against a dense addition, the authors' arithmetic and numpy's indexing.

The floor is one dense in-place float32 `add_` of the whole model by torch: what a server that
shares everything and knows no masks must at least do for each client. One thread everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bench.harness import Figure, Outcome, Room, bench, medians
from fedselect.aggregate import Contribution, aggregate
from fedselect.kernels import LANES
from fedselect.masks import Mask

PERSONAL = 0.3


@bench(
    quick={"size": 4_000_000, "clients": 8, "repeats": 5},
    full={"size": 25_000_000, "clients": 16, "repeats": 7},
    minutes=(1, 10),
)
def kernel(_: Room, *, size: int, clients: int, repeats: int) -> Outcome:
    """All figures of the kernel, per client."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    base = rng.standard_normal(size, dtype=np.float32)
    parts = [_part(rng, size) for _ in range(clients)]
    subjects = _subjects(base, parts)
    found = medians(subjects, repeats=repeats)
    for name in ("aggregate", "aggregate, plain loop"):
        found[name] /= clients
    name = f"aggregate, {size / 1e6:.0f} M × {clients} clients, {LANES} lanes"
    ours = found["aggregate"]
    return Outcome(
        [
            Figure(name, ours, "dense add_ (floor)", found["floor"], 1.0),
            Figure(name, ours, "the authors' arithmetic", found["authors"], 1 / 30),
            Figure(name, ours, "numpy boolean indexing", found["numpy"]),
            Figure(name, ours, "the plain loop", found["aggregate, plain loop"]),
        ]
    )


def _part(rng: np.random.Generator, size: int) -> Contribution:
    mask = Mask.from_bool(rng.random(size, dtype=np.float32) < PERSONAL)
    return Contribution(mask, rng.standard_normal(mask.shared, dtype=np.float32))


def _subjects(base: np.ndarray, parts: list[Contribution]) -> dict[str, Callable[[], object]]:
    size = base.size
    theta = torch.randn(size)
    mask = torch.from_numpy(parts[0].mask.to_bool()).float()
    dense, total, count = torch.zeros(size), torch.zeros(size), torch.zeros(size)
    keep, sums = ~parts[0].mask.to_bool(), np.zeros(size)

    def authors() -> None:
        # What their server does with each client: both products are dense (ALGORITHM §1.2).
        shared = 1 - mask
        total.add_(shared * theta)
        count.add_(shared)

    def indexing() -> None:
        sums[keep] += parts[0].values

    return {
        "aggregate": lambda: aggregate(base, parts, 2),
        "aggregate, plain loop": lambda: aggregate(base, parts, 2, lanes=1),
        "floor": lambda: dense.add_(theta),
        "authors": authors,
        "numpy": indexing,
    }
