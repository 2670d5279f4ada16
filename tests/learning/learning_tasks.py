"""Small tasks and models for the tests of the learning side."""

import torch
from torch import nn

from fedselect import Task

torch.set_num_threads(1)  # bit equality holds at one thread


class BlobTask(Task):
    """24 training and 30 held-out points of 3 classes in 6 dimensions; ``site`` shifts them."""

    def __init__(self, model, *, site=0, roles=None, train=24):
        self.model, self.declared = model, roles or {}
        generator = torch.Generator().manual_seed(site)
        labels = torch.arange(54) % 3
        points = torch.randn(54, 6, generator=generator)
        points[torch.arange(54), labels] += 2.0
        points[:, 3:] += site
        self.train_part = points[:train], labels[:train]
        self.held_out = points[24:], labels[24:]

    def build_model(self):
        return self.model()

    def train_batches(self):
        inputs, labels = self.train_part
        for rows in torch.randperm(len(labels)).split(self.batch_size):
            yield inputs[rows], labels[rows]

    def eval_batches(self):
        return [self.held_out]

    def loss(self, model, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    def roles(self):
        return self.declared


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class Awkward(nn.Module):
    """No layer called fc, a frozen first layer, batch norm, and two tied square layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.answer = nn.Linear(8, 3)

    def forward(self, points):
        hidden = torch.tanh(self.norm(self.stem(points)))
        hidden = torch.tanh(self.second(torch.tanh(self.first(hidden))))
        return self.answer(hidden)


def counted(task):
    """Let a task note, for every step, which tensors had moved since the step before."""
    seen = []
    loss = task.loss

    def watching(model, batch):
        if torch.is_grad_enabled():
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return loss(model, batch)

    task.loss = watching
    return seen
