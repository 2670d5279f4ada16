"""Running a grid: resumed, shared by processes, going on after failures; and its results' lines."""

import json
import subprocess
import sys

import pytest
from study_samples import grid, result
from typer.testing import CliRunner

from fedselect.cli import build
from fedselect.errors import FedSelectError, TrainingError
from fedselect.study.cells import run_cell
from fedselect.study.grid import GridSplit
from fedselect.study.page import Report
from fedselect.study.runner import read_results, run_grid

GRID = """
seeds = [0, 1]
training = { steps = 20, learning_rate = 10.0 }
readings = 2
split = [{ name = "few", task = "digits-mixed", rounds = 4 }]
policy = [
  { name = "local", preset = "local" },
  { name = "diverges", preset = "ditto", settings = { proximal = 100.0 } },
]
"""


def made(cell):
    """A result for which nothing was trained."""
    known = result(cell.policy.name, cell.seed, [80, 70], split=cell.split.name)
    return known.model_copy(update={"key": cell.key})


def study_command(*words):
    return CliRunner().invoke(build("study"), ["study", *map(str, words)])


def test_what_is_done_is_not_done_again_and_a_cut_line_is_cleared(tmp_path):
    study = grid("local", "fedavg", seeds=(0, 1))
    ran = []

    def engine(cell):
        ran.append(str(cell))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run_cell(cell)

    with pytest.raises(KeyboardInterrupt):
        run_grid(study, tmp_path, engine=engine)
    path = tmp_path / "few.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:50])
    found = run_grid(study, tmp_path, engine=engine).results
    assert ran[3:] == ["few, local, seed 1", "few, fedavg, seed 1"]
    assert [(r.policy, r.seed) for r in found] == [
        ("local", 0),
        ("fedavg", 0),
        ("local", 1),
        ("fedavg", 1),
    ]
    assert path.read_bytes().startswith(whole)
    assert len(read_results(tmp_path)) == 4
    again = run_grid(study, tmp_path, engine=lambda cell: pytest.fail("ran again")).results
    assert again == found
    assert run_cell(next(study.cells())).model_copy(update={"seconds": 0}) == found[0].model_copy(
        update={"seconds": 0}
    )


def test_results_of_other_grids_are_left_alone(tmp_path):
    run_grid(grid("local"), tmp_path)
    assert run_grid(grid("fedavg"), tmp_path, wanted=lambda _: False).results == []
    assert len(read_results(tmp_path)) == 1


# --- names ---------------------------------------------------------------------------------------


def split_named(*names):
    return tuple(GridSplit(name=name, task="digits-mixed", rounds=4) for name in names)


def test_a_renamed_split_is_the_same_cell_and_twins_run_once(tmp_path):
    before = run_grid(grid("local", "fedavg"), tmp_path, engine=made).results
    study = grid("local", "fedavg").model_copy(update={"split": split_named("one", "two")})
    found = run_grid(study, tmp_path, engine=lambda cell: pytest.fail("ran again")).results
    assert [(each.split, each.policy) for each in found] == [
        ("one", "local"),
        ("one", "fedavg"),
        ("two", "local"),
        ("two", "fedavg"),
    ]
    assert [each.model_copy(update={"split": "few"}) for each in found] == [*before, *before]
    page = Report(study, found).sections()
    assert "4 of 4 cells have run, seeds 0." in page
    assert "### one" in page
    assert "### two" in page


def test_one_twin_may_be_wanted_alone(tmp_path):
    study = grid("local").model_copy(update={"split": split_named("one", "two")})
    for number, name in enumerate(("one", "two")):
        ran = []
        found = run_grid(
            study,
            tmp_path / name,
            engine=made,
            wanted=lambda cell, name=name: cell.split.name == name,
            told=lambda *told, ran=ran: ran.append((str(told[0]), *told[1:])),
        )
        assert ran == [(f"{name}, local, seed 0", 1, 1)], number
        assert [each.split for each in found.results] == ["one", "two"]


# --- failures ------------------------------------------------------------------------------------


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(tmp_path):
    study, ran = grid("local", "fedavg", "fedper"), []

    def engine(cell):
        ran.append(cell.policy.name)
        if cell.policy.name == "fedavg" and len(ran) < 4:
            raise TrainingError("it diverged")
        return made(cell)

    found = run_grid(study, tmp_path, engine=engine)
    ((cell, error),) = found.failures
    assert (str(cell), str(error)) == ("few, fedavg, seed 0", "it diverged")
    assert [each.policy for each in found.results] == ["local", "fedper"]
    assert "2 of 3 cells have run (not run: 1), seeds 0." in Report(study, found.results).sections()
    again = run_grid(study, tmp_path, engine=engine)
    assert ran == ["local", "fedavg", "fedper", "fedavg"]
    assert (len(again.results), again.failures) == (3, [])
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"], "no lock is left"


def test_the_command_tells_failures_at_the_end(tmp_path):
    path, page = tmp_path / "grid.toml", tmp_path / "page.md"
    path.write_text(GRID)
    said = study_command(path, "--results", tmp_path / "results", "--page", page)
    assert said.exit_code == 1, said
    last = said.stderr.splitlines()[-1]
    assert last.startswith("not run: few, diverges, seed 0, and 1 more: error[training_failed]: ")
    assert "2 of 4 cells have run (not run: 2), seeds 0, 1." in page.read_text()


# --- several processes ---------------------------------------------------------------------------


def test_a_line_that_came_meanwhile_is_not_computed(tmp_path):
    study, ran = grid("local", "fedavg", "fedper"), []

    def engine(cell):
        ran.append(cell.policy.name)
        if len(ran) == 1:  # another process does the next one while this one runs
            run_grid(study, tmp_path, engine=made, wanted=lambda c: c.policy.name == "fedavg")
        return made(cell)

    found = run_grid(study, tmp_path, engine=engine).results
    assert ran == ["local", "fedper"]
    assert len(found) == len(read_results(tmp_path)) == 3


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path):
    study, ran = grid("local", "fedavg"), []
    lock = tmp_path / f".{next(study.cells()).key}.lock"
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )

    def engine(cell):
        ran.append(cell.policy.name)
        return made(cell)

    with subprocess.Popen(
        [sys.executable, "-c", holder, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        run_grid(study, tmp_path, engine=engine)
        assert ran == ["fedavg"]
        process.kill()
    run_grid(study, tmp_path, engine=engine)
    assert ran == ["fedavg", "local"], "a lock ends with its process"


# --- lines ---------------------------------------------------------------------------------------


def damaged(**changes):
    document = json.loads(result("local", 0, [80, 70]).model_dump_json(exclude_none=True))
    return json.dumps({**document, **changes}).encode()


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"nonsense",
        b'{"study": 1}',
        b"\xff",
        damaged(pre=[[80, 70], [80]]),
        damaged(post=[[80, 70]]),
        damaged(pre=[], post=[]),
        damaged(clients=["c0", "c1", "c2"]),
        damaged(examples=[100]),
        damaged(sent=[1, 2, 3]),
        damaged(hits=["AAAA", "AAAA"]),
        damaged(hits=["?", "!"]),
        damaged(clients=[], examples=[], hits=[], sent=[], personal=[], pre=[[]], post=[[]]),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    whole = result("local", 0, [80, 70]).model_dump_json(exclude_none=True).encode()
    (tmp_path / "few.jsonl").write_bytes(b"\n".join([whole, line, whole, b""]))
    with pytest.raises(FedSelectError, match=r"few\.jsonl, line 2, is no result: ") as caught:
        run_grid(grid("local"), tmp_path, engine=made)
    assert caught.value.code == "study_invalid"


@pytest.mark.parametrize("option", ["--results", "--page"])
def test_a_folder_is_no_page_and_a_file_no_folder(tmp_path, option):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    places = {"--results": tmp_path / "results", "--page": tmp_path / "page.md"}
    places[option] = path if option == "--results" else tmp_path
    words = [word for pair in places.items() for word in pair]
    said = study_command(path, *words, "--minutes", "0")
    assert said.exit_code == 2, said
