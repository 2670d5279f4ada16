"""The state machine is right: simulated lives of a run, each from one seed."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

from .proofs import Figures, Room, proof
from .simulation import World

BATCH = 250


@proof(
    promise="the state machine is right",
    test="deterministic simulation with fake clock, store and queue: kills between any two steps, "
    "lost and doubled messages, clock jumps, zombies; all invariants at every commit",
    target="CI 500 seeds; soak 50,000 seeds, 0 breaks",
    quick={"seeds": 2_000, "processes": 1},
    full={"seeds": 50_000, "processes": 2},
    minutes=(5, 60),
)
def simulated_lives(room: Room, *, seeds: int, processes: int = 1) -> Figures:
    """Live ``seeds`` lives, numbered from the room's seed on."""
    begin = room.seed * 1_000_000
    batches = [(begin + i, min(BATCH, seeds - i)) for i in range(0, seeds, BATCH)]
    if processes == 1:
        results = [lives(*batch) for batch in batches]
    else:
        with ProcessPoolExecutor(processes) as pool:
            results = list(pool.map(lives, *zip(*batches, strict=True)))
    total: Counter[str] = Counter()
    breaks: list[str] = []
    for numbers, broken in results:
        total.update(numbers)
        breaks += broken
    measured = (
        f"{len(breaks)} breaks in {seeds:,} seeds; {total['steps']:,} steps, "
        f"{total['deaths']:,} kills, {total['accepted']:,} updates accepted, "
        f"{total['published']:,} versions, {total['abandoned']:,} rounds abandoned"
    )
    if breaks:
        measured += "; first: " + breaks[0]
    return Figures(not breaks, measured, {**total, "seeds": seeds, "breaks": breaks[:20]})


def lives(first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Sums of what ``count`` seeds did, and what broke."""
    total: Counter[str] = Counter()
    breaks: list[str] = []
    for seed in range(first, first + count):
        try:
            total.update(asdict(World(seed).live()))
        except Exception as error:
            breaks.append(f"seed {seed}: {type(error).__name__}: {error}")
    return total, breaks
