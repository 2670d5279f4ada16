"""The ``compare`` command: several policies on one federation, in this process, side by side.

Owns its options, progress and printing. The runs are ``simulate``'s, the figures and the
recommendation those of the service (``comparison``, ``recommend``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import NAMESPACE_URL, uuid5

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fedselect import comparisonpage
from fedselect.comparedoc import ComparedRun, Comparison
from fedselect.comparison import Scored, compare
from fedselect.errors import FedSelectError, SettingsError
from fedselect.evaluations import EvaluationReport
from fedselect.lifecycle import RunState
from fedselect.policies import PRESETS, Arms, RunSettings, preset
from fedselect.reporting import Evaluated, budget
from fedselect.task import Task
from fedselect.tasks import EXAMPLES, client_tasks, example_clients

if TYPE_CHECKING:
    from fedselect.simulate import Simulation

USUAL = ("fedselect", "share-then-local", "fedper", "fedper-late", "random", "fedavg")


def register(app: typer.Typer) -> None:
    """Add the ``compare`` command."""
    app.command("compare")(compare_policies)


def compare_policies(
    task: Annotated[str, typer.Option(help=f"One of: {', '.join(EXAMPLES)}.")] = "digits",
    arm: Annotated[
        list[str] | None, typer.Option(help=f"A policy; repeat. Of: {', '.join(PRESETS)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of every arm.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the batches and of the split.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write it as a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run several policies in this process, and say which to use and whether the data can tell."""
    example_clients(task)  # a wrong name is said before torch is loaded
    settings = _settings(arm or USUAL, rounds=rounds, seed=seed)
    tasks = client_tasks(task, seed=seed)
    found = _comparison(task, settings, _run(tasks, settings))
    if html is not None:
        _write(html, comparisonpage.page(found))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        Console().print(_table(found))
        for reason in found.reasons:
            typer.echo(f"· {reason.text}")


def _settings(names: Sequence[str], *, rounds: int, seed: int) -> RunSettings:
    try:
        policies = tuple(preset(name, rounds=rounds) for name in names)
        return RunSettings(
            rounds=rounds,
            seed=seed,
            arms=Arms(mode="parallel", policies=policies),
        )
    except ValidationError as error:
        texts = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise SettingsError(texts) from error


def _run(tasks: dict[str, Task], settings: RunSettings) -> Mapping[str, Simulation]:
    import torch

    from fedselect.simulate import simulate_arms

    torch.set_num_threads(1)  # small models are faster so, and equal seeds give equal bits
    with Progress(console=Console(stderr=True), transient=True) as bar:
        total = settings.rounds * len(settings.policies)
        shown = bar.add_task("", total=total)

        def progress(name: str, number: int) -> None:
            bar.update(shown, advance=1, description=f"{name}, round {number}")

        return simulate_arms(tasks, settings, progress=progress)


def _comparison(task: str, settings: RunSettings, results: Mapping[str, Simulation]) -> Comparison:
    arms = [
        Scored(
            uuid5(NAMESPACE_URL, policy.name),
            policy,
            settings.rounds,
            settings.rounds,
            _evaluations(results[policy.name]),
        )
        for policy in settings.policies
    ]
    run = ComparedRun(
        id=uuid5(NAMESPACE_URL, task),
        name=f"simulation-of-{task}",
        model=task,
        state=RunState.FINISHED,
        mode="parallel",
        rounds=settings.rounds,
        seed=settings.seed,
        budget=budget(settings.training),
    )
    return compare(run, settings, arms, made_at=datetime.now(UTC))


def _evaluations(result: Simulation) -> list[Evaluated]:
    found = []
    for name, scores in result.scores.items():
        numbers: dict[str, Any] = {
            "scores": {kind: asdict(score) for kind, score in scores.items()},
            "participations": result.states[name].participations,
            "personal_share": result.personal[name],
            "bytes_sent": result.bytes_up[name],
            "bytes_received": result.bytes_down[name],
        }
        report = EvaluationReport.model_validate(numbers)
        found.append(Evaluated(uuid5(NAMESPACE_URL, name), name, report))
    return found


def _table(found: Comparison) -> Table:
    table = Table(title=f"{found.run.model}, {found.run.rounds} rounds, seed {found.run.seed}")
    table.add_column("arm")
    for head in ("pooled %", "95 % over clients", "mean %", "worst %", "worse", "sent MB"):
        table.add_column(head, justify="right")
    for arm in found.arms:
        between, alone = arm.pooled_over_clients, arm.effects.get("local_only")
        table.add_row(
            f"{arm.name} (control)" if arm.control else arm.name,
            "–" if arm.pooled is None else f"{arm.pooled.percent:.1f}",
            "–" if between is None else f"{between.low:.1f}–{between.high:.1f}",
            "–" if arm.mean_percent is None else f"{arm.mean_percent:.1f}",
            "–" if arm.worst is None else f"{arm.worst.percent:.1f}",
            "–" if alone is None else str(len(alone.worse or ())),
            f"{(arm.sent_bytes_each or 0.0) / 1e6:.3f}",
        )
    return table


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise FedSelectError(f"{path} cannot be written: {error}", code="file_invalid") from error
