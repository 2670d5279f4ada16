"""The main job on real parts: ten agents, each with its own person's data, one coordinator.

`make demo` runs this. It starts the local stack, enrols ten clients, starts ten agent processes,
follows the run, recomputes every version from its manifest, verifies the ledger and prints what
each client gained and what it cost. Exit code 0 if every round was published, every version was
recomputed to the same digest and the ledger verifies; accuracy is reported, never a condition.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.cli import prepare
from app.localstack import LocalStack, ServiceState
from fedselect import RoundPolicy, RunSettings, Training, preset_run, wire
from fedselect.audit import verify_export
from fedselect.client import Client
from fedselect.effects import WORSE_POINTS
from fedselect.errors import FedSelectError
from fedselect.evaluations import Evaluation
from fedselect.protocol import ModelCreate, ModelInfo, RunCreate, RunInfo
from fedselect.recompute import manifest_digest, recompute
from fedselect.reportpage import page
from fedselect.tasks import example_clients, load_task
from fedselect.training import TorchLearner

CLIENTS, STEPS = 10, 20
PATIENCE = 5.0  # seconds for agents that are told to end
FEDSELECT = str(Path(sys.executable).with_name("fedselect"))
WORSE = WORSE_POINTS / 100  # as a difference of accuracies
OVER = {"finished", "stopped", "paused"}
console = Console()
report = Console(record=True, width=132)  # the result, which --save writes to a page
bell = threading.Event()  # only ever waited for, so that a pause ends at once on interrupt


@dataclass
class Demo:
    """What the steps of the demo share."""

    task: str
    sites: dict[str, tuple[str, dict[str, Any]]]  # how each client gets its task
    settings: RunSettings
    root: Path
    url: str
    admin: Client
    project: str
    data: tuple[str, ...] = ()  # task options that say where the data is
    stay: bool = False  # agents go on when a run has ended

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return self.settings.rounds

    def folder(self, site: str) -> Path:
        """Where a site's agent keeps its key and its personal parameters."""
        return self.root / "agents" / self.project / site

    def learner(self) -> TorchLearner:
        """A learner of the first site: all sites have the same model."""
        spec, arguments = next(iter(self.sites.values()))
        return TorchLearner(load_task(spec, **arguments))


# --- set-up ------------------------------------------------------------------------------------


@contextmanager
def local_stack(root: Path, keep: bool) -> Iterator[LocalStack]:
    """The stack, stopped at the end unless it is to be kept or ran before."""
    stack = LocalStack(root)
    running = [s.name for s in stack.status() if s.state is ServiceState.RUNNING]
    try:
        with console.status("starting PostgreSQL, Redis, S3, coordinator, worker, scheduler …"):
            stack.up(prepare=lambda environment: prepare(root, environment))
        yield stack
    finally:
        if keep or running:  # what somebody else started is not ours to stop
            url = stack.environment()["PUBLIC_URL"]
            console.print(f"\nThe stack is still up. API docs: {url}/docs")
            console.print(f"Owner key: {root}/owner.key")
            console.print(f"Stop: {FEDSELECT} down --root {root}", soft_wrap=True)
        else:
            stack.down()


def new_project(environment: dict[str, str]) -> tuple[str, str]:
    """A project of its own for every demo, and its owner key."""
    name = f"demo-{secrets.token_hex(3)}"
    command = [FEDSELECT, "admin", "create-key", "--project", name]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise FedSelectError(f"no key for the demo: {done.stderr.strip()}")
    return name, done.stdout.strip()


def demo_settings(rounds: int, clients: int = CLIENTS) -> RunSettings:
    """FedSelect that shares first and personalizes from the middle on."""
    return preset_run(
        "fedselect",
        rounds=rounds,
        training=Training(steps=STEPS),
        round=RoundPolicy(
            goal=clients,
            quorum=clients,
            over_selection=1.0,
            selection_deadline=120,
            report_deadline=120,
            retry_after=0.5,
        ),
    )


def add_model(demo: Demo) -> ModelInfo:
    """Register the model with its initial weights."""
    learner = demo.learner()
    space = learner.space
    model = demo.admin.create_model(ModelCreate(name=demo.task, space=space.to_json()))
    data = wire.encode_version(space.digest, learner.initial())
    upload = demo.admin.send_weights(model.id, data)
    while upload.state == "uploaded":
        bell.wait(0.1)
        upload = demo.admin.upload(upload.id)
    if upload.state != "accepted":
        raise FedSelectError(f"the initial weights were refused: {upload.reason} {upload.detail}")
    return model


def register_model(demo: Demo) -> RunInfo:
    """Register the model, and a run on it."""
    model = add_model(demo)
    run = RunCreate(name=demo.task, model_id=model.id, settings=demo.settings)
    return demo.admin.create_run(run)


def task_options(arguments: dict[str, Any]) -> list[str]:
    """Arguments of a task as options of the command line."""
    return [f"--task-arg={name}={json.dumps(value)}" for name, value in arguments.items()]


def start_agent(demo: Demo, name: str, token: str) -> subprocess.Popen[bytes]:
    """One site's own process; started again with the same folder it goes on where it was."""
    spec, arguments = demo.sites[name]
    pairs = task_options(arguments)
    state = demo.folder(name)
    command = [FEDSELECT, "agent", "--server", demo.url, "--task", spec, *pairs]
    command += ["--name", name, "--state", str(state)]
    command += [] if demo.stay else ["--until-finished"]
    (demo.root / "logs").mkdir(parents=True, exist_ok=True)
    with (demo.root / "logs" / f"agent-{name}.log").open("ab") as log:
        environment = {**os.environ, "FEDSELECT_TOKEN": token}  # never on the command line
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off interrupts, so that what is started is also written down, and ended later."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda found, _: caught.append(found))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            raise KeyboardInterrupt


@contextmanager
def agents(demo: Demo) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """One agent process per site, ended with the block."""
    tokens = demo.admin.create_enrolments(len(demo.sites)).tokens
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, token in zip(demo.sites, tokens, strict=True):
            with undisturbed():
                processes[name] = start_agent(demo, name, token)
        yield processes
    finally:
        end_agents(processes.values())


def end_agents(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask them to end after their present step; whoever takes too long is killed, safely."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def baseline(demo: Demo) -> Iterator[subprocess.Popen[str]]:
    """FedAvg + fine-tuning with the same steps, simulated beside the run, for the comparison."""
    command = ["nice", FEDSELECT, "simulate", "--json"]
    command += ["--task", demo.task, "--preset", "fedavg", *demo.data]
    command += ["--rounds", str(demo.rounds), "--steps", str(STEPS)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    started: list[subprocess.Popen[str]] = []
    try:
        with undisturbed():
            started.append(subprocess.Popen(command, **streams, text=True))
        yield started[0]
    finally:
        for process in started:
            process.kill()
            process.wait()


# --- the run -----------------------------------------------------------------------------------


def follow(demo: Demo, run: RunInfo, processes: dict[str, subprocess.Popen[bytes]]) -> RunInfo:
    """Progress bars until the run is over."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        published = progress.add_task("rounds published", total=demo.rounds)
        evaluated = progress.add_task("clients evaluated", total=len(demo.sites))
        while True:
            run = demo.admin.run(run.id)
            progress.update(published, completed=run.published)
            if run.state.value == "evaluating" or run.state.value in OVER:
                done = len(list(demo.admin.evaluations(run.id)))
                progress.update(evaluated, completed=done)
            if run.state.value in OVER:
                return run
            dead = [n for n, p in processes.items() if p.poll() not in {None, 0}]
            if dead:
                raise FedSelectError(f"agents died: {', '.join(dead)}; see {demo.root}/logs")
            bell.wait(0.5)


# --- proof -------------------------------------------------------------------------------------


def check_versions(demo: Demo, run: RunInfo) -> int:
    """Recompute every published version from its manifest; returns how many agree."""
    versions = {v.id: v for v in demo.admin.versions(run.id)}
    cache: dict[str, bytes] = {}
    agreeing = 0
    rounds = [r for r in demo.admin.rounds(run.id) if r.version_id is not None]
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        for found in progress.track(rounds, description="recomputing versions"):
            document = demo.admin.manifest(found.id)

            def read(key: str, document: Any = document) -> bytes:
                if key not in cache:
                    cache[key] = demo.admin.fetch(document.downloads[key])
                return cache[key]

            data = recompute(document.manifest, read)
            version = versions[found.version_id]
            same = hashlib.sha256(data).hexdigest() == version.sha256
            agreeing += same and manifest_digest(document.manifest) == version.manifest_sha256
    return agreeing


def check_ledger(demo: Demo, run: RunInfo) -> int:
    """Export the ledger up to a signed head that covers the run's end, and verify it."""
    path = demo.root / "ledger.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        head = demo.admin.checkpoint()
        size = int(head.text.split("\n")[1])
        entries = [e for e in demo.admin.ledger_entries() if e.seq < size]
        shown = [e.entry for e in entries if e.entry is not None]
        last = {entry["action"] for entry in shown if entry["subject"] == f"run:{run.id}"}
        if f"run.{run.state.value}" in last:
            break
        bell.wait(0.5)
    lines = [e.model_dump_json() for e in entries]
    lines.append(json.dumps({"checkpoint": head.text, "public_key": head.public_key}))
    path.write_text("\n".join(lines) + "\n")
    return verify_export(lines, partial=True).entries


# --- the table ---------------------------------------------------------------------------------


def accuracy(evaluation: Evaluation, name: str) -> float:
    """Fraction of a client's held-out examples that one model got right."""
    score = evaluation.scores[name]
    return score.correct / score.total


def show(demo: Demo, evaluations: list[Evaluation], tuned: dict[str, float], fedavg: int) -> None:
    """One row per client, then the mean, the worst client and who is worse than a baseline."""
    names = ("local_only", "global", "pre", "post")
    table = Table(title=f"{demo.task}: accuracy on each client's own held-out data, in %")
    headings = ("client", "local-only", "FedAvg+FT*", "global", "merged (pre)", "personal (post)")
    for heading in (*headings, "personal share", "MB sent", "MB received", "of FedAvg, sent"):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    rows = [({n: accuracy(e, n) for n in names}, tuned.get(e.client_name), e) for e in evaluations]
    for scores, ft, e in rows:
        traffic = (f"{e.bytes_sent / 1e6:.3f}", f"{e.bytes_received / 1e6:.3f}")
        cells = (_percent(scores["local_only"]), _percent(ft))
        cells += tuple(_percent(scores[n]) for n in names[1:])
        share = f"{e.bytes_sent / fedavg:.2f}"
        table.add_row(e.client_name, *cells, f"{e.personal_share:.1%}", *traffic, share)
    table.add_section()
    for label, pick in (("mean", fmean), ("worst client", min)):
        known = [ft for _, ft, _ in rows if ft is not None]
        cells = (_percent(pick([s["local_only"] for s, _, _ in rows])),)
        cells += (_percent(pick(known) if known else None),)
        cells += tuple(_percent(pick([s[n] for s, _, _ in rows])) for n in names[1:])
        table.add_row(label, *cells, "", "", "", "")
    report.print(table)
    for label, gaps in (
        ("local-only", [s["post"] - s["local_only"] for s, _, _ in rows]),
        ("FedAvg+FT", [s["post"] - ft for s, ft, _ in rows if ft is not None]),
    ):
        worse = sum(gap < -WORSE for gap in gaps)
        report.print(f"worse than {label} by more than 2 points: {worse} of {len(gaps)} clients")
    report.print(
        f"FedAvg in float32 would send {fedavg / 1e6:.3f} MB and receive as much per client. "
        f"MB are whole update and version files, headers included.\n"
        f"* FedAvg + fine-tuning with the same {STEPS} steps a round, simulated in one process."
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def fedavg_bytes(demo: Demo) -> int:
    """What plain FedAvg sends per client: every parameter and statistic, in float32, each round."""
    return 4 * demo.learner().space.dim * demo.rounds


def write_report(demo: Demo, run: RunInfo) -> Path:
    """The report of the run as a page that any browser opens, without a server."""
    place = (demo.root / "reports" / f"{demo.project}.html").resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(page(demo.admin.run_report(run.id)), "utf-8")
    return place


def run_demo(demo: Demo) -> bool:
    """The whole job; True if everything that was promised holds."""
    run = register_model(demo)
    for warning in run.warnings:
        console.print(f"note: {warning}")
    begun = time.monotonic()
    with baseline(demo) as simulation:
        with agents(demo) as processes:
            run = demo.admin.start_run(run.id)
            run = follow(demo, run, processes)
        seconds = time.monotonic() - begun
        tuned = json.loads(simulation.communicate(timeout=600)[0] or "{}").get("clients", {})
    evaluations = sorted(demo.admin.evaluations(run.id), key=lambda found: found.client_name)
    agreeing, entries = check_versions(demo, run), check_ledger(demo, run)
    if evaluations:
        post = {name: row["post"] for name, row in tuned.items()}
        show(demo, evaluations, post, fedavg_bytes(demo))
    place = write_report(demo, run)
    report.print(
        f"\nrun {run.state.value} in {seconds:.0f} s · {run.published} of {demo.rounds} rounds "
        f"published · {agreeing} versions recomputed to the same digest · ledger of {entries} "
        f"entries verifies ({demo.root}/ledger.jsonl)"
    )
    console.print(f"Who gained, who lost, what it cost: {place}", soft_wrap=True)
    return run.published == agreeing == demo.rounds and run.state.value == "finished"


def save(path: Path, options: argparse.Namespace) -> None:
    """Write what was printed to a page, with what is needed to repeat it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    command = f"make demo TASK={options.task} SAVE={path}"
    text = (
        f"# What `make demo` printed\n\nWritten by `{command}` on {time.strftime('%Y-%m-%d')}, "
        f"commit {commit.stdout.strip() or 'unknown'}, {os.cpu_count()} cores, "
        f"{platform.python_implementation()} {platform.python_version()}. One seed: read the "
        f"differences with care.\n\n```text\n{report.export_text()}```\n"
    )
    path.write_text(text)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="watch", choices=["watch", "digits", "fashion-mnist"])
    parser.add_argument("--data", type=Path, help="folder of the task's files (fashion-mnist)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--root", type=Path, default=Path(".fedselect"))
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    parser.add_argument("--save", type=Path, help="write the result to this Markdown file")
    options = parser.parse_args()
    # A run that is told to stop (a CI time-out) ends all that it started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        data = {} if options.data is None else {"folder": str(options.data.resolve())}
        examples = example_clients(options.task).items()
        sites = {name: (spec, {**own, **data}) for name, (spec, own) in examples}
        spec, arguments = next(iter(sites.values()))
        load_task(spec, **arguments)  # is its data there? say so before anything is started
        with local_stack(options.root, options.keep) as stack:
            environment = stack.environment()
            project, key = new_project(environment)
            url = environment["PUBLIC_URL"]
            with Client(url, key=key) as admin:
                chosen = demo_settings(options.rounds, len(sites))
                where = tuple(task_options(data))
                demo = Demo(options.task, sites, chosen, options.root, url, admin, project, where)
                ok = run_demo(demo)
            if options.save:
                save(options.save, options)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except FedSelectError as error:
        console.print(f"error[{error.code}]: {error}", style="red", markup=False)
        return 1
    console.print("[green]demo passed[/green]" if ok else "[red]demo failed[/red]")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
