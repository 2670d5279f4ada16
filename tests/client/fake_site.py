"""A site in tests: one folder, one learner, one coordinator, and processes that may be killed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import pytest

from fedselect import agent_state
from fedselect.agent import Agent, Step, StepOutcome, enrol
from fedselect.agent_state import AgentFolder
from fedselect.agentdocs import ArmRecord
from fedselect.client import Client, Retries
from fedselect.evaluations import ScoreReport
from fedselect.explaindocs import AblationReport, TensorAblation
from fedselect.personal import PersonalState
from fedselect.policies import RunSettings
from fedselect.space import FloatVector

from .fake_coordinator import SERVER, SPACE, TOKEN, Coordinator, TinyLearner, known_id

NAME = "ward-7"
NO_CONTROL = {"control_sent": 0, "control_received": 0}  # depends on how often one asks
O = StepOutcome  # noqa: E741


class Killed(BaseException):
    """``kill -9``: nothing in the agent may catch it."""


class TinyExplainer:
    """Numbers that depend on all they should depend on; remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.total = 50
        self.told: dict[str, int] | None = None
        self.fault: Callable[[], None] = lambda: None

    def ablate(
        self, state: PersonalState, base: FloatVector, *, settings: RunSettings
    ) -> AblationReport:
        self.asked += 1
        self.fault()
        whole = ScoreReport(
            correct=7, total=self.total, loss=float(np.abs(state.merge(base)).sum())
        )
        without = ScoreReport(correct=5, total=self.total, loss=float(np.abs(base).sum()))
        tensor = TensorAblation(name="body.weight", score=without)
        return AblationReport(whole=whole, without=without, tensors=[tensor])

    def labels(self) -> dict[str, int] | None:
        return self.told


@dataclass
class Life:
    """A site: its folder, its learner and the coordinator that it talks to.

    ``cut(where)`` is called at every boundary: before and after each request, each write (also half
    way), each removal. It may raise.
    """

    path: Path
    other: Coordinator
    learner: TinyLearner = field(default_factory=TinyLearner)
    explainer: TinyExplainer | None = field(default_factory=TinyExplainer)
    cut: Callable[[str], None] = lambda where: None
    steps: list[Step] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    answers: list[httpx.Response] = field(default_factory=list)

    def handle(self, request: httpx.Request) -> httpx.Response:
        where = f"{request.method} {request.url.path}"
        self.cut(f"before {where}")
        response = self.other(request)
        self.answers.append(response)
        self.cut(f"after {where}")
        return response

    def client(self, key: str | None = None) -> Client:
        return Client(
            SERVER,
            key=key,
            retries=Retries(random.Random(0)),
            sleep=self.waits.append,
            transport=httpx.MockTransport(self.handle),
        )

    def run(self, *, steps: int = 100) -> None:
        """One process: enrol if needed, then step until the run has ended."""
        folder = AgentFolder(self.path)
        known = enrol(self.client(), folder, token=TOKEN, name=NAME)
        chance = random.Random(0)
        agent = Agent(
            self.client(known.key),
            self.learner,
            folder,
            name=NAME,
            rng=chance,
            explainer=self.explainer,
        )

        def sleep(seconds: float) -> bool:
            nonlocal steps
            steps -= 1
            return steps <= 0

        agent.run(sleep, until_finished=True, report=self.steps.append)

    def outcomes(self) -> list[StepOutcome]:
        return [s.outcome for s in self.steps if s.outcome is not O.WAITING]

    @property
    def arm(self) -> Path:
        return self.path / "arms" / str(known_id("arm"))

    def record(self, **changes: object) -> ArmRecord:
        path = self.arm / "arm.json"
        found = ArmRecord.model_validate_json(path.read_bytes()) if path.exists() else ArmRecord()
        return found.model_copy(update=changes)

    def state(self) -> PersonalState:
        record = self.record()
        assert record.committed is not None
        return PersonalState.from_bytes(
            (self.arm / record.committed.state.name).read_bytes(), SPACE
        )

    def files(self) -> dict[str, bytes]:
        found = [p for p in self.path.rglob("*") if p.is_file()]
        return {str(p.relative_to(self.path)): p.read_bytes() for p in found}


Live = Callable[..., Life]


@contextmanager
def sites(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """Makes sites; opening a folder first lets go of all locks, as the kernel does for the dead."""
    locks: list[int] = []
    count = 0
    lock = agent_state._lock

    def remember(path: Path) -> int:
        release()
        locks.append(lock(path))
        return locks[-1]

    def release() -> None:
        while locks:
            os.close(locks.pop())

    def make(**changes: Any) -> Life:
        nonlocal count
        count += 1
        return Life(Path(root) / f"site-{count}", Coordinator(**changes))

    monkeypatch.setattr(agent_state, "_lock", remember)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only a loss of power would tell
    memory = Path("/dev/shm")  # a shared disk is the slowest part of these tests
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        yield make
    release()
