"""Nothing accepted is lost or counted twice, whatever is killed: the one-hot oracle."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

import numpy as np

from fedselect import wire

from . import invariants
from .fleet import Campaign, counted, flat_space, found, plain_settings, play, settle
from .proofs import Figures, Room, proof
from .stack import Stack

# How often each of them is chosen; a site forgets everything but its key in the middle of a call.
TARGETS = {
    "worker": 25,
    "coordinator": 20,
    "scheduler": 5,
    "redis": 12,
    "postgres": 8,
    "s3": 10,
    "site": 20,
}
# A short lease, so that the work of a killed worker is soon taken by another; enough attempts that
# a job does not fail because each of its workers was killed.
# And every round is folded.
SETTINGS = {"lease": 3, "job_attempts": 50, "fold_from": 0}


@proof(
    promise="nothing accepted is lost or counted twice",
    test="one-hot oracle under seeded `kill -9` of worker, coordinator, scheduler, Redis, "
    "PostgreSQL, S3 server and clients",
    target="≥ 500 kills over ≥ 200 rounds, 10,000 uploads: 0 lost, 0 double",
    quick={"rounds": 8, "sites": 8, "kills": 20},
    full={"rounds": 200, "sites": 50, "kills": 500},
    minutes=(4, 90),
)
def kills(room: Room, *, rounds: int, sites: int, kills: int) -> Figures:
    with Stack(room.folder / "stack", **SETTINGS) as stack:
        invariants.arm(stack)
        strikes = Strikes(stack, room.rng, per_round=kills / rounds)
        verdict = asyncio.run(_campaign(stack, strikes, rounds, sites))
        broken = invariants.broken(stack)
    numbers = {
        "rounds": rounds,
        "published": verdict.published,
        "uploads": verdict.counted,
        "kills": strikes.done,
        **{f"kills_{name}": count for name, count in strikes.of.items()},
        "lost": verdict.lost,
        "double": verdict.double,
        "excluded": verdict.excluded,
        "broken": broken[:20],
    }
    met = (
        verdict.published == rounds
        and strikes.done >= kills
        and not (verdict.lost or verdict.double or verdict.excluded or broken)
    )
    text = (
        f"{strikes.done} kills over {verdict.published} rounds, {verdict.counted} uploads: "
        f"{verdict.lost} lost, {verdict.double} double, {len(broken)} invariants broken"
    )
    return Figures(met, text, numbers)


@dataclass
class Strikes:
    """Kills beside every round, at seeded moments: who, and how long after the one before."""

    stack: Stack
    rng: Random
    per_round: float
    owed: float = 0.0
    done: int = 0
    campaign: Campaign | None = None

    def __post_init__(self) -> None:
        self.of = dict.fromkeys(TARGETS, 0)

    async def around(self) -> None:
        self.owed += self.per_round
        while self.owed >= 1:
            await asyncio.sleep(self.rng.expovariate(1))
            target = self.rng.choices(list(TARGETS), list(TARGETS.values()))[0]
            if target == "site":
                if not await self._crash_a_site():
                    continue
            else:
                await asyncio.to_thread(self.stack.kill, target)
            self.of[target] += 1
            self.done += 1
            self.owed -= 1

    async def _crash_a_site(self) -> bool:
        assert self.campaign is not None
        sites = list(self.campaign.sites)
        self.rng.shuffle(sites)
        for site in sites:
            if await site.crash():
                return True
        return False


async def _campaign(stack: Stack, strikes: Strikes, rounds: int, sites: int) -> Verdict:
    settings = plain_settings(rounds, sites)
    campaign = await found(stack, "one-hot", settings, space=flat_space(sites), sites=sites)
    strikes.campaign = campaign
    try:
        await play(campaign, until={"finished", "paused", "stopped"}, around=strikes.around)
    finally:
        await campaign.aclose()
    await asyncio.to_thread(settle, stack)
    return judge(campaign)


@dataclass
class Verdict:
    """What the oracle says: everything but ``published`` and ``counted`` should be 0."""

    published: int = 0
    counted: int = 0
    lost: int = 0  # acknowledged, and not in the version of its round
    double: int = 0  # counted twice, or counted without having been accepted
    excluded: int = 0  # acknowledged, and refused with a reason, or its round was not published


def judge(campaign: Campaign) -> Verdict:
    """Compare what the sites were told with what the published versions hold."""
    acknowledged = campaign.history.completed()
    places = {site.name: site.index for site in campaign.sites}
    query = """SELECT a.id, c.name, a.state, r.state, r.id FROM assignments a
        JOIN rounds r ON r.id = a.round_id JOIN clients c ON c.id = a.client_id
        WHERE a.run_id = %s"""
    times = _times(campaign)
    verdict = Verdict(published=len(times))
    for assignment, name, state, round_state, round_id in campaign.stack.rows(
        query, campaign.run.id
    ):
        mine = float(times[round_id][places[name]]) if round_id in times else 0.0
        exactly = 1.0 if state == "accepted" and round_state == "published" else 0.0
        verdict.counted += exactly == 1.0
        verdict.double += mine > exactly + 1e-3
        verdict.lost += mine < exactly - 1e-3
        verdict.excluded += assignment in acknowledged and exactly == 0.0
    return verdict


def _times(campaign: Campaign) -> dict[object, np.ndarray]:
    """Of every published round: how often each site's update is in it."""
    query = """SELECT r.id, r.number, v.object_key, count(p.id) FROM rounds r
        JOIN versions v ON v.round_id = r.id JOIN updates p ON p.round_id = r.id
        WHERE r.run_id = %s GROUP BY 1, 2, 3"""
    space = flat_space(len(campaign.sites))
    found = {}
    for round_id, number, key, count in campaign.stack.rows(query, campaign.run.id):
        data = campaign.stack.core.storage.read(key)
        values = wire.decode_version(data, space_digest=space.digest, dim=space.dim)
        found[round_id] = counted(values, count, number)
    return found
