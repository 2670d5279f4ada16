"""`fedselect estimate`: from a task, a space or a size, as tables or JSON."""

import json

import pytest
from learning_tasks import BlobTask, mlp
from typer.testing import CliRunner

from fedselect.amounts import duration, size
from fedselect.cli import build
from fedselect.errors import FedSelectError, SettingsError
from fedselect.estimatedocs import Estimate
from fedselect.training import TorchLearner

TASK = f"{__file__}:make"


def make():
    """What the command line builds."""
    return BlobTask(mlp)


def ask(*words, code=0):
    found = CliRunner().invoke(build("estimate"), ["estimate", *map(str, words)])
    assert found.exit_code == code, (found.output, found.exception)
    return found.exception if code else found.stdout


def document(*words):
    return json.loads(ask(*words, "--json"))


def test_a_size_is_enough():
    found = document("--elements", 10**6, "--clients", 200, "--link", "dsl", "--link", "1gbit")
    read = Estimate.model_validate(found)
    assert (read.elements, read.clients, read.per_round) == (10**6, 200, 200)
    assert [row.name for row in read.links] == ["dsl", "1gbit"]
    assert "heterogeneity" not in found


def test_a_space_and_settings_from_files(tmp_path):
    space, settings = tmp_path / "space.json", tmp_path / "settings.json"
    learner = TorchLearner(make())
    space.write_text(json.dumps(learner.space.to_json()))
    settings.write_text(json.dumps({"rounds": 7, "wire": {"encoding": "bf16"}}))
    found = document("--space", space, "--settings", settings, "--encoding", "int8")
    assert (found["elements"], found["encoding"]) == (learner.space.dim, "int8")
    assert found["participations"] == 7


def test_a_task_is_measured():
    found = document("--task", TASK, "--encoding", "int8", "--clients", 3, "--rounds", 9)
    assert found["elements"] == TorchLearner(make()).space.dim
    assert found["compute"]["basis"] == "measured"
    assert not [text for text in found["assumptions"] if "normal" in text]


def test_an_example_federation_says_how_its_clients_pull():
    pulled = document("--task", "digits", "--rounds", 9)["heterogeneity"]
    assert pulled["clients"] == 10
    assert pulled["low"] <= pulled["index"] <= pulled["high"]
    assert pulled["label"] == "not a prediction: only the pilot decides"
    assert "not a prediction" in " ".join(ask("--task", "digits", "--rounds", 9).split())


def test_the_tables_hold_what_the_document_holds():
    words = ("--elements", 10**6, "--rounds", 9, "--data-mb", 3)
    shown, found = ask(*words), document(*words)
    for part in ("Mask schedule", "Time", "FedAvg in float32", "sending the data"):
        assert part in shown
    for row in found["encodings"]:
        assert size(row["up"]) in shown
    assert duration(found["links"][0]["run_seconds"]) in shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], "settings_invalid"),
        (["--elements", 5, "--task", TASK], "settings_invalid"),
        (["--elements", 5, "--encoding", "f64"], "settings_invalid"),
        (["--elements", 5, "--preset", "best"], "settings_invalid"),
        (["--elements", 5, "--rounds", 1], "settings_invalid"),
        (["--elements", 5, "--clients", 1], "settings_invalid"),
        (["--elements", 5, "--link", "fast"], "link_unknown"),
        (["--task", "nowhere:Task"], "task_invalid"),
    ],
)
def test_what_cannot_be_estimated_is_said(words, code):
    error = ask(*words, code=1)
    assert isinstance(error, FedSelectError)
    assert error.code == code


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    assert ask("--space", path, code=1).code == "file_invalid"
    path.write_text('{"rounds": 3, "colour": 1}')
    error = ask("--elements", 5, "--settings", path, code=1)
    assert isinstance(error, SettingsError)
    assert "colour" in str(error)


def test_sizes_and_durations_for_people():
    assert [size(n) for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.50 kB", "2.50 GB"]
    shown = [duration(s) for s in (0.0123, 5, 600, 7200)]
    assert shown == ["12.3 ms", "5.0 s", "10.0 min", "2.0 h"]


def test_arms_of_the_settings_are_counted(tmp_path):
    arms = [{"name": "fedavg", "personal": "none"}, {"name": "fedper", "personal": "head"}]
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"rounds": 7, "arms": {"policies": arms}}))
    asked = ("--task", TASK, "--settings", settings, "--clients", 4)
    found = document(*asked)
    assert [arm["name"] for arm in found["arms"]] == ["fedavg", "fedper"]
    assert found["participations"] == 14
    assert "each as if it were alone" in ask(*asked)
