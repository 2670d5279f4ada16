"""What the example tasks share: classification of arrays held in memory, and label-skewed splits.

Owns ``ArrayTask``, the small MLP and the splitter. Must not know any data set.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedselect.errors import FedSelectError
from fedselect.task import Task

GATHERED = 8  # batches copied out of the examples by one call, since single ones cost their calls
IntVector = npt.NDArray[np.int64]
Examples = tuple[npt.NDArray[np.floating[Any]], IntVector]


class ArrayTask(Task):
    """Classification of examples (n, …) with labels (n,), shuffled anew in every pass.

    ``seed`` gives the starting weights: the same for all clients that are built with it.
    """

    def __init__(self, train: Examples, test: Examples, *, seed: int) -> None:
        self._train = _tensors(train)
        self._test = _tensors(test)
        self._seed = seed

    @abstractmethod
    def network(self) -> nn.Module:
        """A new network; its weights may be drawn from torch's global generator."""

    def build_model(self) -> nn.Module:
        """The network with the same weights at each call; the caller's generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return self.network()

    def train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled pass; the last batch may be smaller."""
        inputs, labels = self._train
        for rows in torch.split(torch.randperm(len(labels)), GATHERED * self.batch_size):
            block = inputs.index_select(0, rows), labels.index_select(0, rows)
            yield from zip(*(torch.split(part, self.batch_size) for part in block), strict=True)

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out examples in batches of 500."""
        yield from zip(*(torch.split(tensor, 500) for tensor in self._test), strict=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy of the logits."""
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    def examples(self) -> int:
        """Number of training examples."""
        return len(self._train[1])


def _tensors(examples: Examples) -> tuple[Tensor, Tensor]:
    inputs, labels = examples
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def mlp(inputs: int, outputs: int) -> nn.Module:
    """inputs-64-32-outputs with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, outputs),
    )


@dataclass(frozen=True)
class LabelSkew:
    """A split in which every client sees only ``per_client`` distinct classes.

    Classes are dealt so that each has nearly the same number of clients. A pure function of its
    fields; no example is given to two clients.
    """

    clients: int
    per_client: int
    classes: int = 10
    seed: int = 0

    def labels(self) -> list[IntVector]:
        """The classes of each client, sorted."""
        rng = np.random.default_rng(self.seed)
        used = np.zeros(self.classes, dtype=np.int64)
        dealt = []
        for _ in range(self.clients):
            rarest_first = np.lexsort((rng.random(self.classes), used))
            mine = np.sort(rarest_first[: self.per_client])
            used[mine] += 1
            dealt.append(mine)
        return dealt

    def rows(self, labels: IntVector, per_class: int) -> list[IntVector]:
        """Row numbers of each client, shape (per_client, per_class): one line per class.

        Raises:
            FedSelectError: a class has too few examples for its clients.
        """
        rng = np.random.default_rng([self.seed, 1])
        pools = [rng.permutation(np.flatnonzero(labels == c)) for c in range(self.classes)]
        taken = np.zeros(self.classes, dtype=np.int64)
        found = []
        for mine in self.labels():
            lines = [pools[c][taken[c] : taken[c] + per_class] for c in mine]
            if min(len(line) for line in lines) < per_class:
                raise FedSelectError(
                    f"{self.clients} clients with {self.per_client} classes and {per_class} "
                    "examples of each need more examples than there are",
                    code="task_invalid",
                )
            taken[mine] += per_class
            found.append(np.stack(lines))
        return found
