"""The command ``jobs watch``: is due work left untouched?

Owns what it prints. It runs beside a worker and looks at the database itself; the other ``jobs``
commands ask the API (``fedselect.admin``). Must not contain rules.
"""

from __future__ import annotations

from typing import Annotated

import typer

from app import jobs, wiring


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
