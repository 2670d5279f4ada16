"""The privacy group of a run's settings: differential privacy of what is published.

Owns these settings, the whole numbers that the mechanism works in, and which other settings it
cannot go together with. What it costs is ``accounting``, how it is done ``private``. Why it holds
is docs/adr/0015-noise-on-fixed-sums.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from fedselect.policy import Settings
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


class Privacy(Settings):
    """What a run promises about a client's contributions, beyond that no data leave a site."""

    dp: Dp | None = Field(None, description="Null: no differential privacy.")


def contradiction(settings: RunSettings) -> str | None:
    """Why a run's privacy does not go together with its other settings, in words; None: it does."""
    if settings.privacy.dp is None:
        return None
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
