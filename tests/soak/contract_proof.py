"""The interface does what its description says, whoever asks and whatever they ask."""

from __future__ import annotations

import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import httpx

from .proofs import Figures, Room, proof
from .stack import Stack

sys.path.append(str(Path(__file__).parents[1]))  # as pytest finds the other suites' tools
from contract.fuzz import ROLES, fuzz, prepare
from service.factories import make_project


@proof(
    promise="the interface keeps its contract",
    test="Schemathesis as every role: all checks, examples, coverage, fuzzing and stateful links, "
    "against coordinator and worker; every refusal's code must be among those described",
    target="20,000 calls: 0 server errors, 0 schema violations",
    quick={"seconds": 15, "least": 1000},
    full={"seconds": 90, "least": 20_000},
    minutes=(6, 60),
)
def schema_fuzz(room: Room, *, seconds: int, least: int) -> Figures:
    """``seconds`` for each role."""
    found = []
    with Stack(room.folder / "stack") as stack, httpx.Client(base_url=stack.url) as api:
        for role in ROLES:
            project = make_project(stack.core, api)  # type: ignore[arg-type]  # asks alike
            world = prepare(project, role, partial(time.sleep, 0.2))
            options = ["--max-time", str(seconds)]
            folder = room.folder / role
            found.append(fuzz(stack.url, world, folder, role=role, seed=room.seed, options=options))
    calls = sum(each.calls for each in found)
    errors = sum(each.with_status("5") for each in found)
    failures = [failure for each in found for failure in each.failures]
    by_status: Counter[str] = Counter()
    for each in found:
        for answer, count in each.answers.items():
            by_status[answer.split()[1]] += count
    text = (
        f"{calls:,} calls as {len(found)} roles: {errors} server errors, {len(failures)} violations"
    )
    numbers = {
        "calls": {each.role: each.calls for each in found},
        "statuses": dict(sorted(by_status.items())),
        "failures": failures[:30],
    }
    return Figures(calls >= least and not errors and not failures, text, numbers)
