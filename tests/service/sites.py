"""Sites with real agents, real training and real files, on the coordinator of these tests.

An agent talks to the interface in this process and to the real object store; what a worker would do
is done in between. So a whole run takes a second, and the order of all things is the test's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import torch

from fedselect import RunSettings, Task
from fedselect.agent import Agent, StepOutcome, enrol
from fedselect.agent_state import AgentFolder
from fedselect.client import Client, Retries
from fedselect.personal import PersonalState
from fedselect.simulate import Order
from fedselect.training import TorchLearner

from .factories import Json, Model, Project, drain, everything, make_model, make_token, numbers, ok

SERVER = "http://testserver"


@dataclass
class Federation:
    """A project with its sites, whose agents step when they are told to."""

    project: Project
    tasks: Mapping[str, Task]
    folder: Path
    open: ExitStack
    agents: dict[str, Agent] = field(default_factory=dict)
    folders: dict[str, AgentFolder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = self.open.enter_context(httpx.Client(verify=False))
        first = TorchLearner(next(iter(self.tasks.values())))
        self.model: Model = make_model(
            self.project, space=first.space, weights=first.initial(), name=f"m-{next(numbers)}"
        )

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "testserver":
            asked = {"content": request.content, "headers": dict(request.headers)}
            found = self.project.api.request(request.method, str(request.url), **asked)
        else:
            found = self.store.send(
                self.store.build_request(
                    request.method, request.url, headers=request.headers, content=request.content
                )
            )
        headers = {k: v for k, v in found.headers.items() if k != "content-encoding"}
        return httpx.Response(found.status_code, headers=headers, content=found.content)

    def _client(self, key: str | None = None) -> Client:
        transport = httpx.MockTransport(self._answer)
        return self.open.enter_context(
            Client(SERVER, key=key, retries=Retries(random.Random(0)), transport=transport)
        )

    def join(self, name: str) -> None:
        """Enrol a site and start its agent."""
        folder = self.folders[name] = AgentFolder(self.folder / name)
        self.open.callback(folder.close)
        known = enrol(self._client(), folder, token=make_token(self.project), name=name)
        learner = TorchLearner(self.tasks[name])
        client = self._client(known.key)
        self.agents[name] = Agent(client, learner, folder, name=name, rng=random.Random(0))

    def run(self, settings: RunSettings) -> Json:
        """A run of these settings, started."""
        body = {"name": f"run-{next(numbers)}", "model_id": self.model.id}
        body["settings"] = settings.model_dump(mode="json")
        run = ok(self.project.owner.post("/v1/runs", body), 201)
        return dict(ok(self.project.owner.post(f"/v1/runs/{run['id']}/start")))

    def until(self, name: str, outcome: StepOutcome, *, steps: int = 4) -> None:
        """Let an agent step until it has done this."""
        found = []
        for _ in range(steps):
            found.append(self.agents[name].step())
            if found[-1].outcome is outcome:
                return
        raise AssertionError((name, found))

    def play(self, settings: RunSettings, order: Order, names: list[str]) -> None:
        """All rounds of a run, in each those that ``order`` names; who is new joins first."""
        for number in range(1, settings.rounds + 1):
            for name in order(number, names):
                if name not in self.agents:
                    self.join(name)
                self.until(name, StepOutcome.TRAINED)
                drain(self.project)  # accepted one by one, so that their order is the test's
        drain(self.project)

    def evaluate(self, names: list[str]) -> None:
        """Let everybody report, after what they still wait for."""
        for name in names:
            self.until(name, StepOutcome.EVALUATED)

    def versions(self, run: Json) -> list[str]:
        path = f"/v1/runs/{run['id']}/versions"
        found = sorted(everything(self.project.owner, path), key=lambda each: each["number"])
        return [version["sha256"] for version in found]

    def evaluations(self, run: Json) -> dict[str, Json]:
        found = everything(self.project.owner, f"/v1/runs/{run['id']}/evaluations")
        return {each["client_name"]: each for each in found}

    def state(self, name: str, run: Json) -> PersonalState | None:
        arm = self.folders[name].arm(UUID(run["arm_id"]))
        return arm.committed(self.model.space)


@contextmanager
def federation(project: Project, tasks: Mapping[str, Task], folder: Path) -> Iterator[Federation]:
    """A federation that ends with the block."""
    torch.set_num_threads(1)  # bit equality holds at one thread
    with ExitStack() as stack:
        yield Federation(project, tasks, folder, stack)


def same(one: PersonalState, two: PersonalState) -> bool:
    """Whether two states are equal to the bit."""
    return _told(one) == _told(two)


def _told(state: PersonalState) -> tuple[Any, ...]:
    vectors = [state.theta, state.reference, *([] if state.own is None else [state.own])]
    masks = (state.merge_mask, state.mask)
    return (state.participations, masks, state.gated, [each.tobytes() for each in vectors])
