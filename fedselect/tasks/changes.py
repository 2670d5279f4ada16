"""What may differ from client to client besides its rows: label meanings and how images look.

Owns the changes and how they are dealt. They are synthetic diagnostics: they show what a rule does
where one knows what differs, and prove nothing about real data.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedselect.errors import FedSelectError
from fedselect.policy import Settings
from fedselect.scalars import Flag, Real, Whole
from fedselect.tasks.arrays import Examples
from fedselect.tasks.datasets import Dataset

World = Literal["same", "labels", "rotation", "contrast", "inversion", "mixed"]
CYCLE = 4  # labels that a client takes for one another
CONTRASTS = (1.0, 0.5, 0.25)


class Change(Settings):
    """A client's world: ``labels[c]`` is what it calls class c; images are turned by quarters,
    made flatter around grey, or turned into their negative. Inputs run from 0 to 1.
    """

    labels: tuple[Whole, ...] | None = None
    quarter_turns: Whole = Field(0, ge=0, le=3)
    contrast: Real = Field(1.0, gt=0, le=1)
    inverted: Flag = False

    def apply(self, examples: Examples) -> Examples:
        """The same examples as this client sees them."""
        inputs, labels = examples
        if self.quarter_turns:
            inputs = np.rot90(inputs, self.quarter_turns, axes=(-2, -1)).copy()
        if self.contrast != 1:
            inputs = 0.5 + self.contrast * (inputs - 0.5)
        if self.inverted:
            inputs = 1 - inputs
        return inputs, labels if self.labels is None else np.array(self.labels)[labels]

    def check(self, dataset: Dataset, client: str) -> None:
        """Refuse a change that the data set has no room for.

        Raises:
            FedSelectError: ``split_invalid``.
        """
        if self.labels is not None and sorted(self.labels) != list(range(dataset.classes)):
            raise _error(f"the labels of {client} are no permutation of {dataset.classes} classes")
        if self.quarter_turns and dataset.inputs.ndim < 3:
            raise _error(f"{dataset.name} has no images that could be turned ({client})")


def worlds(world: World, clients: int, classes: int, seed: int) -> list[Change]:
    """One change for each client.

    ``labels``: each its own cycle of 4 labels; ``rotation``, ``contrast``, ``inversion``: the
    values dealt evenly; ``mixed``: a third as it is, a third with labels, a third inverted.

    Raises:
        FedSelectError: ``split_invalid``, too few classes for a cycle.
    """
    rng = np.random.default_rng([seed, 3])

    def dealt(values: int) -> list[int]:
        return [int(value) for value in rng.permutation(np.arange(clients) % values)]

    if world == "rotation":
        return [Change(quarter_turns=turns) for turns in dealt(4)]
    if world == "contrast":
        return [Change(contrast=CONTRASTS[place]) for place in dealt(len(CONTRASTS))]
    if world == "inversion":
        return [Change(inverted=bool(half)) for half in dealt(2)]
    if world == "labels":
        return [Change(labels=_cycle(classes, rng)) for _ in range(clients)]
    if world == "mixed":
        kinds = dealt(3)
        return [
            Change(labels=_cycle(classes, rng) if kind == 1 else None, inverted=kind == 2)
            for kind in kinds
        ]
    return [Change()] * clients


def _cycle(classes: int, rng: np.random.Generator) -> tuple[int, ...]:
    if classes < CYCLE:
        raise _error(f"{CYCLE} labels cannot be confused where there are {classes} classes")
    chosen = rng.permutation(classes)[:CYCLE]
    labels = np.arange(classes)
    labels[chosen] = np.roll(chosen, 1)
    return tuple(map(int, labels))


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="split_invalid")
