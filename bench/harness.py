"""What all benchmarks share: interleaved timing, figures with their targets, the table in the docs.

A figure is never a bare time: the machine is shared, so a subject and its references take turns in
one process, and what counts is the ratio of their medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Figure:
    """One comparison: medians in ms, their ratio, and the ratio wanted (None: for information)."""

    what: str
    against: str
    subject: float
    reference: float
    wanted: float | None = None

    @property
    def ratio(self) -> float:
        return self.subject / self.reference

    @property
    def verdict(self) -> str:
        if self.wanted is None:
            return "–"
        return "met" if self.ratio <= self.wanted else "missed"


def medians(subjects: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median time of each subject in ms; they take turns, and the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(repeats + 1):
        for name, run in subjects.items():
            begin = time.perf_counter()
            run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def machine() -> dict[str, str]:
    """Where and when this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip() or "unknown",
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
    }


def table(figures: list[Figure]) -> str:
    """The figures as Markdown."""
    lines = [
        "| what | ms | against | ms | ratio | wanted | |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        wanted = "–" if f.wanted is None else f"≤ {f.wanted:g}"
        cells = (f.what, f"{f.subject:.1f}", f.against, f"{f.reference:.1f}", f"{f.ratio:.3g}")
        lines.append(f"| {' | '.join(cells)} | {wanted} | {f.verdict} |")
    return "\n".join(lines)


def publish(figures: list[Figure], *, results: Path | None) -> None:
    """Write the table into docs/PERFORMANCE.md, and the raw figures to a file if one is named."""
    where = machine()
    said = ", ".join(f"{name} {value}" for name, value in where.items())
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    DOCUMENT.write_text(f"{head}{BEGIN}\n\n{said}\n\n{table(figures)}\n\n{END}{tail}")
    if results is not None:
        rows = [{**where, **asdict(f), "ratio": f.ratio, "verdict": f.verdict} for f in figures]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
