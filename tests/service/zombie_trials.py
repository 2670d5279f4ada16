"""Many zombies in a row: ``trials`` is the long form of ``test_zombies``."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from app.main import create_app
from app.wiring import Coordinator

from .factories import TestClient, make_project
from .zombies import KINDS, Haunted, haunt, haunted, puppet

BOUNDARIES = {"verify": 24, "aggregate": 20, "publish": 18}  # about as many as a job crosses


@dataclass
class Trials:
    """``stale`` zombies changed something; ``spared`` froze when their job was done already, or
    not at all: they do not count as trials.
    """

    trials: int = 0
    stale: int = 0
    spared: int = 0
    log: list[str] = field(default_factory=list)


def trials(core: Coordinator, environment: dict[str, str], *, count: int, seed: int) -> Trials:
    """Freeze workers at ``count`` random boundaries of random jobs, each beyond its lease.

    ``environment`` are the variables of ``core``'s servers; its schema and bucket are there.
    """
    rng, result = random.Random(seed), Trials()
    app = create_app(core.settings)
    with TestClient(app, raise_server_exceptions=False) as api, puppet(environment) as worker:
        app.state.core.close()
        app.state.core = core
        case: Haunted | None = None
        while result.trials < count and result.spared < 10 * count:
            if case is None or result.trials % 20 == 0:
                case = haunted(make_project(core, api))
                case.log = result.log
            kind = rng.choice(KINDS)
            found = haunt(case, worker, kind=kind, point=rng.randint(1, BOUNDARIES[kind]))
            if found is None:
                result.spared += 1
                continue
            result.trials += 1
            result.stale += not found
    return result
