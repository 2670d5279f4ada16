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

    from fedselect.errors import FedSelectError
    from fedselect.study.golden import Check
    from fedselect.study.grid import Cell, Grid
    from fedselect.study.page import Report


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("study")(study)


def study(
    grid: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A grid (TOML).")],
    results: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of results; what is in it is not rerun.")
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this split or policy; repeat.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no further cell after so long; 0: none.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write tables and plots into this page.")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option(exists=True, help="Hold the results to these figures.")
    ] = None,
) -> None:
    """Compare policies over splits and seeds, at equal gradient steps; go on where it stopped."""
    from fedselect.study.golden import read_golden
    from fedselect.study.grid import read_grid
    from fedselect.study.page import Report
    from fedselect.study.runner import run_grid

    console = Console(stderr=True)
    plan = read_grid(grid)
    _warn(console, plan, only or [])
    figures = None if golden is None else read_golden(golden)
    outcome = run_grid(plan, results, wanted=_wanted(only, minutes), told=_told(console))
    _show(Report(plan, outcome.results, figures), page)
    if outcome.failures:
        _print_failures(console, outcome.failures)
        raise typer.Exit(1)


def _show(report: Report, page: Path | None) -> None:
    from fedselect.study.golden import check
    from fedselect.study.page import write_page

    if page is None:
        typer.echo(report.sections())
    else:
        write_page(report, page)
        typer.echo(f"{len(report.results)} results are in {page}")
    if report.golden is not None and report.grid.batch_orders == 1:
        _print_checks(check(report.golden, report.results))


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


def _print_failures(console: Console, failures: list[tuple[Cell, FedSelectError]]) -> None:
    """What did not run and why, at the end, where it is seen; many for one reason in one line."""
    by_reason: dict[str, list[Cell]] = {}
    for cell, error in failures:
        by_reason.setdefault(f"error[{error.code}]: {error}", []).append(cell)
    for reason, cells in by_reason.items():
        more = f", and {len(cells) - 1} more" if len(cells) > 1 else ""
        said = f"not run: {cells[0]}{more}: {reason}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _print_checks(checks: list[Check]) -> None:
    for each in checks:
        place = "inside" if each.inside else "OUTSIDE"
        typer.echo(
            f"{place:8}{each.split}: {each.what}: {each.found:.1f}, golden {each.golden:.1f} "
            f"± {each.half:.1f} for {each.seeds} seeds"
        )
    inside = sum(each.inside for each in checks)
    typer.echo(f"{inside} of {len(checks)} golden figures come out inside their intervals")
