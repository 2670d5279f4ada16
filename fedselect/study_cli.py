"""The command ``study``: run what a grid has not run yet, and write what follows from it.

Owns its options, progress and printing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedselect.study.golden import Check
    from fedselect.study.grid import Cell, Grid


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("study")(study)


def study(
    grid: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A grid (TOML).")],
    results: Annotated[Path, typer.Option(help="Folder of results; what is in it is not rerun.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this split or policy; repeat.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no further cell after so long; 0: none.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write tables and plots into this page.")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option(exists=True, help="Hold the results to these figures.")
    ] = None,
) -> None:
    """Compare policies over splits and seeds, at equal gradient steps; go on where it stopped."""
    from fedselect.study.golden import check, read_golden
    from fedselect.study.grid import read_grid
    from fedselect.study.page import Report, write_page
    from fedselect.study.runner import run_grid

    console = Console(stderr=True)
    plan = read_grid(grid)
    _warn(console, plan, only or [])
    figures = None if golden is None else read_golden(golden)
    found = run_grid(plan, results, wanted=_wanted(only, minutes), told=_told(console))
    report = Report(plan, found, figures)
    if page is None:
        typer.echo(report.sections())
    else:
        write_page(report, page)
        typer.echo(f"{len(found)} results are in {page}")
    if figures is not None and plan.batch_orders == 1:
        _print_checks(check(figures, found))


def _wanted(only: list[str] | None, minutes: float | None) -> Callable[[Cell], bool]:
    started = time.monotonic()

    def wanted(cell: Cell) -> bool:
        late = minutes is not None and time.monotonic() - started >= 60 * minutes
        return not late and (not only or bool({cell.split.name, cell.policy.name} & set(only)))

    return wanted


def _warn(console: Console, plan: Grid, only: list[str]) -> None:
    """Say which names are none of the grid's, so that nobody waits for what will not run."""
    known = [split.name for split in plan.split] + [policy.name for policy in plan.policy]
    unknown = [name for name in only if name not in known]
    if unknown:
        said = f"{plan.title} has no split or policy {', '.join(unknown)}; it has"
        console.print(f"{said} {', '.join(known)}", highlight=False, soft_wrap=True)


def _told(console: Console) -> Callable[[Cell, int, int], None]:
    def told(cell: Cell, number: int, of: int) -> None:
        console.print(f"{number} of {of}: {cell}", highlight=False)

    return told


def _print_checks(checks: list[Check]) -> None:
    for each in checks:
        place = "inside" if each.inside else "OUTSIDE"
        typer.echo(
            f"{place:8}{each.split}: {each.what}: {each.found:.1f}, golden {each.golden:.1f} "
            f"± {each.half:.1f} for {each.seeds} seeds"
        )
    inside = sum(each.inside for each in checks)
    typer.echo(f"{inside} of {len(checks)} golden figures come out inside their intervals")
