"""Your own model and data as a FedSelect task: four sites, one process, no server.

    python examples/own_model.py

The same class serves a real site: ``fedselect agent --server URL --state DIR
--task examples/own_model.py:TumourTask --task-arg site=2``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn

from fedselect import Task, preset_run
from fedselect.simulate import simulate


class TumourTask(Task):
    """Benign or malignant, from 30 measurements of a cell nucleus; ``site`` is 0 to 3."""

    def __init__(self, site: int) -> None:
        rows, labels = load_breast_cancer(return_X_y=True)
        inputs = torch.tensor(scale(rows[site::4]), dtype=torch.float32)
        targets = torch.tensor(labels[site::4])
        self.train = list(zip(inputs[:40], targets[:40], strict=True))
        self.held_out = inputs[40:], targets[40:]

    def build_model(self):
        return nn.Sequential(nn.Linear(30, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))

    def train_batches(self):
        return torch.utils.data.DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def eval_batches(self):
        return [self.held_out]

    def loss(self, model, batch):
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets)


def main() -> None:
    """Simulate 12 rounds and print how each site fares."""
    torch.set_num_threads(1)
    tasks = {f"site-{site}": TumourTask(site) for site in range(4)}
    result = simulate(tasks, preset_run("fedselect", rounds=12))
    for name, scores in result.scores.items():
        accuracy = {kind: f"{score.accuracy:.1%}" for kind, score in scores.items()}
        print(name, accuracy, f"personal {result.personal[name]:.1%}")
    print("last version", result.versions[-1])


if __name__ == "__main__":
    main()
