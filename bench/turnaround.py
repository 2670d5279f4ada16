"""Round time and memory against Flower: the same model, the same clients, nobody trains.

Both systems run on this machine as they are shipped: Flower with SuperLink, SuperNodes and FedAvg
(``bench.flower``), ours with the local stack and `fedselect agent` processes. A round is what lies
between the opening of two rounds; the first ones, in which everything warms up, do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from uuid import UUID

from app.cli import admin_key_file, prepare
from app.localprocess import until
from app.localstack import LocalStack
from bench import flower
from bench.agents import Sites, agents
from bench.harness import Curve, Figure, Outcome, Room, bench
from bench.memory import EVERY, Peaks, processor_time
from bench.still_task import Still
from fedselect import RoundPolicy, RunSettings, Training, wire
from fedselect.client import Client
from fedselect.policies import Policy, Wire, preset
from fedselect.protocol import ModelCreate, RunCreate
from fedselect.training import TorchLearner

WIDTH = 1000
TASK = Path(__file__).with_name("still_task.py")
PATIENCE = 300.0  # seconds for one round, and for everything before the first
# All of the mask is chosen at once, after the second participation, at random over all tensors.
SPARSE = {"score": "random", "growth": 0.3, "limit": 0.3, "start_round": 1, "interval": 100_000}
WARM = {
    "none": 1,
    "sparse": 3,
    "bf16": 3,
}  # rounds that do not count: the first masks travel in the third
FLOWER = "Flower's FedAvg"
NAMES = {
    "none": "f32, nothing personal",
    "sparse": "f32, 30 % personal",
    "bf16": "bf16, 30 % personal",
}
WANTED = {"none": 1 / 2, "sparse": None, "bf16": 1 / 4}
KINDS = {  # of our processes, by a word of their command lines
    "agents": "fedselect agent",
    "object store": "juicefs",
    "judges": "workers.judge",
    "scheduler": "supervise schedule",
    "workers": "celery",
    "coordinator": "uvicorn",
    "PostgreSQL": "postgres",
}
NOTE = (
    "A round is the time between the openings of two. The peak of a process is the kernel's "
    "high-water mark (RSS); the sum over all processes counts shared pages once (PSS)."
)


@dataclass(frozen=True)
class Size:
    """What both systems are given."""

    layers: int
    clients: int
    rounds: int  # that count

    @property
    def millions(self) -> float:
        return self.layers * WIDTH * (WIDTH + 1) / 1e6

    @property
    def text(self) -> str:
        return f"{self.millions:.0f} M × {self.clients} clients"


@dataclass(frozen=True)
class Taken:
    """What one system needed: seconds of a round, peak MiB of what aggregates and of everything."""

    seconds: float
    aggregator: float
    everything: float
    processor: Mapping[str, float] = field(default_factory=dict)  # seconds of a round, by kind


@bench(
    quick={"layers": (2,), "clients": (2,), "rounds": 2, "kinds": ("none",)},
    full={"layers": (6, 12, 25), "clients": (2, 4, 8), "rounds": 5, "kinds": ("none", "bf16")},
    minutes=(3, 60),
)
def turnaround(
    room: Room,
    *,
    layers: tuple[int, ...],
    clients: tuple[int, ...],
    rounds: int,
    kinds: tuple[str, ...],
) -> Outcome:
    """Seconds of a round and memory, against Flower: the largest model with each number of clients,
    and all smaller ones with the second number of them.
    """
    versions = flower.install()
    figures: list[Figure] = []
    against_clients: dict[str, list[float]] = {}
    against_size: dict[str, list[float]] = {}
    middle = clients[len(clients) // 2]
    notes = [f"Flower: {versions}. {NOTE}"]
    for number in clients:
        size = Size(layers[-1], number, rounds)
        found = _both(room, size, kinds)
        figures += _figures(size.text, found)
        notes += [_spent(size.text, NAMES[kind], found[kind]) for kind in kinds]
        _collect(against_clients, found)
        if number == middle:
            for few in layers[:-1]:
                _collect(against_size, _both(room, Size(few, number, rounds), ("none",)))
            _collect(against_size, found)
    sizes = [Size(few, middle, rounds).millions for few in layers]
    millions = f"M parameters, {middle} clients"
    return Outcome(
        figures,
        [
            *_curves("Round time against clients", against_clients, clients, "clients"),
            *_curves("Round time against model size", against_size, sizes, millions),
        ],
        notes,
    )


def _spent(text: str, name: str, taken: Taken) -> str:
    parts = sorted(taken.processor.items(), key=lambda item: -item[1])
    said = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in parts)
    total = sum(taken.processor.values())
    return f"Processor seconds of a round, {text}, {name}: {said}; {total:.1f} in all."


def _both(room: Room, size: Size, kinds: tuple[str, ...]) -> dict[str, Taken]:
    """Flower and then ours, one after the other, with this model and so many clients."""
    place = f"{size.layers}-{size.clients}"
    found = {FLOWER: _flower(room.folder / f"flower-{place}", size)}
    for kind in kinds:
        found[kind] = _ours(room.folder / f"{kind}-{place}", size, kind)
    return found


def _figures(text: str, found: dict[str, Taken]) -> list[Figure]:
    theirs, dense = found[FLOWER], found["none"]
    rounds = [
        Figure(
            f"a round, {text}, {NAMES[kind]}", found[kind].seconds, FLOWER, theirs.seconds, w, "s"
        )
        for kind, w in WANTED.items()
        if kind in found
    ]
    server, everything = "Flower's server process", "all of Flower's"
    return [
        *rounds,
        Figure(
            f"peak of a worker, {text}", dense.aggregator, server, theirs.aggregator, 1 / 2, "MiB"
        ),
        Figure(
            f"all processes, {text}", dense.everything, everything, theirs.everything, None, "MiB"
        ),
    ]


def _collect(curves: dict[str, list[float]], found: dict[str, Taken]) -> None:
    for name in (FLOWER, "none"):
        curves.setdefault(name, []).append(found[name].seconds)


def _curves(
    plot: str, found: dict[str, list[float]], x: Sequence[float], axis: str
) -> Iterator[Curve]:
    for name, y in found.items():
        yield Curve(plot, NAMES.get(name, name), x, y, (axis, "s"))


# --- Flower --------------------------------------------------------------------------------------


def _flower(folder: Path, size: Size) -> Taken:
    rounds = WARM["none"] + size.rounds
    config = {"layers": size.layers, "width": WIDTH, "rounds": rounds}
    with flower.federation(folder, clients=size.clients, **config) as (notes, peaks):

        def over() -> bool:
            flower.check(size.clients)
            return notes.exists() and len(notes.read_text().splitlines()) > rounds

        deadline = time.monotonic() + PATIENCE * (1 + rounds)
        while not over():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Flower's rounds did not end, see {folder.name}")
            time.sleep(EVERY)
        times = [float(line) for line in notes.read_text().splitlines()]
    took = [after - before for before, after in pairwise(times)]
    seconds = statistics.median(took[WARM["none"] :])
    return Taken(seconds, peaks.largest("flwr-serverapp"), peaks.total)


# --- ours ----------------------------------------------------------------------------------------


def _ours(folder: Path, size: Size, kind: str) -> Taken:
    rounds = WARM[kind] + size.rounds
    stack = LocalStack(folder, given={})
    try:
        stack.up(prepare=lambda ready: prepare(stack.root, ready))
        url = stack.environment()["PUBLIC_URL"]
        key = admin_key_file(stack.root).read_text().strip()
        with Client(url, key=key) as owner, Peaks() as peaks:
            run_id = _run(owner, size, kind, rounds=rounds + 1)
            with agents(owner, folder, _sites(size)):
                _await(owner, run_id, WARM[kind])
                before = processor_time(KINDS)
                _await(owner, run_id, rounds)
                spent = processor_time(KINDS)
            opened = sorted(r.opened_at for r in owner.rounds(run_id))
    finally:
        stack.down()
    took = [(b - a).total_seconds() for a, b in pairwise(opened)]
    seconds = statistics.median(took[WARM[kind] : rounds])
    processor = {name: (spent[name] - before[name]) / size.rounds for name in KINDS}
    return Taken(seconds, peaks.largest("celery", " worker "), peaks.total, processor)


def _await(owner: Client, run_id: UUID, rounds: int) -> None:
    """Until so many rounds are published; asks rarely, for whoever asks takes time from them."""
    deadline = time.monotonic() + PATIENCE * (1 + rounds)
    while owner.run(run_id).published < rounds:
        if time.monotonic() > deadline:
            raise TimeoutError(f"round {rounds} was not published in time")
        time.sleep(EVERY)


def _run(owner: Client, size: Size, kind: str, *, rounds: int) -> UUID:
    learner = TorchLearner(Still(size.layers, WIDTH, 0))
    model = owner.create_model(ModelCreate(name="still", space=learner.space.to_json()))
    data = wire.encode_version(learner.space.digest, learner.initial())
    upload = owner.send_weights(model.id, data)
    if not until(lambda: owner.upload(upload.id).state == "accepted", seconds=120):
        raise TimeoutError("the initial weights were not accepted")
    policy = preset("fedavg") if kind == "none" else Policy(name=kind, **SPARSE)
    everybody = {"goal": size.clients, "quorum": size.clients, "over_selection": 1.0}
    settings = RunSettings(
        rounds=rounds,
        policy=policy,
        training=Training(steps=1, learning_rate=1.0),
        round=RoundPolicy(**everybody, retry_after=0.5),
        wire=Wire(encoding="bf16" if kind == "bf16" else "f32"),
    )
    run = owner.create_run(RunCreate(name="still", model_id=model.id, settings=settings))
    return owner.start_run(run.id).id


def _sites(size: Size) -> Sites:
    shape = {"layers": size.layers, "width": WIDTH}
    task = f"{TASK}:Still"
    return {f"site-{n}": (task, {**shape, "number": n}) for n in range(size.clients)}
