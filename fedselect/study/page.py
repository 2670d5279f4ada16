"""A study's page: tables and plots between two marks, what a person wrote around them kept.

Owns Markdown and the choice of plots. Every figure is of ``figures`` and ``golden``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically
from fedselect.plots import Bar, intervals
from fedselect.study.cells import Result
from fedselect.study.figures import Difference, Estimate, Row, differences, ranking, rows
from fedselect.study.golden import Check, Golden, check
from fedselect.study.grid import Grid, GridSplit

MOST_BARS = 40  # of a plot
_SIGNS = {"higher": "gain", "lower": "loss"}


@dataclass(frozen=True)
class Report:
    """All figures of a study so far."""

    grid: Grid
    results: Sequence[Result]
    golden: Golden | None = None

    def sections(self, plots: str | None = None) -> str:
        """Everything as Markdown; ``plots`` is the folder, as the page sees it, of the plots."""
        found = rows(self.grid, self.results)
        if self.grid.batch_orders > 1:  # it asks what is chosen, not what that brings
            return "\n\n".join([_head(self.grid, self.results), *_masks(found, self.golden)])
        parts = [_head(self.grid, self.results)]
        shown = [
            (_listed, differences(self.grid, self.results, self.grid.named_pairs)),
            (_matrix, differences(self.grid, self.results, self.grid.drawn_pairs)),
        ]
        drawings = self.drawings() if plots else {}
        for split in self.grid.split:
            mine = [row for row in found if row.split == split.name]
            if mine:
                parts += [_split_head(split, mine), _table(self.grid, mine)]
                for table, compared in shown:
                    between = [each for each in compared if each.split == split.name]
                    parts += [table(between)] if between else []
                drawn = f"{split.name}.svg" in drawings
                parts += [f"![differences on {split.name}]({plots}/{split.name}.svg)"] * drawn
        parts += list(_ranking(self.grid, self.results))
        parts += list(_masks(found, self.golden))
        if self.golden is not None:
            parts += list(_golden(self.golden, self.results, found))
        return "\n\n".join(parts)

    def drawings(self) -> dict[str, str]:
        """Plots by file name: each split's differences in the better reading, unless too many."""
        compared = differences(self.grid, self.results)
        found = {}
        for split in self.grid.split:
            bars = [
                Bar(f"{d.policy} − {d.against}", d.mean.mean, _ends(d.mean), _sign(d.mean))
                for d in compared
                if d.split == split.name and d.reading == "better" and d.mean.count > 1
            ]
            if 0 < len(bars) <= MOST_BARS:
                title = f"{split.name}: mean over clients, difference with 95 % interval"
                found[f"{split.name}.svg"] = intervals(title, bars, unit="points")
        return found


def write_page(report: Report, page: Path) -> None:
    """Put the results between the page's marks for them, and the plots into a folder beside it.

    The marks are named by the grid's ``section``, so that a page may show several studies. Plots
    that the page showed there and shows no longer are deleted.

    Raises:
        FedSelectError: ``study_invalid``, the page has no such marks.
    """
    section = report.grid.section
    first, last = marks(section)
    text = page.read_text() if page.exists() else f"# {report.grid.title}\n\n{first}\n{last}\n"
    head, begin, rest = text.partition(first)
    old, end, tail = rest.partition(last)
    if not begin or not end:
        raise FedSelectError(f"{page} has lost its marks, {first} and {last}", code="study_invalid")
    folder = "study/plots" if section == "results" else f"study/plots/{section}"
    plots = page.parent / folder
    plots.mkdir(parents=True, exist_ok=True)
    drawings = report.drawings()
    # Other pages may keep theirs in the same folder: what this one did not show is not its own.
    shown = set(re.findall(rf"\]\({re.escape(folder)}/([^()/]+\.svg)\)", old))
    for name in shown - drawings.keys():
        (plots / name).unlink(missing_ok=True)
    for name, svg in drawings.items():
        (plots / name).write_text(svg)
    write_atomically(page, f"{head}{first}\n\n{report.sections(folder)}\n\n{last}{tail}".encode())


def marks(section: str) -> tuple[str, str]:
    """What stands before and after the results of a study on a page."""
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


# --- splits ------------------------------------------------------------------------------------


def _head(grid: Grid, results: Sequence[Result]) -> str:
    seeds = sorted({each.seed for each in results})
    every = sum(1 for _ in grid.cells())
    missing = f" (not run: {every - len(results)})" if len(results) < every else ""
    training = grid.training
    numbers = ", ".join(map(str, seeds)) or "none"
    return (
        f"{len(results)} of {every} cells have run{missing}, seeds {numbers}. Plain SGD, "
        f"{training.steps} steps a round, batches of {training.batch_size}, learning rate "
        f"{training.learning_rate:g}, all clients in every round. Accuracies are means over the "
        f"last {grid.readings} rounds, in percent; ± are 95 % t-intervals of the mean over seeds, "
        "not corrected for the number of comparisons."
    )


def _split_head(split: GridSplit, mine: Sequence[Row]) -> str:
    steps = {row.steps for row in mine}
    text = (
        f"### {split.name}\n\n{split.rounds} rounds; every client took exactly "
        f"{', '.join(map(str, sorted(steps)))} gradient steps under every policy (counted)."
    )
    rule = split.pretrained
    if rule is None:
        return text
    return (
        f"{text} All policies started from one model that had been trained for {rule.steps} steps, "
        f"not counted here, on the training data of {rule.clients} clients put together; these are "
        "drawn by the seed and take no part."
    )


def _table(grid: Grid, mine: Sequence[Row]) -> str:
    names = (
        *("policy", "seeds", "pre", "post", "better of both", "worst client"),
        *("worse than alone / FedAvg+FT", "harmed against alone / FedAvg+FT", "bytes sent"),
    )
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    titles = {policy.name: policy.title.replace("|", "\\|") for policy in grid.policy}
    return "\n".join([head, *(_line(row, titles[row.policy]) for row in mine)])


def _line(row: Row, title: str) -> str:
    name = f"`{row.policy}`" + (f" {title}" if title else "")
    cells = [
        name,
        str(row.accuracy.count),
        f"{row.pre:.1f}",
        f"{row.post:.1f}",
        f"{_plain(row.accuracy)} ({row.better})",
        _plain(row.worst),
        " / ".join(_share(row.worse.get(base)) for base in ("local", "fedavg")),
        " / ".join(_share(row.harmed.get(base)) for base in ("local", "fedavg")),
        f"{row.sent:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _matrix(found: Sequence[Difference]) -> str:
    """A line for each policy, a column for each that it is compared with."""
    columns = list(dict.fromkeys((each.against, each.reading) for each in found))
    lines: dict[str, dict[tuple[str, str], Difference]] = {}
    for each in found:
        lines.setdefault(each.policy, {})[each.against, each.reading] = each
    heads = " | ".join(f"− `{against}`, {reading}" for against, reading in columns)
    head = (
        "Differences in points: mean over clients; worst client. Bold: its interval does not "
        "contain 0; all others are not distinguishable, or of one seed.\n\n"
        f"| policy | {heads} |\n|{'---|' * (len(columns) + 1)}"
    )
    rows_ = [
        f"| `{name}` | {' | '.join(_both(mine.get(column)) for column in columns)} |"
        for name, mine in lines.items()
    ]
    return "\n".join([head, *rows_])


def _both(each: Difference | None) -> str:
    if each is None:
        return "–"
    return "; ".join(
        f"**{_signed(value)}**" if value.verdict in _SIGNS else _signed(value)
        for value in (each.mean, each.worst)
    )


def _listed(found: Sequence[Difference]) -> str:
    head = (
        "| difference in points | reading | mean | | worst client | | seeds won |\n"
        "|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *map(_difference, found)])


def _difference(each: Difference) -> str:
    cells = [
        f"`{each.policy}` − `{each.against}`",
        each.reading,
        _signed(each.mean),
        _said(each.mean),
        _signed(each.worst),
        _said(each.worst),
        f"{each.won} of {each.mean.count}",
    ]
    return f"| {' | '.join(cells)} |"


def _ranking(grid: Grid, results: Sequence[Result]) -> Iterator[str]:
    found = ranking(grid, results)
    if not found:
        return
    yield (
        f"### Ranked by the mean over {', '.join(grid.ranking)}\n\nEach policy in its better "
        "reading on each split; seeds that have run on all of them."
    )
    head = "| policy | mean | worst client | seeds |\n|---|---|---|---|"
    lines = [
        f"| `{r.policy}` | {_plain(r.mean)} | {_plain(r.worst)} | {r.mean.count} |" for r in found
    ]
    yield "\n".join([head, *lines])


# --- masks and golden figures ---------------------------------------------------------------------


def _masks(found: Sequence[Row], golden: Golden | None = None) -> Iterator[str]:
    shown = [row for row in found if row.kept is not None or row.again is not None]
    if not shown:
        return
    yield (
        "### Masks\n\nMean Jaccard indices of masks: of a client's in two successive rounds; of a "
        "client's under two orders of batches, with the same data and weights; of two clients. By "
        "chance two masks with a share f of all elements have f / (2 − f)."
    )
    head = (
        "| split | policy | successive rounds | two orders | golden | two clients | gated |\n"
        "|---|---|---|---|---|---|---|"
    )
    stable = {} if golden is None else {(g.split, g.policy): g.jaccard for g in golden.stability}
    lines = [
        f"| {row.split} | `{row.policy}` | {_index(row.kept)} | {_index(row.again)} | "
        f"{_index(None if row.again is None else stable.get((row.split, row.policy)))} | "
        f"{_index(row.others)} | "
        f"{_share(row.gated)} |"
        for row in shown
    ]
    yield "\n".join([head, *lines])


def _golden(golden: Golden, results: Sequence[Result], found: Sequence[Row]) -> Iterator[str]:
    checks = check(golden, results)
    inside = sum(each.inside for each in checks)
    yield (
        f"### Held to the golden figures\n\n{golden.source}. Of {len(checks)} figures {inside} "
        f"come out inside their 95 % prediction interval, {len(checks) - inside} outside; by "
        f"chance {0.05 * len(checks):.0f} would be outside even if nothing differed."
    )
    outside = [each for each in checks if not each.inside]
    if outside:
        yield check_table(outside)
    below = {(each.split, each.policy): each for each in golden.below}
    lines = [
        f"| {row.split} | `{row.policy}` | {g.local:.2f} / {g.fedavg:.2f} | "
        f"{_share(row.worse.get('local'))} / {_share(row.worse.get('fedavg'))} |"
        for row in found
        if (g := below.get((row.split, row.policy))) is not None
    ]
    if lines:
        head = "| split | policy | worse, golden | worse, here |\n|---|---|---|---|"
        yield "\n".join([head, *lines])


def check_table(checks: Sequence[Check]) -> str:
    """Golden figures beside ours, a line each."""
    head = "| split | figure | golden | here | allowed | seeds | |\n|---|---|---|---|---|---|---|"
    lines = [
        f"| {c.split} | {c.what} | {c.golden:.1f} | {c.found:.1f} | ± {c.half:.1f} | {c.seeds} | "
        f"{'inside' if c.inside else '**outside**'} |"
        for c in checks
    ]
    return "\n".join([head, *lines])


# --- numbers -------------------------------------------------------------------------------------


def _plain(value: Estimate) -> str:
    return f"{value.mean:.1f}" if value.count < 2 else f"{value.mean:.1f} ± {value.half:.1f}"


def _signed(value: Estimate) -> str:
    return f"{value.mean:+.1f}" if value.count < 2 else f"{value.mean:+.1f} ± {value.half:.1f}"


def _said(value: Estimate) -> str:
    return f"**{value.verdict}**" if value.verdict in _SIGNS else value.verdict


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _index(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ends(value: Estimate) -> tuple[float, float]:
    half = 0.0 if math.isnan(value.half) else value.half
    return value.mean - half, value.mean + half


def _sign(value: Estimate) -> str:
    return _SIGNS.get(value.verdict, "undecided")
