"""What a run tells of its sites, and for how long: coarser numbers, and masks that go early.

Owns the settings and the rounding. Sites round before anything is sent; the coordinator does it
again before anything is stored, should an agent send more. Sums over clients that everybody may
read are coarser still. Must not know what the numbers are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from fedselect.policy import Settings
from fedselect.scalars import Real, Whole


class Disclosure(Settings):
    """Rounding of what sites tell, and the life of their masks. Fixed with the run."""

    round_scores: Real | None = Field(
        None,
        gt=0,
        le=0.5,
        description="Shares of right examples, losses and distances are told in multiples of this: "
        "0.05 tells accuracies in steps of 5 points. Null: as they are.",
    )
    round_counts: Whole = Field(
        1,
        ge=1,
        le=1000,
        description="Numbers of examples, to train, held out or of a label, are told in multiples "
        "of this; it divides report.min_examples.",
    )
    mask_days: Real | None = Field(
        None,
        gt=0,
        le=3650,
        description="Days after which a published version's update files and masks go, though it "
        "is pinned or inside the coordinator's RECOMPUTE_WINDOW: it can then not be recomputed. "
        "Null: as that setting says.",
    )

    @property
    def rounds(self) -> bool:
        """Whether any number is told coarser than it is."""
        return self.round_scores is not None or self.round_counts > 1

    def number(self, value: float, most: float = math.inf) -> float:
        """A share, a loss or a distance as it may be told, at most ``most``."""
        if self.round_scores is None:
            return value
        steps = value / self.round_scores + 0.5
        if math.isinf(steps):  # a loss beyond all measure
            return min(value, most)
        # Ten digits: 3 · 0.1 is told as 0.3.
        return min(round(self.round_scores * math.floor(steps), 10), most)

    def part(self, share: float, total: int) -> int:
        """How many of ``total`` examples a share (0 to 1) of them is told as."""
        return round(self.number(share, 1) * total)

    def part_from(self, least: int, total: int) -> int:
        """The smallest number of ``total`` examples that is told and not below ``least``, which is
        at most ``total``.
        """
        if self.round_scores is None or self.round_scores * total < 1:  # each number is told
            return least
        first = math.floor(least / total / self.round_scores)
        told = (self.part(n * self.round_scores, total) for n in range(first, first + 3))
        return next((each for each in told if each >= least), total)

    def count(self, value: int) -> int:
        """A number of examples as it may be told; never 0 of some."""
        step = self.round_counts
        return max(step, (value + step // 2) // step * step) if value and step > 1 else value

    def words(self) -> str:
        """What is rounded, in a sentence."""
        found = []
        if self.round_scores is not None:
            found.append(f"accuracies in steps of {100 * self.round_scores:g} points")
            found.append(f"losses in steps of {self.round_scores:g}")
        if self.round_counts > 1:
            found.append(f"numbers of examples in steps of {self.round_counts}")
        return f"Figures are rounded at the sites: {', '.join(found)}."


def at_least(counts: Sequence[int], clients: int) -> int | None:
    """How many examples clients have together, at the least; None where that would be 0 or of fewer
    than so many ``clients``.

    Told in whole steps (1, 2 or 5 times a power of ten) that are no smaller than what as many
    clients have who have most: whoever joins or leaves moves the sum by less than one.
    """
    largest = sum(sorted(counts)[-clients:])
    if len(counts) < clients or largest == 0:
        return None
    power = 10 ** (len(str(largest)) - 1)
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= largest)
    return sum(counts) // step * step or None
