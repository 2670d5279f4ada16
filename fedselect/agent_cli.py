"""The ``agent`` command: one site's long-running program.

Owns its options, its signals and how a step is logged. Must not decide anything of the protocol
(``agent``), nor load torch before the command runs.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedselect.agent import Agent, Step, enrol
from fedselect.agent_state import AgentFolder
from fedselect.agentdocs import Credentials
from fedselect.client import Client
from fedselect.errors import FedSelectError

if TYPE_CHECKING:
    from fedselect.personal import Explainer, Learner

Server = Annotated[str, typer.Option(help="Address of the coordinator, https://host:port.")]
TaskSpec = Annotated[str, typer.Option(help="package.module:Name or path/to/file.py:Name.")]
State = Annotated[Path, typer.Option(help="Folder of this client's key and personal parameters.")]
TaskArg = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the task; repeatable.")
]
Name = Annotated[str | None, typer.Option(help="Name of a client that registers.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="FEDSELECT_TOKEN", help="Enrolment token of a client that registers."),
]
UntilFinished = Annotated[
    bool, typer.Option("--until-finished", help="End when the newest run has ended.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; 1 repeats bit by bit.")]
TellLabels = Annotated[
    bool,
    typer.Option(
        "--tell-labels",
        help="Agree to tell how many training examples there are of each label, few ones left out.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Log JSON lines.")]


def register(app: typer.Typer) -> None:
    """Add the ``agent`` command."""
    app.command("agent")(agent)


def agent(
    server: Server,
    task: TaskSpec,
    state: State,
    task_arg: TaskArg = None,
    name: Name = None,
    token: Token = None,
    until_finished: UntilFinished = False,
    threads: Threads = 1,
    tell_labels: TellLabels = False,
    as_json: AsJson = False,
) -> None:
    """Take part in runs with a task of your own.

    The first start registers and needs --name and --token (better: the variable FEDSELECT_TOKEN,
    which no process list shows). Kill it at any time: the next start goes on where it was.
    """
    stop = Stop()
    learner, explainer = _load(task, task_arg or [], threads, tell_labels=tell_labels)
    folder = AgentFolder(state)
    try:
        known = _credentials(folder, server, name=name, token=token, stop=stop)
        with Client(server, key=known.key, sleep=stop.wait) as client:
            chance = random.SystemRandom()
            one = Agent(client, learner, folder, name=known.name, rng=chance, explainer=explainer)
            one.run(
                stop.wait,
                until_finished=until_finished,
                report=lambda step: typer.echo(log_line(step, as_json=as_json), err=True),
            )
    finally:
        folder.close()


class Stop:
    """SIGTERM or SIGINT asks for an end after the present step; a second one kills, safely.

    A pipe and not an ``Event``, whose ``set`` may deadlock inside a signal handler.
    """

    def __init__(self) -> None:
        self._asked, self._ask = os.pipe()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        os.write(self._ask, b".")
        signal.signal(number, signal.SIG_DFL)

    def wait(self, seconds: float) -> bool:
        """Sleep; true at once when the end was asked for."""
        return bool(select.select([self._asked], [], [], seconds)[0])


def _load(
    task: str, arguments: list[str], threads: int, *, tell_labels: bool
) -> tuple[Learner, Explainer]:
    """What trains a task, and what tells the worth of a client's part of its model."""
    import torch

    from fedselect.explain import TorchExplainer
    from fedselect.tasks import load_task, task_arguments
    from fedselect.training import TorchLearner

    torch.set_num_threads(threads)
    learner = TorchLearner(load_task(task, **task_arguments(arguments)))
    return learner, TorchExplainer(learner, tell_labels=tell_labels)


def _credentials(
    folder: AgentFolder, server: str, *, name: str | None, token: str | None, stop: Stop
) -> Credentials:
    known = folder.credentials()
    if known is not None and name is None:
        return known
    if name is None or (token is None and known is None):
        raise FedSelectError(
            f"{folder.path} has no credentials yet: give --name, and --token or FEDSELECT_TOKEN "
            "(an administrator makes tokens: POST /v1/enrolments)",
            code="enrolment_missing",
        )
    with Client(server, sleep=stop.wait) as client:
        return enrol(client, folder, token=token or "", name=name)


def log_line(step: Step, *, as_json: bool) -> str:
    """What one step did, as a JSON object or for people."""
    if as_json:
        facts = {
            "outcome": step.outcome.value,
            "round": step.round,
            "wait": round(step.wait, 3),
            "detail": step.detail,
        }
        return json.dumps(facts)
    place = "" if step.round is None else f" round {step.round}"
    # The service's own words must not steer a terminal.
    words = "".join(c if c.isprintable() else " " for c in step.detail)
    detail = f": {words}" if words else ""
    return f"{step.outcome.value}{place}{detail} (next in {step.wait:.1f} s)"
