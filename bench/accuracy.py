"""What encoded deltas cost in accuracy: the same runs with f32, bf16 and int8, paired by seed.

All runs are simulations, which compute what the service computes bit for bit. A loss is the
difference of the mean accuracies over clients and seeds, in points; the same seed means the same
starting weights, data and batches, so that only the encoding differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bench.harness import Figure, Outcome, Room, bench

LIMIT = 0.3  # points that an encoding may cost
KINDS = {"post": "own model", "pre": "shared model with its personal part"}
QUICK = {"tasks": {"digits": 10}, "seeds": [0], "encodings": ["int8"]}
FULL = {
    "tasks": {"digits": 20, "watch": 20, "fashion-mnist": 20},
    "seeds": [0, 1, 2],
    "encodings": ["bf16", "int8"],
}
Scores = dict[str, float]


@bench(quick=QUICK, full=FULL, minutes=(1, 30))
def accuracy(
    _room: Room, *, tasks: dict[str, int], seeds: Sequence[int], encodings: Sequence[str]
) -> Outcome:
    import torch

    torch.set_num_threads(1)
    figures, notes = [], []
    for task, rounds in tasks.items():
        plain = [_scores(task, rounds, seed, "f32") for seed in seeds]
        for encoding in encodings:
            coded = [_scores(task, rounds, seed, encoding) for seed in seeds]
            figures += _figures(f"{task}, {encoding}", plain, coded)
        means = {kind: 100 * fmean(each[kind] for each in plain) for kind in KINDS}
        notes.append(
            f"{task}: 10 clients, {rounds} rounds, {len(seeds)} seeds; with f32 "
            + ", ".join(f"{name} {means[kind]:.1f} %" for kind, name in KINDS.items())
        )
    return Outcome(figures, notes=notes)


def _figures(what: str, plain: Sequence[Scores], coded: Sequence[Scores]) -> list[Figure]:
    return [
        Figure(
            f"{what}: accuracy lost, {name}",
            100 * fmean(p[kind] - c[kind] for p, c in zip(plain, coded, strict=True)),
            "the limit",
            LIMIT,
            wanted=1,
            unit="points",
        )
        for kind, name in KINDS.items()
    ]


def _scores(task: str, rounds: int, seed: int, encoding: str) -> Scores:
    from fedselect.policies import Wire, preset_run
    from fedselect.simulate import simulate
    from fedselect.tasks import client_tasks

    wire = Wire.model_validate({"encoding": encoding})
    settings = preset_run("fedselect", rounds=rounds, seed=seed, wire=wire)
    result = simulate(client_tasks(task, seed=seed), settings)
    return {
        kind: fmean(scores[kind].accuracy for scores in result.scores.values()) for kind in KINDS
    }
