"""Studies: equal steps for every policy, resumed where they stopped, and what the figures say."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from study_samples import grid, only, result
from typer.testing import CliRunner

from fedselect.cli import build
from fedselect.errors import FedSelectError
from fedselect.policies import PRESETS
from fedselect.simulate import SimulatedRun, simulate
from fedselect.study import cells
from fedselect.study.cells import run_cell
from fedselect.study.figures import (
    by_cell,
    difference,
    differences,
    estimate,
    ranking,
    rows,
)
from fedselect.study.golden import Golden, check, read_golden
from fedselect.study.grid import GridSplit, Pair, read_grid
from fedselect.study.page import Report, marks, write_page
from fedselect.study.pretraining import participants
from fedselect.tasks import client_tasks
from fedselect.tasks.federations import dealt

ROOT = Path(__file__).parents[2]
BEGIN, END = marks("results")
GOLDEN = ROOT / "tests" / "golden" / "study.json"


# --- cells ------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fedbn"])
def test_every_policy_takes_as_many_gradient_steps(name):
    """``run_cell`` counts them; a policy that took others would be refused."""
    study = grid(name, rounds=12 if name in {"fedselect-official", "fisher-gate"} else 6)
    found = run_cell(only(study))
    assert found.steps == 2 * found.rounds
    assert len(found.pre) == len(found.post) == (1 if name in {"fedavg-ft", "fedbabu"} else 2)


def test_a_policy_that_takes_other_steps_is_refused(monkeypatch):
    monkeypatch.setattr(cells.Cell, "steps", property(lambda self: 9))
    with pytest.raises(FedSelectError, match="took 8 gradient steps, not 9") as caught:
        run_cell(only(grid("fedavg")))
    assert caught.value.code == "study_steps"


def test_a_cell_is_what_the_simulation_says():
    cell = only(grid("fisher", rounds=5))
    found = run_cell(cell)
    result = simulate(client_tasks("digits-mixed", seed=0), cell.settings)
    assert found.version == result.versions[-1]
    assert list(found.sent) == [result.bytes_up[name] for name in found.clients]
    for number, name in enumerate(found.clients):
        scores = result.scores[name]
        assert found.pre[-1][number] == scores["pre"].correct
        assert found.post[-1][number] == scores["post"].correct == found.right(number).sum()
        assert found.examples[number] == scores["post"].total
        assert found.personal[number] == pytest.approx(result.personal[name], abs=1e-6)
    accuracies = found.accuracies("pre")
    assert accuracies[0] == pytest.approx(
        100 * fmean(row[0] for row in found.pre) / found.examples[0]
    )


def test_pairs_of_hits_are_what_both_got_right():
    one, other = (run_cell(only(grid(name))) for name in ("local", "fedavg"))
    score = one.score(3, beside=other)
    assert score.both == (one.right(3) & other.right(3)).sum() <= score.correct
    assert score.correct == one.post[-1][3]


def test_masks_are_compared_between_rounds_orders_and_clients():
    study = grid("fisher", rounds=6, batch_orders=2)
    found = run_cell(only(study))
    assert found.kept == 1, "a mask that comes at once stays"
    assert 0.02 < found.again < 1
    assert 0 < found.others < found.again
    growing = run_cell(only(grid("fedselect", rounds=8)))
    assert 0 < growing.kept < 1
    assert growing.again is None
    fixed = run_cell(only(grid("fedper")))
    assert (fixed.kept, fixed.others) == (None, None)


def test_a_key_names_all_that_decides():
    base = only(grid("fedselect", rounds=6))
    others = [
        only(grid("fedselect", rounds=7)),
        only(grid("random", rounds=6)),
        only(grid("fedselect", rounds=6, seeds=(1,))),
        only(grid("fedselect", rounds=6, batch_orders=2)),
    ]
    keys = {cell.key for cell in [base, *others]}
    assert len(keys) == 5
    assert only(grid("fedselect", rounds=6)).key == base.key


def test_a_key_names_what_a_saved_split_holds_not_where_it_lies(tmp_path):
    def key(path, seed):
        dealt("digits-mixed", seed).save(path)
        study = grid("local").model_copy(
            update={"split": (GridSplit(name="few", task=f"split:{path}", rounds=4),)}
        )
        return only(study).key

    first = key(tmp_path / "one.json", 0)
    assert key(tmp_path / "two.json", 0) == first
    assert key(tmp_path / "one.json", 1) != first


def test_a_saved_split_that_changes_under_way_is_no_result(tmp_path):
    path = tmp_path / "one.json"
    dealt("digits-mixed", 0).save(path)
    split = GridSplit(name="few", task=f"split:{path}", rounds=3)
    cell = only(grid("local").model_copy(update={"split": (split,)}))
    assert run_cell(cell).key == cell.key
    dealt("digits-mixed", 1).save(path)
    with pytest.raises(FedSelectError, match="has changed since the study began"):
        run_cell(cell)


def test_lines_of_earlier_studies_still_count():
    """What the product has learned since is in the keys of those cells alone that use it."""
    study = read_grid(ROOT / "docs" / "study" / "full.toml")
    keys = {(c.split.name, c.policy.name, c.seed): c.key for c in study.cells()}
    folder = ROOT / "docs" / "study" / "results"
    for split in ("watch", "fashion-20x5"):
        lines = (folder / f"{split}.jsonl").read_text().splitlines()
        assert lines
        for each in map(json.loads, lines):
            assert keys[each["split"], each["policy"], each["seed"]] == each["key"]


# --- a start from public data ------------------------------------------------------------------


def pretrained(*policies, clients=4, steps=30, **changes):
    split = {"name": "few", "task": "digits-mixed", "rounds": 4}
    study = grid(*policies, **changes)
    return study.model_copy(
        update={"split": (GridSplit(**split, pretrained={"clients": clients, "steps": steps}),)}
    )


def test_all_policies_start_from_one_model_of_clients_who_take_no_part():
    tasks = client_tasks("digits-mixed", seed=0)
    starts = []
    for name in ("fedavg", "fedbabu", "ditto", "fedrep"):
        inside, start = participants(only(pretrained(name)), tasks)
        starts.append(start)
        assert len(inside) == len(tasks) - 4
    for start in starts[1:]:
        np.testing.assert_array_equal(start, starts[0])
    other, another = participants(only(pretrained("fedavg", seeds=(1,))), tasks)
    assert other.keys() != inside.keys()
    assert (another != starts[0]).any()
    everybody, none = participants(only(grid("fedavg")), tasks)
    assert (everybody, none) == (tasks, None)


def test_a_cell_starts_there_and_counts_its_own_steps_only():
    plain = only(pretrained("local"))
    found = run_cell(plain)
    inside, start = participants(plain, client_tasks("digits-mixed", seed=0))
    assert found.clients == tuple(inside)
    assert found.steps == 8
    run = SimulatedRun(inside, plain.settings, start=start)
    np.testing.assert_array_equal(run.values, start)
    fresh = SimulatedRun(inside, plain.settings)
    for each in (run, fresh):
        for _ in range(4):
            each.round(each.names)
    assert run.version == found.version != fresh.version
    right = [
        sum(
            learner.scored([("one", each.values)], settings=each.settings)["one"][0].correct
            for learner in each.learners.values()
        )
        for each in (fresh, run)
    ]
    assert right[0] < right[1], "the others' data teach something"


def test_the_key_of_a_cell_names_its_start():
    keys = {
        only(study).key
        for study in (
            grid("local"),
            pretrained("local"),
            pretrained("local", steps=31),
            pretrained("local", clients=3),
        )
    }
    assert len(keys) == 4


def test_somebody_has_to_be_left():
    with pytest.raises(FedSelectError, match="fewer than 2 are left") as caught:
        run_cell(only(pretrained("local", clients=11)))
    assert caught.value.code == "study_invalid"


def test_the_page_says_that_pretraining_is_not_counted():
    study = pretrained("local")
    text = Report(study, [result("local", 0, [80, 70])]).sections()
    assert "been trained for 30 steps, not counted here, on the training data of 4 clients" in text


# --- figures ------------------------------------------------------------------


def test_an_interval_is_students():
    values = [1.0, 2.0, 4.0, 7.0]
    found = estimate(values)
    assert found.mean == 3.5
    assert found.half == pytest.approx(3.182446 * stdev(values) / 2, rel=1e-6)
    assert estimate([3.0]).verdict == "one seed"
    assert math.isnan(estimate([3.0]).half)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.2, 0.9], "higher"),
        ([-1.0, -1.2, -0.9], "lower"),
        ([1.0, -1.2, 0.9], "not distinguishable"),
        ([0.0, 0.0], "not distinguishable"),
    ],
)
def test_what_may_be_said_of_a_difference(values, verdict):
    assert estimate(values).verdict == verdict


def test_differences_are_paired_by_seed_in_the_better_reading_of_each():
    known = by_cell(
        [
            result("one", 0, [50, 60], [70, 80]),
            result("one", 1, [50, 60], [60, 90]),
            result("one", 5, [1, 1], [1, 1]),
            result("other", 0, [70, 70], [50, 50]),
            result("other", 1, [60, 60], [50, 50]),
        ]
    )
    found = difference(known, "few", "one", "other", "better")
    assert (found.mean.count, found.won) == (2, 2)
    assert found.mean.mean == pytest.approx(fmean([75 - 70, 75 - 60]))
    assert found.worst.mean == pytest.approx(fmean([70 - 70, 60 - 60]))
    assert difference(known, "few", "one", "other", "pre").mean.mean == pytest.approx(-10)
    assert difference(known, "few", "one", "nobody", "pre") is None


def test_worse_and_harmed_are_counted_against_both_baselines():
    study = grid("local", "fedavg", "fedselect", seeds=(0, 1))
    found = rows(
        study,
        [
            result("local", 0, [80, 80, 80, 80]),
            result("local", 1, [80, 80, 80, 80]),
            result("fedavg", 0, [20, 90, 90, 90]),
            result("fedselect", 0, [79, 77, 40, 90]),
            result("fedselect", 1, [80, 80, 40, 90]),
        ],
    )
    mine = next(row for row in found if row.policy == "fedselect")
    assert mine.worse == {"local": 3 / 8, "fedavg": 2 / 4}
    assert mine.harmed["local"] >= 2 / 8
    assert mine.sent == pytest.approx(1000 / (4 * 50 * 10))
    alone = next(row for row in found if row.policy == "local")
    assert set(alone.worse) == {"fedavg"}


def test_golden_figures_are_held_to_their_prediction_interval():
    golden = Golden(
        source="a test",
        seeds=7,
        cells=[{"split": "few", "policy": "one", "pre": 70, "post": 60, "sd": 2, "worst": 50}],
        differences=[
            {
                "split": "few",
                "policy": "one",
                "against": "other",
                "reading": "pre",
                "mean": [5, 1],
                "worst": [5, 1],
            }
        ],
    )

    def checks(pre):
        return check(golden, [result("one", 0, [pre, pre]), result("other", 0, [65, 65])])

    half = 2.446912 * 2 * math.sqrt(1 / 7 + 1) + 0.05
    assert checks(70)[0].half == pytest.approx(half, rel=1e-6)
    assert [c.inside for c in checks(70)] == [True] * 3
    assert [c.inside for c in checks(76)] == [False] * 3
    assert [c.inside for c in checks(73)] == [True, False, False]
    assert checks(70)[1].half == pytest.approx(math.sqrt(8) + 0.05)


def test_the_golden_file_is_whole():
    golden = read_golden(GOLDEN)
    study = read_grid(ROOT / "docs" / "study" / "full.toml")
    assert (len(golden.cells), len(golden.differences)) == (70, 150)
    splits, policies = ({e.name for e in entries} for entries in (study.split, study.policy))
    assert {cell.split for cell in golden.cells} == splits
    assert {cell.policy for cell in golden.cells} - policies == {"trial-gate"}
    pairs = {(d.policy, d.against, d.reading) for d in golden.differences}
    ours = {(p.policy, p.against, p.reading) for p in study.pair}
    ours -= {("fedper-late", against, "better") for against in ("fedselect", "random-30")}
    assert {pair for pair in pairs if "trial-gate" not in pair} == ours
    stable = {policy.name for policy in read_grid(ROOT / "docs/study/stability.toml").policy}
    of_masks = {each.policy for each in golden.stability}
    assert of_masks - stable == {"snr-2", "gate", "fisher-others"}, "others are on the page"


@pytest.mark.parametrize("name", ["full", "quick", "search", "confirm", "moves", "stability"])
def test_the_grids_can_be_read(name):
    study = read_grid(ROOT / "docs" / "study" / f"{name}.toml")
    cells_ = list(study.cells())
    assert len({cell.key for cell in cells_}) == len(cells_)
    assert {cell.steps for cell in cells_} <= {600, 1200}


def test_the_search_is_bounded_and_compares_with_what_it_has_to_beat():
    search = read_grid(ROOT / "docs" / "study" / "search.toml")
    rivals = {"random-30", "share-then-local", "fedper", "ditto"}
    assert len(search.policy) <= 60
    pairs = {(pair.policy, pair.against) for pair in search.drawn_pairs}
    names = {policy.name for policy in search.policy}
    assert pairs == {(name, rival) for name in names - rivals for rival in rivals}


def test_leaders_are_confirmed_as_they_were_searched_on_seeds_nobody_has_seen():
    search, confirm = (
        read_grid(ROOT / "docs" / "study" / f"{name}.toml") for name in ("search", "confirm")
    )
    assert not set(search.seeds) & set(confirm.seeds)
    searched = {policy.name: policy for policy in search.policy}
    assert all(policy == searched[policy.name] for policy in confirm.policy)
    rivals = {pair.against for pair in search.drawn_pairs}
    assert rivals <= {policy.name for policy in confirm.policy}
    assert len(confirm.policy) <= len(rivals) + 3
    ranked = [split for split in search.split if split.name in search.ranking]
    assert confirm.ranking == search.ranking
    assert list(confirm.split) == ranked
    assert (confirm.training, confirm.readings) == (search.training, search.readings)


def test_a_star_stands_for_everybody_who_is_no_rival():
    study = grid(
        *("local", "fedavg", "fedper", "ditto"),
        pair=[
            {"policy": "*", "against": "local"},
            {"policy": "*", "against": "fedavg", "reading": "pre"},
            {"policy": "local", "against": "fedavg"},
        ],
    )
    found = [(pair.policy, pair.against, pair.reading) for pair in study.pairs]
    assert found == [
        ("local", "fedavg", "better"),
        ("fedper", "local", "better"),
        ("fedper", "fedavg", "pre"),
        ("ditto", "local", "better"),
        ("ditto", "fedavg", "pre"),
    ]


def test_a_split_may_be_for_some_policies_alone():
    study = grid("local", "fedavg", "fedper")
    split = study.split[0].model_copy(update={"policies": ("local", "fedper")})
    study = study.model_copy(update={"split": (split,)})
    assert [cell.policy.name for cell in study.cells()] == ["local", "fedper"]


def test_policies_are_ranked_by_their_mean_over_the_splits_of_the_ranking():
    splits = [GridSplit(name=name, task="digits", rounds=4) for name in ("a", "b", "aside")]
    study = grid("local", "fedavg", "fedper").model_copy(
        update={"split": tuple(splits), "ranking": ("a", "b")}
    )
    results = [
        result("local", 0, [50, 60], split="a"),
        result("local", 0, [70, 60], [90, 100], split="b"),
        result("fedavg", 0, [90, 90], split="a"),
        result("fedavg", 0, [60, 70], split="b"),
        result("fedavg", 1, [80, 90], split="a"),
        result("fedavg", 1, [60, 70], split="b"),
        result("fedavg", 2, [0, 0], split="b"),
        result("fedper", 0, [100, 100], split="a"),
        result("local", 0, [0, 0], split="aside"),
    ]
    found = ranking(study, results)
    assert [(r.policy, r.mean.mean, r.worst.mean, r.mean.count) for r in found] == [
        ("fedavg", 76.25, 72.5, 2),
        ("local", 75, 70, 1),
    ]
    page = Report(study, results).sections()  # t(0.975, 1) = 12.706; sd 1.768 and 3.536
    assert "| `fedavg` | 76.2 ± 15.9 | 72.5 ± 31.8 | 2 |" in page
    assert "| `local` | 75.0 | 70.0 | 1 |" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = []", "seeds"),
        ("= 3", "cannot be read"),
        ("seeds = [0, 1, 0]", "seeds must differ, not 0, 1, 0"),
        ("readings = 5", "x has 4 rounds, too few for 5 readings"),
        ('split = [{name = "x", task = "digit", rounds = 4}]', "x: there is no example task"),
        ('split = [{name = "x", task = "split:no.json", rounds = 4}]', "x: no.json is no split"),
        ('pair = [{policy = "local", against = "local"}]', "compared with itself"),
        ('title = "a <!-- results: end --> b"', "one line without <!--"),
        (r'policy = [{name = "a", preset = "local", title = "a\nb"}]', "one line without <!--"),
        ('[[split]]\nname = "x"', "split.0"),
        ('pair = [{policy = "a", against = "b"}]', "no policies a and b"),
        ('ranking = ["y"]', "no policies or splits y"),
        ('split = [{name = "x", task = "digits", rounds = 4, policies = ["a"]}]', "splits a"),
        ("training = {epochs = 3}", "counts steps"),
        ('policy = [{name = "a", preset = "fedsekect"}]', "no preset"),
        ('policy = [{name = "a", preset = "fedavg", settings = {limi = 1}}]', "limi"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(tmp_path, text, said):
    whole = {
        "seeds": "seeds = [0]",
        "split": 'split = [{name = "x", task = "digits", rounds = 4}]',
        "policy": 'policy = [{name = "local", preset = "local"}]',
    }
    given = text.lstrip("[").split()[0].rstrip("]")
    parts = [line for name, line in whole.items() if name != given]
    (tmp_path / "grid.toml").write_text("\n".join([*parts, text]))
    with pytest.raises(FedSelectError, match=said):
        read_grid(tmp_path / "grid.toml")


# --- the page and the command ------------------------------------------------------------------


def full_report():
    study = grid(
        "local",
        "fedavg",
        "fedselect",
        seeds=(0, 1),
        pair=[
            {"policy": "fedselect", "against": "local"},
            {"policy": "fedavg", "against": "local"},
        ],
    )
    keys = {(c.policy.name, c.seed): c.key for c in study.cells()}
    figures = {"local": [80, 70], "fedavg": [80, 71], "fedselect": [90, 85]}
    results = [
        result(name, seed, [value + seed for value in values]).model_copy(
            update={"key": keys[name, seed]}
        )
        for name, values in figures.items()
        for seed in (0, 1)
    ]
    return Report(study, results)


def test_the_page_keeps_what_a_person_wrote(tmp_path):
    page = tmp_path / "STUDY.md"
    page.write_text(f"# Mine\n\nbefore\n\n{BEGIN}\nold\n{END}\n\n## What we claim\n\nafter\n")
    write_page(full_report(), page)
    text = page.read_text()
    assert text.startswith("# Mine\n\nbefore\n\n")
    assert text.endswith("## What we claim\n\nafter\n")
    assert "\nold\n" not in text
    assert "| `fedselect` − `local` | better | +12.5 ± 0.0 | **higher** |" in text
    assert "| `fedavg` − `local` | better | +0.5 ± 0.0 |" in text
    svg = (tmp_path / "study" / "plots" / "few.svg").read_text()
    assert svg.startswith("<svg")
    assert "(study/plots/few.svg)" in text
    once = page.read_text()
    write_page(full_report(), page)
    assert page.read_text() == once
    page.write_text("# no marks")
    with pytest.raises(FedSelectError, match="marks"):
        write_page(full_report(), page)


def test_a_study_of_orders_shows_masks_alone_beside_the_golden_ones():
    study = grid("fisher", "random", batch_orders=3)
    stable = result("fisher", 0, [80, 70]).model_copy(update={"again": 0.71, "others": 0.3})
    golden = Golden(
        source="one",
        seeds=7,
        cells=(),
        differences=(),
        stability=({"split": "few", "policy": "fisher", "jaccard": 0.69},),
    )
    text = Report(study, [stable], golden).sections()
    assert "| few | `fisher` | – | 0.71 | 0.69 | 0.30 | 0.00 |" in text
    assert "worst client" not in text
    assert "| 0.71 | – | 0.30 |" in Report(study, [stable]).sections()


def test_a_page_shows_two_studies_and_keeps_their_plots_apart(tmp_path):
    page = tmp_path / "SEARCH.md"
    report = full_report()
    one, two = marks("results"), marks("again")
    page.write_text("\n".join(["# One", *one, "# Two", *two, "# Three"]))
    write_page(report, page)
    study = report.grid.model_copy(
        update={
            "section": "again",
            "pair": (
                Pair(policy="*", against="local", reading="pre"),
                Pair(policy="*", against="local"),
                Pair(policy="local", against="fedselect"),
            ),
        }
    )
    write_page(Report(study, report.results), page)
    first, then, last = (page.read_text().index(word) for word in ("# One", "# Two", "# Three"))
    text = page.read_text()
    assert "+12.5 ± 0.0 | **higher**" in text[first:then]
    assert "| `fedselect` | **+12.5 ± 0.0**; **+15.0 ± 0.0** |" in text[then:last]
    assert "| `local` − `fedselect` | better | -" in text[then:last]
    assert "study/plots/again/few.svg" in text[then:last]
    write_page(report, page)
    assert page.read_text() == text
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.svg")}
    assert found == {"study/plots/few.svg", "study/plots/again/few.svg"}


def test_a_page_deletes_plots_of_its_own_alone(tmp_path):
    report = full_report()
    (other,) = (split.model_copy(update={"name": "other"}) for split in report.grid.split)
    moved = Report(
        report.grid.model_copy(update={"split": (other,)}),
        [each.model_copy(update={"split": "other"}) for each in report.results],
    )
    write_page(report, tmp_path / "STUDY.md")
    write_page(moved, tmp_path / "MINE.md")
    plots = tmp_path / "study" / "plots"
    (plots / "by-hand.svg").write_text("<svg/>")
    assert {path.name for path in plots.iterdir()} == {"few.svg", "other.svg", "by-hand.svg"}
    write_page(Report(report.grid, report.results[:1]), tmp_path / "STUDY.md")
    assert {path.name for path in plots.iterdir()} == {"other.svg", "by-hand.svg"}


def test_the_words_where_nothing_can_be_told():
    report = full_report()
    results = [
        result("fedselect", 0, [90, 80]),
        result("fedselect", 1, [70, 60]),
        result("local", 0, [70, 60]),
        result("local", 1, [90, 80]),
    ]
    (found,) = differences(report.grid, results)
    assert found.mean.verdict == "not distinguishable"
    assert "not distinguishable" in Report(report.grid, results).sections()


def test_a_name_that_the_grid_does_not_have_is_told(tmp_path):
    words = ["study", ROOT / "docs" / "study" / "quick.toml", "--results", tmp_path]
    words += ["--only", "wotch", "--only", "local", "--minutes", "0"]
    said = CliRunner().invoke(build("study"), [str(word) for word in words])
    assert said.exit_code == 0, said
    assert "has no split or policy wotch; it has watch, " in said.stderr


def test_the_quick_study_on_the_watch_comes_out_again(tmp_path):
    """What of `make study QUICK=1` needs no network: the natural split by person, one seed."""
    run = ["study", ROOT / "docs" / "study" / "quick.toml", "--results", tmp_path / "results"]
    words = [*run, "--only", "watch", "--golden", GOLDEN, "--page", tmp_path / "page.md"]
    said = CliRunner().invoke(build("study"), [str(word) for word in words])
    assert said.exit_code == 0, said
    checks = [line.split()[0] for line in said.stdout.splitlines() if ", golden " in line]
    assert len(checks) == 9, "three policies, and three differences in mean and worst client"
    # One in twenty is outside by chance, and another processor may round otherwise.
    assert checks.count("inside") >= 7, said.stdout
    lines = (tmp_path / "results" / "watch.jsonl").read_text().splitlines()
    assert {json.loads(line)["policy"] for line in lines} == {
        "local",
        "share-then-local",
        "fedselect",
    }
    assert "### watch" in (tmp_path / "page.md").read_text()
