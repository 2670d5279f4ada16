"""One cell of a study: the product's own simulation, looked at in its last rounds.

Owns what is measured of a cell and its line. Every client's gradient steps are counted while they
are taken and must be as many as the grid says, whatever the policy does with them. Must not train,
choose or score by itself: that is ``simulate``, ``selection`` and ``training``.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedselect.errors import FedSelectError
from fedselect.evaluations import ScoreReport
from fedselect.masks import Mask
from fedselect.personal import PersonalState, Score
from fedselect.policy import Settings
from fedselect.scalars import Count, Real
from fedselect.simulate import SimulatedRun
from fedselect.space import Role
from fedselect.study.grid import STUDY, Cell
from fedselect.study.pretraining import participants
from fedselect.task import Batch, Task
from fedselect.tasks import client_tasks
from fedselect.training import TorchLearner


class Result(Settings):
    """A cell's line. Lists have an entry for each client, in the order of ``clients``.

    ``pre`` and ``post`` are the correct answers in each reading (a row per reading), ``examples``
    those asked; ``hits`` which of them ``post`` got right in the last reading, packed bits in
    base64. ``sent`` are bytes of update files. ``kept`` is the mean Jaccard index of a client's
    masks of two successive rounds, ``again`` that of its last masks under two orders of batches,
    ``others`` that of two clients; null where there are none to compare.
    """

    study: str = STUDY
    key: str
    split: str
    policy: str
    seed: Count
    engine: str = "simulate"
    rounds: Count
    steps: Count = Field(description="Gradient steps that each client has taken, counted.")
    elements: Count
    clients: tuple[str, ...]
    examples: tuple[Count, ...]
    pre: tuple[tuple[Count, ...], ...]
    post: tuple[tuple[Count, ...], ...]
    hits: tuple[str, ...]
    sent: tuple[Count, ...]
    personal: tuple[Real, ...]
    gated: tuple[str, ...] = ()
    kept: Real | None = None
    again: Real | None = None
    others: Real | None = None
    version: str
    seconds: Real

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        lists = (self.examples, self.hits, self.sent, self.personal, *self.pre, *self.post)
        if not self.clients or any(len(each) != len(self.clients) for each in lists):
            raise ValueError("every list needs an entry for each client")
        if not self.pre or len(self.pre) != len(self.post):
            raise ValueError("pre and post need a row for each reading")
        for packed, examples in zip(self.hits, self.examples, strict=True):
            if len(base64.b64decode(packed, validate=True)) != math.ceil(examples / 8):
                raise ValueError("hits need a bit for each example")
        return self

    def accuracies(self, reading: str) -> npt.NDArray[np.float64]:
        """Percent right of each client, (clients,), the mean over the readings."""
        rows = self.pre if reading == "pre" else self.post
        percent: npt.NDArray[np.float64] = 100 * np.mean(rows, axis=0) / np.array(self.examples)
        return percent

    def right(self, client: int) -> npt.NDArray[np.bool_]:
        """Which held-out examples a client's own model got right in the last reading."""
        packed = np.frombuffer(base64.b64decode(self.hits[client]), dtype=np.uint8)
        return np.unpackbits(packed, count=self.examples[client]).astype(bool)

    def score(self, client: int, *, beside: Result | None = None) -> ScoreReport:
        """The last reading of ``post``, with what another result got right, too."""
        right = self.right(client)
        both = None if beside is None else int((right & beside.right(client)).sum())
        return ScoreReport(correct=int(right.sum()), total=len(right), loss=0, both=both)


class Counted(Task):
    """A task that counts its gradient steps: losses that are asked for in training mode."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.steps = 0

    def build_model(self) -> nn.Module:
        """That of the task."""
        return self._task.build_model()

    def train_batches(self) -> Iterable[Batch]:
        """Those of the task."""
        self._task.batch_size = self.batch_size
        return self._task.train_batches()

    def eval_batches(self) -> Iterable[Batch]:
        """Those of the task."""
        return self._task.eval_batches()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """That of the task; a step, if the model is in training mode."""
        self.steps += model.training
        return self._task.loss(model, batch)

    def hits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Those of the task."""
        return self._task.hits(model, batch)

    def examples(self) -> int:
        """Those of the task."""
        return self._task.examples()

    def roles(self) -> Mapping[str, Role]:
        """Those of the task."""
        return self._task.roles()


@dataclass
class Readings:
    """What the last rounds of a run showed, by client."""

    pre: list[dict[str, int]] = field(default_factory=list)
    post: list[dict[str, int]] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    hits: dict[str, Tensor] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    masks: dict[str, Mask] = field(default_factory=dict)


def run_cell(cell: Cell, *, cache: Path | None = None) -> Result:
    """Run one cell.

    Raises:
        FedSelectError: its data are not here; or ``study_steps``, a client has not taken as many
            gradient steps as all others in the study.
    """
    started = time.monotonic()
    torch.set_num_threads(1)  # small models are faster so, and equal seeds give equal bits
    run, readings = _played(cell, cache, order=0)
    _check_still(cell)
    again = [_played(cell, cache, order=n)[1].masks for n in range(1, cell.grid.batch_orders)]
    states, names = run.states(), run.names

    def each(values: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(values[name] for name in names)

    return Result(
        key=cell.key,
        split=cell.split.name,
        policy=cell.policy.name,
        seed=cell.seed,
        rounds=cell.split.rounds,
        steps=cell.steps,
        elements=run.space.dim,
        clients=tuple(names),
        examples=each(readings.examples),
        pre=tuple(each(row) for row in readings.pre),
        post=tuple(each(row) for row in readings.post),
        hits=tuple(_packed(readings.hits[name]) for name in names),
        sent=each(run.bytes_up()),
        personal=tuple(round(states[n].merge_mask.share(run.space), 6) for n in names),
        gated=tuple(name for name in names if states[name].gated),
        kept=fmean(readings.kept) if readings.kept else None,
        again=_over_orders([readings.masks, *again]),
        others=_between(list(readings.masks.values())),
        version=run.version,
        seconds=round(time.monotonic() - started, 2),
    )


def _check_still(cell: Cell) -> None:
    """See that the key still says what has run: a saved split's file may have been written anew."""
    if Cell(cell.grid, cell.split, cell.policy, cell.seed).key != cell.key:
        raise FedSelectError(
            f"{cell}: the file of {cell.split.task} has changed since the study began; start it "
            "again",
            code="study_invalid",
        )


def _played(cell: Cell, cache: Path | None, *, order: int) -> tuple[SimulatedRun, Readings]:
    """One run of a cell, counted; ``order`` above 0 draws its batches otherwise."""
    where = {} if cache is None else {"cache": cache}
    every = client_tasks(cell.split.task, seed=cell.seed, **where)
    plain, start = participants(cell, every)
    tasks = {name: Counted(task) for name, task in plain.items()}
    seed = cell.settings.seed + order * 2**32
    settings = cell.settings.model_copy(update={"seed": seed})
    run = SimulatedRun(tasks, settings, start=start)
    readings, first = Readings(), settings.rounds - cell.grid.readings
    for number in range(settings.rounds):
        run.round(run.names)
        _compare_masks(run, readings)
        last = number == settings.rounds - 1
        # Fine-tuning comes once, at the end: more of it would be more steps.
        if last or (number >= first and not settings.policy.finetune):
            _read(run, readings)
    for name, task in tasks.items():
        if task.steps != cell.steps:
            raise FedSelectError(
                f"{cell}: {name} took {task.steps} gradient steps, not {cell.steps}",
                code="study_steps",
            )
    return run, readings


def _read(run: SimulatedRun, readings: Readings) -> None:
    pre, post = {}, {}
    for name, state in run.states().items():
        found, hits = _scores(run.learners[name], state, run)
        pre[name], post[name] = found["pre"].correct, found["post"].correct
        readings.examples[name] = found["post"].total
        readings.hits[name] = hits
    readings.pre.append(pre)
    readings.post.append(post)


def _scores(
    learner: TorchLearner, state: PersonalState, run: SimulatedRun
) -> tuple[dict[str, Score], Tensor]:
    models = {
        "pre": state.personalized(run.values),
        "post": learner.finished(state, run.values, run.settings),
    }
    found = learner.scored(models.items(), settings=run.settings)
    hits = found["post"][1]
    if hits is None:
        raise FedSelectError("a study needs tasks that tell single hits", code="study_invalid")
    return {name: score for name, (score, _) in found.items()}, hits


def _compare_masks(run: SimulatedRun, readings: Readings) -> None:
    """How much of each client's mask is the same as a round before, once it has chosen one."""
    if run.settings.policy.personal != "learned":
        return
    still = Mask.initial(run.space)
    for name, state in run.states().items():
        mask = state.merge_mask - still
        before = readings.masks.get(name)
        if before is not None and before.personal:
            readings.kept.append(before.jaccard(mask))
        readings.masks[name] = mask


def _over_orders(orders: Sequence[Mapping[str, Mask]]) -> float | None:
    """The mean Jaccard index of a client's masks under two orders of batches."""
    found = [
        one[name].jaccard(other[name])
        for one, other in combinations(orders, 2)
        for name in one
        if one[name].personal or other[name].personal
    ]
    return fmean(found) if found else None


def _between(masks: Sequence[Mask]) -> float | None:
    """The mean Jaccard index of two clients' masks."""
    chosen = [mask for mask in masks if mask.personal]
    found = [one.jaccard(other) for one, other in combinations(chosen, 2)]
    return fmean(found) if found else None


def _packed(hits: Tensor) -> str:
    return base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()
