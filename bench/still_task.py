"""The task of an agent that does not learn: one step moves every value a little, at the least cost.

Made for `fedselect agent --task bench/still_task.py:Still`: the turnaround without any training.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedselect import Task


class Still(Task):
    """``layers`` square layers of ``width``; ``number`` makes the clients differ."""

    def __init__(self, layers: int, width: int, number: int) -> None:
        self.layers, self.width = layers, width
        self.step = 1e-3 * (1 + number)

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.layers)))

    def train_batches(self) -> Iterable[Tensor]:
        yield torch.ones(1)

    eval_batches = train_batches

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:  # noqa: ARG002
        return torch.stack([p.sum() for p in model.parameters()]).sum() * self.step

    def outcome(self, model: nn.Module, batch: Tensor) -> tuple[int, int]:  # noqa: ARG002
        return 0, 1
