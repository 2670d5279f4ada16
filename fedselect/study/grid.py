"""A study's grid: which policies on which splits for which seeds, read from a TOML file.

Owns the grid's form and the cells it spans. Must not run anything, nor load torch.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedselect.errors import FedSelectError
from fedselect.policies import RunSettings, Training, preset
from fedselect.policy import Settings
from fedselect.scalars import Whole
from fedselect.tasks import SPLIT, example_clients

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
STUDY = "fedselect-study/1"
ALL = "*"
Reading = Literal["pre", "post", "better"]


def _one_line(text: str) -> str:
    # What looks like a page's mark would be taken for one when the page is written again.
    if "<!--" in text or "".join(text.splitlines()) != text:
        raise ValueError(f"a title is one line without <!--, not {text!r}")
    return text


Title = Annotated[str, AfterValidator(_one_line)]


class Pretrained(Settings):
    """What all policies of a split start from: a model of public data.

    The first ``clients`` in an order of the seed are not in the federation; one model is trained on
    their training data, put together, for so many ``steps``.
    """

    clients: Whole = Field(ge=1, le=100_000)
    steps: Whole = Field(ge=1, le=1_000_000)


class GridSplit(Settings):
    """A split by a name of its own: a federation of ``fedselect.tasks``, or ``split:FILE``.

    With ``policies`` only these run on it.
    """

    name: str = Field(pattern=NAME)
    task: str
    rounds: Whole = Field(ge=2, le=100_000)
    pretrained: Pretrained | None = None
    policies: tuple[str, ...] = ()

    def source(self) -> str:
        """What a key names as the task: its name, or of a saved split what its file holds.

        Raises:
            FedSelectError: ``study_invalid``, the file cannot be read.
        """
        if not self.task.startswith(SPLIT):
            return self.task
        path = Path(self.task.removeprefix(SPLIT))
        try:
            return SPLIT + hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise FedSelectError(f"{path} cannot be read: {error}", code="study_invalid") from error


class GridPolicy(Settings):
    """A policy by a name of its own: a preset with settings changed."""

    name: str = Field(pattern=NAME, max_length=64)
    preset: str
    settings: dict[str, Any] = Field(default_factory=dict)
    title: Title = ""


class Pair(Settings):
    """A difference to report: ``policy`` − ``against``, in one reading.

    The policy ``*`` stands for each that no such pair of the grid is against.
    """

    policy: str
    against: str
    reading: Reading = "better"

    @model_validator(mode="after")
    def _is_of_two(self) -> Self:
        if self.policy == self.against:
            raise ValueError(f"{self.policy} would be compared with itself")
        return self


class Grid(Settings):
    """All of a study. ``readings``: accuracies are means over so many last rounds.

    ``batch_orders`` above 1 runs each cell so often with the same data and weights in another order
    of batches, to see whether the same elements are chosen. ``section`` names the marks on the page
    that results go between. Policies are ranked by their mean over the splits of ``ranking``.
    """

    title: Title = "study"
    section: str = Field("results", pattern=NAME)
    seeds: tuple[Whole, ...] = Field(min_length=1)
    training: Training = Training(steps=20)
    readings: Whole = Field(3, ge=1, le=100)
    batch_orders: Whole = Field(1, ge=1, le=10)
    split: tuple[GridSplit, ...] = Field(min_length=1)
    policy: tuple[GridPolicy, ...] = Field(min_length=1)
    pair: tuple[Pair, ...] = ()
    ranking: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for entries in (self.split, self.policy):
            names = [each.name for each in entries]
            if len(set(names)) < len(names):
                raise ValueError(f"names must differ, not {', '.join(names)}")
        known = {each.name for each in self.policy}
        for pair in self.pair:
            if pair.against not in known or pair.policy not in known | {ALL}:
                raise ValueError(f"no policies {pair.policy} and {pair.against} to compare")
        unknown = {name for split in self.split for name in split.policies} - known
        unknown |= set(self.ranking) - {split.name for split in self.split}
        if unknown:
            raise ValueError(f"no policies or splits {', '.join(sorted(unknown))}")
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, not {', '.join(map(str, self.seeds))}")
        for split in self.split:
            if split.rounds < self.readings:
                raise ValueError(
                    f"{split.name} has {split.rounds} rounds, too few for {self.readings} readings"
                )
        return self

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair."""
        return (*self.named_pairs, *self.drawn_pairs)

    @property
    def named_pairs(self) -> tuple[Pair, ...]:
        """The pairs without ``*``."""
        return tuple(pair for pair in self.pair if pair.policy != ALL)

    @property
    def drawn_pairs(self) -> tuple[Pair, ...]:
        """What ``*`` stands for, one policy after the other."""
        drawn = [pair for pair in self.pair if pair.policy == ALL]
        rivals = {pair.against for pair in drawn}
        others = [each.name for each in self.policy if each.name not in rivals]
        return tuple(p.model_copy(update={"policy": name}) for name in others for p in drawn)

    def cells(self) -> Iterator[Cell]:
        """Every combination, one seed after the other, so that a study can be stopped early."""
        for seed, split in product(self.seeds, self.split):
            for policy in self.policy:
                if not split.policies or policy.name in split.policies:
                    yield Cell(self, split, policy, seed)


@dataclass(frozen=True)
class Cell:
    """One policy on one split for one seed."""

    grid: Grid
    split: GridSplit
    policy: GridPolicy
    seed: int

    @cached_property
    def settings(self) -> RunSettings:
        """The run's settings.

        A policy that fine-tunes spends its last budget on that: it has one round less, so that all
        take as many gradient steps.
        """
        rounds = self.split.rounds
        policy = preset(
            self.policy.preset, rounds=rounds, **{**self.policy.settings, "name": self.policy.name}
        )
        return RunSettings(
            rounds=rounds - policy.finetune,
            seed=self.seed,
            policy=policy,
            training=self.grid.training,
        )

    @property
    def steps(self) -> int:
        """Gradient steps of each client."""
        steps = self.grid.training.steps
        if steps is None:
            raise FedSelectError("a study counts steps: give training.steps", code="study_invalid")
        return self.split.rounds * steps

    @cached_property
    def key(self) -> str:
        """What decides the result, as a digest: a cell with the same key need not run again."""
        document = {
            "study": STUDY,
            "task": self.split.source(),
            "settings": self.settings.model_dump(mode="json"),
            "readings": self.grid.readings,
            "batch_orders": self.grid.batch_orders,
        }
        if self.split.pretrained is not None:  # other keys are what they always were
            document["pretrained"] = self.split.pretrained.model_dump()
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def __str__(self) -> str:
        return f"{self.split.name}, {self.policy.name}, seed {self.seed}"


def read_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        FedSelectError: ``study_invalid``, with the place.
    """
    try:
        grid = Grid.model_validate(tomllib.loads(path.read_text()))
        for split in grid.split:
            _check_task(path, split)
        for cell in grid.cells():
            cell.settings  # noqa: B018  # its checks
            cell.steps  # noqa: B018
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedSelectError(f"{path} cannot be read: {error}", code="study_invalid") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "grid"
        raise FedSelectError(f"{path}: {place}: {first['msg']}", code="study_invalid") from error
    return grid


def _check_task(path: Path, split: GridSplit) -> None:
    """Before anything runs: a cell would find it too late."""
    try:
        example_clients(split.task)
    except FedSelectError as error:
        raise FedSelectError(f"{path}: {split.name}: {error}", code="study_invalid") from error
