"""Redis is disposable: emptied, killed or away for a minute in the middle of a round."""

from __future__ import annotations

import asyncio
import time
from random import Random

from . import invariants
from .fleet import Campaign, flat_space, found, plain_settings, play, settle
from .kills_proof import judge
from .proofs import Figures, Room, proof
from .stack import Stack

RESUMED = 60  # seconds within which a round must go on once Redis is back
SETTINGS = {"lease": 3}
FAULTS = ("flush", "kill", "down")


@proof(
    promise="Redis is disposable",
    test="FLUSHALL, `kill -9`, and a time without Redis, each in the middle of rounds",
    target=f"every round finishes, published ≤ {RESUMED} s after Redis is back; 0 lost, 0 double",
    quick={"times": 1, "sites": 6, "away": 8},
    full={"times": 10, "sites": 20, "away": 60},
    minutes=(4, 60),
)
def redis(room: Room, *, times: int, sites: int, away: float) -> Figures:
    with Stack(room.folder / "stack", **SETTINGS) as stack:
        invariants.arm(stack)
        trouble = Trouble(stack, room.rng, away, list(FAULTS) * times)
        rounds = len(trouble.left)
        campaign = asyncio.run(_campaign(stack, trouble, rounds, sites))
        settle(stack)
        verdict, broken = judge(campaign), invariants.broken(stack)
        waits = _waits(stack, trouble.back)
    slowest = max(waits, default=float("inf"))
    met = verdict.published == rounds and len(waits) == rounds and slowest <= RESUMED
    met = met and not (verdict.lost or verdict.double or verdict.excluded or broken)
    text = (
        f"{rounds} faults in {verdict.published} rounds, {verdict.counted} uploads, published at "
        f"most {slowest:.1f} s after Redis was back; {verdict.lost} lost, {verdict.double} double"
    )
    return Figures(met, text, {"waits": waits, "broken": broken[:20]})


class Trouble:
    """Does the next fault beside every round; ``back`` tells when Redis was there again."""

    def __init__(self, stack: Stack, rng: Random, away: float, faults: list[str]) -> None:
        self._stack, self._rng, self._away = stack, rng, away
        self.left = faults
        self.back: list[float] = []

    async def around(self) -> None:
        if self.left:
            await asyncio.sleep(self._rng.uniform(0, 1.5))
            await asyncio.to_thread(self._do, self.left.pop(0))
            self.back.append(time.time())

    def _do(self, fault: str) -> None:
        if fault == "flush":
            with self._stack.redis() as client:
                client.flushall()
            return
        self._stack.stop("redis")
        if fault == "down":
            time.sleep(self._away)
        self._stack.start("redis", wait=True)


async def _campaign(stack: Stack, trouble: Trouble, rounds: int, sites: int) -> Campaign:
    settings = plain_settings(rounds, sites)
    campaign = await found(stack, "redis", settings, space=flat_space(sites), sites=sites)
    try:
        await play(campaign, until={"finished", "paused"}, around=trouble.around)
    finally:
        await campaign.aclose()
    return campaign


def _waits(stack: Stack, back: list[float]) -> list[float]:
    """Seconds from every return of Redis to the next version; 0 if none was waiting for it."""
    query = "SELECT extract(epoch FROM closed_at)::float8 FROM rounds ORDER BY closed_at"
    ends = [row[0] for row in stack.rows(query) if row[0] is not None]
    return [max(0.0, end - moment) for end, moment in zip(ends, back, strict=False)]
