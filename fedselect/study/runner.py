"""Running what a study has not run yet: a line of JSON for each cell, written when it is done.

Owns the folder of results. A cell whose key is in it is not run again; a line that a kill has cut
is cleared away. Several processes may work on one folder: each takes what no other is at. Must not
know what a cell is made of (``cells``) or what follows from it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedselect.errors import FedSelectError
from fedselect.study.cells import Result, run_cell
from fedselect.study.grid import Cell, Grid

Engine = Callable[[Cell], Result]
Told = Callable[[Cell, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """The results of a grid so far, and the cells that failed, each with the reason."""

    results: list[Result]
    failures: list[tuple[Cell, FedSelectError]]


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, a file for each split; none if there is no folder yet.

    Raises:
        FedSelectError: ``study_invalid``, a whole line that is no result.
    """
    return [each for path in sorted(folder.glob("*.jsonl")) for each in _results(path)]


def _results(path: Path) -> Iterator[Result]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut off
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                yield Result.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "line"
            raise FedSelectError(
                f"{path}, line {number}, is no result: {place}: {first['msg']}",
                code="study_invalid",
            ) from error


def results_of(grid: Grid, found: Iterable[Result]) -> list[Result]:
    """The results of a grid's cells among others, the last one of each, in the grid's order.

    A line is found by its key and shown under the grid's names: a split that was named otherwise
    then, or has two names now, is the same cell.
    """
    last = {each.key: each for each in found}
    return [_named(last[cell.key], cell) for cell in grid.cells() if cell.key in last]


def _named(result: Result, cell: Cell) -> Result:
    names = {"split": cell.split.name, "policy": cell.policy.name, "seed": cell.seed}
    return result.model_copy(update=names)


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    engine: Engine = run_cell,
    wanted: Callable[[Cell], bool] = lambda _: True,
    told: Told | None = None,
) -> Outcome:
    """Run every ``wanted`` cell that is not done, those after one that fails, too.

    ``wanted`` is asked beforehand, and again right before a cell would run; then
    ``told(cell, number, of)`` is called. Of a failure nothing is kept: it is tried again next time.

    Raises:
        FedSelectError: ``study_invalid``, the folder holds a line that is no result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {each.key for each in read_results(folder)}
    missing: dict[str, Cell] = {}
    for cell in grid.cells():
        if cell.key not in done and wanted(cell):
            missing.setdefault(cell.key, cell)
    failures = []
    for number, cell in enumerate(missing.values(), start=1):
        path = folder / f"{cell.split.name}.jsonl"
        with _claimed(folder, cell) as mine:
            if not mine or not wanted(cell) or _holds(folder, cell):
                continue
            if told is not None:
                told(cell, number, len(missing))
            try:
                _append(path, engine(cell))
            except FedSelectError as error:
                failures.append((cell, error))
    return Outcome(results_of(grid, read_results(folder)), failures)


@contextmanager
def _claimed(folder: Path, cell: Cell) -> Iterator[bool]:
    """Whether the cell is this process's to run, as no other is at it."""
    path = folder / f".{cell.key}.lock"
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that
        except BlockingIOError:
            yield False
            return
        if not _still(path, file.fileno()):
            yield False  # whoever was at it has ended in between
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _still(path: Path, opened: int) -> bool:
    """Whether the file that was opened is the one of this name."""
    try:
        return path.stat().st_ino == os.fstat(opened).st_ino
    except FileNotFoundError:
        return False


def _holds(folder: Path, cell: Cell) -> bool:
    """Whether another process has brought the cell's line since, under whatever name."""
    key = f'"key":"{cell.key}"'.encode()
    files = (path.read_bytes() for path in folder.glob("*.jsonl"))
    return any(key in line for data in files for line in data.split(b"\n")[:-1])


def _append(path: Path, result: Result) -> None:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # nobody's line is taken for one that was cut off
        _clear_cut_line(path)
        file.write(result.model_dump_json(exclude_none=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _clear_cut_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
