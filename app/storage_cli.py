"""The commands ``fedselect storage``: what the configured object store enforces, and whose key its
objects are encrypted with.

Owns what they print. Must not contain checks (`app/probe_checks.py`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from app import encrypted, retention, settings, upkeep_cli
from app.probe import Report, probe
from app.settings import AppSettings

app = typer.Typer(no_args_is_help=True, help="The object store behind the coordinator.")
out = Console()


@app.command("probe")
def probe_store(
    root: Annotated[Path, typer.Option(help="Folder of the local stack.")] = Path(".fedselect"),
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 unless signature, method, expiry hold.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="At S3_PUBLIC_ENDPOINT, as clients reach it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Try what the store of S3_ENDPOINT, or of the local stack, enforces; it leaves nothing."""
    report = probe(_settings(root), public=public)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "summary": report.summary}))
    else:
        out.print(_table(report))
        out.print(f"{report.summary} ({report.endpoint}, {report.seconds:.1f} s)")
    if strict:
        report.insist()


@app.command("re-encrypt")
def re_encrypt(
    root: upkeep_cli.Root = upkeep_cli.DEFAULT_ROOT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Write what ENCRYPTION_KEY_PREVIOUS encrypted anew with ENCRYPTION_KEY; repeat it at will.

    The service goes on working. When it is done the previous key opens nothing in the store, and
    what it opened elsewhere, in copies and backups, goes with it if it is destroyed.
    """
    with upkeep_cli.deployment(root) as core, retention.alone(core):
        count = encrypted.re_encrypt(core.storage, core.ring)
    if as_json:
        typer.echo(json.dumps({"objects": count, "keys": core.ring.ids}))
        return
    out.print(f"{count:,} objects are written anew; all are encrypted with {core.ring.ids[0]}")


def _settings(root: Path) -> AppSettings:
    """Of this process, or of the local stack where there is one and no store is named."""
    if os.environ.get("S3_ENDPOINT") or not (root / "state.json").exists():
        return settings.read()
    from app.localstack import LocalStack  # its libraries take a second to load

    return settings.read(LocalStack(root).environment())


def _table(report: Report) -> Table:
    headers = ("tried", "the store", "so", "which means")
    table = Table(Column("check", no_wrap=True), *headers, box=None)
    for f in report.findings:
        table.add_row(f.check, f.tried, f.answer, f.verdict.value, f.meaning)
    return table
