"""Who belongs to a cohort, and who is in which group of a rollout: pure rules.

Owns the stable hash that places clients, the size of a group, and the nesting of stages: a larger
stage contains the smaller one, the control group is disjoint from all of them. Must not read rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedselect.cohortdocs import CohortRule
from fedselect.errors import SettingsError

PLACES = 2**64


def place(salt: str, client: str) -> int:
    """Where a client (by its id) stands, from 0 to 2⁶⁴ − 1: the same for the same salt, for ever.

    The first 8 bytes of SHA-256, so that places are spread evenly and nobody can choose one.
    """
    digest = hashlib.sha256(f"fedselect-cohort/{salt}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a rule may look at in a client."""

    id: str
    tags: Sequence[str]


def belongs(rule: CohortRule, salt: str, client: Candidate) -> bool:
    """Whether a client is a member; ``rule.clients`` are ids here, as the coordinator keeps them.

    A percentage that grows keeps everybody who was in.
    """
    if rule.clients is not None:
        return client.id in rule.clients
    if rule.tag is not None:
        return rule.tag in client.tags
    return place(salt, client.id) * 100 < Fraction(rule.percent or 0) * PLACES


def group_size(percent: float, clients: int, minimum: int) -> int:
    """max(minimum, ⌈percent · clients / 100⌉)."""
    return max(minimum, math.ceil(Fraction(percent) * clients / 100))


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a rollout: what each stage adds to the ones before, and the control group."""

    added: tuple[tuple[str, ...], ...]
    control: tuple[str, ...]

    def stage(self, index: int) -> tuple[str, ...]:
        """All clients of a stage, those of the smaller ones included."""
        return tuple(client for part in self.added[: index + 1] for client in part)


def split(
    clients: Iterable[str], *, salt: str, stages: Sequence[float], control: float, minimum: int
) -> Groups:
    """Deal clients (ids) to rising ``stages`` and to the ``control`` group, shares in percent.

    In the order of their places: stages from the front, the control group from the back; the last
    stage ends where the control group begins.

    Raises:
        SettingsError: ``rollout_too_small``: stage and control group would overlap.
    """
    order = sorted(clients, key=lambda client: (place(salt, client), client))
    held_back = group_size(control, len(order), minimum)
    room = len(order) - held_back
    if room < minimum:
        raise SettingsError(
            f"{len(order)} clients are too few for a stage of {minimum} and a control group of "
            f"{held_back}; enrol more, or lower minimum or control",
            code="rollout_too_small",
        )
    ends = [min(room, group_size(percent, len(order), minimum)) for percent in stages]
    starts = [0, *ends[:-1]]
    parts = tuple(tuple(order[a:b]) for a, b in zip(starts, ends, strict=True))
    return Groups(parts, tuple(order[room:]))
