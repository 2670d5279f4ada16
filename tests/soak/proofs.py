"""The register of proofs: what is promised, how large a proof of it is, how it is run.

A proof is a function in a module of this package (``*_proof.py``) with the decorator
:func:`proof`; it gets a :class:`Room` and the numbers of its size, and returns :class:`Figures`.
``python -m tests.soak`` runs them one after the other (see ``__main__``); a tiny size of each may
be called from a test.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMS = ("quick", "full")
Json = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What a proof measured, in words for the table; ``met`` says whether the promise was kept."""

    met: bool
    measured: str
    numbers: Json = field(default_factory=dict)


@dataclass
class Room:
    """Where a proof works: a folder of its own, a seed, and what is undone at the end."""

    folder: Path
    seed: int
    cleanup: ExitStack = field(default_factory=ExitStack)

    @property
    def rng(self) -> random.Random:
        """A generator that begins anew with the seed."""
        return random.Random(self.seed)


@dataclass(frozen=True)
class Proof:
    """One row of the table. ``quick`` and ``full`` are the sizes, ``minutes`` the limits."""

    name: str
    promise: str
    test: str
    target: str
    quick: Json
    full: Json
    minutes: tuple[float, float]
    run: Callable[..., Figures]

    def size(self, form: str) -> Json:
        return self.quick if form == "quick" else self.full

    def limit(self, form: str) -> float:
        """Seconds after which a run of it is ended."""
        return 60 * self.minutes[FORMS.index(form)]


REGISTER: dict[str, Proof] = {}


def proof(
    *, promise: str, test: str, target: str, quick: Json, full: Json, minutes: tuple[float, float]
) -> Callable[[Callable[..., Figures]], Callable[..., Figures]]:
    """Register a function ``run(room, **size)`` under its own name."""

    def register(run: Callable[..., Figures]) -> Callable[..., Figures]:
        name = run.__name__
        assert name not in REGISTER, f"two proofs are called {name}"
        REGISTER[name] = Proof(name, promise, test, target, quick, full, minutes, run)
        return run

    return register


def all_proofs() -> Iterator[Proof]:
    """Every proof there is, in the order of their modules' names."""
    for module in sorted(Path(__file__).parent.glob("*_proof.py")):
        if not module.name.startswith("test_"):
            importlib.import_module(f".{module.stem}", __package__)
    yield from REGISTER.values()
