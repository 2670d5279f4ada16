"""Commands of the learning side: ``simulate``; ``agent``, ``estimate`` and those about model
files have files of their own.

Owns argument parsing, progress and printing. Must not compute anything itself, nor load torch
before a command runs: ``fedselect --help`` stays fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedselect import (
    agent_cli,
    arms_cli,
    data_cli,
    estimate_cli,
    explain_cli,
    study_cli,
    versions_cli,
)
from fedselect.checkpoints import Checkpoint
from fedselect.effects import WORSE_POINTS
from fedselect.errors import SettingsError
from fedselect.policies import PRESETS, RunSettings, Training, preset_run
from fedselect.task import Task
from fedselect.tasks import EXAMPLES, client_tasks, example_clients, task_arguments

if TYPE_CHECKING:
    from fedselect.simulate import Simulation

WORSE = WORSE_POINTS / 100  # as a difference of accuracies
SCORES = ("local_only", "global", "pre", "post")


def register(app: typer.Typer) -> None:
    """Add the learning commands to the ``fedselect`` command."""
    agent_cli.register(app)
    arms_cli.register(app)
    data_cli.register(app)
    estimate_cli.register(app)
    explain_cli.register(app)
    study_cli.register(app)
    versions_cli.register(app)
    app.command("simulate")(simulate)


def simulate(
    task: Annotated[str, typer.Option(help=f"One of: {', '.join(EXAMPLES)}.")] = "digits",
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = "fedselect",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the batches and of the split.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps per client and round.")
    ] = None,
    participation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the clients that each round draws.")
    ] = 1.0,
    vectorized: Annotated[
        bool, typer.Option("--vectorized", help="Train all clients of a small model at once.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder to keep the state in, and to go on from.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Rounds between two checkpoints.")] = 1,
    task_arg: agent_cli.TaskArg = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run a whole federation in this process and compare it with training alone."""
    console = Console(stderr=True)
    example_clients(task)  # a wrong name is said before torch is loaded
    arguments = task_arguments(task_arg or [])
    settings = run_settings(preset, rounds=rounds, seed=seed, steps=steps)
    tasks = client_tasks(task, **{"seed": seed, **arguments})
    for warning in _warnings(settings, len(tasks), participation):
        console.print(f"Note: {warning}", highlight=False)
    about = {"task": task, "arguments": arguments, "participation": participation}
    kept = None if checkpoint is None else Checkpoint(checkpoint, every, about)
    way = (vectorized, kept)
    document = report(_run(tasks, settings, console, participation, way))
    if as_json:
        typer.echo(json.dumps({"task": task, "preset": preset, **document}, indent=2))
    else:
        Console().print(_table(document, f"{task}, {preset}, {rounds} rounds, seed {seed}"))
        _print_summary(document)


def run_settings(preset: str, *, rounds: int, seed: int, steps: int | None) -> RunSettings:
    """Run settings of a preset; ``steps`` replaces its training budget.

    Raises:
        SettingsError: no such preset, or settings that contradict each other.
    """
    changes: dict[str, Any] = {} if steps is None else {"training": Training(steps=steps)}
    try:
        return preset_run(preset, rounds=rounds, seed=seed, **changes)
    except ValidationError as error:
        texts = "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
        raise SettingsError(texts) from error


def _warnings(settings: RunSettings, clients: int, participation: float) -> list[str]:
    drawn = max(1, round(participation * clients))
    rules = settings.round.model_copy(update={"goal": drawn, "over_selection": 1.0})
    return settings.model_copy(update={"round": rules}).warnings(clients)


def _run(
    tasks: dict[str, Task],
    settings: RunSettings,
    console: Console,
    participation: float,
    way: tuple[bool, Checkpoint | None],
) -> Simulation:
    import torch

    from fedselect.simulate import Execution, sampled
    from fedselect.simulate import simulate as run

    torch.set_num_threads(1)  # small models are faster so, and equal seeds give equal bits
    with Progress(console=console, transient=True) as bar:
        shown = bar.add_task(f"{len(tasks)} clients train", total=settings.rounds)

        def progress(number: int) -> None:
            last = number == settings.rounds
            bar.update(
                shown, completed=number, description="scoring, training alone" if last else None
            )

        order = sampled(participation, settings.seed)
        result = run(tasks, settings, order=order, progress=progress, execution=Execution(*way))
    if result.one_by_one is not None:
        console.print(
            f"Note: clients were trained one by one: {result.one_by_one}", highlight=False
        )
    return result


def report(result: Simulation) -> dict[str, Any]:
    """A simulation as plain JSON: accuracies and shares from 0 to 1, sizes in bytes."""
    clients: dict[str, dict[str, Any]] = {
        name: {
            **{kind: scores[kind].accuracy for kind in SCORES},
            "personal_share": result.personal[name],
            "bytes_up": result.bytes_up[name],
            "bytes_down": result.bytes_down[name],
            "participations": result.states[name].participations,
            "gated": result.states[name].gated,
            "worse": scores["post"].accuracy - scores["local_only"].accuracy < -WORSE,
        }
        for name, scores in result.scores.items()
    }
    rows = list(clients.values())
    return {
        "clients": clients,
        "mean": {kind: fmean(float(row[kind]) for row in rows) for kind in SCORES},
        "worst": {kind: min(float(row[kind]) for row in rows) for kind in SCORES},
        "worse": sum(bool(row["worse"]) for row in rows),
        "elements": result.space.dim,
        "space": result.space.digest,
        "version": result.versions[-1],
    }


def _table(document: dict[str, Any], title: str) -> Table:
    table = Table(title=title)
    table.add_column("client")
    for name in ("local-only %", "global %", "pre %", "post %", "personal %", "up kB", "down kB"):
        table.add_column(name, justify="right")
    for name, row in document["clients"].items():
        accuracies = [f"{100 * row[kind]:.1f}" for kind in SCORES]
        sizes = [f"{row[key] / 1000:,.0f}" for key in ("bytes_up", "bytes_down")]
        style = "red" if row["worse"] else None
        table.add_row(name, *accuracies, f"{100 * row['personal_share']:.1f}", *sizes, style=style)
    table.add_section()
    for name in ("mean", "worst"):
        table.add_row(name, *(f"{100 * document[name][kind]:.1f}" for kind in SCORES))
    return table


def _print_summary(document: dict[str, Any]) -> None:
    typer.echo(
        f"{document['worse']} of {len(document['clients'])} clients are worse: their own model at "
        "the end (post) is more than 2 points below training alone for as many steps (local-only)."
    )
    typer.echo(f"Last version: sha256 {document['version']}")
