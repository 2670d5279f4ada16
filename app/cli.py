"""Commands of the server half: up, down, status, jobs, storage, admin.

Owns what they print. Must not contain rules: it starts the stack and calls the same functions as
the API.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from alembic import command as alembic
from alembic.config import Config
from rich.console import Console
from rich.table import Table

from app import jobs_cli, keys, ledger, storage_cli, tenants, upkeep_cli, wiring
from fedselect import admin as remote
from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically
from fedselect.profiles import Profile, Profiles, write_profiles

if TYPE_CHECKING:
    from app.localstack import LocalStack

out = Console()
admin = remote.app  # over HTTP; what follows goes to the database itself
remote.jobs.command("watch")(jobs_cli.watch)
DIRECT = "On the deployment itself, without a key (break-glass)"
Root = Annotated[Path, typer.Option(help="Folder of the local stack.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DEFAULT_ROOT = Path(".fedselect")


def register(app: typer.Typer) -> None:
    """Add this half's commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.add_typer(remote.jobs, name="jobs")
    app.add_typer(storage_cli.app, name="storage")
    upkeep_cli.register(app, admin)


def up(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Start PostgreSQL, Redis, an S3 server, the coordinator, a worker and the scheduler."""
    stack = _stack(root)
    stack.up(prepare=lambda environment: prepare(root, environment))
    url = stack.environment()["PUBLIC_URL"]
    _show(stack, as_json)
    if not as_json:
        out.print(f"API docs  {url}/docs\nOwner key {admin_key_file(root)}")
        out.print(f"Stop with [bold]fedselect down --root {root}[/bold]")


def down(root: Root = DEFAULT_ROOT) -> None:
    """Stop everything that `up` started; the data stays."""
    _stack(root).down()


def status(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show what runs; exit code 1 unless everything does."""
    stack = _stack(root)
    _show(stack, as_json)
    if any(s.state.value not in {"running", "given"} for s in stack.status()):
        raise typer.Exit(1)


def _stack(root: Path) -> LocalStack:
    # Its libraries take a second to load, which only these three commands need to wait for.
    from app.localstack import LocalStack

    return LocalStack(root)


def _show(stack: LocalStack, as_json: bool) -> None:
    services = stack.status()
    if as_json:
        rows = [
            {
                "name": s.name,
                "state": s.state.value,
                "pid": s.pid,
                "port": s.port,
                "log": str(s.log),
            }
            for s in services
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table("service", "state", "pid", "port", "log", box=None)
    for s in services:
        table.add_row(s.name, s.state.value, str(s.pid or "–"), str(s.port or "–"), str(s.log))
    out.print(table)


def admin_key_file(root: Path) -> Path:
    """Where the local stack keeps its owner key."""
    return root / "owner.key"


def prepare(root: Path, environment: dict[str, str]) -> None:
    """Migrate, create the bucket, the default project and its owner key, once; note where it is."""
    with _environment(environment):
        migrate()
        with _coordinator() as core:
            core.storage.prepare()
            file = admin_key_file(root)
            if not file.exists():
                write_atomically(file, _first_key(core).encode())
    here = Profile(environment["PUBLIC_URL"], str(file.absolute()))
    write_profiles(root / "profiles.toml", Profiles("local", {"local": here}))


def _first_key(core: wiring.Coordinator, role: str = "owner") -> str:
    with core.db.transaction("command-line", "first_key") as tx:
        project = tenants.ensure_project(tx, organisation="default", project="default")
        return keys.first(tx, core.settings.pepper, project, role=role, name="first key").key


@admin.command(rich_help_panel=DIRECT)
def migrate() -> None:
    """Bring the schema up to date as MIGRATION_DATABASE_URL; grant DATABASE_URL's role its use."""
    config = Config()
    config.set_main_option("script_location", "migrations:.")
    config.set_main_option("path_separator", "os")
    alembic.upgrade(config, "head")


@admin.command("create-bucket", rich_help_panel=DIRECT)
def create_bucket() -> None:
    """Create S3_BUCKET if it is not there."""
    with _coordinator() as core:
        core.storage.prepare()


@admin.command("create-key", rich_help_panel=DIRECT)
def create_key(
    organisation: Annotated[str, typer.Option()] = "default",
    project: Annotated[
        str, typer.Option(help="'' for a key of the whole organisation.")
    ] = "default",
    role: Annotated[str, typer.Option(help="owner, operator, auditor or viewer")] = "owner",
    root: upkeep_cli.Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Print a new key, also when all others are lost; what it is for is created if needed.

    It is shown this one time.
    """
    with (
        upkeep_cli.deployment(root) as core,
        core.db.transaction("command-line", "create_key") as tx,
    ):
        place = (
            tenants.ensure_project(tx, organisation=organisation, project=project)
            if project
            else tenants.ensure_organisation(tx, organisation)
        )
        issued = keys.first(tx, core.settings.pepper, place, role=role, name="command line")
    typer.echo(issued.model_dump_json() if as_json else issued.key)


@admin.command("rotate-ledger-key", rich_help_panel=DIRECT)
def rotate_ledger_key(root: upkeep_cli.Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Write down, signed by LEDGER_KEY_PREVIOUS, that LEDGER_KEY signs from now on; print its key.

    Nothing is sealed between giving the service its new key and this; then it goes on by itself.
    """
    with upkeep_cli.deployment(root) as core:
        old = core.settings.ledger_key_previous
        if old is None:
            raise FedSelectError(
                "give the seed that signs now as LEDGER_KEY_PREVIOUS and the new one as LEDGER_KEY",
                code="settings_invalid",
            )
        with core.db.transaction("command-line", "rotate_ledger_key") as tx:
            key = ledger.rotate(
                tx,
                old=base64.b64decode(old.get_secret_value()),
                new=core.settings.ledger_seed,
                origin=core.settings.ledger_origin,
            )
    typer.echo(json.dumps({"ledger_key": key}) if as_json else key)


@admin.command("check-ledger", rich_help_panel=DIRECT)
def check_ledger(root: upkeep_cli.Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Recompute the whole ledger, compare heads and rows with it; exit code 1 if one is wrong."""
    from app import ledgercheck

    with upkeep_cli.deployment(root) as core:
        found = ledgercheck.check_ledger(core)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        out.print(
            f"{found.sealed:,} entries sealed, {found.unsealed:,} waiting, {found.checkpoints:,} "
            f"heads signed, {found.stored:,} stored: {len(found.findings)} findings"
        )
        for line in found.findings:
            out.print(f"- {line}", markup=False, highlight=False)
    if found.findings:
        raise typer.Exit(1)


@contextmanager
def _coordinator() -> Iterator[wiring.Coordinator]:
    core = wiring.build()
    try:
        yield core
    finally:
        core.close()


@contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
