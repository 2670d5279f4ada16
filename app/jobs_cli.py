"""The ``jobs`` commands: look at the coordinator's work, retry it, notice that it stalls.

Owns what they print. All but ``watch`` ask the API, with the rights of the key; ``watch`` runs
beside a worker and looks at the database itself. Must not contain rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app import jobs, wiring
from fedselect.client import Client
from fedselect.errors import FedSelectError
from fedselect.protocol import JobInfo

out = Console()
app = typer.Typer(no_args_is_help=True, help="Look at the coordinator's work and retry it.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Server = Annotated[
    str | None, typer.Option(envvar="FEDSELECT_SERVER", help="Default: the local stack's.")
]
KeyFile = Annotated[
    Path | None, typer.Option(help="File with an owner's or auditor's key; or FEDSELECT_KEY.")
]
Key = Annotated[str | None, typer.Option(envvar="FEDSELECT_KEY", hidden=True)]
JobId = Annotated[UUID, typer.Argument(help="Id of a job, as `list` shows it.")]
LOCAL = Path(".fedselect")


@app.command("list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="due, leased, done or failed")] = None,
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, oldest first."""
    with _client(server, key_file, key) as client:
        found = list(client.jobs(state))
    if as_json:
        typer.echo(json.dumps([job.model_dump(mode="json") for job in found]))
        return
    table = Table("id", "kind", "part", "state", "attempts", "created", "error", box=None)
    for job in found:
        when = f"{job.created_at:%m-%d %H:%M:%S}"
        row = (str(job.id), job.kind, str(job.part), job.state, str(job.attempts), when)
        table.add_row(*row, escape(job.error or ""))
    out.print(table)


@app.command()
def show(
    job_id: JobId,
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show one job."""
    with _client(server, key_file, key) as client:
        _print(client.job(job_id), as_json)


@app.command()
def retry(
    job_id: JobId,
    server: Server = None,
    key_file: KeyFile = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Have a due job done now, or a failed one of a round with the whole round again."""
    with _client(server, key_file, key) as client:
        _print(client.retry_job(job_id), as_json)


@app.command()
def watch(
    seconds: Annotated[
        float | None, typer.Option(help="How old is too old. Default: WATCHDOG.")
    ] = None,
) -> None:
    """Exit code 1 if due work stays untouched: the workers do not consume (any more)."""
    core = wiring.build()
    try:
        with core.db.transaction("command-line", "jobs.watch") as tx:
            found = jobs.stalled(tx, seconds=seconds or core.settings.watchdog)
    finally:
        core.close()
    if found is not None:
        typer.echo(
            f"job {found.id} ({found.kind}) waits since {found.run_after:%H:%M:%S} UTC and no "
            "worker does anything; restart the workers, and look whether Redis and the scheduler "
            "run",
            err=True,
        )
        raise typer.Exit(1)


@contextmanager
def _client(server: str | None, key_file: Path | None, key: str | None) -> Iterator[Client]:
    if key_file is not None or key is None:
        key = _read(key_file or LOCAL / "owner.key")
    with Client(server or _local_server(), key=key) as client:
        yield client


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise FedSelectError(
            f"cannot read the key file {path} ({error.strerror}); give --key-file or set "
            "FEDSELECT_KEY",
            code="key_missing",
        ) from error


def _local_server() -> str:
    from app.localstack import LocalStack  # its libraries take a second to load

    return LocalStack(LOCAL).environment()["PUBLIC_URL"]


def _print(job: JobInfo, as_json: bool) -> None:
    if as_json:
        typer.echo(job.model_dump_json())
        return
    table = Table(box=None, show_header=False)
    for name, value in job.model_dump(mode="json").items():
        table.add_row(name, escape(str("–" if value is None else value)))
    out.print(table)
