"""The register of benchmarks, and what they share: figures with references, fair timing.

A benchmark is a function in a module of this folder with the decorator :func:`bench`. It gets a
:class:`Room` and the numbers of its size, runs in a process of its own (``python -m bench``), and
returns an :class:`Outcome`. A figure is never bare: the machine is shared, so a subject and its
reference are measured in the same run, taking turns where they can, and what counts is their ratio.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMS = ("quick", "full")
FOLDER = Path(__file__).parent
Json = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One comparison: a subject, its named reference, and the ratio of the two that is wanted.

    ``wanted`` is the largest ratio that will do (the smallest with ``at_least``); without it the
    figure is for information. Where a target is a plain limit (150 ms, 500 MiB), that limit is the
    reference, ``against`` says so ("the limit"), and the ratio wanted is 1.
    """

    what: str
    subject: float
    against: str
    reference: float
    wanted: float | None = None
    unit: str = "ms"
    at_least: bool = False

    @property
    def ratio(self) -> float:
        return self.subject / self.reference

    @property
    def verdict(self) -> str:
        if self.wanted is None:
            return "–"
        met = self.ratio >= self.wanted if self.at_least else self.ratio <= self.wanted
        return "met" if met else "missed"


@dataclass(frozen=True)
class Curve:
    """One line of a plot. Curves with the same ``plot`` share it; all its x and y units agree."""

    plot: str  # its title: "round time against clients"
    name: str  # of this line
    x: Sequence[float]
    y: Sequence[float]
    axes: tuple[str, str] = ("clients", "ms")


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found. ``notes`` are sentences that belong below the table."""

    figures: Sequence[Figure]
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = ()


@dataclass
class Room:
    """Where a benchmark works: an empty folder of its own; what is undone at the end."""

    folder: Path
    cleanup: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True)
class Bench:
    """One registered benchmark. ``quick`` and ``full`` are its sizes, ``minutes`` the limits.

    Without a quick size it has only a full form: small, it would show what another one shows.
    """

    name: str
    module: str
    quick: Json | None
    full: Json
    minutes: tuple[float, float]
    run: Callable[..., Outcome]

    def size(self, form: str) -> Json | None:
        return self.quick if form == "quick" else self.full

    def limit(self, form: str) -> float:
        """Seconds after which a run of it is ended."""
        return 60 * self.minutes[FORMS.index(form)]


REGISTER: dict[str, Bench] = {}


def bench(
    *, quick: Json | None, full: Json, minutes: tuple[float, float]
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register a function ``run(room, **size)`` under its own name.

    All quick forms together must end within three minutes, so a quick one has a few seconds.
    """

    def register(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
        name = run.__name__
        assert name not in REGISTER, f"two benchmarks are called {name}"
        REGISTER[name] = Bench(name, run.__module__, quick, full, minutes, run)
        return run

    return register


def all_benches() -> dict[str, Bench]:
    """Every benchmark there is, in the order of their modules' names."""
    for module in sorted(FOLDER.glob("[a-z]*.py")):
        importlib.import_module(f"bench.{module.stem}")
    return dict(REGISTER)


def medians(
    subjects: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of each subject in ms; they take turns, and the first turn does not count.

    ``clock=time.process_time`` counts the processor's time of all threads: what one thread computes
    is measured so, because it does not wait for whoever else uses the machine.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(repeats + 1):
        for name, took in _turn(subjects, clock):
            if turn:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


def _turn(
    subjects: Mapping[str, Callable[[], object]], clock: Callable[[], float]
) -> Iterator[tuple[str, float]]:
    for name, run in subjects.items():
        begin = clock()
        run()
        yield name, 1000 * (clock() - begin)
