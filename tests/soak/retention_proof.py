"""A deletion dies at every place that it comes to; nothing is lost, forgotten or left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app import wiring
from app.cli import migrate
from app.failpoints import DIED
from app.localstack import LocalStack
from app.main import create_app
from app.objects import check_objects
from tests.service.campaign import Campaign
from tests.service.factories import TestClient, make_project

from .proofs import Figures, Room, proof

# Nothing is too young, and a batch is so small that every trial finds work.
EAGER = {"RECOMPUTE_WINDOW": "0", "RETAIN_ORPHANS": "0.05", "GC_BATCH": "1"}
BUSY = {"UPLOADS_PER_MINUTE": "100000"}  # two clients send what would take them days
COLLECT = "from app import retention, wiring; retention.collect(wiring.build(), batches=1)"
ROUNDS = 16  # for one trial of every place: two updates each, and a trial deletes one or two
# Updates first, so that every trial comes by the same places.
AGE = """UPDATE objects SET claimed_at = claimed_at - interval '1 day' -
    interval '1 hour' * (key LIKE 'accepted/%')::int"""
BEGUN = """SELECT count(*) FILTER (WHERE action = 'deletion.begun') -
    count(*) FILTER (WHERE action = 'deletion.done') FROM ledger_entries"""


@proof(
    promise="a deletion that dies anywhere is ended by whoever comes next",
    test="a collection dies at every place that it comes to, then another one runs",
    target="0 objects without a row, 0 rows without an object, every intent has its outcome",
    quick={"times": 1},
    full={"times": 20},
    minutes=(6, 60),
)
def collector_dies(room: Room, *, times: int) -> Figures:
    with _deployment(room) as (campaign, environment):
        for number in range(ROUNDS * times + 2):  # the last one is pinned
            campaign.round(number)
        campaign.project.sql(AGE)
        places = _places(room.folder / "visits", environment)
        died = broken = 0
        for place in places * times:
            died += _collect(environment, f"{place}:1") == DIED
            between = check_objects(campaign.core)
            finished = _collect(environment) == 0
            after = check_objects(campaign.core)
            ((open_intents,),) = campaign.project.sql(BEGUN)
            whole = between.ok and after.ok and not after.unfinished and not open_intents
            broken += not (whole and finished)
    trials = len(places) * times
    return Figures(
        met=died == trials and not broken,
        measured=f"{died} deaths at {len(places)} places, {broken} broken",
        numbers={"places": places, "trials": trials, "died": died, "broken": broken},
    )


@contextmanager
def _deployment(room: Room) -> Iterator[tuple[Campaign, dict[str, str]]]:
    stack = LocalStack(room.folder / "stack", durable=False, given={})
    stack.up(product=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**stack.environment(), **BUSY}.items():
            patch.setenv(name, value)
        migrate()
        core = wiring.build()
        app = create_app(core.settings)
        with TestClient(app, raise_server_exceptions=False) as api:
            app.state.core.close()
            app.state.core = core
            campaign = Campaign(make_project(core, api), rounds=1000, published=0)
            yield campaign, {**os.environ, **EAGER}
        core.close()


def _places(folder: Path, environment: dict[str, str]) -> list[str]:
    """Where a collection that has something to do comes by, in the order of the first visits."""
    folder.mkdir()
    assert _collect(environment, str(folder)) == 0
    return list(dict.fromkeys((folder / "visits").read_text().split()))


def _collect(environment: dict[str, str], order: str = "") -> int:
    command = [sys.executable, "-c", COLLECT]
    return subprocess.run(
        command, env={**environment, "FAILPOINT": order}, timeout=120, check=False
    ).returncode
