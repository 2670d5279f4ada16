"""Masked aggregation against dense arithmetic: a plain addition, the authors', Flower's.

The floor is one dense in-place float32 `add_` of the whole model by torch: what a server that
shares everything and knows no masks must at least do for each client. One thread's processor time,
the clock's where there are two. All times are per client, divisions of a round included; the robust
rules' per round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from time import perf_counter, process_time

import numpy as np
import torch

from bench.harness import Figure, Outcome, Room, bench, medians
from fedselect.aggregate import SHARD, Accumulator, Contribution, aggregate
from fedselect.deltas import SCALE_BLOCK
from fedselect.kernels import LANES
from fedselect.masks import Mask
from fedselect.robust import MEDIAN, Trim, robust

PERSONAL = 0.3
LAYER = 512 * 512 * 9  # elements of a ResNet-18's largest tensors, where most of its weight lies
DENSE = 4  # clients of the dense references: they cost the same for each
Subjects = dict[str, tuple[Callable[[], object], int]]  # with the number of clients of a run


@bench(
    quick={"size": 4_000_000, "clients": 8, "repeats": 5, "rules": (4_000_000, 8)},
    full={"size": 25_000_000, "clients": 16, "repeats": 7, "rules": (11_200_000, 20)},
    minutes=(1, 10),
)
def kernel(_: Room, *, size: int, clients: int, repeats: int, rules: tuple[int, int]) -> Outcome:
    """All figures of the kernel, per client."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    base = rng.standard_normal(size, dtype=np.float32)
    parts = [_part(rng, size) for _ in range(clients)]
    subjects = {**_dense(base), **_masked(rng, base, parts)}
    many = {name: number for name, (_, number) in subjects.items()}
    runs = {name: run for name, (run, _) in subjects.items()}
    found = medians(runs, repeats=repeats, clock=process_time)
    per_client = {name: found[name] / many[name] for name in found}
    figures = [*_figures(per_client, size, clients), _threads(base, parts, runs["floor"])]
    return Outcome([*figures, *_robust(rng, *rules)])


def _threads(base: np.ndarray, parts: list[Contribution], floor: Callable[[], object]) -> Figure:
    """What a second thread is good for, by the clock."""
    out = np.zeros(base.size, dtype=np.float32)
    both = {"floor": floor, "ours": lambda: aggregate(base, parts, 2, out=out, threads=2)}
    found = medians(both, repeats=3, clock=perf_counter)
    name = "the same in 2 threads, by the clock"
    return Figure(name, found["ours"] / len(parts), "dense add_ (floor)", found["floor"])


def _figures(found: dict[str, float], size: int, clients: int) -> list[Figure]:
    name = f"aggregate, {size / 1e6:.0f} M × {clients} clients, {LANES} lanes"
    ours, floor = found.pop("aggregate"), found.pop("floor")
    figures = [
        Figure(name, ours, "dense add_ (floor)", floor, 1.0),
        Figure(name, ours, "the authors' arithmetic", found.pop("authors"), 1 / 30),
        Figure(name, ours, "Flower's dense arithmetic", found.pop("flower"), 1.0),
        Figure(name, ours, "numpy boolean indexing", found.pop("numpy")),
    ]
    return figures + [Figure(what, ms, "dense add_ (floor)", floor) for what, ms in found.items()]


def _robust(rng: np.random.Generator, size: int, clients: int) -> list[Figure]:
    base = np.zeros(size, dtype=np.float32)
    parts = [_part(rng, size) for _ in range(clients)]
    rules = {"median": MEDIAN, "trimmed mean": Trim(0.1)}
    runs = {name: lambda rule=rule: robust(base, parts, rule, 2) for name, rule in rules.items()}
    return [
        Figure(f"{name}, {size / 1e6:.1f} M × {clients} clients", ms, "the limit", 15_000, 1.0)
        for name, ms in medians(runs, repeats=3, clock=process_time).items()
    ]


def _part(rng: np.random.Generator, size: int) -> Contribution:
    mask = Mask.from_bool(rng.random(size, dtype=np.float32) < PERSONAL)
    return Contribution(mask, rng.standard_normal(mask.shared, dtype=np.float32))


def _in_format(rng: np.random.Generator, part: Contribution, kind: str) -> Contribution:
    if kind == "float16":
        return Contribution(part.mask, part.values.astype(np.float16))
    if kind == "bfloat16":
        return Contribution(part.mask, (part.values.view(np.uint32) >> 16).astype(np.uint16))
    scales = rng.random(-(-part.mask.dim // SCALE_BLOCK), dtype=np.float32)
    return Contribution(part.mask, (32 * part.values).clip(-127, 127).astype(np.int8), 1.0, scales)


def _masked(rng: np.random.Generator, base: np.ndarray, parts: list[Contribution]) -> Subjects:
    clients = len(parts)
    weighed = [Contribution(part.mask, part.values, 3.0) for part in parts]
    keep, sums = ~parts[0].mask.to_bool(), np.zeros(base.size)
    out = np.zeros(base.size, dtype=np.float32)  # in place, as the floor is

    def indexing() -> None:
        sums[keep] += parts[0].values

    def run(own: list[Contribution], **how: int) -> tuple[Callable[[], object], int]:
        return lambda: aggregate(base, own, 2, out=out, **how), clients

    coded = {
        f"{kind}": run([_in_format(rng, part, kind) for part in parts])
        for kind in ("bfloat16", "float16", "int8 with scales")
    }
    return {
        "aggregate": run(parts),
        "numpy": (indexing, 1),
        "the same with weights": run(weighed),
        "the same into new memory": (lambda: aggregate(base, parts, 2), clients),
        **coded,
        "the same by shards, as workers do": (lambda: _sharded(base, parts, out), clients),
        "the same spread by AVX2": run(parts, lanes=min(LANES, 8)),
        "the same spread one by one": run(parts, lanes=1),
    }


def _sharded(base: np.ndarray, parts: list[Contribution], out: np.ndarray) -> None:
    taken = [0] * len(parts)
    ranks = [part.mask.block_rank() for part in parts]
    for start in range(0, base.size, SHARD):
        stop = min(start + SHARD, base.size)
        accumulator = Accumulator(stop - start)
        for number, (part, rank) in enumerate(zip(parts, ranks, strict=True)):
            last = int(rank[-(-stop // 65_536)])
            packed = part.mask.packed[start // 8 : -(-stop // 8)]
            accumulator.add(packed, part.values[taken[number] : last])
            taken[number] = last
        accumulator.finish(base[start:stop], 2, out=out[start:stop])


def _dense(base: np.ndarray) -> Subjects:
    """References that know no masks, or handle them densely, tensor by tensor."""
    dense, theta = torch.zeros(base.size), torch.randn(base.size)
    mask = (torch.rand(base.size) < PERSONAL).float()
    layers = [theta.split(LAYER), mask.split(LAYER)]
    arrays = [layer.numpy() for layer in layers[0]]

    def authors() -> None:
        # What their server does in a round: both sums are dense, each inverts the mask anew, and
        # the quotient goes by boolean indexing (ALGORITHM §1.2).
        for own, personal in zip(*layers, strict=True):
            counts, sums = 1 - personal, own * (1 - personal)
            for _ in range(DENSE - 1):
                counts += 1 - personal
                sums += own * (1 - personal)
            sums[counts != 0] /= counts[counts != 0]

    def flower() -> None:
        # Flower's FedAvg `aggregate`: every client's layers times its examples, summed, divided.
        weighed = [[layer * 3 for layer in arrays] for _ in range(DENSE)]
        for layer in zip(*weighed, strict=True):
            reduce(np.add, layer) / (3 * DENSE)

    return {
        "floor": (lambda: dense.add_(theta), 1),
        "authors": (authors, DENSE),
        "flower": (flower, DENSE),
    }
