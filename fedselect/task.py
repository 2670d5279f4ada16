"""The whole contract an integrator writes: a model, its data and its loss (DESIGN §6).

Owns the ``Task`` base class only. Must not import torch at run time, so that ``import fedselect``
stays light.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedselect.space import Role

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Any  # whatever train_batches yields; the default ``predictions`` reads (inputs, labels)


class Task(ABC):
    """One site's model, private data and loss. Four methods are required, two are optional.

    ``batch_size`` is set from the run's settings before any batch is asked for. Shuffling should
    use torch's global random generator: it is seeded per run, client and round, which is what
    makes a participation repeatable.
    """

    batch_size: int = 20

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, with the weights that a run starts from."""

    @abstractmethod
    def train_batches(self) -> Iterable[Batch]:
        """One pass over the training data."""

    @abstractmethod
    def eval_batches(self) -> Iterable[Batch]:
        """One pass over the held-out data, never trained on."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar to be minimised."""

    def hits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Which examples of a batch are right; the default expects ``(inputs, labels)`` and logits.

        With single examples two models can be compared pair by pair: the interval of their
        difference is narrower than :meth:`outcome` alone allows.
        """
        inputs, labels = batch
        right: Tensor = model(inputs).argmax(-1) == labels
        return right

    def outcome(self, model: nn.Module, batch: Batch) -> tuple[int, int]:
        """(correct, total) of a batch; override it where only these numbers are known."""
        hits = self.hits(model, batch)
        return int(hits.sum()), hits.numel()

    def examples(self) -> int:
        """Number of training examples, which weighs this client when a run asks for that."""
        return sum(_length(batch) for batch in self.train_batches())

    def roles(self) -> Mapping[str, Role]:
        """Roles of single tensors by name, where the defaults (docs/ARCHITECTURE.md) do not fit."""
        return {}


def _length(batch: Batch) -> int:
    return len(batch[0]) if isinstance(batch, tuple | list) else len(batch)
