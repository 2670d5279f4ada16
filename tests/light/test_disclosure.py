"""What sites tell is as coarse as the run says, and consistent."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedselect.disclosure import Disclosure, at_least
from fedselect.evaluations import EvaluationReport, ScoreReport
from fedselect.explaindocs import AblationReport
from fedselect.policies import RunSettings

STEPS = st.sampled_from([None, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5])
COUNTS = st.sampled_from([1, 2, 5, 10])
RULES = st.builds(Disclosure, round_scores=STEPS, round_counts=COUNTS)


def settings_of(rule, **report):
    return RunSettings(disclosure=rule, report=report or {"min_examples": 10})


@st.composite
def pairs(draw):
    """Two models on the same examples: right by both, by one alone, by neither."""
    both, one, other, neither = (draw(st.integers(0, 300)) for _ in range(4))
    total = max(1, both + one + other + neither)
    loss = draw(st.floats(0, 20))
    post = {"correct": both + one, "total": total, "loss": loss, "both": both + one}
    pre = {"correct": both + other, "total": total, "loss": loss / 2, "both": both}
    return {"post": post, "pre": pre}


def report(scores, **more):
    numbers = {"participations": 3, "personal_share": 0.4321, "bytes_sent": 1, "bytes_received": 2}
    return EvaluationReport.model_validate({"scores": scores, **numbers, **more})


@given(pairs(), RULES)
@example(
    {
        "post": {"correct": 40, "total": 61, "loss": 0.0, "both": 40},
        "pre": {"correct": 40, "total": 61, "loss": 0.0, "both": 21},
    },
    Disclosure(round_scores=0.1, round_counts=2),
)
def test_a_report_stays_a_report_and_twice_is_as_once(scores, rule):
    settings = settings_of(rule)
    told = report(scores).disclosed(settings)
    again = EvaluationReport.model_validate(told.model_dump())  # its own checks hold
    assert again.disclosed(settings) == told
    step, count = rule.round_scores, rule.round_counts
    for name, score in told.scores.items():
        assert score.total % count == 0 or count == 1
        if step is not None:
            exact = scores[name]["correct"] / scores[name]["total"]
            slack = step / 2 + 0.5 / score.total + 1e-9
            assert abs(score.correct / score.total - exact) <= slack
            assert score.loss == pytest.approx(step * round(score.loss / step))


@given(st.integers(1, 120), st.data(), STEPS)
def test_the_smallest_number_that_is_told(total, data, step):
    rule = Disclosure(round_scores=step)
    least = data.draw(st.integers(0, total))
    told = {rule.part(count / total, total) for count in range(total + 1)}
    assert rule.part_from(least, total) == min(each for each in told if each >= least)


def test_no_number_is_too_large_or_too_small_to_round():
    assert Disclosure(round_scores=0.05).number(1e308) == 1e308
    assert Disclosure(round_scores=1e-300).number(0.4, 1) == 0.4
    for step, total in ((1e-18, 9 * 10**15), (1e-17, 10**18), (0.5, 1), (1e-300, 10**12)):
        assert Disclosure(round_scores=step).part_from(total - 1, total) >= total - 1


@given(pairs(), RULES)
def test_an_ablation_is_rounded_alike(scores, rule):
    settings = settings_of(rule)
    tensors = [{"name": "w", "score": scores["pre"]}, {"name": "v", "score": None}]
    found = AblationReport.model_validate(
        {"whole": scores["post"], "without": scores["pre"], "tensors": tensors}
    )
    told = found.disclosed(settings)
    assert AblationReport.model_validate(told.model_dump()) == told
    if told.whole is not None:
        evaluated = report(scores).disclosed(settings).scores
        assert told.whole.correct == evaluated["post"].correct
        assert told.without == told.tensors[0].score
        assert told.without.correct == evaluated["pre"].correct
    assert told.tensors[1].score is None


def test_nothing_changes_unless_the_run_says_so():
    scores = {"post": {"correct": 7, "total": 13, "loss": 0.123456, "both": 7}}
    assert report(scores).disclosed(RunSettings()) == report(scores)
    assert Disclosure().count(17) == 17
    assert Disclosure().number(0.123) == 0.123
    assert "disclosure" not in RunSettings().model_dump(), "earlier agents need not know of it"


def test_examples():
    rule = Disclosure(round_scores=0.05, round_counts=10)
    score = ScoreReport(correct=61, total=97, loss=0.734).rounded(rule)
    assert (score.correct, score.total, score.loss) == (65, 100, 0.75)
    assert [rule.count(n) for n in (0, 1, 14, 15, 96)] == [0, 10, 10, 20, 100]
    assert rule.number(0.99, 1) == 1
    assert rule.number(1.99, 2) == 2
    assert Disclosure(round_scores=0.3).number(0.99, 1) == 0.9
    assert Disclosure(round_scores=0.4).number(0.99, 1) == 0.8
    told = report({}, divergence=1.98, labels={"a": 44, "b": 8}).disclosed(settings_of(rule))
    assert (told.personal_share, told.divergence, told.labels) == (0.45, 2, {"a": 40})


def test_what_is_just_enough_stays_enough():
    """The coordinator withholds what looks like too few examples, after the site has rounded."""
    with pytest.raises(ValueError, match="does not divide"):
        settings_of(Disclosure(round_counts=4))
    settings = settings_of(Disclosure(round_counts=5))
    scores = {"post": {"correct": 3, "total": 10, "loss": 1}}
    told = report(scores).disclosed(settings)
    assert told.disclosed(settings).scores["post"].total == 10
    scores["post"]["total"] = 9
    assert report(scores).disclosed(settings).scores == {}


@given(st.lists(st.integers(1, 10**6), max_size=30), st.integers(1, 10**6), st.integers(1, 5))
def test_a_sum_over_clients_resolves_none_of_them(counts, own, clients):
    """Of a sum with and without a client, no more is seen than that it may have crossed a step."""
    without, with_it = at_least(counts, clients) or 0, at_least([*counts, own], clients) or 0
    if len(counts) < clients:
        assert without == 0
    assert 0 <= without <= sum(counts)
    assert 0 <= with_it <= sum(counts) + own
    step = sum(sorted([*counts, own])[-clients:])  # at least: it is rounded up
    assert with_it == 0 or with_it >= step >= own


def test_steps_of_sums_over_clients():
    assert at_least([90] * 9, 3) == 500
    assert at_least([90] * 5, 3) is None, "450, in steps of 500"
    assert at_least([1000, *[10] * 9], 3) is None, "one client is nearly all of it"
    assert at_least([400] * 20, 3) == 8000
    assert at_least([], 1) is at_least([0, 0], 2) is at_least([7], 2) is None
