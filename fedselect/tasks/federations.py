"""Named federations, and those of a saved split: a data set, how it is dealt, and a small model.

Owns the list and the task of one client. A new one is an entry of ``FEDERATIONS`` (its clients are
named in ``fedselect.tasks``, which must not load torch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from fedselect.errors import FedSelectError
from fedselect.task import Task
from fedselect.tasks.arrays import ArrayTask, Examples, mlp
from fedselect.tasks.changes import World
from fedselect.tasks.datasets import CACHE, Dataset
from fedselect.tasks.sources import open_dataset
from fedselect.tasks.splits import ClientRows, Manifest, Split, deal, read_manifest


@dataclass(frozen=True)
class Federation:
    """A data set by name, its split, and what a client is called."""

    dataset: str
    split: Split
    noun: str = "site"


def _few(world: World) -> Federation:
    """Five images of each class for each of 20 clients, in such a world."""
    split = Split(kind="classes", clients=20, classes=10, train=5, test=20, world=world)
    return Federation("fashion-mnist", split)


FEDERATIONS: Mapping[str, Federation] = {
    "watch": Federation("watch", Split(kind="group", share=0.25), "subject"),
    "vowel": Federation("vowel", Split(kind="group", per="class", train=2, test=4), "speaker"),
    "chem97": Federation(
        "chem97", Split(kind="group", clients=20, train=60, test=200), "authority"
    ),
    "fashion-20x5": Federation(
        "fashion-mnist", Split(kind="classes", clients=20, classes=5, train=10, test=50)
    ),
    "fashion-labels": _few("labels"),
    "fashion-rotation": _few("rotation"),
    "fashion-contrast": _few("contrast"),
    "fashion-inversion": _few("inversion"),
    "fashion-mixed": _few("mixed"),
    "fashion-dirichlet": Federation(
        "fashion-mnist", Split(kind="dirichlet", clients=20, alpha=0.3, train=50, test=200)
    ),
    "fashion-shards": Federation(
        "fashion-mnist", Split(kind="shards", clients=20, shards=2, train=50, test=200)
    ),
    "mnist": Federation(
        "mnist-10k", Split(kind="classes", clients=20, classes=5, train=10, test=50)
    ),
    "digits-dirichlet": Federation(
        "digits", Split(kind="dirichlet", clients=10, alpha=0.5, train=30, test=60)
    ),
    "digits-mixed": Federation(
        "digits",
        Split(kind="classes", clients=12, classes=10, train=3, test=8, world="mixed"),
    ),
}


class SplitTask(ArrayTask):
    """One client of a split; ``seed`` gives the starting weights, the same for all clients."""

    def __init__(self, dataset: Dataset, rows: ClientRows, *, seed: int) -> None:
        parts = (self._seen(dataset, rows, part) for part in (rows.train, rows.test))
        super().__init__(*parts, seed=seed)
        self._shape, self._classes = dataset.inputs.shape[1:], dataset.classes

    @staticmethod
    def _seen(dataset: Dataset, rows: ClientRows, part: tuple[int, ...]) -> Examples:
        """What the network is given, with images from -1 to 1: a negative is then −x."""
        inputs, labels = rows.change.apply(dataset.examples(np.array(part)))
        return (2 * inputs - 1 if dataset.inputs.dtype == np.uint8 else inputs), labels

    def network(self) -> nn.Module:
        """For series the watch's CNN, for colour images one in two dimensions, else an MLP."""
        if len(self._shape) == 2 and self._shape[0] < 8 < self._shape[1]:
            return Convolutions(1, self._shape[0], self._classes)
        if len(self._shape) == 3:
            return Convolutions(2, self._shape[0], self._classes)
        return mlp(math.prod(self._shape), self._classes)


class Convolutions(nn.Module):
    """Two convolutions with ReLU, the mean over all places, one linear layer."""

    def __init__(self, dimensions: int, channels: int, classes: int) -> None:
        super().__init__()
        layer = nn.Conv1d if dimensions == 1 else nn.Conv2d
        width = 7 if dimensions == 1 else 5
        self.conv1 = layer(channels, 16, width, stride=2)
        self.conv2 = layer(16, 32, width, stride=2)
        self.out = nn.Linear(32, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes) of inputs (n, channels, …)."""
        hidden = nn.functional.relu(self.conv1(inputs))
        hidden = nn.functional.relu(self.conv2(hidden))
        logits: Tensor = self.out(hidden.flatten(2).mean(-1))
        return logits


def federation(name: str) -> Federation:
    """A federation by name.

    Raises:
        FedSelectError: ``task_invalid``, there is none.
    """
    if name not in FEDERATIONS:
        known = ", ".join(FEDERATIONS)
        raise FedSelectError(
            f"there is no federation {name!r}; there are {known}", code="task_invalid"
        )
    return FEDERATIONS[name]


@lru_cache(maxsize=8)  # every client of a simulation asks for the same
def dealt(name: str, seed: int, cache: Path = CACHE) -> Manifest:
    """The split of a federation for a seed.

    Raises:
        FedSelectError: no such federation, or its data are not here.
    """
    found = federation(name)
    dataset = open_dataset(found.dataset, cache)
    return deal(dataset, found.split, seed=seed, noun=found.noun)


def split_tasks(manifest: Manifest, *, seed: int, cache: Path = CACHE) -> dict[str, Task]:
    """The tasks of all clients of a split, by name; ``seed`` gives the starting weights.

    Raises:
        FedSelectError: the data are not here, or not those of the split.
    """
    dataset = open_dataset(manifest.dataset, cache)
    manifest.verify(dataset)
    return {name: SplitTask(dataset, rows, seed=seed) for name, rows in manifest.clients.items()}


def client_task(
    federation: str, client: int, *, seed: int = 0, cache: str | Path = CACHE
) -> SplitTask:
    """One client of a named federation, by its number; ``seed`` draws split and weights.

    Raises:
        FedSelectError: no such federation or client, or its data are not here.
    """
    manifest = dealt(federation, seed, Path(cache))
    name = f"{FEDERATIONS[federation].noun}-{client:02d}"
    return _task(manifest, name, seed, Path(cache))


def manifest_task(
    manifest: str, client: str, *, seed: int | None = None, cache: str | Path = CACHE
) -> SplitTask:
    """One client, by name, of the split that a manifest file holds; ``seed`` draws the weights,
    that of the manifest if None.

    Raises:
        FedSelectError: no such file or client, or its data are not here.
    """
    found = _read(Path(manifest), Path(cache))
    return _task(found, client, found.seed if seed is None else seed, Path(cache))


@lru_cache(maxsize=4)
def _read(path: Path, cache: Path) -> Manifest:
    manifest = read_manifest(path)
    manifest.verify(open_dataset(manifest.dataset, cache))
    return manifest


def _task(manifest: Manifest, name: str, seed: int, cache: Path) -> SplitTask:
    if name not in manifest.clients:
        known = ", ".join(manifest.clients)
        raise FedSelectError(f"there is no client {name}; there are {known}", code="task_invalid")
    return SplitTask(open_dataset(manifest.dataset, cache), manifest.clients[name], seed=seed)
