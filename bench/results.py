"""Where results are kept: a line of docs/bench-results.jsonl for each, and the page made of them.

Owns the file, the description of the machine, and when the page is written. Must not measure.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench.harness import Json
from bench.report import draw, render

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "bench-results.jsonl"
PAGE = ROOT / "docs" / "PERFORMANCE.md"
NAMED = ("numpy", "torch", "numba")  # versions worth noting beside Python's


def machine() -> Json:
    """Where, when and with what this is measured; asked before anything runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    revision = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False)
    versions = [f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in NAMED)]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip() or "unknown",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": ", ".join(versions),
    }


def append(lines: Sequence[Json], file: Path) -> None:
    """Add results to a file of lines."""
    with file.open("a") as opened:
        opened.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)


def record(lines: Sequence[Json]) -> None:
    """Keep results for good, and write docs/PERFORMANCE.md and its plots from the newest."""
    append(lines, RESULTS)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    PAGE.write_text(render(PAGE.read_text(), known))
    draw(known, PAGE.parent / "plots")
