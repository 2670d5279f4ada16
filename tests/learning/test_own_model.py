"""The example of an own model and the ``simulate`` command run as a user would run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedselect.errors import FedSelectError
from fedselect.learning_cli import register
from fedselect.tasks import load_task

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_model.py"


@pytest.fixture
def command():
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, ["simulate", *map(str, arguments)])


def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"site-{i}" for i in range(4)] + ["last"]
    assert "fc" not in EXAMPLE.read_text()


def test_the_example_is_a_task_that_an_agent_can_load():
    task = load_task(f"{EXAMPLE}:TumourTask", site=2)
    assert task.examples() == 40


def test_the_learning_commands_load_no_torch():
    code = "import sys, fedselect.learning_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_simulate_prints_json(command):
    done = command("--rounds", 4, "--steps", 2, "--preset", "fedper", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert len(document["clients"]) == 10
    row = document["clients"]["site-03"]
    assert set(row) == {
        "local_only",
        "global",
        "pre",
        "post",
        "personal_share",
        "bytes_up",
        "bytes_down",
        "gated",
        "participations",
        "worse",
    }
    mean = sum(c["post"] for c in document["clients"].values()) / 10
    assert document["mean"]["post"] == pytest.approx(mean)
    assert document["worst"]["pre"] == min(c["pre"] for c in document["clients"].values())
    assert document["worse"] == sum(
        c["post"] - c["local_only"] < -0.02 for c in document["clients"].values()
    )
    assert document["elements"] == 6570


def test_simulate_prints_a_table(command):
    done = command("--rounds", 3, "--steps", 1, "--preset", "fedavg")
    assert done.exit_code == 0, done.output
    for word in ("site-09", "mean", "worst", "of 10 clients are worse", "sha256"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--preset", "fedbest"], "no preset 'fedbest'"),
        (["--task", "cifar"], "no example task 'cifar'"),
        (["--rounds", "2"], "would ever be used"),
    ],
)
def test_simulate_says_what_is_wrong(command, arguments, text):
    done = command(*arguments)
    assert isinstance(done.exception, FedSelectError)  # ``fedselect.cli`` prints it
    assert text in str(done.exception)
