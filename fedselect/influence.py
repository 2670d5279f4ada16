"""Bounded influence as settings of a run, and what a client's conduct leads to.

Owns the settings with their checks and the pure rules of strikes. The arithmetic is ``clipping``
and ``bounded``. Must not know rows, files or a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import Field

from fedselect.policy import Settings
from fedselect.scalars import Flag, Real, Whole

# What a client can only be refused for if its agent, or whoever speaks for it, is at fault. Late,
# lost and cancelled updates are not among them, nor what the service could not do.
EXCUSED = ("round_", "client_erased", "upload_missing", "verification_")
# An update that changes nothing is refused, but honest clients have nothing to tell now and then:
# steps that float32 swallows, gradients that vanish. Who never has anything rides along.
UNCHANGED = "update_unchanged"
IDLE_ROUNDS = 3  # in a row, the last of which is the first strike


class Influence(Settings):
    """How far one client can move a version (docs/SECURITY.md).

    Clients are told nothing of it: it is the coordinator's business, and an agent of any release
    takes part.
    """

    rule: Literal["mean", "trimmed_mean", "median"] = Field(
        "mean",
        description="Over the values present at an element. With fewer than five of them the other "
        "two are the mean of all, too.",
    )
    trim: Real = Field(
        0.2, gt=0, lt=0.5, description="trimmed_mean: share of the values left out at each end."
    )
    clip_norm: Real | None = Field(
        None, gt=0, le=1e9, description="Largest L2 norm of an update's change of its base."
    )
    clip_quantile: Real | None = Field(
        None,
        gt=0,
        le=1,
        description="The same as a quantile of the norms that the round before accepted (the first "
        "round's own); never above `clip_norm`.",
    )
    max_change: Real | None = Field(
        None, gt=0, le=1e9, description="Largest change of one element, after clipping."
    )
    share_cap: Flag = Field(
        True,
        description="No client weighs more than 1/k of an element, whatever number of examples it "
        "claims.",
    )
    movers: Flag = Field(
        False,
        description="Only clients whose value is not the base's count towards k: an element that "
        "fewer move stays as it is.",
    )
    refuse_unchanged: Flag = Field(
        True, description="Refuse an update that changes nothing: a free rider's."
    )
    likeness: Real | None = Field(
        None,
        gt=0,
        le=1,
        description="Refuse an update whose change points the way of one accepted before it in "
        "this round, from this cosine on (estimated to 0.06); 0.98 leaves honest clients alone.",
    )
    clients_per_group: Whole | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Clients with the same tag `<group>:…` that a round takes.",
    )
    group: str = Field("site", max_length=32, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    strikes: Whole | None = Field(
        None,
        ge=1,
        le=1000,
        description="Refused updates within `strike_window` after which a client is suspended; one "
        "that changes nothing counts from the third round in a row on.",
    )
    strike_window: Real = Field(7 * 86_400, gt=0, le=365 * 86_400, description="Seconds.")

    @property
    def measures(self) -> bool:
        """Whether the change of each update must be known when it is accepted."""
        clips = self.clip_norm is not None or self.clip_quantile is not None
        return clips or self.refuse_unchanged or self.likeness is not None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of one update of a client in a run: ``reason`` None if it was accepted.

    ``round`` is the number and attempt of its round, alike in all arms; ``attempt`` the client's.
    """

    at: datetime
    reason: str | None
    round: tuple[int, int] = (1, 1)
    attempt: int = 1


def is_strike(reason: str | None) -> bool:
    """Whether a refusal with this reason may count against its client."""
    return reason is not None and not reason.startswith(EXCUSED)


def strikes(judged: Iterable[Judgement]) -> Iterator[Judgement]:
    """What earned a client a strike in a run, the oldest first.

    Arms of a run go through the same rounds: a fault that shows in several of them is one. Updates
    that change nothing are none before the client has sent nothing else for ``IDLE_ROUNDS`` rounds.
    """
    counted: set[tuple[tuple[int, int], int]] = set()
    idle: set[tuple[int, int]] = set()
    for each in sorted(judged, key=lambda found: found.at):
        if each.reason is None:
            idle.clear()
        if not is_strike(each.reason):
            continue
        place = (each.round, each.attempt)
        if each.reason == UNCHANGED:
            idle.add(each.round)
            if len(idle) < IDLE_ROUNDS:
                continue
            place = (each.round, 0)  # trying again in a round makes it no worse
        if place not in counted:
            counted.add(place)
            yield each


def standing(
    judged: Iterable[Judgement],
    rules: Influence,
    *,
    since: datetime | None,
    now: datetime,
) -> list[Judgement]:
    """The strikes in a run that count now, the oldest first.

    What was before ``since``, when an administrator last let the client in again, is forgiven.
    """
    begin = now - timedelta(seconds=rules.strike_window)
    known = [each for each in judged if since is None or each.at > since]
    return [each for each in strikes(known) if begin < each.at <= now]


def suspended(
    judged: Iterable[Judgement],
    rules: Influence,
    *,
    since: datetime | None,
    now: datetime,
) -> bool:
    """Whether the strikes that count (:func:`standing`) are enough to suspend a client."""
    if rules.strikes is None:
        return False
    return len(standing(judged, rules, since=since, now=now)) >= rules.strikes


def group_of(tags: Sequence[str], group: str) -> str | None:
    """The first of the tags ``<group>:…``; None for a client that has none."""
    return next((tag for tag in tags if tag.startswith(f"{group}:")), None)
