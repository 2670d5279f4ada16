"""``python -m tests.soak``: run the proofs, note the results, write the table.

Every proof runs in a process and a folder of its own under ``.soak/``, is ended at its time limit,
and whatever it started is ended after it. Results are appended to a file, one JSON object a line;
``docs/RELIABILITY.md`` shows the newest full one of every proof, or the newest quick one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from app.localprocess import end, search
from app.localstack import LocalStack

from .proofs import FORMS, Figures, Json, Proof, Room, all_proofs
from .report import render

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".soak"
RESULTS = ROOT / "docs" / "soak-results.jsonl"
PAGE = ROOT / "docs" / "RELIABILITY.md"
FAILED = 1
MARK = "FEDSELECT_SOAK_ROOM"  # set for a proof and, through it, for all that it starts


def main() -> int:
    options = _options()
    # Whoever is told to stop (a CI time-out) must end what it started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    proofs = {each.name: each for each in all_proofs()}
    if options.alone:
        return _alone(proofs[options.alone], options.form, options.seed)
    if options.list:
        return _say("\n".join(f"{p.name:24} {p.promise}" for p in proofs.values()))
    wanted = options.only or list(proofs)
    _commit()
    met = _run_all([proofs[name] for name in wanted], options)
    if options.results == RESULTS:
        PAGE.write_text(render(PAGE.read_text(), list(proofs.values()), _results(RESULTS)))
    return 0 if all(met) else FAILED


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--quick", dest="form", action="store_const", const="quick", default="full")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", metavar="NAME", help="may be repeated")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, appended")
    parser.add_argument("--at-once", type=int, help="side by side; default: 2 quick ones")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)  # this very process
    return parser.parse_args()


def _run_all(wanted: list[Proof], options: argparse.Namespace) -> list[bool]:
    """Quick forms wait most of the time, so two go side by side; full ones measure undisturbed."""
    at_once = options.at_once or (2 if options.form == "quick" else 1)
    with ThreadPoolExecutor(at_once) as pool:
        try:
            return list(
                pool.map(lambda p: _run(p, options.form, options.seed, options.results), wanted)
            )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for proof in wanted:
                _end_all(_folder(proof))
            raise


# --- one proof in a process of its own -----------------------------------------------------------


def _run(proof: Proof, form: str, seed: int, results: Path) -> bool:
    folder = _folder(proof)
    _clear(folder)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", __package__, "--alone", proof.name]
    started = time.monotonic()
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--form", form, "--seed", str(seed)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: str(folder)},
            start_new_session=True,
        )
        try:
            child.wait(proof.limit(form))
        except subprocess.TimeoutExpired:
            _say(f"{proof.name}: ended after {proof.limit(form):.0f} s")
        finally:
            child.kill()
            child.wait()
            _end_all(folder)
    figures = _figures(folder, child.returncode)
    line = _line(proof, form, seed, time.monotonic() - started) | asdict(figures)
    with results.open("a") as file:
        file.write(f"{json.dumps(line, ensure_ascii=False)}\n")
    word = "met" if figures.met else "MISSED"
    _say(f"{proof.name:24} {word:7} {line['seconds']:6.0f} s  {figures.measured}")
    if figures.met:
        shutil.rmtree(folder, ignore_errors=True)
    return figures.met


def _alone(proof: Proof, form: str, seed: int) -> int:
    folder = _folder(proof)
    room = Room(folder, seed)
    with room.cleanup:
        try:
            figures = proof.run(room, **proof.size(form))
        except Exception as error:
            traceback.print_exc()
            figures = Figures(False, f"{type(error).__name__}: {error}"[:300])
    (folder / "figures.json").write_text(json.dumps(asdict(figures)))
    return 0


def _figures(folder: Path, status: int) -> Figures:
    try:
        return Figures(**json.loads((folder / "figures.json").read_text()))
    except FileNotFoundError:
        return Figures(False, f"did not end by itself (status {status}); see {folder.name}/log")


def _folder(proof: Proof) -> Path:
    return WORK / proof.name


def _end_all(folder: Path) -> None:
    """End what a proof started: its processes inherit our mark, its stacks note their servers."""
    for process in search(lambda each: bool(each.environ().get(MARK) == str(folder))):
        end(process)
    for state in folder.rglob("state.json"):
        LocalStack(state.parent, given={}).down()


def _clear(folder: Path) -> None:
    _end_all(folder)
    shutil.rmtree(folder, ignore_errors=True)


# --- results -------------------------------------------------------------------------------------


@cache  # as it was at the start: our own results make the tree dirty
def _commit() -> str:
    revision = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _line(proof: Proof, form: str, seed: int, seconds: float) -> Json:
    return {
        "proof": proof.name,
        "form": form,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "seed": seed,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": round(seconds, 1),
    }


def _results(file: Path) -> list[Json]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
