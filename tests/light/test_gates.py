"""Gates at their boundaries, with figures recomputed here from the scores themselves."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from pydantic import ValidationError

from fedselect.effects import ENOUGH_CLIENTS, RESAMPLES, gain, mean_difference, worst_decile
from fedselect.evaluations import ScoreReport
from fedselect.gates import Observation, Observed, cannot_tell, judge
from fedselect.rolloutdocs import Gates, GateVerdict, RolloutCreate, Verdict

OFF = dict.fromkeys(("mean_gain", "harmed_share", "worst_decile_drop", "rejection_rate", "latency"))
PASS, FAIL, INSUFFICIENT = Verdict.PASS, Verdict.FAIL, Verdict.INSUFFICIENT


def score(correct: int, total: int = 100) -> ScoreReport:
    return ScoreReport(correct=correct, total=total, loss=0)


def seen(points: float | None, number: int = 0, *, seconds: float = 1.0) -> Observation:
    """A client whose version is so many points better than the one before, and than its own."""
    if points is None:
        return Observation(f"c{number}", None)
    version = score(50 + int(points))
    scores = {"post": version, "before": score(50)}
    scores |= {"pre": version, "local_only": score(50), "start": score(10)}
    return Observation(f"c{number}", scores, seconds)


def group(*points: float | None) -> list[Observation]:
    return [seen(each, number) for number, each in enumerate(points)]


def one(stage: list[Observation], control: list[Observation], **gates: object) -> GateVerdict:
    (found,) = judge(Gates(**{**OFF, **gates}), Observed(stage, control, seed=7))
    return found


# --- mean gain ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "verdict"), [(2.0, PASS), (2.000001, FAIL), (-1.0, PASS)])
def test_the_mean_gain_is_the_difference_of_the_groups_and_its_limit_passes(limit, verdict):
    found = one(group(*[5] * 10), group(*[3] * 10), mean_gain=limit)
    assert (found.verdict, found.figure) == (verdict, pytest.approx(2, abs=1e-12))
    assert (found.stage.value, found.control.value) == (pytest.approx(5), pytest.approx(3))


@pytest.mark.parametrize("sizes", [(9, 10), (10, 9), (3, 3), (0, 10)])
def test_fewer_than_ten_clients_in_either_group_are_insufficient(sizes):
    stage, control = (group(*[5] * size) for size in sizes)
    for gate in ("mean_gain", "worst_decile_drop"):
        found = one(stage, control, **{gate: 0.0})
        assert found.verdict is INSUFFICIENT
        assert found.interval is None
        assert "insufficient evidence" in found.text
        assert found.text.endswith("admin decides")


def test_ten_in_both_groups_are_enough():
    assert one(group(*range(10)), group(*range(10)), mean_gain=0.0).verdict is PASS


def test_the_interval_of_the_difference_is_the_bootstrap_of_both_groups():
    one_, other = [float(x) for x in range(12)], [float(x % 3) for x in range(15)]
    found = mean_difference(one_, other, 3)
    rng = np.random.default_rng(99)
    means = [
        fmean(rng.choice(one_, len(one_))) - fmean(rng.choice(other, len(other)))
        for _ in range(RESAMPLES // 5)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.2), pytest.approx(high, abs=0.2))
    assert mean_difference(one_, other, 3) == found
    assert mean_difference(one_[: ENOUGH_CLIENTS - 1], other, 3) is None


def test_another_baseline_of_the_client_may_be_asked_for():
    found = one(group(*[5] * 10), group(*[3] * 10), mean_gain=0.0, baseline="start")
    assert found.stage.value == pytest.approx(45)


# --- harm --------------------------------------------------------------------------------------


def test_harm_is_judged_client_by_client_so_that_few_are_enough():
    assert gain(score(20), score(50), judged=True).harmed
    assert not gain(score(49), score(50), judged=True).harmed
    stage = group(-30, 0, 0, 0)
    for limit, verdict in ((0.25, PASS), (0.2499, FAIL)):
        found = one(stage, group(0), harmed_share=limit)
        assert (found.verdict, found.figure) == (verdict, 0.25)


def test_one_planted_harmed_client_of_three_is_caught():
    assert one(group(5, 5, -40), group(0, 0, 0), harmed_share=0.1).verdict is FAIL


def test_nobody_measured_says_nothing_about_harm():
    found = one(group(None, None), group(0), harmed_share=0.1)
    assert (found.verdict, found.figure) == (INSUFFICIENT, None)


def test_what_is_told_of_the_trained_model_does_not_narrow_the_interval_of_the_merged_one():
    told = ScoreReport(correct=50, total=100, loss=0, both=50)
    scores = {"post": score(50), "pre": score(44), "local_only": told}
    found = one([Observation("c", scores, 1.0)], [], harmed_share=0.0, baseline="local_only")
    assert found.figure == 0  # with that overlap the interval would end below 0
    assert gain(score(44), told, judged=True).harmed


def test_what_is_told_of_the_version_before_narrows_the_interval_of_the_new_one():
    for both, harmed in ((44, 1.0), (None, 0.0)):
        scores = {
            "post": score(44),
            "before": ScoreReport(correct=50, total=100, loss=0, both=both),
        }
        found = one([Observation("c", scores, 1.0)], [], harmed_share=0.0)
        assert found.figure == harmed


def test_a_run_with_bad_settings_cannot_hide_behind_a_bad_baseline():
    """What it trains alone is as bad as what it trains together; the version before is not."""
    bad = {"post": score(10), "before": score(90), "pre": score(10), "local_only": score(10)}
    stage = [Observation("c", bad, 1.0)]
    assert one(stage, [], harmed_share=0.0).verdict is FAIL
    assert one(stage, [], harmed_share=0.0, baseline="local_only").verdict is PASS


def test_an_agent_that_cannot_compare_is_not_measured():
    old = {"post": score(90), "pre": score(90), "local_only": score(50)}
    assert one([Observation("c", old, 1.0)], [], harmed_share=0.0).verdict is INSUFFICIENT


# --- the worst decile --------------------------------------------------------------------------


def test_the_worst_decile_is_a_whole_number_of_clients():
    assert worst_decile([3.0, 1.0, 2.0]) == 1
    assert worst_decile([float(x) for x in range(10)]) == 0
    assert worst_decile([float(x) for x in range(11)]) == 0.5


@pytest.mark.parametrize(("limit", "verdict"), [(4.0, PASS), (3.999999, FAIL)])
def test_the_worst_decile_may_drop_as_far_as_its_limit(limit, verdict):
    stage, control = group(-2, *[9] * 9), group(2, *[5] * 9)
    found = one(stage, control, worst_decile_drop=limit)
    assert (found.verdict, found.figure) == (verdict, pytest.approx(4, abs=1e-12))


# --- refusals and time -------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "verdict"), [(0.25, PASS), (0.24, FAIL)])
def test_who_does_not_answer_counts_as_a_refusal(limit, verdict):
    found = one(group(0, 0, 0, None), group(None), rejection_rate=limit)
    assert (found.verdict, found.figure, found.control.value) == (verdict, 0.25, 1.0)


@pytest.mark.parametrize(("limit", "verdict"), [(9.0, PASS), (8.999, FAIL)])
def test_nine_of_ten_keep_the_latency(limit, verdict):
    stage = [seen(0, number, seconds=number + 1.0) for number in range(10)]
    found = one(stage, [], latency=limit)
    assert (found.verdict, found.figure) == (verdict, 9.0)


def test_nobody_has_answered():
    assert one(group(None), [], latency=1.0).verdict is INSUFFICIENT


# --- all of them -------------------------------------------------------------------------------


def test_gates_that_are_off_say_nothing_and_all_others_name_limit_and_unit():
    assert judge(Gates(**OFF), Observed([], [], seed=0)) == []
    found = judge(Gates(latency=5), Observed(group(*[1] * 10), group(*[0] * 10), seed=1))
    assert [each.gate for each in found] == list(OFF)
    assert all(each.unit and str(each.gate) in each.text for each in found)
    assert {each.verdict for each in found} == {PASS}


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean_gain": math.nan},
        {"harmed_share": 1.1},
        {"harmed_share": -0.1},
        {"latency": math.inf},
        {"latency": 0},
        {"rejection_rate": "0.1"},
        {"other": 1},
    ],
)
def test_limits_that_cannot_be(wrong):
    with pytest.raises(ValidationError):
        Gates(**wrong)


@pytest.mark.parametrize("stages", [[], [5, 25], [25, 5, 100], [5, 5, 100], [0, 100], [math.nan]])
def test_stages_rise_to_all(stages):
    ids = dict.fromkeys(("model_id", "version_id"), "00000000-0000-4000-8000-000000000000")
    with pytest.raises(ValidationError):
        RolloutCreate(name="x", **ids, stages=stages)


# --- in words ----------------------------------------------------------------------------------


def test_a_mean_says_whether_its_interval_leaves_the_limit_open():
    noisy = group(*[-9, 9] * 6), group(*[-8, 8] * 6)
    found = one(*noisy, mean_gain=0.0)
    assert (found.verdict, found.figure) == (PASS, pytest.approx(0, abs=1e-9))
    assert "which leaves both open" in found.text
    clear = one(group(*[9, 8] * 6), group(*[0, 1] * 6), mean_gain=0.0)
    assert "95 % interval" in clear.text
    assert "open" not in clear.text


@pytest.mark.parametrize(
    ("stages", "control", "words"),
    [
        ((10, 20), 10, None),
        ((3, 7), 3, "in no stage: 10 clients are needed"),
        ((5, 30, 81), 10, "not in stage 1: 10 clients are needed in the stage and in the control"),
        ((9, 9, 40), 12, "there are 9 and 9 and 12"),
    ],
)
def test_what_groups_cannot_tell_is_known_before(stages, control, words):
    found = cannot_tell(Gates(), stages, control)
    assert (words in found[0]) if words else found == []
    assert cannot_tell(Gates(mean_gain=None, worst_decile_drop=None), stages, control) == []
    only = cannot_tell(Gates(mean_gain=None), stages, control)
    assert not only or only[0].startswith("worst_decile_drop can tell")
