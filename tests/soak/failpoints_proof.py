"""A crash at any boundary: processes die at every failpoint, and the round completes."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from random import Random

from . import invariants
from .fleet import flat_space, found, plain_settings, play, settle
from .proofs import Figures, Room, proof
from .stack import Stack

SITES = 3
SETTINGS = {"lease": 2, "job_attempts": 50}


@proof(
    promise="a crash at any boundary does no harm",
    test="a process dies at a named failpoint in a round from enrolment to the sealed ledger; "
    "seeds vary which visit, the order of clients and what else dies in the same round",
    target="100 % of ≥ 25 points, each × 20, no invariant broken",
    quick={"times": 1, "at_once": 6, "most": None},
    full={"times": 20, "at_once": 6, "most": None},
    minutes=(6, 120),
)
def failpoints(room: Room, *, times: int, at_once: int, most: int | None) -> Figures:
    """``at_once`` crashes a round, ``times`` at every point, or at ``most`` of them only."""
    places = Places(room.folder / "failpoints")
    with Stack(room.folder / "stack", failpoint=places.folder, **SETTINGS) as stack:
        invariants.arm(stack)
        round_trip(stack, "recorded", room.rng)
        visits = places.visits()
        aimed = room.rng.sample(sorted(visits), most or len(visits))
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
    text = (
        f"{crashes} crashes at {len(aimed) - len(owed)} of {len(visits)} points in {trial} rounds, "
        f"{len(broken)} invariants broken"
    )
    numbers = {"names": sorted(visits), "crashes": crashes, "rounds": trial, "left": dict(owed)}
    met = len(visits) >= 25 and not owed and not broken
    return Figures(met, text, numbers | {"broken": broken})


def round_trip(stack: Stack, name: str, rng: Random) -> None:
    """One whole round: enrolment, weights, updates, publication, evaluation, sealing."""
    asyncio.run(_round_trip(stack, name, rng))
    settle(stack)


async def _round_trip(stack: Stack, name: str, rng: Random) -> None:
    space = flat_space(SITES)
    campaign = await found(stack, name, plain_settings(1, SITES), space=space, sites=SITES)
    rng.shuffle(campaign.sites)
    try:
        assert await play(campaign, until={"finished", "paused"}) == "finished"
    finally:
        await campaign.aclose()


class Places:
    """The folder through which the processes' failpoints are steered (`app/failpoints.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def visits(self) -> Counter[str]:
        """How often each place has been visited since the start."""
        return Counter((self.folder / "visits").read_text().split())

    def arm(self, orders: dict[str, int]) -> None:
        text = "\n".join(f"{place}:{visit}" for place, visit in orders.items())
        (self.folder / "armed.new").write_text(text)
        (self.folder / "armed.new").replace(self.folder / "armed")

    def died(self, chosen: list[str]) -> list[str]:
        """Those of the chosen places where a process has died; the other orders are withdrawn."""
        left = {order.rpartition(":")[0] for order in (self.folder / "armed").read_text().split()}
        self.arm({})
        return [place for place in chosen if place not in left]
