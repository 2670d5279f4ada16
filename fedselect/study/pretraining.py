"""What all policies of a split start from: one model of the data of some clients, who stay outside.

Owns who is outside and the pooled task. In the product this model is a run's version 0, whoever has
trained it; its steps are no client's. Must not train by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fedselect.budgets import seeded
from fedselect.errors import FedSelectError
from fedselect.holdout import drawn, joined
from fedselect.policies import RunSettings, Training, preset
from fedselect.space import FloatVector, Role
from fedselect.study.grid import Cell, Pretrained
from fedselect.task import Batch, Task
from fedselect.training import TorchLearner


class Pooled(Task):
    """The model and loss of the first of some clients, and the training data of all of them."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        every = list(tasks)
        self._first = every[0]
        with seeded(0):
            self._data = joined([batch for task in every for batch in task.train_batches()])

    def build_model(self) -> nn.Module:
        """That of the first client."""
        return self._first.build_model()

    def train_batches(self) -> Iterable[Batch]:
        """One pass over everybody's examples, mixed."""
        return drawn(self._data, self.batch_size)

    def eval_batches(self) -> Iterable[Batch]:
        """None: it is not evaluated."""
        return []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """That of the first client."""
        return self._first.loss(model, batch)

    def roles(self) -> Mapping[str, Role]:
        """Those of the first client."""
        return self._first.roles()


def participants(
    cell: Cell, tasks: Mapping[str, Task]
) -> tuple[dict[str, Task], FloatVector | None]:
    """The clients that take part, and the model (D,) that all policies start from; None: their own.

    Raises:
        FedSelectError: ``study_invalid``, fewer than 2 clients would be left.
    """
    rule = cell.split.pretrained
    if rule is None:
        return dict(tasks), None
    order = sorted(tasks, key=lambda name: _drawn(cell.seed, name))
    inside = sorted(order[rule.clients :])
    if len(inside) < 2:
        raise FedSelectError(
            f"{cell.split.name} has {len(order)} clients: without the {rule.clients} whose data "
            "are public, fewer than 2 are left",
            code="study_invalid",
        )
    outside = [tasks[name] for name in sorted(order[: rule.clients])]
    return {name: tasks[name] for name in inside}, _start(cell, outside, rule)


def _start(cell: Cell, outside: list[Task], rule: Pretrained) -> FloatVector:
    """The same for every policy."""
    learner = TorchLearner(Pooled(outside))
    training = Training(**{**cell.grid.training.model_dump(), "steps": rule.steps})
    settings = RunSettings(policy=preset("fedavg"), training=training)
    learner.task.batch_size = training.batch_size
    with seeded(_drawn(cell.seed, "start")):
        return learner.train_once(learner.initial(), settings)


def _drawn(seed: int, what: str) -> int:
    digest = hashlib.sha256(f"fedselect-public/{seed}/{what}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
