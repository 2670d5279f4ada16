"""What the noise of a run is worth: ε from Google's dp-accounting, and whether it is of any use.

Owns the account of a run: what its rounds spend, how many fit into a budget, and how large the
noise is against what clients could teach. Must not draw noise (``noise``) or know rows. Of the
``server`` extra; without it the account is refused in words.

No amplification by sampling is claimed: who takes part is whoever checks in, with more places than
needed, and that is no Poisson sampling. Every round counts as if every client were in it. So ``t``
rounds are one Gaussian mechanism of noise multiplier z / √t, exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache

from fedselect.errors import SettingsError
from fedselect.manifestdocs import ManifestNoise
from fedselect.policies import RunSettings
from fedselect.policy import Policy
from fedselect.protocol import PrivacyAccount
from fedselect.space import Kind, ParameterSpace, Role

MOST_EPSILON = 1e6  # beyond which nobody asks for more digits
TOLERANCE = 1e-9


def delta(multiplier: float, rounds: int, epsilon: float) -> float:
    """δ(ε) of so many rounds with noise of ``multiplier`` times the clip."""
    try:
        from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
    except ImportError as error:
        raise SettingsError(
            "accounting for privacy.dp needs the package dp-accounting: pip install "
            "'fedselect[server]'",
            code="accountant_missing",
        ) from error
    loss = GaussianPrivacyLoss(standard_deviation=multiplier / math.sqrt(rounds))
    return float(loss.get_delta_for_epsilon(epsilon))


@lru_cache(maxsize=4096)
def epsilon(multiplier: float, rounds: int, wanted: float) -> float:
    """The smallest ε that so many rounds keep with δ ``wanted``, rounded up; 0 for no round."""
    if rounds == 0 or delta(multiplier, rounds, 0.0) <= wanted:
        return 0.0
    high = 1.0
    while delta(multiplier, rounds, high) > wanted:
        high *= 2
        if high > MOST_EPSILON:
            return math.inf
    low = high / 2 if high > 1 else 0.0
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        if delta(multiplier, rounds, middle) > wanted:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=1024)
def rounds_within(multiplier: float, budget: tuple[float, float], most: int) -> int:
    """How many rounds, at most ``most``, keep the budget (ε, δ)."""
    low, high = 0, most  # low rounds keep it
    while low < high:
        middle = (low + high + 1) // 2
        if delta(multiplier, middle, budget[0]) <= budget[1]:
            low = middle
        else:
            high = middle - 1
    return low


def rounds_allowed(settings: RunSettings) -> int:
    """How many rounds a run may publish: those of its settings, or fewer if a budget ends it."""
    dp = settings.privacy.dp
    if dp is None:
        return settings.rounds
    return rounds_within(dp.grid.multiplier, (dp.epsilon, dp.delta), settings.rounds)


def travelling(policy: Policy, space: ParameterSpace) -> int:
    """Elements that clients may send under a policy: those that get noise."""
    still = policy.never_travels(space)
    return space.dim - sum(last - first for first, last in still)


def noise_rule(settings: RunSettings, space: ParameterSpace, commitment: str = "") -> ManifestNoise:
    """The noise of a round of a run with ``privacy.dp``.

    Raises:
        SpaceError: the policy does not fit the model.
        ValueError: there is no ``privacy.dp``.
    """
    if settings.privacy.dp is None:
        raise ValueError("the run has no privacy.dp")
    return ManifestNoise(
        **settings.privacy.dp.grid._asdict(),
        goal=settings.round.goal,
        still=settings.policy.never_travels(space),
        commitment=commitment,
    )


def account(
    settings: RunSettings,
    space: ParameterSpace,
    *,
    published: int = 0,
    accuracy_cost: float | None = None,
) -> PrivacyAccount | None:
    """The account of a run after so many rounds; None without ``privacy.dp``.

    Raises:
        SettingsError: ``accountant_missing``.
        SpaceError: the policy does not fit the model.
    """
    dp = settings.privacy.dp
    if dp is None:
        return None
    multiplier, rounds = dp.grid.multiplier, rounds_allowed(settings)
    elements = travelling(settings.policy, space)
    ratio = multiplier * math.sqrt(elements) / settings.round.goal
    return PrivacyAccount(
        budget=dp.epsilon,
        delta=dp.delta,
        clip=dp.clip,
        noise=multiplier,
        rounds=rounds,
        epsilon=epsilon(multiplier, rounds, dp.delta),
        spent=epsilon(multiplier, published, dp.delta),
        noise_share=ratio / math.sqrt(max(1, rounds)),
        clients_needed=math.ceil(ratio / math.sqrt(max(1, rounds)) * settings.round.goal),
        accuracy_cost=accuracy_cost,
    )


def check_useful(settings: RunSettings, space: ParameterSpace) -> None:
    """Refuse differential privacy that is of no use; see :func:`useless`.

    Raises:
        SettingsError: ``privacy_useless``, or ``accountant_missing``.
        SpaceError: the policy does not fit the model.
    """
    fault = useless(settings, space)
    if fault is not None:
        raise SettingsError(fault, code="privacy_useless")


def useless(settings: RunSettings, space: ParameterSpace) -> str | None:
    """Why differential privacy would leave nothing but noise, or not a single round; else None.

    The rule: over the run the noise adds up to a vector of length z·C·√(D·T) / goal, while clients
    that all pulled the same way, at the full clip, would move the model by C·T. Once the first is
    longer than the second, noise is most of every version whatever the data are.

    Raises:
        SettingsError: ``accountant_missing``.
        SpaceError: the policy does not fit the model.
    """
    found = account(settings, space)
    if found is None:
        return None
    if any(slot.kind is Kind.BUFFER and slot.role is Role.SHARED for slot in space.slots):
        return (
            "the model shares buffers (running statistics), and noise would make variances "
            "negative: register it with personal buffers to use privacy.dp"
        )
    if found.rounds == 0:
        return (
            f"a single round already spends more than ε = {found.budget:g} at δ = {found.delta:g}: "
            f"raise privacy.dp.noise above {found.noise:.3g}, or the budget"
        )
    if found.noise_share <= 1:
        return None
    return (
        f"with a goal of {settings.round.goal} clients, the noise of {found.rounds} rounds on "
        f"{travelling(settings.policy, space):,} elements is {found.noise_share:.3g} times as long "
        "as the farthest that its clients could move the model together, so the versions would be "
        f"noise whatever the data are. A goal of {found.clients_needed:,} is the least; fewer "
        "elements that travel (a smaller model, a personal head or body), less noise or more "
        "rounds need fewer clients"
    )
