"""The account of differential privacy, against other ways to compute it, and what it refuses."""

import math

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedselect import Kind, ParameterSpace, Role, RoundPolicy, RunSettings, preset_run
from fedselect.accounting import (
    account,
    check_useful,
    epsilon,
    noise_rule,
    rounds_allowed,
    rounds_within,
    travelling,
)
from fedselect.armestimate import estimate_run
from fedselect.errors import SettingsError
from fedselect.estimate import single_tensor
from fedselect.estimatedocs import EstimateCreate
from fedselect.influence import Influence
from fedselect.policies import Arms, Dp, Policy, Privacy, Secure

CASES = [(0.5, 1, 1e-5), (1.0, 1, 1e-6), (1.0, 30, 1e-5), (5.0, 100, 1e-5), (10.0, 100, 1e-7)]


def normal(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def closed(multiplier, rounds, eps):
    """δ of Gaussian noise: Balle and Wang 2018, theorem 8."""
    mu = math.sqrt(rounds) / multiplier
    return normal(mu / 2 - eps / mu) - math.exp(eps) * normal(-mu / 2 - eps / mu)


@pytest.mark.parametrize(("multiplier", "rounds", "delta"), CASES)
def test_epsilon_is_that_of_other_accountants(multiplier, rounds, delta):
    found = epsilon(multiplier, rounds, delta)
    event = SelfComposedDpEvent(GaussianDpEvent(multiplier), rounds)
    composed = PLDAccountant().compose(event).get_epsilon(delta)
    assert found == pytest.approx(composed, rel=0.01)
    assert closed(multiplier, rounds, found) == pytest.approx(delta, rel=1e-4)
    assert found < RdpAccountant().compose(event).get_epsilon(delta) < 1.25 * found


def test_nothing_published_spends_nothing_and_more_rounds_spend_more():
    spent = [epsilon(2.0, rounds, 1e-6) for rounds in range(6)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    assert epsilon(100.0, 1, 1e-2) == 0  # δ alone pays for it
    assert epsilon(1e-4, 1, 1e-9) == math.inf


@pytest.mark.parametrize("budget", [0.01, 3.0, 8.0, 20.0])
def test_the_last_round_that_fits_is_the_last_that_fits(budget):
    rounds = rounds_within(2.0, (budget, 1e-6), 60)
    assert rounds == 0 or epsilon(2.0, rounds, 1e-6) <= budget
    assert rounds == 60 or epsilon(2.0, rounds + 1, 1e-6) > budget


def settings(goal=400, rounds=100, policy="fedavg", **dp):
    rule = {"clip": 1.0, "noise": 1.0, "epsilon": 100.0, "delta": 1e-6} | dp
    return preset_run(
        policy,
        rounds=rounds,
        round=RoundPolicy(goal=goal, quorum=2),
        privacy=Privacy(dp=Dp(**rule)),
    )


def test_the_account_of_a_run_ends_at_its_budget():
    space = single_tensor(10_000)
    rule = settings(epsilon=20.0, noise=2.0)
    found = account(rule, space, published=5)
    assert found.rounds == rounds_allowed(rule) < 100
    assert found.epsilon <= 20 < epsilon(2.0, found.rounds + 1, 1e-6)
    assert found.spent == epsilon(2.0, 5, 1e-6)
    assert account(RunSettings(), space) is None
    assert rounds_allowed(RunSettings(rounds=7)) == 7


@pytest.mark.parametrize(("elements", "least"), [(11_200_000, 335), (1_000_000, 100), (50_000, 23)])
def test_too_few_clients_for_so_many_elements_are_refused(elements, least):
    space = single_tensor(elements)
    check_useful(settings(goal=least), space)
    with pytest.raises(SettingsError, match=f"A goal of {least:,} is the least") as refused:
        check_useful(settings(goal=least - 1), space)
    assert refused.value.code == "privacy_useless"


def test_a_budget_without_a_round_is_refused():
    with pytest.raises(SettingsError, match="a single round already spends"):
        check_useful(settings(epsilon=0.1), single_tensor(100))


def test_shared_running_statistics_are_refused():
    space = ParameterSpace.of(
        [("w", (3,), Kind.WEIGHT, Role.SELECTABLE), ("var", (3,), Kind.BUFFER, Role.SHARED)]
    )
    with pytest.raises(SettingsError, match="variances"):
        check_useful(settings(), space)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"round": RoundPolicy(weighting="examples")}, "nobody can weigh more"),
        ({"arms": Arms(policies=(Policy(name="a"), Policy(name="b")))}, "each arm"),
    ],
)
def test_settings_that_would_break_the_bound_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        RunSettings(privacy=settings().privacy, **changes)


@pytest.mark.parametrize("privacy", [settings().privacy, Privacy(secure=Secure())])
def test_what_looks_at_the_updates_of_others_is_refused(privacy):
    rules = {"policy": Policy(personal="head"), "round": RoundPolicy(min_contributors=3)}
    RunSettings(privacy=privacy, **rules)
    with pytest.raises(ValueError, match="looking at those of others"):
        RunSettings(privacy=privacy, influence=Influence(rule="median"), **rules)


def test_a_run_without_privacy_says_nothing_of_it():
    assert "privacy" not in RunSettings().model_dump()
    assert settings().model_dump()["privacy"]["dp"]["clip"] == 1.0
    assert any("min_contributors does not apply" in text for text in settings().warnings())
    assert any("1 / 20000 clients" in text for text in settings(delta=1e-4).warnings(20_000))


@pytest.mark.parametrize("clip", [1e-9, 0.3, 1.0, 7.77, 1e9])
def test_whole_numbers_never_promise_too_much(clip):
    rule = Dp(clip=clip, noise=0.7, epsilon=1.0)
    step, bound, sigma = rule.grid
    assert 2**29 <= bound < 2**30
    assert math.ldexp(bound, step) <= clip < math.ldexp(bound + 1, step)
    assert sigma >= 0.7 * bound
    assert rule.grid.multiplier == pytest.approx(0.7, rel=1e-8)


def test_what_never_travels_gets_no_noise():
    space = ParameterSpace.of(
        [
            ("body.weight", (4,), Kind.WEIGHT, Role.SELECTABLE),
            ("norm.mean", (2,), Kind.BUFFER, Role.PERSONAL),
            ("head.weight", (3,), Kind.WEIGHT, Role.SELECTABLE),
        ]
    )
    assert noise_rule(settings(), space).still == [(4, 6)]
    assert noise_rule(settings(policy="fedper"), space).still == [(4, 9)]
    assert noise_rule(settings(policy="fedper-late"), space).still == [(4, 6)]
    assert [travelling(settings(policy=p).policy, space) for p in ("fedavg", "fedper")] == [7, 4]


def test_an_estimate_says_what_is_promised_and_whether_it_would_be_refused():
    asked = EstimateCreate(elements=1_000_000, settings=settings(goal=20), clients=20)
    found = estimate_run(asked, single_tensor(1_000_000))
    assert found.privacy.epsilon == pytest.approx(epsilon(1.0, found.privacy.rounds, 1e-6))
    assert found.privacy.noise_share > 1
    assert any("is refused: with a goal of 20 clients" in text for text in found.assumptions)
    plain = asked.model_copy(update={"settings": RunSettings()})
    assert estimate_run(plain, single_tensor(1_000_000)).privacy is None
