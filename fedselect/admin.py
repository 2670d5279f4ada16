"""The ``fedselect admin`` commands over the HTTP interface: what a person does with a key.

Owns the group and its commands about models, runs, rounds and jobs; each is one call. Commands that
go to the database itself are the server half's (`app/cli.py`), which adds them to this group. Must
not print (``remote`` does) or contain rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from fedselect import (
    admin_access,
    admin_hooks,
    admin_rollouts,
    admin_versions,
    comparison,
    comparisonpage,
    explainpage,
)
from fedselect.client import Client
from fedselect.comparedoc import Comparison
from fedselect.errors import FedSelectError
from fedselect.estimatedocs import RunEstimate
from fedselect.evaluations import Evaluation
from fedselect.explaindocs import Explanation
from fedselect.manifestdocs import ManifestDocument
from fedselect.pictures import draw
from fedselect.policies import RunSettings, preset
from fedselect.protocol import (
    JobInfo,
    ModelCreate,
    ModelInfo,
    RoundDetail,
    RoundInfo,
    RunCreate,
    RunInfo,
    VersionInfo,
)
from fedselect.remote import command, group, read_json, valid
from fedselect.reportdoc import RunReport
from fedselect.reportpage import page
from fedselect.reporttable import table
from fedselect.tenancy import Identity
from fedselect.uploads import UploadStatus

REMOTE = "Over the HTTP interface, with a key"
Id = Annotated[UUID, typer.Argument(metavar="ID")]
RunId = Annotated[UUID, typer.Argument(metavar="RUN", help="Id of the run.")]

app = group("Administer a coordinator.")
models = group("Models and their initial weights.")
runs = group("Training campaigns.")
rounds = group("Rounds of a run.")
jobs = group("The coordinator's own work.")
for name, part in (
    ("profiles", admin_access.profiles),
    ("projects", admin_access.projects),
    ("clients", admin_access.clients),
    ("keys", admin_access.keys),
    ("members", admin_access.members),
    ("webhooks", admin_hooks.webhooks),
    ("models", models),
    ("runs", runs),
    ("rounds", rounds),
    ("versions", admin_versions.versions),
    ("cohorts", admin_rollouts.cohorts),
    ("channels", admin_rollouts.channels),
    ("rollouts", admin_rollouts.rollouts),
    ("jobs", jobs),
):
    app.add_typer(part, name=name, rich_help_panel=REMOTE)


@command(app, "whoami", panel=REMOTE)
def who_am_i(client: Client) -> Identity:
    """Show role, scopes, organisation and project of the key in use."""
    return client.who_am_i()


# --- models ------------------------------------------------------------------------------------


@command(models, "list", columns=("id", "name", "elements", "initial_version.sha256"))
def list_models(client: Client) -> Iterator[ModelInfo]:
    """List models, oldest first."""
    return client.models()


@command(models, "show")
def show_model(client: Client, model_id: Id) -> ModelInfo:
    """Show one model."""
    return client.model(model_id)


@command(models, "create")
def create_model(
    client: Client,
    name: str,
    space: Annotated[Path, typer.Argument(help="File with the parameter space, JSON.")],
) -> ModelInfo:
    """Register a model by its parameter space; `send-weights` follows."""
    return client.create_model(valid(ModelCreate, name=name, space=read_json(space)))


@command(models, "send-weights")
def send_weights(
    client: Client,
    model_id: Id,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A version file.")],
) -> UploadStatus:
    """Upload a model's initial weights; `models show` names them once they are verified."""
    return client.send_weights(model_id, file.read_bytes())


@command(models, "show-upload")
def show_upload(client: Client, upload_id: Id) -> UploadStatus:
    """Show what became of weights that were sent, and why they were refused."""
    return client.upload(upload_id)


# --- runs and rounds ---------------------------------------------------------------------------


@command(runs, "list", columns=("id", "name", "state", "published", "created_at", "reason"))
def list_runs(client: Client) -> Iterator[RunInfo]:
    """List runs, oldest first."""
    return client.runs()


@command(runs, "show")
def show_run(client: Client, run_id: Id) -> RunInfo:
    """Show one run."""
    return client.run(run_id)


@command(runs, "create")
def create_run(
    client: Client,
    name: str,
    model_id: Annotated[UUID, typer.Argument(metavar="MODEL", help="Id of the model.")],
    settings: Annotated[Path | None, typer.Option(help="File with its settings, JSON.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="A policy by name, as an arm of the run; repeat.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Of arms: parallel or randomized; else by the clients.")
    ] = None,
) -> RunInfo:
    """Create a run; it waits for `start`."""
    given = read_json(settings) if settings else {}
    if arm:
        rounds = given.get("rounds", RunSettings.model_fields["rounds"].default)
        policies = [
            preset(name, rounds=rounds if isinstance(rounds, int) else None) for name in arm
        ]
        given["arms"] = {"mode": mode, "policies": policies}
    wanted = valid(RunSettings, **given)
    return client.create_run(valid(RunCreate, name=name, model_id=model_id, settings=wanted))


@command(runs, "start")
def start_run(client: Client, run_id: Id) -> RunInfo:
    """Open a run's first round."""
    return client.start_run(run_id)


@command(runs, "pause")
def pause_run(client: Client, run_id: Id) -> RunInfo:
    """Let the present round end and open no further one."""
    return client.pause_run(run_id)


@command(runs, "resume")
def resume_run(client: Client, run_id: Id) -> RunInfo:
    """Go on with a paused run."""
    return client.resume_run(run_id)


@command(runs, "stop")
def stop_run(client: Client, run_id: Id) -> RunInfo:
    """End a run for good; its present round is cancelled."""
    return client.stop_run(run_id)


@command(runs, "versions", columns=("number", "id", "size", "sha256", "created_at"))
def list_versions(client: Client, run_id: RunId) -> Iterator[VersionInfo]:
    """List a run's versions."""
    return client.versions(run_id)


@command(
    runs,
    "evaluations",
    columns=("client_name", "arm", "personal_share", "participations", "scores"),
)
def list_evaluations(client: Client, run_id: RunId) -> Iterator[Evaluation]:
    """List what clients measured at the end of a run."""
    return client.evaluations(run_id)


@command(runs, "estimate")
def show_run_estimate(
    client: Client,
    run_id: Id,
    link: Annotated[str, typer.Option(help="The clients' line, as of `fedselect estimate`.")] = (
        "100mbit"
    ),
) -> RunEstimate:
    """Compare a run's estimate with what it has cost."""
    return client.run_estimate(run_id, link=link)


@command(runs, "report", columns=("text", "value", "unit", "n"), rows="facts")
def report_run(
    client: Client,
    run_id: RunId,
    html: Annotated[Path | None, typer.Option(help="Write it as a page to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a line per client to this file.")] = None,
    arm: Annotated[str | None, typer.Option(help="Name of the arm; by default the first.")] = None,
    fedavg: Annotated[
        UUID | None, typer.Option(help="Id of a FedAvg run of the same settings, to compare with.")
    ] = None,
    rerun: Annotated[
        UUID | None, typer.Option(help="Id of the same run with another seed, to compare masks.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw its plots to this file; needs a Chromium.")
    ] = None,
) -> RunReport:
    """Say who gained, who lost, what a run cost and what it personalized."""
    report = client.run_report(run_id, arm=arm, fedavg=fedavg, rerun=rerun)
    for path, write in ((html, page), (csv, table)):
        if path is not None:
            _write(path, write(report))
    if png is not None:
        draw(page(report), png)
    return report


@command(runs, "compare", columns=("text",), rows="reasons")
def compare_run(
    client: Client,
    run_id: RunId,
    html: Annotated[Path | None, typer.Option(help="Write it as a page to this file.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write a line per client and arm to this file.")
    ] = None,
) -> Comparison:
    """Say which of a run's arms to use, and whether the data can tell."""
    found = client.comparison(run_id)
    for path, write in ((html, comparisonpage.page), (csv, comparison.table)):
        if path is not None:
            _write(path, write(found))
    return found


@command(runs, "explain", columns=("text",), rows="tensors")
def explain_client(
    client: Client,
    run_id: RunId,
    client_id: Annotated[UUID, typer.Argument(metavar="CLIENT", help="Id of the client.")],
    html: Annotated[Path | None, typer.Option(help="Write it as a page to this file.")] = None,
    arm: Annotated[str | None, typer.Option(help="Name of an arm; else the first.")] = None,
) -> Explanation:
    """Explain what of a client's model is its own, and what that is worth."""
    found = client.explanation(run_id, client_id, arm=arm)
    if html is not None:
        _write(html, explainpage.page(found))
    return found


@command(rounds, "list", columns=("number", "attempt", "state", "id", "opened_at", "reason"))
def list_rounds(client: Client, run_id: RunId) -> Iterator[RoundInfo]:
    """List the rounds of a run."""
    return client.rounds(run_id)


@command(rounds, "show")
def show_round(client: Client, round_id: Id) -> RoundDetail:
    """Show one round and its assignments."""
    return client.round(round_id)


@command(rounds, "manifest")
def show_manifest(client: Client, round_id: Id) -> ManifestDocument:
    """Show what is needed to recompute a round's version, with signed addresses of its files."""
    return client.manifest(round_id)


@command(rounds, "cancel")
def cancel_round(client: Client, round_id: Id) -> RoundInfo:
    """End a round without a version; the run pauses."""
    return client.cancel_round(round_id)


# --- jobs --------------------------------------------------------------------------------------


@command(jobs, "list", columns=("id", "kind", "part", "state", "attempts", "created_at", "error"))
def list_jobs(
    client: Client,
    state: Annotated[str | None, typer.Option(help="due, leased, done or failed")] = None,
) -> Iterator[JobInfo]:
    """List jobs, oldest first."""
    return client.jobs(state)


@command(jobs, "show")
def show_job(client: Client, job_id: Id) -> JobInfo:
    """Show one job."""
    return client.job(job_id)


@command(jobs, "retry")
def retry_job(client: Client, job_id: Id) -> JobInfo:
    """Have a due job done now, or a failed one of a round with the whole round again."""
    return client.retry_job(job_id)


# --- files -------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8", newline="")  # CSV brings its own line ends
    except OSError as error:
        raise FedSelectError(f"{path} cannot be written: {error}", code="file_invalid") from error
