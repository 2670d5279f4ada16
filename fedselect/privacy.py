"""The privacy group of a run's settings: differential privacy of what is published.

Owns these settings, the whole numbers that the mechanism works in, and which other settings it
cannot go together with. What it costs is ``accounting``, how it is done ``private``. Why it holds
is docs/adr/0015-noise-on-fixed-sums.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from fedselect.policy import Settings, later
from fedselect.scalars import Real

if TYPE_CHECKING:
    from fedselect.policies import RunSettings

BITS = 30  # of the clip in steps of the grid: what is cut off is far below any noise


class Grid(NamedTuple):
    """The mechanism in whole numbers: ``bound`` and ``sigma`` count steps of 2**``step``."""

    step: int
    bound: int
    sigma: int

    @property
    def multiplier(self) -> float:
        """Standard deviation of the noise over the bound, as it is accounted."""
        return self.sigma / self.bound


class Dp(Settings):
    """Differential privacy of a client's contributions to the published versions of a run.

    Each round publishes ``(Σ clip(delta) + N(0, (noise · clip)²)) / goal``, at every element that
    may travel, whoever shares it.
    """

    clip: Real = Field(
        ge=1e-9,
        le=1e9,
        description="C: L2 bound of the delta that one client sends in a round; longer ones are "
        "shortened to it.",
        examples=[1.0],
    )
    noise: Real = Field(
        ge=0.01,
        le=1000,
        description="Standard deviation of the noise on the sum of a round, over the clip.",
        examples=[1.0],
    )
    epsilon: Real = Field(
        gt=0, le=100, description="The budget of the run, which stops at it.", examples=[8.0]
    )
    delta: Real = Field(1e-5, gt=0, le=1e-3, description="δ of the budget; well below 1 / clients.")

    @property
    def grid(self) -> Grid:
        """Clip and noise in steps of a power of two; the clip rounded down, the noise up."""
        mantissa, exponent = math.frexp(self.clip)
        bound = math.floor(math.ldexp(mantissa, BITS))
        return Grid(exponent - BITS, bound, math.ceil(self.noise * bound))


class Secure(Settings):
    """Secure aggregation of rounds, for masks by rows or whole tensors: a prototype."""

    threshold: Real = Field(
        0.6,
        gt=0.5,
        le=1,
        description="Share of a round's participants that must deliver and recover the others.",
    )
    bound: Real = Field(
        1.0, ge=1e-9, le=1e9, description="Largest magnitude of an element's change."
    )

    def needed(self, participants: int) -> int:
        """How many of so many must deliver: more than half."""
        return max(participants // 2 + 1, math.ceil(round(self.threshold * participants, 9)))


class Privacy(Settings):
    """What a run promises about a client's contributions, beyond that no data leave a site."""

    dp: Dp | None = Field(None, description="Null: no differential privacy.")
    secure: Secure | None = later(
        None, description="Null: the coordinator sees single updates. A prototype for simulations."
    )


def contradiction(settings: RunSettings) -> str | None:
    """Why a run's privacy does not go together with its other settings, in words; None: it does."""
    private = settings.privacy.dp is not None or settings.privacy.secure is not None
    if private and settings.influence is not None:
        return (
            "influence refuses and bounds updates by looking at those of others: privacy.secure "
            "hides them, and the bound of privacy.dp is of each client alone; give one of them"
        )
    if any(policy.pooled is not None for policy in settings.policies) and (
        private or settings.influence is not None
    ):
        return (
            "agreement is computed from single updates, without noise and unbounded: leave out "
            "policy.pooled, or privacy and influence"
        )
    if settings.privacy.secure is not None:
        return _unblindable(settings)
    return None if settings.privacy.dp is None else _unbounded(settings)


def exposed(settings: RunSettings) -> list[str]:
    """Where a number that is published may be a single client's, in words."""
    if settings.privacy.dp is not None:
        return []
    found, rules = [], settings.influence
    if settings.round.min_contributors == 1:
        found.append(
            "min_contributors is 1: what a single client shares of an element is published as it is"
        )
    if settings.round.weighting == "examples" and (rules is None or not rules.share_cap):
        found.append(
            "with round.weighting examples, a client with most of the examples is most of the mean "
            "at every element, however many share it: influence.share_cap keeps it to 1 / "
            "min_contributors"
        )
    return found


def _unblindable(settings: RunSettings) -> str | None:
    """What needs single updates, or other index sets than rows and tensors."""
    by_elements = (
        p.name for p in settings.policies if p.personal == "learned" and p.scope != "row"
    )
    faults = (
        (
            settings.privacy.dp is not None,
            "the coordinator must clip single updates for privacy.dp, which privacy.secure hides",
        ),
        (
            next(by_elements, None) is not None,
            "masks of single elements tell of the data, and privacy.secure makes public what a "
            "client shares: give policy.scope row, or a fixed mask",
        ),
        (
            settings.wire.encoding != "f32",
            "scales and error feedback of different clients do not add up under privacy.secure: "
            "give wire.encoding f32",
        ),
        (
            settings.round.weighting != "uniform",
            "privacy.secure adds values of weight 1: give round.weighting uniform",
        ),
        (
            settings.round.min_contributors < 3,
            "of a sum of two each knows the other: privacy.secure needs round.min_contributors of "
            "at least 3",
        ),
    )
    return next((text for applies, text in faults if applies), None)


def _unbounded(settings: RunSettings) -> str | None:
    """What would let one client change more than its clip, or spend more than is accounted."""
    if settings.round.weighting != "uniform":
        return (
            "privacy.dp bounds what each client adds, so nobody can weigh more: give "
            "round.weighting uniform"
        )
    if settings.arms is not None:
        return (
            "each arm would publish from the same clients, and spend as much: compare policies "
            "without privacy.dp, or in a simulation, then run one of them with it"
        )
    return None
