"""A crash at any boundary: processes die at every failpoint, and the round completes."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from uuid import UUID

from fedselect.checkindocs import Assignment

from . import invariants
from .fleet import Site, flat_space, found, plain_settings, play, settle
from .proofs import Figures, Room, proof
from .rolling_out import roll_out
from .stack import Stack

PAGE = Path(__file__).parents[2] / "docs" / "RELIABILITY.md"
SITES = 9  # one more than a group, so that something is folded
SETTINGS = {"lease": 2, "job_attempts": 50, "fold_from": 0}


@proof(
    promise="a crash at any boundary does no harm",
    test="a process dies at a named failpoint in a round from enrolment to the sealed ledger and "
    "the rollout of its version; "
    "seeds vary which visit, the order of clients and what else dies in the same round",
    target="100 % of ≥ 25 points, each × 20, no invariant broken",
    quick={"times": 1, "at_once": 8, "most": 24},
    full={"times": 20, "at_once": 8, "most": None},
    minutes=(5, 150),
)
def failpoints(room: Room, *, times: int, at_once: int, most: int | None) -> Figures:
    """``at_once`` crashes a round, ``times`` at every point, or at ``most`` of them only."""
    places = Places(room.folder / "failpoints")
    with Stack(room.folder / "stack", failpoint=places.folder, **SETTINGS) as stack:
        invariants.arm(stack)
        round_trip(stack, "recorded", room.rng, wait_for=places.ticked)
        visits = places.visits()
        every, sometimes = documented()
        unlisted = sorted({base(place) for place in visits} - every - sometimes)
        aimed = [place for place in sorted(visits) if base(place) in every]
        aimed = room.rng.sample(aimed, most or len(aimed))
        owed = Counter(dict.fromkeys(aimed, times))
        broken: dict[str, str] = {}  # a violation and the trial that showed it first
        trial = 0
        # A place that is not reached again in a trial is tried again, but not for ever.
        while owed.total() and trial < 3 * times * len(aimed) / at_once + 3:
            trial += 1
            rng = Random(f"{room.seed}/{trial}")
            chosen = rng.sample(sorted(owed), min(at_once, len(owed)))
            places.arm({place: rng.randint(1, min(3, visits[place])) for place in chosen})
            round_trip(stack, f"trial-{trial}", rng)
            owed -= Counter(places.died(chosen))
            for text in invariants.wrong_rows(stack):
                broken.setdefault(text, f"trial {trial}: {', '.join(chosen)}")
        broken = dict.fromkeys(invariants.broken(stack), "at the end") | broken
    crashes = times * len(aimed) - owed.total()
    died = len(aimed) - len(owed)
    text = (
        f"{crashes} crashes at {died} of {2 * len(every)} points in {trial} rounds, "
        f"{len(broken)} invariants broken"
    )
    unreached = sorted(every - {base(place) for place in visits})
    numbers = {"unlisted": unlisted, "unreached": unreached, "left": dict(owed)}
    met = 2 * len(every) >= 25 and not (unlisted or unreached or owed or broken)
    numbers |= {"crashes": crashes, "rounds": trial}
    return Figures(met, text, numbers | {"broken": broken})


def documented() -> tuple[set[str], set[str]]:
    """The failpoints that docs/RELIABILITY.md promises of every round, and those now and then."""
    listed = PAGE.read_text().partition("<!-- failpoints -->")[2]
    every, _, rest = listed.partition("<!-- now and then -->")
    names = re.compile(r"`([\w.]+)`")
    return set(names.findall(every)), set(names.findall(rest.partition("<!-- end")[0]))


def base(place: str) -> str:
    """A place without its before or after."""
    return re.sub(r"\.(before|after)(_commit)?$", "", place)


Condition = Callable[[], bool]


def round_trip(stack: Stack, name: str, rng: Random, *, wait_for: Condition = lambda: True) -> None:
    """One whole round: enrolment, weights, updates, publication, evaluation, sealing; then its
    version is rolled out, and ablated.
    """
    asyncio.run(_round_trip(stack, name, rng, wait_for))
    settle(stack)


async def _round_trip(stack: Stack, name: str, rng: Random, wait_for: Condition) -> None:
    space = flat_space(SITES)
    campaign = await found(stack, name, plain_settings(1, SITES), space=space, sites=SITES)
    while not wait_for():
        await asyncio.sleep(0.1)
    rng.shuffle(campaign.sites)
    campaign.sites[-1] = Last(**vars(campaign.sites[-1]))
    try:
        assert await play(campaign, until={"finished", "paused"}) == "finished"
        await roll_out(campaign)
    finally:
        await campaign.aclose()


class Last(Site):
    """Delivers once the updates of all others are folded: then every round has a fold in it."""

    async def deliver(self, work: Assignment) -> None:
        while not await asyncio.to_thread(self._folded, work.run.id):
            await asyncio.sleep(0.1)
        await super().deliver(work)

    def _folded(self, run: UUID) -> bool:
        query = """SELECT s.part FROM partial_sums s JOIN rounds r ON r.id = s.round_id
            WHERE r.run_id = %s"""
        return bool(self.stack.rows(query, run))


class Places:
    """The folder through which the processes' failpoints are steered (`app/failpoints.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def visits(self) -> Counter[str]:
        """How often each place has been visited since the start."""
        return Counter((self.folder / "visits").read_text().split())

    def ticked(self) -> bool:
        """Whether the scheduler has looked at a round yet, which it does once a second."""
        return self.visits()["sweep.tick.after_commit"] > 0

    def arm(self, orders: dict[str, int]) -> None:
        text = "\n".join(f"{place}:{visit}" for place, visit in orders.items())
        (self.folder / "armed.new").write_text(text)
        (self.folder / "armed.new").replace(self.folder / "armed")

    def died(self, chosen: list[str]) -> list[str]:
        """Those of the chosen places where a process has died; the other orders are withdrawn."""
        left = {order.rpartition(":")[0] for order in (self.folder / "armed").read_text().split()}
        self.arm({})
        return [place for place in chosen if place not in left]
