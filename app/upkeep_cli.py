"""Commands that keep a deployment in order: gc, backup, restore, and the erasure of a client.

Owns what they print and where they find the deployment: in the environment, else in the folder of
the local stack. Must not contain rules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table

from app import backup, erasure, objects, retention, settings, verification, wiring
from app.tables import Client
from fedselect.errors import FedSelectError
from fedselect.noise import run_secret
from fedselect.retention import Collection

out = Console()
Root = Annotated[Path, typer.Option(help="Folder of the local stack, unless DATABASE_URL is set.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)]
DEFAULT_ROOT = Path(".fedselect")
ACTOR = "command-line"


def register(app: typer.Typer, admin: typer.Typer) -> None:
    """Add these commands."""
    app.command()(gc)
    app.command("backup")(back_up)
    app.command()(restore)
    panel = "On the deployment itself, without a key (break-glass)"
    admin.command("erase-client", rich_help_panel=panel)(erase_client)
    admin.command("noise-secret", rich_help_panel=panel)(noise_secret)


def noise_secret(
    run: Annotated[UUID, typer.Argument(help="Of a run with privacy.dp.")],
    root: Root = DEFAULT_ROOT,
) -> None:
    """Print a run's noise secret in hex, for an auditor who recomputes its versions.

    With it, anyone can take the noise off what was published: it is for those who may see the
    updates anyway.
    """
    with deployment(root) as core:
        master = core.settings.noise_seed
        if master is None:
            raise FedSelectError("NOISE_KEY is not set", code="noise_key_missing")
        typer.echo(run_secret(master, str(run)).hex())


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only compare store and rows; exit code 1 if not equal.")
    ] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Delete what the retention rules let go (docs/OPERATIONS.md)."""
    with deployment(root) as core:
        if check:
            _check(core, as_json)
            return
        found = (
            retention.rehearse(core, strays=True)
            if dry_run
            else retention.collect(core, strays=True)
        )
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        _show(found)


def _show(found: Collection) -> None:
    if not found.kinds:
        out.print("nothing is old enough to go")
        return
    table = Table("would go" if found.dry_run else "deleted", "count", "bytes", "oldest", box=None)
    for kind in found.kinds:
        size = f"{kind.bytes:,}" if kind.bytes else "–"
        table.add_row(kind.kind, f"{kind.count:,}", size, f"{kind.oldest:%Y-%m-%d %H:%M} UTC")
    out.print(table)


def _check(core: wiring.Coordinator, as_json: bool) -> None:
    found = objects.check_objects(core)
    if as_json:
        out.print_json(data=asdict(found))
    else:
        out.print(
            f"{found.objects:,} objects: {len(found.strays):,} that no row expects, "
            f"{len(found.missing):,} missing, {found.unfinished:,} deletions under way"
        )
        lines = [*found.strays, *(f"{key}: {why}" for key, why in found.missing)]
        for line in lines:
            out.print(f"- {line}", markup=False, highlight=False)
    if not found.ok:
        raise typer.Exit(1)


def back_up(folder: Folder, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Write database and bucket into an empty folder, while the service works."""
    with deployment(root) as core:
        found = backup.back_up(core, folder)
    if as_json:
        facts = {"files": len(found.files), "bytes": found.size, "schema": found.schema}
        typer.echo(json.dumps({**facts, "folder": str(folder)}))
        return
    out.print(f"{len(found.files):,} files, {found.size:,} bytes, schema {found.schema}: {folder}")
    keys = "KEY_PEPPER, LEDGER_KEY, NOISE_KEY and ENCRYPTION_KEY"
    out.print(f"Keep the settings ({keys}) elsewhere: they are not in it.")


def restore(
    folder: Folder,
    force: Annotated[
        bool, typer.Option("--force", help="Delete what the target holds already.")
    ] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Put a backup into an empty database and bucket, and verify everything in them."""
    with deployment(root, start=True) as core:
        backup.restore(core, folder, force=force)
        found = verification.verify(core)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        _show_verified(found)
    if found.findings:
        raise typer.Exit(1)


def _show_verified(found: verification.Verification) -> None:
    out.print(
        f"{found.versions:,} versions, {found.masks:,} masks, {found.updates:,} updates, "
        f"{found.manifests:,} manifests, {found.entries:,} ledger entries compared: "
        f"{len(found.findings)} findings"
    )
    for line in found.findings:
        out.print(f"- {line}", markup=False, highlight=False)


def erase_client(
    client: Annotated[UUID, typer.Argument(help="The client's id.")],
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Revoke a client and delete its files, masks and evaluations; for good."""
    with deployment(root) as core:
        with core.db.transaction(ACTOR, "upkeep.erase_client") as tx:
            row = tx.session.get(Client, client)
        if row is None:
            raise FedSelectError(f"there is no client {client}", code="not_found")
        found = erasure.erase(core, client, project=row.project_id, actor=ACTOR)
    if as_json:
        typer.echo(found.model_dump_json())
        return
    out.print(
        f"{found.pseudonym}: {found.updates} updates, {found.masks} masks and {found.evaluations} "
        f"evaluations are gone, {found.waiting} files wait\n"
        f"its contribution remains in {len(found.versions)} versions"
    )
    for version in found.versions:
        out.print(f"- number {version.number} of run {version.run_id}: {version.id}")
    for line in found.stays:
        out.print(f"- {line}", markup=False, highlight=False)


@contextmanager
def deployment(root: Path, *, start: bool = False) -> Iterator[wiring.Coordinator]:
    """The deployment that the environment names, else the local stack in this folder."""
    variables = {} if os.environ.get("DATABASE_URL") else _local(root, start=start)
    core = wiring.build(settings.read(variables))
    try:
        yield core
    finally:
        core.close()


def _local(root: Path, *, start: bool) -> dict[str, str]:
    from app.localstack import LocalStack, StackError

    stack = LocalStack(root)
    if start:
        stack.up(product=False)
    try:
        return stack.environment()
    except StackError as error:
        raise StackError(f"{error}, and DATABASE_URL names no other deployment") from error
