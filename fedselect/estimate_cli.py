"""The ``estimate`` command: what a run would cost, from a task, a space or a number of elements.

Owns its options and tables. Torch is loaded for a task alone; the figures are ``estimate``'s, what
is measured ``dryrun``'s.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fedselect import agent_cli
from fedselect.amounts import duration, size
from fedselect.armestimate import estimate_run
from fedselect.errors import FedSelectError, SettingsError
from fedselect.estimate import single_tensor
from fedselect.estimatedocs import Estimate, EstimateCreate
from fedselect.heterogeneity import LABEL
from fedselect.policies import PRESETS, RunSettings, Wire, preset_run
from fedselect.protocol import PrivacyAccount
from fedselect.space import ParameterSpace
from fedselect.tasks import EXAMPLES, client_tasks, load_task, task_arguments

if TYPE_CHECKING:
    from fedselect.dryrun import DryRun
    from fedselect.heterogeneity import Divergence

ENOUGH = 3  # clients whose tasks are at hand, so that their updates can be compared


def register(app: typer.Typer) -> None:
    """Add the ``estimate`` command."""
    app.command("estimate")(estimate)


Spec = Annotated[
    str | None,
    typer.Option(
        "--task", help=f"package.module:Name, file.py:Name, or one of {', '.join(EXAMPLES)}."
    ),
]
Elements = Annotated[int | None, typer.Option(min=1, help="Of a model that is not at hand.")]
Space = Annotated[
    Path | None,
    typer.Option("--space", exists=True, dir_okay=False, help="A parameter space, JSON."),
]
Settings = Annotated[
    Path | None,
    typer.Option("--settings", exists=True, dir_okay=False, help="Run settings, JSON."),
]
Preset = Annotated[str, typer.Option(help=f"Without --settings, one of: {', '.join(PRESETS)}.")]
Rounds = Annotated[int, typer.Option(min=1, help="Without --settings.")]
Encoding = Annotated[str | None, typer.Option(help="f32, bf16 or int8.")]
Clients = Annotated[int, typer.Option(min=1, help="Of the federation.")]
Links = Annotated[
    list[str] | None, typer.Option("--link", help="10mbit, 50mbit/10mbit, dsl …; repeatable.")
]
Data = Annotated[
    float | None, typer.Option("--data-mb", min=0, help="MB of a client's data, to compare with.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def estimate(
    task: Spec = None,
    task_arg: agent_cli.TaskArg = None,
    elements: Elements = None,
    space: Space = None,
    settings: Settings = None,
    preset: Preset = "fedselect",
    rounds: Rounds = 60,
    encoding: Encoding = None,
    clients: Clients = 10,
    link: Links = None,
    data_mb: Data = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would cost, before anybody joins it.

    With --task a step and real deltas are measured in this process, and with an example federation
    also how differently its clients pull. Otherwise give --space or --elements.
    """
    if sum(given is not None for given in (task, elements, space)) != 1:
        raise SettingsError("give exactly one of --task, --space and --elements")
    rule = _settings(settings, preset=preset, rounds=rounds, encoding=encoding, clients=clients)
    dry, pulled = _dry_run(task, task_arg or [], rule) if task else (None, None)
    model = dry.space if dry else _space(space, elements)
    asked = _asked(
        rule,
        clients=clients,
        links=link or ["10mbit"],
        data_bytes=None if data_mb is None else round(data_mb * 1e6),
        elements=elements,
        space=None if elements else model.to_json(),
        **({"examples": dry.examples, "measured": dry.measured} if dry else {}),
    )
    found = estimate_run(asked, model)
    if as_json:
        extra = {"heterogeneity": {**asdict(pulled), "label": LABEL}} if pulled else {}
        typer.echo(json.dumps({**found.model_dump(mode="json"), **extra}))
    else:
        _show(found, pulled)


# --- what is asked -----------------------------------------------------------------------------


def _settings(
    path: Path | None, *, preset: str, rounds: int, encoding: str | None, clients: int
) -> RunSettings:
    try:
        if path is not None:
            rule = RunSettings.model_validate_json(path.read_bytes())
        else:
            rule = preset_run(preset, rounds=rounds)
            goal = {"goal": max(clients, rule.round.quorum), "over_selection": 1.0}
            changed = rule.round.model_dump() | goal
            rule = RunSettings.model_validate(rule.model_dump() | {"round": changed})
        if encoding is not None:
            rule = rule.model_copy(update={"wire": Wire.model_validate({"encoding": encoding})})
    except ValidationError as error:
        raise SettingsError(_words(error)) from error
    return rule


def _words(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}".lstrip(": ") for f in faults)


def _space(path: Path | None, elements: int | None) -> ParameterSpace:
    if path is None:
        return single_tensor(elements or 1)
    try:
        return ParameterSpace.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise FedSelectError(f"{path} cannot be read: {error}", code="file_invalid") from error


def _asked(settings: RunSettings, **values: Any) -> EstimateCreate:
    try:
        return EstimateCreate(settings=settings, **values)
    except ValidationError as error:
        raise SettingsError(_words(error)) from error


def _dry_run(
    spec: str, arguments: list[str], settings: RunSettings
) -> tuple[DryRun, Divergence | None]:
    import torch

    from fedselect.dryrun import measure, pull

    torch.set_num_threads(1)
    given = task_arguments(arguments)
    example = spec in EXAMPLES
    tasks = client_tasks(spec, **given) if example else {"site": load_task(spec, **given)}
    with Console(stderr=True).status("measuring a step, and real deltas …"):
        found = measure(tasks, settings)
        return found, pull(tasks, settings) if len(tasks) >= ENOUGH else None


# --- what is shown -----------------------------------------------------------------------------


def _show(found: Estimate, pulled: Divergence | None) -> None:
    console = Console(highlight=False)
    console.print(
        f"{found.elements:,} elements, {found.clients:,} clients, {found.per_round:,} in each "
        f"round, {found.participations:.1f} participations each, {found.encoding}\n"
    )
    for table in (_traffic(found), _encodings(found), _masks(found), _links(found)):
        console.print(table)
    if found.arms:
        console.print(_arms(found))
    if found.privacy is not None:
        console.print(_private(found.privacy))
    console.print(_sheet(found))
    if pulled is not None:
        console.print(
            f"\nHeterogeneity of {pulled.clients} clients: {pulled.index:.2f} "
            f"({pulled.low:.2f} to {pulled.high:.2f} with 95 %), of which {pulled.noise:.2f} is "
            f"the order of batches – {LABEL}."
        )
    for text in found.assumptions:
        console.print(f"· {text}")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _traffic(found: Estimate) -> Table:
    table = _table("Bytes", "of", "up", "down", "control up", "control down")
    for name in ("participation", "round", "client", "run"):
        row = getattr(found, name)
        cells = (row.up, row.down, row.control_up, row.control_down)
        table.add_row(f"one {name}" if name != "run" else "the run", *map(size, cells))
    return table


def _encodings(found: Estimate) -> Table:
    table = _table("One client, whole run, by encoding", "", "up", "down", "of FedAvg f32")
    for row in found.encodings:
        table.add_row(row.encoding, size(row.up), size(row.down), f"{row.of_fedavg:.3f}")
    return table


def _masks(found: Estimate) -> Table:
    columns = ("personal", "mask", "bytes", "update", "download")
    table = _table("Mask schedule", "participations", *columns)
    for row in found.masks:
        span = f"{row.first}" if row.first == row.last else f"{row.first}–{row.last}"
        sizes = map(size, (row.mask_bytes, row.update_bytes, row.download_bytes))
        table.add_row(span, f"{row.personal_share:.1%}", row.mask, *sizes)
    return table


def _arms(found: Estimate) -> Table:
    table = _table("Arms, each as if it were alone", "arm", "clients", "up", "down", "of FedAvg")
    for row in found.arms:
        cells = (f"{row.clients:,}", size(row.run.up), size(row.run.down), f"{row.of_fedavg:.3f}")
        table.add_row(row.name, *cells)
    return table


def _private(found: PrivacyAccount) -> Table:
    table = _table("Differential privacy", "", "")
    cost = found.accuracy_cost
    for name, text in {
        f"ε of {found.rounds} rounds, δ = {found.delta:g}": f"{found.epsilon:.3g}",
        "budget": f"{found.budget:g}",
        "noise against the farthest clients could move": f"{found.noise_share:.3g}",
        "points that noise alone cost": "not measured" if cost is None else f"{cost:.1f}",
    }.items():
        table.add_row(name, text)
    return table


def _links(found: Estimate) -> Table:
    table = _table("Time", "link", "down", "up", "one round", "the run")
    for row in found.links:
        cells = (row.down_seconds, row.up_seconds, row.round_seconds, row.run_seconds)
        table.add_row(row.name, *map(duration, cells))
    return table


def _sheet(found: Estimate) -> Table:
    table = Table(box=None, show_header=False)
    server, storage, against = found.server, found.storage, found.against
    compute = found.compute
    rows = {
        "client computes": f"{duration(compute.seconds)} for {compute.steps} steps "
        f"({compute.basis})",
        "verifying a round": duration(server.verify_seconds),
        "summing a round": f"{duration(server.kernel_seconds)}, then published within "
        f"{duration(server.publish_seconds)}",
        "memory of a worker": size(server.worker_memory),
        "object store": f"{size(storage.run)} at the end, {size(storage.kept)} once updates go",
        "FedAvg in float32": f"{size(against.fedavg)}; this is {against.of_fedavg:.2f} of it",
    }
    if against.central is not None and against.of_central is not None:
        rows["sending the data"] = (
            f"{size(against.central)}; this is {against.of_central:.2f} of it"
        )
    for name, text in rows.items():
        table.add_row(name, text)
    return table
