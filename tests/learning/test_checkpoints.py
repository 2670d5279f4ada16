"""A simulation that was ended goes on to the bits of one that was not."""

import json
import subprocess
import sys

import pytest
import safetensors
from learning_tasks import Awkward, BlobTask, mlp
from typer.testing import CliRunner

from fedselect import Policy, Training, preset_run
from fedselect.checkpoints import FILE, Checkpoint
from fedselect.cli import build
from fedselect.errors import FedSelectError
from fedselect.policies import Wire
from fedselect.simulate import Execution, sampled
from fedselect.simulate import simulate as simulated

ROUNDS = 8
POOLED = Policy(pooled=1, growth=0.3, start_round=3, window=3)


class Ended(Exception):
    """As if somebody had pressed Ctrl-C."""


def tasks(model=mlp, count=5):
    return {f"site-{i}": BlobTask(model, site=i) for i in range(count)}


def settings(name, **changes):
    return preset_run(name, rounds=ROUNDS, training=Training(steps=4), **changes)


def simulate(clients, rule, *, vectorized=False, checkpoint=None, **how):
    return simulated(clients, rule, execution=Execution(vectorized, checkpoint), **how)


def ended_after(number):
    def progress(done):
        if done == number:
            raise Ended

    return progress


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize(
    ("preset", "model", "encoding"),
    [
        ("fedselect", mlp, "int8"),
        ("fisher-gate", mlp, "f32"),
        ("ditto", mlp, "bf16"),
        ("random", Awkward, "f32"),
        ("pooled", Awkward, "int8"),
    ],
)
def test_what_goes_on_ends_as_if_it_had_never_stopped(
    tmp_path, preset, model, encoding, vectorized
):
    rule = settings("fisher" if preset == "pooled" else preset, wire=Wire(encoding=encoding))
    if preset == "pooled":
        rule = rule.model_copy(update={"policy": POOLED})
    how = {"order": sampled(0.7, seed=1), "vectorized": vectorized}
    whole = simulate(tasks(model), rule, **how)
    kept = Checkpoint(tmp_path / "kept")
    for number in (1, 4, 5):
        with pytest.raises(Ended):
            simulate(tasks(model), rule, **how, checkpoint=kept, progress=ended_after(number))
    rounds = []
    found = simulate(tasks(model), rule, **how, checkpoint=kept, progress=rounds.append)
    assert rounds == [6, 7, 8]
    assert found.versions == whole.versions
    assert found.scores == whole.scores
    assert (found.bytes_up, found.bytes_down) == (whole.bytes_up, whole.bytes_down)
    for name, state in whole.states.items():
        assert state.to_bytes(whole.space) == found.states[name].to_bytes(whole.space)
    again = simulate(tasks(model), rule, **how, checkpoint=kept, progress=rounds.append)
    assert (again.versions, len(rounds)) == (whole.versions, 3)


def test_a_checkpoint_is_written_every_so_often_and_at_the_end(tmp_path):
    rule, seen = settings("fedavg"), []

    def progress(_):
        path = tmp_path / FILE
        if path.exists():
            with safetensors.safe_open(path, "numpy") as file:
                document = json.loads(file.metadata()["simulation"])
            seen.append(len(document["versions"]) - 1)

    simulate(tasks(), rule, checkpoint=Checkpoint(tmp_path, every=3), progress=progress)
    assert seen == [3, 3, 3, 6, 6, 8]


def test_another_simulation_does_not_go_on_from_it(tmp_path):
    kept = Checkpoint(tmp_path, about={"task": "blobs"})
    simulate(tasks(), settings("fedavg"), checkpoint=kept)
    others = {
        "settings": (tasks(), settings("fedper"), kept, False),
        "clients": (tasks(count=4), settings("fedavg"), kept, False),
        "about": (tasks(), settings("fedavg"), Checkpoint(tmp_path, about={"task": "x"}), False),
        "parameter space": (tasks(Awkward), settings("fedavg"), kept, False),
        "way of training": (tasks(), settings("fedavg"), kept, True),
    }
    for word, (clients, rule, checkpoint, vectorized) in others.items():
        with pytest.raises(FedSelectError, match=word) as caught:
            simulate(clients, rule, checkpoint=checkpoint, vectorized=vectorized)
        assert caught.value.code == "checkpoint_mismatch"


def test_a_damaged_checkpoint_is_refused_in_words(tmp_path):
    kept = Checkpoint(tmp_path)
    simulate(tasks(), settings("fedavg"), checkpoint=kept)
    whole = (tmp_path / FILE).read_bytes()
    for data in (b"", b"x", whole[:100], whole[:-1], whole.replace(b"versions", b"verzions")):
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(FedSelectError, match="damaged") as caught:
            simulate(tasks(), settings("fedavg"), checkpoint=kept)
        assert caught.value.code == "checkpoint_invalid"


def test_a_file_is_no_folder_for_checkpoints(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FedSelectError, match="kept in a folder") as caught:
            simulate(
                tasks(), settings("fedavg"), checkpoint=Checkpoint(place), progress=pytest.fail
            )
        assert caught.value.code == "checkpoint_invalid"


def test_the_command_goes_on_after_a_kill(tmp_path):
    arguments = ["simulate", "--task", "digits", "--rounds", "12", "--steps", "3", "--json"]
    arguments += ["--vectorized", "--participation", "0.5"]
    runner, app = CliRunner(), build("simulate")
    plain = runner.invoke(app, arguments)
    assert plain.exit_code == 0, plain.output
    script = (
        "import os, sys; import fedselect.simulate as s; from fedselect.cli import main\n"
        "round = s.SimulatedRun.round\n"
        "def killed(run, accepted, **how):\n"
        "    if run.rounds == 7: os.kill(os.getpid(), 9)\n"
        "    round(run, accepted, **how)\n"
        "s.SimulatedRun.round = killed\n"
        "main()"
    )
    folder = ["--checkpoint", str(tmp_path)]
    command = [sys.executable, "-c", script, *arguments, *folder]
    killed = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert killed.returncode == -9, killed.stderr
    with safetensors.safe_open(tmp_path / FILE, "numpy") as file:
        assert len(json.loads(file.metadata()["simulation"])["versions"]) == 8
    found = runner.invoke(app, [*arguments, *folder])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads(plain.stdout)
    other = runner.invoke(app, [*arguments, *folder, "--seed", "1"])
    assert other.exit_code != 0
