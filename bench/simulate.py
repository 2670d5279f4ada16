"""Clients trained all at once against one by one: whole rounds, and a whole simulation of 1,000.

Both ways simulate the same federation in turns: 10 or 64 features in 10 classes, 50 examples a
client, an MLP F-64-32-10 (3,114 or 6,570 parameters), 20 steps in batches of 20. A round is all of
it: batches, steps, masks, update files written and read, the sum. One thread's processor time.
"""

from __future__ import annotations

from functools import partial
from time import process_time

import numpy as np
import torch
from torch import nn

from bench.harness import Figure, Outcome, Room, bench, medians
from fedselect.policies import preset_run
from fedselect.simulate import Execution, SimulatedRun, simulate
from fedselect.task import Task
from fedselect.tasks.arrays import ArrayTask, mlp

CLASSES, EXAMPLES = 10, 50
ROUNDS = 30
WAYS = {"all at once": True, "one by one": False}


class Clouds(ArrayTask):
    """A client whose examples lie around the same 10 points as everybody's, moved by its own."""

    def __init__(self, client: int, features: int) -> None:
        self._features = features
        centres = np.random.default_rng(0).normal(size=(CLASSES, features))
        rng = np.random.default_rng([1, client])
        labels = np.tile(np.arange(CLASSES), 2 * EXAMPLES // CLASSES)
        noise = rng.normal(size=(len(labels), features))
        points = centres[labels] + 2 * noise + rng.normal(size=features)
        halves = [(points[part], labels[part]) for part in np.split(np.arange(2 * EXAMPLES), 2)]
        super().__init__(halves[0], halves[1], seed=0)

    def network(self) -> nn.Module:
        """MLP F-64-32-10."""
        return mlp(self._features, CLASSES)


@bench(
    quick={"clients": 20, "repeats": 1, "presets": ("fedselect",), "features": (10,), "many": 0},
    full={
        "clients": 200,
        "repeats": 5,
        "presets": ("fedselect", "fisher", "ditto"),
        "features": (10, 64),
        "many": 1000,
    },
    minutes=(1, 30),
)
def simulation(
    _: Room,
    *,
    clients: int,
    repeats: int,
    presets: tuple[str, ...],
    features: tuple[int, ...],
    many: int,
) -> Outcome:
    """Rounds of each model and preset both ways, and how long 1,000 clients take."""
    torch.set_num_threads(1)
    figures = [
        _rounds(_tasks(clients, each), preset, repeats) for each in features for preset in presets
    ]
    return Outcome(figures, notes=[_whole(many, features[-1])] if many else [])


def _tasks(clients: int, features: int) -> dict[str, Task]:
    return {f"site-{number:04}": Clouds(number, features) for number in range(clients)}


def _rounds(tasks: dict[str, Task], preset: str, repeats: int) -> Figure:
    settings = preset_run(preset, rounds=2 * (repeats + 1))  # half of them with a mask
    runs = {
        name: SimulatedRun(tasks, settings, vectorized=vectorized)
        for name, vectorized in WAYS.items()
    }
    for run in runs.values():
        assert run.one_by_one is None
        for _ in range(repeats + 1):
            run.round(run.names)
    subjects = {name: partial(run.round, run.names) for name, run in runs.items()}
    found = medians(subjects, repeats=repeats - 1 or 1, clock=process_time)
    apart = float(np.abs(runs["all at once"].values - runs["one by one"].values).max())
    name = (
        f"a round of {len(tasks)} clients, {runs['one by one'].space.dim:,} parameters, {preset} "
        f"(≤ {apart:.1g} apart)"
    )
    return Figure(name, found["one by one"], "all at once", found["all at once"], 5, at_least=True)


def _whole(clients: int, features: int) -> str:
    tasks = _tasks(clients, features)
    begin = process_time()
    simulate(tasks, preset_run("fedselect", rounds=ROUNDS), execution=Execution(vectorized=True))
    return (
        f"All at once, a whole simulation of {clients:,} clients with {features} features over "
        f"{ROUNDS} rounds, with everybody's scores and everybody's training alone: "
        f"{process_time() - begin:.0f} s of processor time."
    )
