"""Running what a study has not run yet: a line of JSON for each cell, written when it is done.

Owns the folder of results. A cell whose key is in it is not run again; a line that a kill has cut
is cleared away. Must not know what a cell is made of (``cells``) or what follows from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from fedselect.errors import FedSelectError
from fedselect.study.cells import Result, run_cell
from fedselect.study.grid import Cell, Grid

Engine = Callable[[Cell], Result]
Told = Callable[[Cell, int, int], None]


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, a file for each split; none if there is no folder yet.

    Raises:
        FedSelectError: ``study_invalid``, a whole line that is no result.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut off
        try:
            found += [Result.model_validate_json(line) for line in lines if line]
        except ValidationError as error:
            raise FedSelectError(
                f"{path} holds a line that is no result: {error}", code="study_invalid"
            ) from error
    return found


def results_of(grid: Grid, found: Iterable[Result]) -> list[Result]:
    """The results of a grid's cells among others, the last one of each, in the grid's order."""
    last = {each.key: each for each in found}
    keys = dict.fromkeys(cell.key for cell in grid.cells())
    return [last[key] for key in keys if key in last]


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    engine: Engine = run_cell,
    wanted: Callable[[Cell], bool] = lambda _: True,
    told: Told | None = None,
) -> list[Result]:
    """Run every ``wanted`` cell that is not done, and give the results of the grid so far.

    ``wanted`` is asked right before a cell would run; ``told(cell, number, of)`` is called then.

    Raises:
        FedSelectError: as :func:`~fedselect.study.cells.run_cell`; what was done stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.jsonl"):
        _clear_cut_line(path)
    done = {each.key for each in read_results(folder)}
    missing = {cell.key: cell for cell in grid.cells() if cell.key not in done}
    for number, cell in enumerate(missing.values(), start=1):
        if not wanted(cell):
            continue
        if told is not None:
            told(cell, number, len(missing))
        _append(folder / f"{cell.split.name}.jsonl", engine(cell))
    return results_of(grid, read_results(folder))


def _append(path: Path, result: Result) -> None:
    with path.open("ab") as file:
        file.write(result.model_dump_json(exclude_none=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _clear_cut_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
