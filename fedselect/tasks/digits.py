"""Handwritten digits of scikit-learn (1,797 images of 8 × 8): 10 sites with 2 digits each.

Owns this one task. The data comes with scikit-learn; nothing is downloaded. With two classes per
site local training alone is hard to beat (ALGORITHM §5.1): good for trying things out in a second,
no evidence for federating.
"""

from __future__ import annotations

from torch import nn

from fedselect.errors import FedSelectError
from fedselect.tasks.arrays import ArrayTask, Examples, IntVector, LabelSkew, mlp

CLIENTS = 10
PER_CLASS = 11  # training examples
HELD_OUT = 76  # per class and site: the rarest digit has 174 images for two sites


class DigitsTask(ArrayTask):
    """One of the 10 sites: 22 training and 152 held-out images, MLP 64-64-32-10.

    ``seed`` draws the split and the starting weights; it must be the same at all sites.

    Raises:
        FedSelectError: no such client.
    """

    def __init__(self, client: int, *, seed: int = 0) -> None:
        if client not in range(CLIENTS):
            raise FedSelectError(f"client must be 0 to {CLIENTS - 1}, got {client!r}")
        from sklearn.datasets import load_digits  # slow to import

        images, labels = load_digits(return_X_y=True)
        split = LabelSkew(CLIENTS, per_client=2, seed=seed)
        rows = split.rows(labels, PER_CLASS + HELD_OUT)[client]

        def pick(chosen: IntVector) -> Examples:
            flat = chosen.reshape(-1)
            return images[flat] / 16, labels[flat]

        super().__init__(pick(rows[:, :PER_CLASS]), pick(rows[:, PER_CLASS:]), seed=seed)

    def network(self) -> nn.Module:
        """MLP 64-64-32-10."""
        return mlp(64, 10)
