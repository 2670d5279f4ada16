"""Commands about model files: ``import``, ``export`` and ``personalized``.

Owns their options and what they write. Torch is loaded for ``import`` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from fedselect import agent_cli
from fedselect.errors import FedSelectError, SpaceError
from fedselect.exporting import export_version, state_dict_file
from fedselect.personal import write_atomically
from fedselect.serving import load_personalized
from fedselect.space import FloatVector, ParameterSpace
from fedselect.tasks import load_task, task_arguments
from fedselect.wire import encode_version, file_digest

if TYPE_CHECKING:
    from fedselect.task import Task

SPACE, WEIGHTS = "space.json", "version-0.safetensors"
Existing = Annotated[Path, typer.Argument(exists=True, dir_okay=False)]
Out = Annotated[Path, typer.Option(help="Where to.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("import")(import_model)
    app.command("export")(export_model)
    app.command("personalized")(personalized)


def import_model(
    task: agent_cli.TaskSpec,
    out: Out,
    weights: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A state_dict in safetensors."),
    ] = None,
    task_arg: agent_cli.TaskArg = None,
) -> None:
    """Make a parameter space and version 0 of a task's model, to be registered.

    With --weights of an existing model, otherwise those that the task builds.
    """
    made = load_task(task, **task_arguments(task_arg or []))
    space, values = read_model(made, weights)
    out.mkdir(parents=True, exist_ok=True)
    data = encode_version(space.digest, values)
    write_atomically(out / SPACE, json.dumps(space.to_json()).encode())
    write_atomically(out / WEIGHTS, data)
    typer.echo(f"{space.dim:,} elements in {len(space.slots)} tensors, sha256 {file_digest(data)}")
    typer.echo(f"Register them: fedselect admin models create NAME {out / SPACE}")
    typer.echo(f"               fedselect admin models send-weights ID {out / WEIGHTS}")


def read_model(task: Task, weights: Path | None) -> tuple[ParameterSpace, FloatVector]:
    """The space of a task's model and its values (D,), from a safetensors file if one is given.

    Names that are tied to another one may be missing in the file, and so may integer buffers.

    Raises:
        SpaceError: other names or shapes than the model has.
        FedSelectError: file_invalid.
    """
    import safetensors.torch
    import torch

    from fedselect.training import TorchLearner

    learner = TorchLearner(task)
    if weights is None:
        return learner.space, learner.initial()
    try:
        found = safetensors.torch.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise FedSelectError(f"{weights} cannot be read: {error}", code="file_invalid") from error
    unknown = sorted(found.keys() - task.build_model().state_dict().keys())
    if unknown:
        raise SpaceError(f"{weights} has tensors that the model lacks: {', '.join(unknown[:5])}")
    known = learner.space.by_name
    named = {n: t.to(torch.float32).numpy() for n, t in found.items() if n in known}
    return learner.space, learner.space.flatten(named)


def export_model(
    version: Existing,
    space: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Its space, JSON.")],
    out: Out,
) -> None:
    """Write a version file as a plain PyTorch state_dict, in safetensors."""
    try:
        known = ParameterSpace.from_json(json.loads(space.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise FedSelectError(f"{space} cannot be read: {error}", code="file_invalid") from error
    data = export_version(version.read_bytes(), known)
    write_atomically(out, data)
    typer.echo(f"{known.dim:,} elements in {out}")


def personalized(
    state: agent_cli.State,
    out: Out,
    arm: Annotated[UUID | None, typer.Option(help="Which of several arms.")] = None,
    version: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Merge the personal part into this version file."
        ),
    ] = None,
) -> None:
    """Write this client's personalized model as a plain PyTorch state_dict, in safetensors.

    As last trained, or merged into a version. It holds personal parameters: keep it here.
    """
    found = load_personalized(
        state, arm=arm, version=version.read_bytes() if version is not None else None
    )
    write_atomically(out, state_dict_file(found.tensors, arm=str(found.arm)))
    typer.echo(
        f"round {found.round}, {found.participations} participations, in {out} (personal: keep it "
        "here)"
    )
