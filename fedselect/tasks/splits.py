"""How a data set is dealt to clients: a split's settings, the deal, and its manifest.

Owns who gets which rows, and what is changed in a client's world (``changes``). A deal is a pure
function of data set, settings and seed; as numpy's streams may change between its releases, what
was dealt is saved as a manifest, and what is run is what the manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically
from fedselect.policy import Settings
from fedselect.scalars import Real, Whole
from fedselect.tasks.arrays import IntVector, LabelSkew
from fedselect.tasks.changes import Change, World, worlds
from fedselect.tasks.datasets import Dataset

Rows = tuple[IntVector, IntVector]  # numbers of the training and of the held-out examples


class Split(Settings):
    """What a client gets. ``train`` and ``test`` count examples, of each class or of the client.

    - ``group``: the data set's own groups, the largest first if there are more than ``clients``.
      With ``share`` that part of what is not held out, of each block, and all that is held out.
    - ``classes``: ``classes`` distinct ones each, ``train`` and ``test`` of each class; all of them
      for an even split.
    - ``dirichlet``: label shares drawn from Dir(``alpha``, …) (Hsu et al. 2019, arXiv 1909.06335),
      the same for both parts.
    - ``shards``: the examples sorted by label, cut into pieces, ``shards`` pieces each (McMahan et
      al., AISTATS 2017, arXiv 1602.05629), held-out ones in the same shares.

    ``world`` is what is changed from client to client (``changes``).
    """

    kind: Literal["group", "classes", "dirichlet", "shards"]
    clients: Whole | None = Field(None, ge=1, le=100_000)
    train: Whole = Field(0, ge=0)
    test: Whole = Field(0, ge=0)
    per: Literal["class", "client"] = "client"
    share: Real | None = Field(None, gt=0, le=1)
    classes: Whole | None = Field(None, ge=1)
    alpha: Real | None = Field(None, gt=0, le=1e6)
    shards: Whole | None = Field(None, ge=1)
    world: World = "same"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        needs = {"classes": self.classes, "dirichlet": self.alpha, "shards": self.shards}
        if self.kind in needs and needs[self.kind] is None:
            raise ValueError(f"a split by {self.kind} needs its number")
        if self.kind != "group" and self.clients is None:
            raise ValueError("say how many clients there are")
        if self.share is None and 0 in (self.train, self.test):
            raise ValueError("say how many examples a client trains on and is tested on")
        if self.share is not None and self.kind != "group":
            raise ValueError("a share is drawn of the data set's own groups only")
        return self


class ClientRows(Settings):
    """One client's rows of the data set, and what is changed in them."""

    train: tuple[Whole, ...] = Field(min_length=1)
    test: tuple[Whole, ...] = Field(min_length=1)
    change: Change = Change()


class Manifest(Settings):
    """A split that was dealt: which rows of which data set (by digest) each client has."""

    format: Literal["fedselect-split/1"] = "fedselect-split/1"
    dataset: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    split: Split
    seed: Whole = Field(ge=0, lt=2**63)
    clients: dict[str, ClientRows] = Field(min_length=1)

    def verify(self, dataset: Dataset) -> None:
        """Refuse another data set, rows that it has not, and rows that are dealt twice.

        Raises:
            FedSelectError: ``split_invalid``.
        """
        if dataset.digest != self.digest:
            raise _error(
                f"this split is of {self.dataset} with digest {self.digest[:12]}…, but the data "
                f"here have {dataset.digest[:12]}…"
            )
        every = np.array(
            [row for rows in self.clients.values() for row in (*rows.train, *rows.test)]
        )
        if every.min() < 0 or every.max() >= len(dataset.labels):
            raise _error("this split names rows that the data set has not")
        if len(np.unique(every)) < len(every):
            raise _error("this split deals a row twice")
        for name, rows in self.clients.items():
            rows.change.check(dataset, name)

    def save(self, path: Path) -> None:
        """Write it as JSON, a client a line."""
        head = self.model_dump(mode="json", exclude={"clients"})
        facts = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
        lines = ",\n  ".join(
            f"{json.dumps(name)}: {rows.model_dump_json(exclude_defaults=True)}"
            for name, rows in self.clients.items()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f'{{{facts},\n "clients": {{\n  {lines}\n }}\n}}\n'.encode())


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; :meth:`Manifest.verify` holds it to the data.

    Raises:
        FedSelectError: ``split_invalid``, no such file, or not a manifest.
    """
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _error(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _error(f"{path} is no split manifest: {place}: {first['msg']}") from error


def deal(dataset: Dataset, split: Split, *, seed: int, noun: str = "client") -> Manifest:
    """Deal a data set to clients, named ``noun-00`` and so on (of groups, by their number).

    Raises:
        FedSelectError: ``split_invalid``, the data set has too few examples, or no groups.
    """
    dealt = dict((_by_group if split.kind == "group" else _made)(dataset, split, seed))
    for number, parts in dealt.items():
        if not all(map(len, parts)):
            raise _error(f"{noun}-{number:02d} would have no examples to train on, or to test on")
    changes = worlds(split.world, len(dealt), dataset.classes, seed)
    clients = {
        f"{noun}-{number:02d}": ClientRows(
            train=tuple(map(int, train)), test=tuple(map(int, test)), change=change
        )
        for (number, (train, test)), change in zip(dealt.items(), changes, strict=True)
    }
    manifest = Manifest(
        dataset=dataset.name, digest=dataset.digest, split=split, seed=seed, clients=clients
    )
    manifest.verify(dataset)
    return manifest


# --- natural groups ------------------------------------------------------------------------------


def _by_group(dataset: Dataset, split: Split, seed: int) -> Iterator[tuple[int, Rows]]:
    groups = dataset.groups
    if groups is None:
        raise _error(f"{dataset.name} does not say whose its examples are; split it otherwise")
    numbers, sizes = np.unique(groups, return_counts=True)
    if split.clients is not None and split.clients > len(numbers):
        raise _error(f"{dataset.name} has {len(numbers)} groups, not {split.clients}")
    largest = np.lexsort((numbers, -sizes))[: split.clients]
    for group in np.sort(numbers[largest]):
        rng = np.random.default_rng([seed, int(group)])
        mine = np.flatnonzero(groups == group)
        if split.share is not None:
            yield int(group), _shares(dataset, mine, split.share, rng)
        else:
            yield int(group), _counted(dataset.labels, mine, split, rng)


def _shares(dataset: Dataset, mine: IntVector, share: float, rng: np.random.Generator) -> Rows:
    if dataset.held_out is None:
        raise _error(f"{dataset.name} has no test part of its own; give train and test")
    blocks = dataset.blocks if dataset.blocks is not None else np.zeros(len(dataset.labels), int)
    train = []
    for block in np.unique(blocks[mine]):
        rows = mine[(blocks[mine] == block) & ~dataset.held_out[mine]]
        train.append(rows[np.sort(rng.permutation(len(rows))[: round(share * len(rows))])])
    return np.concatenate(train), mine[dataset.held_out[mine]]


def _counted(labels: IntVector, mine: IntVector, split: Split, rng: np.random.Generator) -> Rows:
    """``train`` and ``test`` rows, of each class that the group has or of all together."""
    pools = [mine]
    if split.per == "class":
        pools = [mine[labels[mine] == label] for label in np.unique(labels[mine])]
    drawn = [rng.permutation(pool)[: split.train + split.test] for pool in pools]
    if min(map(len, drawn)) < split.train + split.test:
        raise _error(
            f"a group has only {min(map(len, drawn))} examples where {split.train} are to train "
            f"on and {split.test} to test on"
        )
    train, test = zip(*((rows[: split.train], rows[split.train :]) for rows in drawn), strict=True)
    return np.concatenate(train), np.concatenate(test)


# --- made splits ---------------------------------------------------------------------------------


def _made(dataset: Dataset, split: Split, seed: int) -> Iterator[tuple[int, Rows]]:
    """Clients in order; both parts come from one pool where the data set has no test part."""
    every = np.arange(len(dataset.labels))
    kept, held = every, every
    if dataset.held_out is not None:
        kept, held = every[~dataset.held_out], every[dataset.held_out]
    wanted = _counts(dataset, split, seed)
    rng = np.random.default_rng([seed, 1])
    train = _take(dataset.labels, kept, wanted[0], rng)
    if dataset.held_out is None:
        held = np.setdiff1d(held, np.concatenate(train))
    test = _take(dataset.labels, held, wanted[1], rng)
    yield from enumerate(zip(train, test, strict=True))


def _counts(dataset: Dataset, split: Split, seed: int) -> tuple[IntVector, IntVector]:
    """How many examples of each class each client trains on, and is tested on: (clients, classes)
    each.
    """
    clients, classes = split.clients or 1, dataset.classes
    rng = np.random.default_rng([seed, 2])
    if split.kind == "classes":
        skew = LabelSkew(clients, min(split.classes or classes, classes), classes, seed)
        has = np.zeros((clients, classes), dtype=np.int64)
        for row, mine in zip(has, skew.labels(), strict=True):
            row[mine] = 1
        return has * split.train, has * split.test
    if split.kind == "dirichlet":
        shares = rng.dirichlet(np.full(classes, split.alpha), size=clients)
        return _rounded(shares * split.train), _rounded(shares * split.test)
    # Shards: an even sample sorted by label is cut; only how many of which label fall into a
    # client's pieces matters, the rows themselves are drawn like all others.
    pieces = clients * (split.shards or 1)
    line = np.sort(np.arange(clients * split.train) % classes)
    cut = np.array_split(line, pieces)
    dealt = rng.permutation(pieces).reshape(clients, -1)
    train = np.stack(
        [np.bincount(np.concatenate([cut[p] for p in mine]), minlength=classes) for mine in dealt]
    )
    return train, _rounded(train / train.sum(1, keepdims=True) * split.test)


def _rounded(wanted: np.ndarray) -> IntVector:
    """Whole numbers with the same sum in each row: the largest remainders are rounded up."""
    down = np.floor(wanted + 1e-9).astype(np.int64)
    short = np.rint(wanted.sum(1)).astype(np.int64) - down.sum(1)
    for row, more, exact in zip(down, short, wanted, strict=True):
        row[np.argsort(row - exact, kind="stable")[:more]] += 1
    return down


def _take(
    labels: IntVector, rows: IntVector, wanted: IntVector, rng: np.random.Generator
) -> list[IntVector]:
    """Rows of each client as wanted (clients, classes), by class; none is dealt twice."""
    found: list[list[IntVector]] = [[] for _ in wanted]
    for label, column in enumerate(wanted.T):
        pool = rng.permutation(rows[labels[rows] == label])
        if column.sum() > len(pool):
            raise _error(
                f"the clients together need {column.sum()} examples of class {label}, there are "
                f"{len(pool)}"
            )
        for mine, part in zip(found, np.split(pool, np.cumsum(column)), strict=False):
            mine.append(part)
    return [np.concatenate(mine) for mine in found]


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="split_invalid")
