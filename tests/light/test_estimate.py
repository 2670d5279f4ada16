"""Estimates: their sums, their limits, and what they say where little is known."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from pydantic import ValidationError

from fedselect import preset_run
from fedselect.errors import SettingsError
from fedselect.estimate import WORKER_MEMORY, estimate, single_tensor
from fedselect.estimatedocs import MOST_STRETCHES, EstimateCreate
from fedselect.filesizes import version_size
from fedselect.policies import Policy, RoundPolicy, RunSettings, Training, Wire

D = 1_000_000


def ask(elements=D, **changes):
    settings = changes.pop("settings", None) or rule()
    return EstimateCreate(
        elements=elements, settings=settings, **{"clients": 10, "links": ["lan"], **changes}
    )


def rule(name="fedselect", *, rounds=60, encoding="f32", **round_policy):
    policy = RoundPolicy(**{"goal": 10, "over_selection": 1.0, **round_policy})
    return preset_run(name, rounds=rounds, round=policy, wire=Wire(encoding=encoding))


def answer(**changes):
    asked = ask(**changes)
    return estimate(asked, single_tensor(asked.elements))


def test_fedavg_in_float32_costs_what_everybody_knows():
    found = answer(settings=rule("fedavg"))
    file = version_size(D)
    assert found.client.down == 61 * file  # 60 rounds and the evaluation
    assert found.client.up == pytest.approx(60 * 4 * D, rel=0.002)
    assert found.against.fedavg == 10 * 60 * 8 * D
    assert found.against.of_fedavg == pytest.approx(1 + 1 / 120, rel=0.002)
    assert found.run.up == 10 * found.client.up
    assert [row.mask for row in found.masks] == ["first", "unchanged"]


def test_the_schedule_is_the_policy_s():
    found = answer()
    assert [(row.first, row.last) for row in found.masks[:2]] == [(1, 1), (2, 31)]
    for before, after in pairwise(found.masks):
        assert after.first == before.last + 1
        assert after.personal_share >= before.personal_share
    assert found.masks[-1].last == 60
    assert found.masks[-1].personal_share == pytest.approx(0.3)
    grown = [row for row in found.masks if row.mask == "grown"]
    assert len(grown) == 7  # to 0.302 by 0.05, capped
    assert all(abs(row.mask_bytes - D / 8) < 200 for row in grown)


def test_encodings_keep_their_promises():
    half = {"growth": 0.5, "limit": 0.5, "start_round": 1}
    rows = {}
    for encoding in ("bf16", "int8"):
        settings = rule(encoding=encoding).model_copy(update={"policy": Policy(**half)})
        found = answer(elements=4 * D, settings=settings)
        rows[encoding] = found
        last = found.masks[-1]
        share = (last.update_bytes + last.download_bytes) / (8 * 4 * D)
        assert share < {"bf16": 0.27, "int8": 1 / 7}[encoding]
    names = [row.encoding for row in rows["int8"].encodings]
    assert names == ["f32", "bf16", "int8"]
    shares = [row.of_fedavg for row in rows["int8"].encodings]
    assert shares == sorted(shares, reverse=True)


def test_who_comes_seldom_fetches_more_each_time():
    many = answer(clients=100, settings=rule(encoding="int8"))
    few = answer(clients=10, settings=rule(encoding="int8"))
    assert (many.per_round, many.participations) == (10, 6)
    assert many.masks[1].download_bytes > 5 * few.masks[1].download_bytes
    assert many.run.up < few.run.up * 1.3  # as many updates, none of which has a grown mask
    assert any("No mask is ever used" in text for text in many.assumptions)
    assert not any("No mask is ever used" in text for text in few.assumptions)
    assert many.evaluation_down > few.evaluation_down


def test_a_slow_line_takes_longer_and_a_store_has_a_line_too():
    found = answer(links=["1mbit", "100mbit", "100mbit/1mbit"])
    slow, fast, mixed = (row.round_seconds for row in found.links)
    assert slow > mixed > fast
    one = found.links[0]
    assert one.up_seconds == pytest.approx(8 * found.participation.up / 1e6, rel=1e-6)
    busy = answer(links=["lan"], store_link="1mbit")
    assert busy.links[0].round_seconds > 8 * 10 * found.participation.up / 1e6


def test_time_of_a_client_is_measured_or_assumed():
    assumed = answer().compute
    assert (assumed.basis, assumed.steps) == ("flops", 20)
    measured = answer(measured={"step_seconds": 0.5}).compute
    assert (measured.basis, measured.seconds) == ("measured", 10)
    official = answer(settings=rule("fedselect-official"), examples=100).compute
    assert official.steps == 15 * 2 * 4


def test_memory_does_not_grow_and_sums_do():
    small, large = answer(elements=D), answer(elements=100 * D)
    assert small.server.worker_memory == large.server.worker_memory == WORKER_MEMORY
    assert large.server.kernel_seconds == pytest.approx(100 * small.server.kernel_seconds)


def test_what_lies_in_the_store():
    found = answer(settings=rule("fedavg"))
    assert found.storage.kept == pytest.approx(61 * version_size(D), rel=0.001)
    assert found.storage.run - found.storage.kept == pytest.approx(found.run.up + D / 8, rel=0.001)


def test_against_sending_the_data():
    assert answer().against.central is None
    found = answer(data_bytes=10**9)
    assert found.against.central == 10**10
    assert found.against.of_central == pytest.approx((found.run.up + found.run.down) / 10**10)


def test_too_few_clients():
    with pytest.raises(SettingsError, match="quorum"):
        answer(clients=1)
    found = answer(clients=5)
    assert found.links[0].round_seconds > 600
    assert any("selection deadline" in text for text in found.assumptions)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"elements": 5, "space": {}},
        {"elements": 0},
        {"elements": 5, "clients": 0},
        {"elements": 5, "links": []},
        {"elements": 5, "measured": {"step_seconds": -1}},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        EstimateCreate(**{"clients": 3, **wrong})


def test_unknown_links_are_refused():
    with pytest.raises(SettingsError, match="no link"):
        answer(links=["carrier.pigeon"])


@pytest.mark.parametrize("encoding", ["f32", "int8"])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_largest_question_is_answered_soon(encoding, interval):
    policy = Policy(growth=1e-4, limit=1, interval=interval)
    round_policy = RoundPolicy(goal=100_000, min_contributors=1000, quorum=1000)
    settings = RunSettings(
        rounds=100_000,
        policy=policy,
        training=Training(epochs=10_000),
        round=round_policy,
        wire=Wire(encoding=encoding),
    )
    begun = time.process_time()
    found = answer(elements=2**33, clients=1_000_000, settings=settings)
    assert time.process_time() - begun < 5
    assert len(found.masks) <= MOST_STRETCHES
    assert found.run.up > 0
