"""The explanation of a mask: every figure against sets of element numbers, and its sentences."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from statistics import fmean
from uuid import UUID

import numpy as np
import pytest
from pydantic import ValidationError

from fedselect import Kind, Mask, ParameterSpace, Role, RunSettings, explainpage
from fedselect.effects import gain
from fedselect.evaluations import ScoreReport
from fedselect.explaindocs import AblationReport, Explanation, TensorAblation
from fedselect.explaining import Ablated, Known, Subject, explain

SPACE = ParameterSpace.of(
    [
        ("conv<1>.weight", (9, 3), Kind.WEIGHT, Role.SELECTABLE),
        ("conv1.bias", (3,), Kind.BIAS, Role.SHARED),
        ("norm.weight", (12,), Kind.NORM, Role.SELECTABLE),
        ("norm.running_mean", (7,), Kind.BUFFER, Role.PERSONAL),
        ("last.weight", (11,), Kind.WEIGHT, Role.SELECTABLE),
    ]
)
CONV, NORM, LAST = range(27), range(30, 42), range(49, 60)
NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
OWN = {*range(15), *range(30, 33), 49}
OTHERS = [{*range(10, 20), 30, 50}, {0, 1, 31, 32, 49}, {*range(5), 41}, {20, 21, 22}]
SUBJECT = Subject("ward-7", "watch-cnn", 4, UUID(int=7), UUID(int=1), "shoulder-2026")
WHOLE = ScoreReport(correct=180, total=200, loss=0.3)


def mask_of(chosen: set[int]) -> Mask:
    bits = Mask.initial(SPACE).to_bool().copy()
    bits[sorted(chosen)] = True
    return Mask.from_bool(bits)


def score(correct: int, both: int | None = None, total: int = 200) -> ScoreReport:
    return ScoreReport(correct=correct, total=total, loss=1, both=both)


def ablation(**changes: object) -> AblationReport:
    tensors = [
        TensorAblation(
            name="conv<1>.weight",
            score=score(150, 148),
            threshold=0.02,
            delta_chosen=0.05,
            delta_shared=0.01,
            distance_percent=40.0,
        ),
        TensorAblation(name="norm.weight", score=score(179, 178), threshold=0.5),
        TensorAblation(name="last.weight", score=score(195, 180)),
    ]
    known = {"whole": WHOLE, "without": score(120, 118), "tensors": tensors}
    return AblationReport.model_validate({**known, **changes})


def sample(
    *, others: list[set[int]] | None = None, report: AblationReport | None = None, **rule: int
) -> Explanation:
    masks = [mask_of(each) for each in (OTHERS if others is None else others)]
    known = Known(SPACE, mask_of(OWN), masks, Ablated(report or ablation(), 5, NOW))
    return explain(SUBJECT, RunSettings(report=rule), known, made_at=NOW)


def by_name(found: Explanation) -> dict:
    return {each.name: each for each in found.tensors}


# --- figures -----------------------------------------------------------------------------------


def test_counts_and_ranks_are_those_of_the_sets():
    found = sample()
    assert (found.elements, found.chosen) == (27 + 12 + 11, 19)
    assert found.percent == pytest.approx(100 * 19 / 50)
    assert found.fixed == ["norm.running_mean"]
    tensors = by_name(found)
    for name, part in (("conv<1>.weight", CONV), ("norm.weight", NORM), ("last.weight", LAST)):
        assert tensors[name].elements == len(part)
        assert tensors[name].chosen == len(OWN & set(part))
        assert tensors[name].percent == pytest.approx(100 * len(OWN & set(part)) / len(part))
    assert [each.name for each in found.tensors] == ["conv<1>.weight", "norm.weight", "last.weight"]
    assert [each.rank for each in found.tensors] == [1, 2, 3]
    assert "conv1.bias" not in tensors, "the policy cannot choose from it"


def test_agreement_is_that_of_the_sets():
    found = sample()
    assert found.compared == 4
    for name, part in (("conv<1>.weight", CONV), ("norm.weight", NORM), ("last.weight", LAST)):
        mine = OWN & set(part)
        tensor = by_name(found)[name]
        share = fmean(100 * fmean(j in other for other in OTHERS) for j in mine)
        assert tensor.others_percent == pytest.approx(share)
        blind = fmean(100 * len(other & set(part)) / len(part) for other in OTHERS)
        assert tensor.chance_percent == pytest.approx(blind)
        alone = [j for j in mine if not any(j in other for other in OTHERS)]
        assert tensor.alone_percent == pytest.approx(100 * len(alone) / len(mine))


def test_losses_are_paired_gains_of_the_whole_model():
    found, report = sample(), ablation()
    assert found.measured is not None
    assert (found.measured.version, found.measured.whole.percent) == (5, 90)
    for tensor in report.tensors:
        expected = gain(WHOLE, tensor.score, judged=False)
        lost = by_name(found)[tensor.name].lost
        assert (lost.points, lost.interval, lost.paired) == (
            expected.points,
            expected.interval,
            True,
        )
    losses = {name: each.lost for name, each in by_name(found).items()}
    assert {name: each.sign for name, each in losses.items()} == {
        "conv<1>.weight": "loss",
        "norm.weight": "undecided",
        "last.weight": "gain",
    }
    assert found.measured.lost.points == pytest.approx(30)


def test_values_of_few_elements_are_not_told():
    """Of three chosen elements a mean would be close to a value."""
    tensors = by_name(sample())
    assert tensors["conv<1>.weight"].threshold == 0.02
    assert tensors["conv<1>.weight"].distance_percent == 40
    assert tensors["norm.weight"].chosen < 10
    assert tensors["norm.weight"].threshold is None


def test_small_groups_are_withheld():
    few = sample(min_clients=5)
    assert few.compared == 0
    assert all(each.others_percent is None for each in few.tensors)
    assert any("at least 5 other clients" in line for line in few.summary)
    small = sample(min_examples=201)
    assert small.measured.withheld
    assert small.measured.whole is small.measured.lost is None
    assert all(each.lost is None for each in small.tensors)
    assert any("withheld" in line for line in small.summary)
    assert "points" not in " ".join(each.text for each in small.tensors)


def test_without_an_ablation_it_says_so():
    known = Known(SPACE, mask_of(OWN), [])
    found = explain(SUBJECT, RunSettings(), known, made_at=NOW)
    assert found.measured is None
    assert any("not measured" in line for line in found.summary)
    nothing = explain(SUBJECT, RunSettings(), Known(SPACE, mask_of(set())), made_at=NOW)
    assert (nothing.chosen, nothing.percent) == (0, 0)
    assert "none of the 27 weights" in nothing.tensors[0].text


def test_a_document_survives_its_journey():
    found = sample()
    assert Explanation.model_validate_json(found.model_dump_json()) == found


# --- what an agent may say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"without": score(100, total=199)}, "same examples"),
        ({"without": score(60, 39)}, "both"),
        ({"whole": None}, "same examples"),
        ({"without": score(0, 0), "tensors": [{"name": "a", "score": None}] * 2}, "twice"),
        ({"tensors": [{"name": "a", "threshold": -1}]}, "greater"),
        ({"tensors": [{"name": "a", "threshold": float("nan")}]}, "finite"),
        ({"tensors": [{"name": "a", "mask": [1, 2]}]}, "Extra"),
        ({"tensors": [{"name": f"a{n}"} for n in range(65)]}, "at most 64"),
    ],
)
def test_reports_that_cannot_be(changes, why):
    with pytest.raises(ValidationError, match=why):
        ablation(**changes)


# --- sentences and the page --------------------------------------------------------------------


def test_sentences_are_for_people():
    texts = {name: each.text for name, each in by_name(sample()).items()}
    assert re.fullmatch(
        r"In layer conv<1>\.weight 15 of 27 weights are this site's own; without them it would "
        r"lose 15\.0 points \(\d+\.\d to \d+\.\d\)\.",
        texts["conv<1>.weight"],
    )
    assert (
        "3 of 12 scales are this site's own; without them its accuracy would change by so"
        in (texts["norm.weight"])
    )
    assert (
        "1 of 11 weights is this site's own; without them it would gain 7.5 points"
        in (texts["last.weight"])
    )
    whole = " ".join(sample().summary)
    assert "19 of 50, 38.0 %, are ward-7's own" in whole
    assert "without any of them it would lose 30.0 points" in whole
    assert "worth most is conv<1>.weight" in whole
    assert "Of the 4 other clients" in whole


def test_the_page_stands_alone_and_names_no_element():
    page = explainpage.page(sample())
    assert "<script" not in page
    assert "conv<1>" not in page
    assert "conv&lt;1&gt;.weight" in page
    assert page.count("<svg") == 2
    digest = mask_of(OWN).digest
    assert digest not in page
    assert digest not in sample().model_dump_json()
    assert not re.search(r"url\(|@import|src=|href=", page)


@pytest.mark.parametrize("rule", [{}, {"min_examples": 201}, {"min_clients": 9}])
def test_pages_of_little_are_pages(rule):
    page = explainpage.page(sample(**rule))
    assert "Layer by layer" in page
    assert page.count("<svg") == (1 if "min_examples" in rule else 2)


def test_many_tensors_are_cut_to_the_largest():
    rows = [(f"l{n}.weight", (n + 1,), Kind.WEIGHT, Role.SELECTABLE) for n in range(210)]
    space = ParameterSpace.of(rows)
    known = Known(space, Mask.from_bool(np.ones(space.dim, dtype=bool)))
    found = explain(SUBJECT, RunSettings(), known, made_at=NOW)
    assert (len(found.tensors), found.tensors_left_out) == (200, 10)
    assert min(each.elements for each in found.tensors) == 11
    assert found.chosen == space.dim
