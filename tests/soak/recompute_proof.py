"""Recomputable: whatever the order, the number of workers and the restarts, the same bytes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from functools import partial
from random import Random

import numpy as np

from fedselect import Mask, ParameterSpace
from fedselect.checkindocs import Assignment
from fedselect.manifestdocs import SHARD, Manifest
from fedselect.recompute import recompute
from fedselect.space import Kind, Role

from . import invariants
from .fleet import Campaign, Site, encode, found, plain_settings, play, settle
from .proofs import Figures, Room, proof
from .stack import Stack

WORKERS = (1, 2, 4)


@proof(
    promise="a published version is recomputable",
    test="random values and masks, shuffled arrival, 1, 2 and 4 workers, restarts, sums formed "
    "while updates arrive; some models have several shards",
    target="1,000 of 1,000 rounds: the SHA-256 of the 30-line reference",
    quick={"runs": 3, "rounds": 4, "large_rounds": 1},
    full={"runs": 24, "rounds": 41, "large_rounds": 16},
    minutes=(4, 90),
)
def recomputable(room: Room, *, runs: int, rounds: int, large_rounds: int) -> Figures:
    """``runs`` × ``rounds`` of small models side by side, and ``large_rounds`` of a large one."""
    with Stack(room.folder / "stack", lease=3, job_attempts=50, fold_from=0) as stack:
        invariants.arm(stack)
        same = total = 0
        for number, workers in enumerate(WORKERS):
            stack.extra_workers(workers)
            share = range(number, runs, len(WORKERS))
            asyncio.run(_runs(stack, room.seed, [f"small-{n}" for n in share], rounds, 2000))
        asyncio.run(_runs(stack, room.seed, ["large"], large_rounds, SHARD + 4321))
        settle(stack)
        for matches in _compared(stack):
            total += 1
            same += matches
        broken = invariants.wrong_rows(stack)
    wanted = runs * rounds + large_rounds
    text = f"{same} of {total} rounds have the SHA-256 of the reference"
    numbers = {"rounds": total, "same": same, "broken": broken[:20]}
    return Figures(same == total == wanted and not broken, text, numbers)


async def _runs(stack: Stack, seed: int, names: list[str], rounds: int, elements: int) -> None:
    """Several runs at a time; a worker is killed and started again now and then."""
    campaigns = [
        await _found(stack, Random(f"{seed}/{name}"), name, rounds, elements) for name in names
    ]
    restarts = asyncio.create_task(_restart(stack, Random(f"{seed}/{names}"), len(stack.extra)))
    try:
        states = await asyncio.gather(*(play(c, until={"finished", "paused"}) for c in campaigns))
    finally:
        restarts.cancel()
        for campaign in campaigns:
            await campaign.aclose()
    assert set(states) <= {"finished"}, states


async def _restart(stack: Stack, rng: Random, workers: int) -> None:
    while True:
        await asyncio.sleep(rng.uniform(15, 45))  # a worker needs some seconds to start
        await asyncio.to_thread(stack.extra_workers, workers)


async def _found(stack: Stack, rng: Random, name: str, rounds: int, elements: int) -> Campaign:
    sites = rng.randint(2, 12)
    space = ParameterSpace.of(
        [
            ("w", (elements,), Kind.WEIGHT, Role.SELECTABLE),
            ("b", (7,), Kind.BIAS, Role.SHARED),
        ]
    )
    k, patience = rng.randint(1, 2), 900  # on a busy machine, too, nobody is to be too late here
    late = {f"{name}_deadline": patience for name in ("selection", "report")}
    settings = plain_settings(rounds, sites, personal=True, min_contributors=k, **late)
    upload = partial(_drawn, space=space)
    return await found(stack, name, settings, space=space, sites=sites, upload=upload)


def _drawn(site: Site, work: Assignment, *, space: ParameterSpace) -> bytes:
    """Random values, and a mask of the client's own that changes in every third round."""
    number = work.round or 0
    mask_rng = np.random.default_rng([site.index, number // 3])
    drawn = Mask.from_bool(mask_rng.random(space.dim) < 0.3)
    lower, upper = work.run.settings.policy.bounds(space)
    theta = np.random.default_rng([site.index, number]).normal(size=space.dim).astype(np.float32)
    return encode(work, theta, lower | (drawn & upper))


def _compared(stack: Stack) -> list[bool]:
    query = "SELECT v.sha256, m.body FROM versions v JOIN manifests m USING (round_id)"
    read = stack.core.storage.read
    return [
        hashlib.sha256(recompute(Manifest.model_validate(json.loads(body)), read)).hexdigest()
        == sha256
        for sha256, body in stack.rows(query)
    ]
