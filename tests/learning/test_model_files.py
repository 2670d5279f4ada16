"""Models in and out: imported, exported, personalized at a client, and loaded by plain torch."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from learning_tasks import Awkward, BlobTask, mlp
from typer.testing import CliRunner

import fedselect
from fedselect.agent_state import AgentFolder
from fedselect.agentdocs import Delivery
from fedselect.cli import build
from fedselect.errors import FedSelectError, SpaceError
from fedselect.exporting import export_version
from fedselect.personal import derive_seed
from fedselect.policies import RunSettings, Training
from fedselect.space import ParameterSpace
from fedselect.training import TorchLearner
from fedselect.versions_cli import read_model
from fedselect.wire import decode_version, encode_version

TASK = f"{__file__}:make"
ARM = "0198f5a0-0000-7000-8000-00000000000a"
RULE = RunSettings(rounds=9, training=Training(steps=4))


def make(kind="mlp", site=0):
    """What the command line builds."""
    return BlobTask({"mlp": mlp, "awkward": Awkward}[kind], site=site)


def run(*words, code=0):
    found = CliRunner().invoke(build(words[0]), list(map(str, words)))
    assert found.exit_code == code, (found.output, found.exception)
    return found


def trained_model(kind=mlp):
    torch.manual_seed(3)
    return kind()


@pytest.mark.parametrize("kind", [mlp, Awkward])
def test_an_exported_version_gives_a_torch_model_the_very_same_answers(kind):
    learner, model = TorchLearner(BlobTask(kind)), trained_model(kind)
    state = model.state_dict()
    values = learner.space.flatten({s.name: state[s.name].numpy() for s in learner.space.slots})
    file = export_version(encode_version(learner.space.digest, values), learner.space)
    fresh = kind()
    left = fresh.load_state_dict(safetensors.torch.load(file), strict=False)
    assert left.unexpected_keys == []
    assert set(left.missing_keys) <= set(state) - set(learner.space.by_name)
    points = torch.randn(5, 6)
    torch.testing.assert_close(fresh.eval()(points), model.eval()(points), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mlp", "awkward"])
def test_an_existing_model_becomes_version_0(tmp_path, kind):
    model = trained_model({"mlp": mlp, "awkward": Awkward}[kind])
    weights, out = tmp_path / "weights.safetensors", tmp_path / "made"
    safetensors.torch.save_model(model, weights)  # leaves tied names out
    words = ("--task", TASK, "--task-arg", f"kind={kind}")
    said = run("import", *words, "--weights", weights, "--out", out).stdout
    assert "fedselect admin models create" in said
    space = ParameterSpace.from_json(json.loads((out / "space.json").read_text()))
    assert space.digest == TorchLearner(make(kind)).space.digest
    data = (out / "version-0.safetensors").read_bytes()
    values = space.unflatten(decode_version(data, space_digest=space.digest, dim=space.dim))
    for name, tensor in model.state_dict().items():
        if name in values:
            np.testing.assert_array_equal(values[name], tensor.numpy())
    back = tmp_path / "back.safetensors"
    files = (out / "version-0.safetensors", "--space", out / "space.json")
    run("export", *files, "--out", back)
    found = safetensors.torch.load_file(back)
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in found)


def test_without_weights_version_0_is_what_the_task_builds(tmp_path):
    run("import", "--task", TASK, "--out", tmp_path)
    learner = TorchLearner(make())
    data = (tmp_path / "version-0.safetensors").read_bytes()
    found = decode_version(data, space_digest=learner.space.digest, dim=learner.space.dim)
    np.testing.assert_array_equal(found, learner.initial())


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(SpaceError, match="lacks"):
        read_model(make(), path)
    safetensors.torch.save_file({"0.weight": torch.zeros(8, 6)}, path)
    with pytest.raises(SpaceError, match="missing"):
        read_model(make(), path)
    safetensors.torch.save_file({**mlp().state_dict(), "0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(SpaceError, match="shape"):
        read_model(make(), path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(FedSelectError, match="cannot be read"):
        read_model(make(), path)


# --- at a client -------------------------------------------------------------------------------


def site(path, kind=mlp, *, rounds=3, arm=ARM):
    """The folder of a client that has taken part, its learner and its state."""
    learner = TorchLearner(BlobTask(kind))
    state, base = None, learner.initial()
    for number in range(1, rounds + 1):
        seed = derive_seed(RULE, "site", number)
        state = learner.participate(state, base, settings=RULE, seed=seed).state
    folder = AgentFolder(path)
    folder.keep_space(learner.space)
    place = folder.arm(arm)
    work = Delivery(assignment=arm, round=rounds, mask_version=1, mask_sha256="0" * 64)
    place.commit(place.hold(work, state=[state.to_bytes(learner.space)], update=b"x"))
    return folder, learner, state


@pytest.mark.parametrize("kind", [mlp, Awkward])
def test_a_personalized_model_is_served_by_plain_torch(tmp_path, kind):
    folder, learner, state = site(tmp_path, kind)
    found = fedselect.load_personalized(tmp_path)  # while the agent holds its lock
    assert (str(found.arm), found.round, found.participations) == (ARM, 3, 3)
    model = kind()
    tensors = {name: torch.from_numpy(np.array(t)) for name, t in found.tensors.items()}
    assert model.load_state_dict(tensors, strict=False).unexpected_keys == []
    kept = model.state_dict()
    for slot in learner.space.slots:
        own = state.theta[slot.offset : slot.stop].reshape(slot.shape)
        np.testing.assert_array_equal(kept[slot.name].numpy(), own)
    for name, count in state.buffers.items():
        assert kept[name] == torch.from_numpy(np.array(count))
    folder.close()


def test_the_personal_part_goes_into_another_version(tmp_path):
    _, learner, state = site(tmp_path)
    assert state.merge_mask.personal > 0
    other = np.full(learner.space.dim, 0.5, np.float32)
    version = encode_version(learner.space.digest, other)
    found = fedselect.load_personalized(tmp_path, version=version).tensors
    flat = learner.space.flatten(found)
    np.testing.assert_array_equal(flat, state.merge(other))
    assert (flat == 0.5).any()
    assert (flat != 0.5).any()


def test_the_command_writes_a_file_of_its_own(tmp_path):
    _, _, state = site(tmp_path / "agent")
    out = tmp_path / "own.safetensors"
    said = run("personalized", "--state", tmp_path / "agent", "--out", out).stdout
    assert "3 participations" in said
    assert out.stat().st_mode & 0o077 == 0, "personal parameters are their owner's"
    found = safetensors.torch.load_file(out)
    assert torch.equal(found["0.bias"], torch.from_numpy(state.theta[48:56].copy()))


def test_what_cannot_be_served_is_said(tmp_path):
    def code(**options):
        with pytest.raises(FedSelectError) as caught:
            fedselect.load_personalized(tmp_path, **options)
        return caught.value.code

    assert code() == "state_missing"
    folder, learner, _ = site(tmp_path, rounds=1)
    second = ARM[:-1] + "b"
    place = folder.arm(second)
    place.commit(
        place.hold(
            Delivery(assignment=second, round=1, mask_version=1, mask_sha256="0" * 64),
            state=[(tmp_path / "arms" / ARM / f"{ARM}.safetensors").read_bytes()],
            update=b"x",
        )
    )
    assert code() == "state_ambiguous"
    assert str(fedselect.load_personalized(tmp_path, arm=second).arm) == second
    assert code(arm="0198f5a0-0000-7000-8000-00000000000c") == "state_missing"
    (tmp_path / "arms" / second / f"{second}.safetensors").write_bytes(b"torn")
    assert code(arm=second) == "state_corrupt"
    with pytest.raises(FedSelectError):
        fedselect.load_personalized(
            tmp_path, arm=ARM, version=encode_version("0" * 64, learner.initial())
        )
