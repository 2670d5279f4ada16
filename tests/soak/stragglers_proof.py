"""Stragglers do not stop a round: clients that vanish, come late, repeat themselves, send junk."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from uuid import UUID

from fedselect import wire
from fedselect.checkindocs import Assignment
from fedselect.client import announce

from . import invariants
from .fleet import Campaign, Site, flat_space, found, plain_settings, play, settle
from .proofs import Figures, Room, proof
from .stack import Stack

HABITS = {"drop out": 30, "late": 10, "duplicate": 10, "corrupt": 5, "plain": 45}


@proof(
    promise="stragglers do not stop a round",
    test="30 % drop out, 10 % late, 10 % duplicate, 5 % corrupt, anew in every round",
    target="every round with a quorum publishes exactly its good updates, the rest are abandoned",
    quick={"rounds": 4, "deadline": 4},
    full={"rounds": 100, "deadline": 6},
    minutes=(3, 45),
)
def stragglers(room: Room, *, rounds: int, deadline: float) -> Figures:
    with Stack(room.folder / "stack", lease=5) as stack:
        invariants.arm(stack)
        campaign = asyncio.run(_campaign(stack, room.seed, rounds, deadline))
        settle(stack)
        wrong, states = _wrong(campaign)
        broken = invariants.broken(stack)
    habits = Counter(habit for site in campaign.sites for habit in site.did.values())  # type: ignore[attr-defined]
    text = (
        f"{states['published']} rounds published, {states['abandoned']} abandoned, "
        f"{len(wrong)} wrongly; {', '.join(f'{count} {habit}' for habit, count in habits.items())}"
    )
    met = states["published"] == rounds and set(states) <= {"published", "abandoned"} and not wrong
    numbers = {
        "states": dict(states),
        "habits": dict(habits),
        "wrong": wrong,
        "broken": broken[:20],
    }
    return Figures(met and not broken, text, numbers)


async def _campaign(stack: Stack, seed: int, rounds: int, deadline: float) -> Campaign:
    rules = {"goal": 10, "quorum": 6, "over_selection": 1.3, "max_attempts": 100}
    settings = plain_settings(rounds, 10, report_deadline=deadline, selection_deadline=5, **rules)
    campaign = await found(stack, "stragglers", settings, space=flat_space(13), sites=13)
    campaign.sites = [Straggler(**vars(site), seed=seed, did={}) for site in campaign.sites]  # type: ignore[arg-type]
    try:
        await play(campaign, until={"finished", "paused"})
    finally:
        await campaign.aclose()
    return campaign


@dataclass
class Straggler(Site):
    """Draws another habit for every assignment."""

    seed: int = 0
    did: dict[UUID, str] | None = None

    async def deliver(self, work: Assignment) -> None:
        assert self.did is not None
        rng = Random(f"{self.seed}/{self.index}/{work.round}/{work.attempt}/{len(self.did)}")
        habit = rng.choices(list(HABITS), list(HABITS.values()))[0]
        self.did[work.id] = habit
        await self._behave(work, habit, rng)

    async def _behave(self, work: Assignment, habit: str, rng: Random) -> None:
        data = self.upload(self, work)
        if habit == "corrupt":
            data = corrupt(data, rng)
        silent_after = rng.choice(["check-in", "reserve", "put"]) if habit == "drop out" else None
        if silent_after == "check-in":
            return
        for _ in range(1 + (habit == "duplicate")):
            ticket = await self.client.reserve_update(work.id, announce(data))
            if silent_after == "reserve":
                return
            await self.client.put_file(ticket, data)
        if silent_after == "put":
            return
        if habit == "late":
            await asyncio.sleep((work.deadline - datetime.now(UTC)).total_seconds() + 0.2)
        for _ in range(1 + (habit == "duplicate")):
            await self._noted(work, "complete", self.client.complete(ticket.id))


def corrupt(data: bytes, rng: Random) -> bytes:
    """Junk of one of four kinds."""
    values = wire.read_update_layout(data).sections["values"]
    nan = data[: values.start] + struct.pack("<f", float("nan")) + data[values.start + 4 :]
    return rng.choice([data + b"\0", data[:-1], b"\xff" * len(data), nan])


def _wrong(campaign: Campaign) -> tuple[list[str], Counter[str]]:
    """Rounds that did not end as the acknowledged good updates demand, and how all ended."""
    good: Counter[UUID] = Counter()
    habits = {a: habit for site in campaign.sites for a, habit in site.did.items()}  # type: ignore[attr-defined]
    owner = dict(campaign.stack.rows("SELECT id, round_id FROM assignments WHERE kind = 'train'"))
    for assignment in campaign.history.completed():
        good[owner[assignment]] += habits[assignment] != "corrupt"
    query = """SELECT r.id, r.state, count(p.id) FROM rounds r
        LEFT JOIN updates p ON p.round_id = r.id WHERE r.run_id = %s GROUP BY 1, 2"""
    wrong, states = [], Counter[str]()
    for round_id, state, accepted in campaign.stack.rows(query, campaign.run.id):
        states[state] += 1
        right = "published" if good[round_id] >= 6 else "abandoned"
        if state != right or accepted != good[round_id]:
            wrong.append(f"{round_id}: {state}, {accepted} accepted of {good[round_id]} good")
    return wrong, states
