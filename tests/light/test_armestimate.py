"""Estimates of runs with arms: the sums of what each arm would cost alone."""

from __future__ import annotations

import pytest

from fedselect.armestimate import estimate_run
from fedselect.estimate import estimate, single_tensor
from fedselect.estimatedocs import EstimateCreate
from fedselect.filesizes import version_size
from fedselect.policies import Arms, RoundPolicy, RunSettings, preset

SPACE = single_tensor(10_000)
POLICIES = (preset("fedavg"), preset("fedper"), preset("fedselect", rounds=20))


def asked(mode: str | None, clients: int = 12, **changes: object) -> EstimateCreate:
    arms = None if mode is None else Arms(mode=mode, policies=POLICIES)
    settings = RunSettings(rounds=20, round=RoundPolicy(goal=4), arms=arms)
    return EstimateCreate(elements=10_000, settings=settings, clients=clients, **changes)


def alone(clients: int):
    each = asked("parallel", clients)
    return [
        estimate(each.model_copy(update={"settings": each.settings.of_arm(p.name)}), SPACE)
        for p in POLICIES
    ]


def test_without_arms_it_is_the_estimate_of_one_policy() -> None:
    assert estimate_run(asked(None), SPACE) == estimate(asked(None), SPACE)
    assert estimate_run(asked(None), SPACE).arms == []


def test_parallel_arms_cost_their_sum_but_for_version_0() -> None:
    found, each = estimate_run(asked("parallel"), SPACE), alone(12)
    version = version_size(10_000)
    assert found.client.up == sum(e.client.up for e in each)
    assert found.client.down == sum(e.client.down for e in each) - 2 * version
    assert found.run.down == sum(e.run.down for e in each) - 12 * 2 * version
    assert found.round.up == pytest.approx(sum(e.round.up for e in each), abs=3)
    assert found.participations == pytest.approx(sum(e.participations for e in each))
    assert found.evaluation_down == sum(e.evaluation_down for e in each)
    assert found.storage.run == sum(e.storage.run for e in each) - 2 * version
    assert found.links[0].run_seconds == pytest.approx(sum(e.links[0].run_seconds for e in each))
    assert found.against.fedavg == each[0].against.fedavg
    assert found.against.of_fedavg == pytest.approx(
        (found.run.up + found.run.down) / each[0].against.fedavg
    )
    for arm, one in zip(found.arms, each, strict=True):
        assert (arm.client, arm.run, arm.masks) == (one.client, one.run, one.masks)
    assert found.encodings[0].up == pytest.approx(sum(e.encodings[0].up for e in each), abs=3)


def test_what_arms_publish_alike_is_fetched_once() -> None:
    """With all clients in each round: fedselect is FedAvg until its first mask serves."""
    settings = asked("parallel").settings.model_copy(
        update={"round": RoundPolicy(goal=12, over_selection=1)}
    )
    body = asked("parallel").model_copy(update={"settings": settings})
    found, version = estimate_run(body, SPACE), version_size(10_000)
    each = sum(arm.client.down for arm in found.arms)
    first = settings.policies[2].first_use()
    assert first == 11
    assert each - found.client.down == (2 + first) * version
    assert 12 * found.client.down == found.run.down
    late = preset("fedper-late", rounds=20)
    again = Arms(mode="parallel", policies=(*POLICIES, late, preset("local")))
    more = body.model_copy(update={"settings": settings.model_copy(update={"arms": again})})
    found = estimate_run(more, SPACE)
    each = sum(arm.client.down for arm in found.arms)
    assert each - found.client.down == (4 + first + 10) * version
    two = Arms(mode="parallel", policies=(preset("fedavg"), preset("random", rounds=40)))
    same = body.model_copy(update={"settings": settings.model_copy(update={"arms": two})})
    found = estimate_run(same, SPACE)
    assert found.client.down < sum(arm.client.down for arm in found.arms) - 19 * version


def test_randomized_arms_share_the_clients() -> None:
    found, each = estimate_run(asked("randomized", 60, data_bytes=1000), SPACE), alone(20)
    assert (found.clients, [arm.clients for arm in found.arms]) == (60, [20, 20, 20])
    assert found.run.up == sum(e.run.up for e in each)
    assert found.client.up == pytest.approx(sum(e.client.up for e in each) / 3, abs=1)
    assert found.links[0].round_seconds == max(e.links[0].round_seconds for e in each)
    assert found.against.central == 60_000
    assert "20 an arm" in found.assumptions[-1]


def test_the_mode_is_what_a_run_would_get() -> None:
    unsaid = asked("parallel").settings.arms.model_copy(update={"mode": None})
    for clients, mode in ((49, "parallel"), (60, "randomized")):
        settings = asked("parallel").settings.model_copy(update={"arms": unsaid})
        body = asked(mode, clients).model_copy(update={"settings": settings})
        assert estimate_run(body, SPACE) == estimate_run(asked(mode, clients), SPACE)
