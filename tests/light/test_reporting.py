"""The report of a run: every figure follows from what was measured, and the page says it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from math import ceil
from uuid import UUID

import numpy as np
import pytest
from report_samples import RUN, SPACE, evaluated, sample, stored, twelve

from fedselect import Mask, RunSettings, Training, pages, plots, preset, reportpage
from fedselect.effects import BASELINES
from fedselect.reportdoc import RunReport
from fedselect.reporting import MODELS, Repeated, unlike, unlike_rerun
from fedselect.reporttable import COLUMNS, table

SVG = "{http://www.w3.org/2000/svg}"


def points(post: int, other: int, total: int = 200) -> float:
    return 100 * (post - other) / total


# --- the document ------------------------------------------------------------------------------


def test_gains_of_every_client_from_the_raw_counts():
    raw, report = {e.name: e.report.scores for e in twelve()}, sample()
    assert [client.name for client in report.clients] == sorted(raw)
    for client in report.clients:
        scores = raw[client.name]
        assert set(client.gains) == set(BASELINES) - {"fedavg_ft"}
        for baseline, gain in client.gains.items():
            expected = points(scores["post"].correct, scores[baseline].correct)
            assert gain.points == pytest.approx(expected)
        assert {m: a.correct for m, a in client.accuracy.items()} == {
            m: s.correct for m, s in scores.items()
        }


def test_the_harmed_client_is_said_to_be_harmed():
    effect = sample().effects["local_only"]
    assert (effect.harmed, effect.worse, effect.lost) == (["site-11"],) * 3
    assert "site-11" in effect.worst_decile
    assert effect.worst_decile_points == pytest.approx((points(90, 170) + points(150, 140)) / 2)
    assert effect.clients == 12
    assert effect.interval is not None
    assert sample().effects["pre"].harmed is None, "harm is said of two baselines alone"


def test_another_run_is_fedavg_with_fine_tuning():
    found = twelve()
    tuned = [evaluated(n, post=100 + 10 * n, alone=1, total=300).report for n in range(12)]
    tuned[2] = tuned[2].model_copy(update={"participations": 2})
    both = [replace(each, tuned=other) for each, other in zip(found, tuned, strict=True)]
    report = sample(both, fedavg=RUN.id)
    assert (report.fedavg_run, report.unmeasured) == (RUN.id, {})
    gains = {c.name: c.gains["fedavg_ft"] for c in report.clients if "fedavg_ft" in c.gains}
    assert set(gains) == {f"site-{n:02}" for n in range(12)} - {"site-02"}, "other gradient steps"
    for each, other in zip(found, tuned, strict=True):
        if each.name in gains:
            expected = each.report.scores["post"].correct / 2 - other.scores["post"].correct / 3
            assert gains[each.name].points == pytest.approx(expected)
            assert gains[each.name].worse is (expected < -2)
            assert not gains[each.name].paired
    assert report.effects["fedavg_ft"].harmed == ["site-11"]
    facts = {fact.code: fact for fact in report.facts}
    assert (facts["harmed_fedavg_ft"].value, facts["harmed_fedavg_ft"].n) == (1, 11)
    text = Elements(reportpage.page(report)).text
    assert "Against FedAvg with fine-tuning 1 of 11 clients are harmed" in text
    assert "Not measured" not in text
    assert len(drawings(reportpage.page(report))) == 12
    line = list(csv.DictReader(io.StringIO(table(report))))[11]
    assert line["harmed_fedavg_ft"] == "True"


FEDAVG = {"policy": preset("fedavg"), "rounds": 20}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"policy": preset("random", start_round=1)}, "makes elements personal"),
        ({"rounds": 21}, "21 rounds, not 20"),
        ({"training": Training(steps=21)}, "21 gradient steps"),
        ({"training": Training(steps=20, learning_rate=0.1)}, "done otherwise"),
        ({"seed": 5}, None),
    ],
)
def test_what_is_fedavg_at_equal_gradient_steps(changes, why):
    run = RunSettings(policy=preset("fedselect", start_round=10), rounds=20)
    said = unlike(run, RunSettings(**{**FEDAVG, **changes}))
    assert (why in said) if why else said is None


def test_epochs_of_another_schedule_are_other_steps():
    epochs = {"training": Training(epochs=3), "rounds": 20}
    run = RunSettings(policy=preset("fedselect-official"), **epochs)
    assert unlike(run, RunSettings(policy=preset("fedavg"), **epochs))
    alternating = preset("fedavg", schedule="alternating")
    assert unlike(run, RunSettings(policy=alternating, **epochs)) is None


def test_means_and_evenness_from_the_raw_counts():
    raw, report = [e.report.scores for e in twelve()], sample()
    for baseline, effect in report.effects.items():
        gaps = [points(s["post"].correct, s[baseline].correct) for s in raw]
        assert effect.mean_points == pytest.approx(sum(gaps) / 12)
        assert effect.lowest_points == pytest.approx(min(gaps))
    for model in set(MODELS) - {"fedavg_ft"}:
        x = [s[model].correct for s in raw]
        expected = sum(x) ** 2 / (12 * sum(v * v for v in x))
        assert report.fairness[model] == pytest.approx(expected)


def test_cost_against_fedavg_is_counted_in_elements_that_travel():
    report = sample()
    dense = 4 * (SPACE.dim - 10)  # ten are frozen
    for number, client in enumerate(report.clients):
        cost = client.cost
        assert (cost.sent_bytes, cost.received_bytes) == (1000 + number, 2000)
        assert (cost.fedavg_sent_bytes, cost.fedavg_received_bytes) == (3 * dense, 4 * dense)
    total = sum(1000 + n + 2000 for n in range(12))
    assert report.cost.of_fedavg_percent == pytest.approx(100 * total / (12 * 7 * dense))
    assert report.cost.control_bytes == 12 * 70
    assert (report.cost.rejected.count, report.cost.rejected.of) == (4, 40)
    assert report.cost.client_seconds is None


def test_small_groups_are_left_out():
    few = [*twelve()[:3], evaluated(5, post=9, alone=1, total=9)]
    report = sample(few, min_examples=10)
    hidden = next(client for client in report.clients if client.name == "site-05")
    assert hidden.withheld
    assert (hidden.accuracy, hidden.gains) == ({}, {})
    assert report.effects["local_only"].clients == 3
    assert sample(few, min_examples=10, min_clients=4).effects == {}
    assert sample(few, min_examples=10, min_clients=4).fairness == {}
    assert sample(few, min_examples=10, min_clients=5).masks.overlap is None
    assert sample(few, min_examples=10, min_clients=5).masks.tensors == []


def test_few_clients_are_insufficient_evidence():
    report = sample(twelve()[:9])
    assert report.effects["local_only"].evidence == "insufficient"
    (fact,) = [f for f in report.facts if f.code == "mean_gain_local_only"]
    assert "insufficient evidence" in fact.text
    assert fact.n == 9


def test_facts_name_value_unit_and_n():
    facts = {fact.code: fact for fact in sample().facts}
    assert (facts["harmed_local_only"].value, facts["harmed_local_only"].n) == (1, 12)
    assert (facts["rejected"].value, facts["rejected"].unit, facts["rejected"].n) == (
        10,
        "percent",
        40,
    )
    assert facts["no_effect_fedavg_ft"].value is None
    assert facts["evaluated"].n == 12
    nothing = {fact.code for fact in sample([]).facts}
    assert "no_effect_local_only" in nothing


def test_a_document_survives_its_journey():
    report = sample()
    assert RunReport.model_validate_json(report.model_dump_json()) == report
    assert report.format == "fedselect-report/1"


# --- heterogeneity -----------------------------------------------------------------------------


def test_gain_is_told_against_heterogeneity():
    report = sample()
    found = {(each.index, each.baseline): each for each in report.heterogeneity}
    assert set(found) == {("divergence", "global"), ("divergence", "local_only")}
    alone = found["divergence", "local_only"]
    raw = {e.name: e.report for e in twelve()}
    gaps = [points(r.scores["post"].correct, r.scores["local_only"].correct) for r in raw.values()]
    apart = [r.divergence for r in raw.values()]
    ranks = [np.argsort(np.argsort(each)) for each in (gaps, apart)]
    assert alone.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert alone.mean_index == pytest.approx(np.mean(apart))
    assert (alone.clients, alone.evidence) == (12, "sufficient")
    text = Elements(reportpage.page(report)).text
    assert f"Rank correlation {alone.rank_correlation:+.2f} over 12 clients" in text
    assert sample(twelve()[:2]).heterogeneity == []
    few = sample(twelve()[:9]).heterogeneity
    assert {(each.evidence, each.interval) for each in few} == {("insufficient", None)}


def test_labels_count_only_of_those_who_tell_them():
    labels = [{"a": 90, "b": 10}, {"a": 50, "b": 50}, {"b": 80, "c": 20}, {"a": 40, "rare": 3}]
    found = [evaluated(n, post=150, alone=140, labels=each) for n, each in enumerate(labels)]
    found.append(evaluated(4, post=150, alone=140))
    report = sample(found)
    told = {c.name: c.label_distance for c in report.clients}
    assert told["site-04"] is None
    mean = {"a": (0.5 + 0 + 1) / 3, "b": (0.5 + 0.8) / 3, "c": 0.2 / 3}
    expected = (abs(0.9 - mean["a"]) + abs(0.1 - mean["b"]) + mean["c"]) / 2
    assert told["site-00"] == pytest.approx(expected), "three examples of a label are left out"
    few = sample(found, min_clients=4)
    assert {c.label_distance for c in few.clients} == {None}
    for text in (report.model_dump_json(), reportpage.page(report), table(report)):
        assert "rare" not in text
        assert '"b"' not in text
    line = next(csv.DictReader(io.StringIO(table(report))))
    assert float(line["label_distance"]) == pytest.approx(expected)


def test_another_seed_is_a_rerun_and_nothing_else_is():
    settings = RunSettings(seed=4)
    assert unlike_rerun(settings, RunSettings(seed=5)) is None
    assert unlike_rerun(settings, RunSettings(seed=5, report={"min_clients": 9})) is None
    assert "same seed" in unlike_rerun(settings, RunSettings(seed=4))
    assert "rounds, training" in unlike_rerun(
        settings, RunSettings(seed=5, rounds=61, training=Training(steps=21))
    )


def test_what_a_rerun_chooses_again():
    kept, other = stored(12), stored(12, seed=9)
    last = {h.client_id: h.stages[-1].digest for h in other.histories}
    read = replace(kept, read={**kept.read, **other.read})
    named = Repeated(UUID(int=9), "again-2026", 5, last)
    report = sample(masks=read, rerun=named)
    rerun = report.masks.rerun
    always = Mask.initial(SPACE)
    for client, ours, theirs in zip(rerun.clients, kept.histories, other.histories, strict=True):
        one, two = (read.read[h.stages[-1].digest] - always for h in (ours, theirs))
        assert client.again_percent == pytest.approx(100 * (one & two).personal / one.personal)
    shares = [client.again_percent for client in rerun.clients]
    assert rerun.mean_again_percent == pytest.approx(np.mean(shares))
    text = Elements(reportpage.page(report)).text
    assert f"run again-2026 with seed 5 chose {rerun.mean_again_percent:.1f} % again" in text
    few = sample(twelve()[:2], masks=replace(stored(2), read=read.read), rerun=named)
    assert few.masks.rerun.mean_again_percent is None
    assert "Not said: it takes 3 clients" in Elements(reportpage.page(few)).text


def test_tensors_over_the_rounds_from_the_masks():
    kept = stored(12)
    report = sample(masks=kept)
    assert report.masks.rounds == [2, 3]
    for tensor in report.masks.tensors:
        slot = SPACE.by_name[tensor.name]
        for column, value in enumerate(tensor.rounds_percent):
            parts = [
                kept.read[h.stages[column].digest].to_bool()[slot.offset : slot.stop]
                for h in kept.histories
            ]
            assert value == pytest.approx(100 * np.mean(parts))


# --- the table ---------------------------------------------------------------------------------


def test_the_table_has_one_line_per_client():
    report = sample([*twelve()[:4], evaluated(5, post=9, alone=1, total=9)])
    lines = list(csv.DictReader(io.StringIO(table(report))))
    assert [line["name"] for line in lines] == [client.name for client in report.clients]
    assert tuple(lines[0]) == COLUMNS
    assert float(lines[1]["gain_local_only_points"]) == pytest.approx(points(151, 136))
    assert lines[1]["worse_local_only"] == "False"
    assert lines[4]["post_percent"] == lines[4]["gain_pre_points"] == ""
    assert table(sample([])).strip() == ",".join(COLUMNS)


# --- the page ----------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_a_page_stands_alone():
    page = reportpage.page(sample())
    found = Elements(page)
    assert "script" not in found.tags
    assert not {"link", "img", "iframe", "object", "form", "base"} & set(found.tags)
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), "no handlers"
        assert name not in {"style", "src", "href", "srcset"}, (tag, name)
        assert name == "xmlns" or "//" not in (value or ""), (tag, name, value)
    assert not re.search(r"url\(|@import", page)


def test_its_policy_allows_its_own_stylesheet_and_nothing_else():
    page = reportpage.page(sample())
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    said = dict(part.strip().split(" ", 1) for part in pages.CSP.split(";"))
    assert said["default-src"] == "'none'"
    assert said["style-src"] == f"'sha256-{digest}'"
    assert pages.CSP in page


def test_what_others_wrote_is_text():
    run = RUN.model_copy(update={"model": "<script>alert(1)</script>", "policy": '"><b>'})
    page = reportpage.page(sample(run=run))
    assert "<script" not in page
    assert "head<b>" not in page
    assert "head<b>.weight" in Elements(page).text


def test_the_five_questions_are_answered_in_words():
    text = Elements(reportpage.page(sample())).text
    assert text.index("May we roll out?") < text.index("Who gained?"), "the decision comes first"
    for question in (
        "Who gained?",
        "Who lost?",
        "What did it cost?",
        "What was personalized?",
        "May we roll out?",
    ):
        assert question in text
    effect = sample().effects["local_only"]
    assert f"gain {effect.mean_points:+.1f} percentage points in the mean over 12 clients" in text
    assert f"{len(effect.gained)} of 12 clients gained clearly" in text
    assert "1 of 12 clients are harmed" in text
    assert "They are: site-11." in text
    assert f"{sample().cost.of_fedavg_percent:.1f} % of the" in text
    overlap = sample().masks.overlap
    assert f"agree on {100 * overlap.mean:.1f} % of what either chose" in text
    assert "This report does not decide" in text


def test_its_plots_hold_every_client():
    page = reportpage.page(sample())
    found = drawings(page)
    titles = [drawing.find(f"{SVG}title").text for drawing in found]
    assert len(found) == len(set(titles)) == 11
    by_title = dict(zip(titles, found, strict=True))
    forest = by_title["Gain of each client against training alone, with 95 % intervals"]
    assert len(forest.findall(f"{SVG}circle")) == 12
    assert {c.get("fill") for c in forest.findall(f"{SVG}circle")} >= {plots.SIGNS["loss"]}
    strips = by_title["Gain of every client against each baseline"]
    assert len(strips.findall(f"{SVG}circle")) == 12 * 4
    assert len(by_title["Megabytes moved, against FedAvg"].findall(f"{SVG}rect")) == 4
    assert (
        len(by_title["Personal share of each client over the rounds"].findall(f"{SVG}polyline"))
        == 12
    )
    assert len(by_title["Personal share of each tensor"].findall(f"{SVG}rect")) == 3
    over = by_title["Personal share of each tensor over the rounds, mean over clients"]
    assert len(over.findall(f"{SVG}polyline")) == 2
    tree = by_title["Clients by their masks"]
    assert len(tree.findall(f"{SVG}line[@stroke='{plots.PALETTE[0]}']")) == 3 * 11
    apart = by_title["Gain against training alone by distance of its update from that of all"]
    assert len(apart.findall(f"{SVG}circle")) == 12
    cells = by_title["Agreement of the clients' masks, in %"].findall(f"{SVG}rect")
    assert len(cells) == 144


def test_everything_drawn_lies_inside_its_frame():
    for drawing in drawings(reportpage.page(sample())):
        width, height = map(float, drawing.get("viewBox").split()[2:])
        for element in drawing.iter():
            for name in ("x", "cx", "x1", "x2"):
                assert -1 <= float(element.get(name, 0)) <= width + 1
            for name in ("y", "cy", "y1", "y2"):
                assert -1 <= float(element.get(name, 0)) <= height + 1


def test_hundreds_of_clients_are_drawn_at_their_ends():
    many = [evaluated(n, post=100 + n % 90, alone=100) for n in range(150)]
    page = reportpage.page(sample(many, masks=stored(3)))
    forest = drawings(page)[0]
    dots = [float(c.get("cx")) for c in forest.findall(f"{SVG}circle")]
    assert len(dots) == reportpage.MOST_SHOWN
    assert dots == sorted(dots)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_page_of_few_clients_says_so(count):
    text = Elements(reportpage.page(sample(twelve()[:count], masks=stored(count)))).text
    assert ("This cannot be said" in text) == (count < 3)
    assert "May we roll out?" in text


def test_masks_that_were_not_read_leave_the_rest():
    page = reportpage.page(sample(masks=stored(12, read=False)))
    assert "From 0 of 24 stored masks" in Elements(page).text
    assert len(drawings(page)) == 6


def test_axes_have_round_numbers():
    assert plots.ticks(-7.3, 11) == [-5, 0, 5, 10]
    assert plots.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert plots.ticks(1.95, 3.05, least=1) == [2, 3]
    for low, high in ((0, 1e-9), (3, 3), (-100, 100), (0, 1e12)):
        assert 1 <= len(plots.ticks(low, high)) <= 9


def test_the_worst_tenth_is_at_least_one():
    for count in (3, 10, 11):
        effect = sample(twelve()[:count]).effects["local_only"]
        assert len(effect.worst_decile) == ceil(count / 10)
