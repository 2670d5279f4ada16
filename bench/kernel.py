"""Masked aggregation against a dense addition, the authors' arithmetic and numpy's indexing.

The floor is one dense in-place float32 `add_` of the whole model by torch: what a server that
shares everything and knows no masks must at least do for each client. One thread everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bench.harness import Figure, medians
from fedselect.aggregate import Contribution, aggregate
from fedselect.kernels import LANES
from fedselect.masks import Mask

PERSONAL = 0.3


def run(*, quick: bool) -> list[Figure]:
    """All figures of the kernel, per client."""
    size, clients, repeats = (4_000_000, 8, 5) if quick else (25_000_000, 16, 7)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    base = rng.standard_normal(size, dtype=np.float32)
    parts = [_part(rng, size) for _ in range(clients)]
    subjects = _subjects(base, parts)
    found = medians(subjects, repeats=repeats)
    for name in ("aggregate", "aggregate, plain loop"):
        found[name] /= clients
    name = f"aggregate, {size / 1e6:.0f} M × {clients} clients, {LANES} lanes"
    return [
        Figure(name, "dense add_ (floor)", found["aggregate"], found["floor"], 1.0),
        Figure(name, "the authors' arithmetic", found["aggregate"], found["authors"], 1 / 30),
        Figure(name, "numpy boolean indexing", found["aggregate"], found["numpy"]),
        Figure(name, "the plain loop", found["aggregate"], found["aggregate, plain loop"]),
    ]


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
