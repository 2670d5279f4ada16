"""`python -m bench`: run the benchmarks, note the results, write docs/PERFORMANCE.md and its plots.

Every benchmark runs in a process and a folder of its own under ``.bench/`` and is ended at its time
limit with whatever it started. A full run appends to docs/bench-results.jsonl and writes the page;
a quick one only prints, unless a file for its results is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from app.localprocess import end, search
from app.localstack import LocalStack
from bench.harness import REGISTER, Bench, Json, Outcome, Room, all_benches
from bench.report import section
from bench.results import ROOT, append, machine, record

WORK = ROOT / ".bench"
MARK = "FEDSELECT_BENCH_ROOM"  # set for a benchmark and, through it, for all that it starts


def main() -> int:
    # Whoever is told to stop (a CI time-out) must end what it started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = _options()
    if options.alone:
        importlib.import_module(options.module)
        return _alone(REGISTER[options.alone], json.loads(options.size))
    benches = all_benches()
    if options.list:
        print("\n".join(benches))
        return 0
    wanted = [benches[name] for name in options.only or benches]
    place, lines = machine(), []
    for each in wanted:
        size = each.size(options.form)
        if size is None:
            print(f"{each.name} has no {options.form} form", end="\n\n")
            continue
        lines.append(place | _run(each, options.form, size | json.loads(options.size)))
    _note(lines, options)
    return int(any(line["error"] for line in lines))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", dest="form", action="store_const", const="quick", default="full")
    parser.add_argument("--size", default="{}", help="JSON: numbers of the size to change")
    parser.add_argument("--only", action="append", metavar="NAME", help="may be repeated")
    parser.add_argument("--results", type=Path, help="append to this file, leave the docs alone")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # in this very process
    parser.add_argument("--module", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one benchmark in a process of its own -------------------------------------------------------


def _run(each: Bench, form: str, size: Json) -> Json:
    folder = WORK / each.name
    _end_all(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bench", "--alone", each.name, "--module", each.module]
    started, load = time.monotonic(), os.getloadavg()[0]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--size", json.dumps(size)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: str(folder)},
            start_new_session=True,
        )
        try:
            child.wait(each.limit(form))
        except subprocess.TimeoutExpired:
            print(f"{each.name}: ended after {each.limit(form):.0f} s")
        finally:
            child.kill()
            child.wait()
            _end_all(folder)
    found = _outcome(folder, child.returncode)
    line = {"bench": each.name, "form": form, "size": size, "load": round(load, 1)} | found
    line["seconds"] = round(time.monotonic() - started, 1)
    print(section(line), end="\n\n", flush=True)
    if not line["error"]:
        shutil.rmtree(folder, ignore_errors=True)
    return line


def _alone(each: Bench, size: Json) -> int:
    folder = WORK / each.name
    room = Room(folder)
    error = ""
    with room.cleanup:
        try:
            outcome = each.run(room, **size)
        except Exception as problem:
            traceback.print_exc()
            outcome, error = Outcome([]), f"{type(problem).__name__}: {problem}"[:300]
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome) | {"error": error}))
    return 0


def _outcome(folder: Path, status: int) -> Json:
    try:
        return dict(json.loads((folder / "outcome.json").read_text()))
    except FileNotFoundError:
        error = f"did not end by itself (status {status}); see {folder.name}/log"
        return asdict(Outcome([])) | {"error": error}


def _end_all(folder: Path) -> None:
    """End what a benchmark started: its processes inherit our mark, its stacks note their own."""
    for process in search(lambda each: bool(each.environ().get(MARK) == str(folder))):
        end(process)
    for state in folder.rglob("state.json"):
        LocalStack(state.parent, given={}).down()


# --- results -------------------------------------------------------------------------------------


def _note(lines: list[Json], options: argparse.Namespace) -> None:
    if options.results is not None:
        append(lines, options.results)
    elif options.form != "quick":
        record(lines)


if __name__ == "__main__":
    sys.exit(main())
