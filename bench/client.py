"""The client's own arithmetic: against plain SGD, and against the authors' way to choose masks.

The authors' rule is written from its description (ALGORITHM: per tensor, sort all changes of what
is shared, take those from the cut upwards); the benchmark first proves that both choose the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import Figure, Outcome, Room, bench, medians
from fedselect import Mask, RunSettings
from fedselect.policies import Policy, Training
from fedselect.scores import Seen
from fedselect.selection import choose
from fedselect.space import ParameterSpace
from fedselect.task import Batch, Task
from fedselect.training import TorchLearner

OFFICIAL = Policy(personal="learned", start_round=0, growth=0.25, limit=0.8, limit_mode="official")


class Noise(Task):
    """Batches of noise, the same in every pass: what is measured is arithmetic."""

    def __init__(self, build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int) -> None:
        self._build = build
        rng = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 10, (batch,), generator=rng)
        self._batch = (torch.randn((batch, *shape), generator=rng), labels)

    def build_model(self) -> nn.Module:
        return self._build()

    def train_batches(self) -> Iterator[Batch]:
        yield self._batch

    eval_batches = train_batches

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    sizes = (3072, 2048, 2048, 256, 10)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *(m for layer in layers for m in (layer, nn.ReLU())))


@bench(
    quick={"steps": 10, "repeats": 3, "large": False},
    full={"steps": 20, "repeats": 7, "large": True},
    minutes=(1, 10),
)
def client(_: Room, *, steps: int, repeats: int, large: bool) -> Outcome:
    """A participation, and the growth of a mask by itself."""
    torch.set_num_threads(1)
    tasks = {"CNN": Noise(cnn, (1, 28, 28), 20)}
    if large:
        tasks["MLP"] = Noise(mlp, (3, 32, 32), 128)
    figures = []
    for name, task in tasks.items():
        learner = TorchLearner(task)
        what = f"{name} of {learner.space.dim / 1e6:.2g} M"
        figures += [*_training(what, learner, steps, repeats), *_growing(what, learner, repeats)]
    return Outcome(figures)


# --- a participation against plain SGD ------------------------------------------------------------


def _training(what: str, learner: TorchLearner, steps: int, repeats: int) -> list[Figure]:
    base = learner.initial()
    plain = learner.task.build_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)

    def sgd() -> None:
        (batch,) = learner.task.train_batches()
        for _ in range(steps):
            optimizer.zero_grad()
            learner.task.loss(plain, batch).backward()
            optimizer.step()

    def ours(schedule: str) -> Callable[[], object]:
        policy = OFFICIAL.model_copy(update={"schedule": schedule, "interval": 1})
        training = Training(steps=steps, learning_rate=0.01)
        settings = RunSettings(policy=policy, training=training, rounds=10)
        state = learner.participate(None, base, settings=settings, seed=0).state
        state = learner.participate(state, base, settings=settings, seed=1).state
        return lambda: learner.participate(state, base, settings=settings, seed=2)

    subjects = {"sgd": sgd, "joint": ours("joint"), "alternating": ours("alternating")}
    found = medians(subjects, repeats=repeats)
    against = "plain SGD"
    return [
        Figure(f"{what}, {steps} steps, {each}", found[each], against, found["sgd"], 1.05)
        for each in ("joint", "alternating")
    ]


# --- the growth of a mask against the authors' rule ----------------------------------------------


def _growing(what: str, learner: TorchLearner, repeats: int) -> list[Figure]:
    space = learner.space
    # Changes that are all different: of equal ones the authors take all, we take exactly k.
    reference = np.zeros(space.dim, np.float32)
    theta = np.random.default_rng(0).permutation(space.dim).astype(np.float32) + 1
    mask = Mask.initial(space)
    state = {"theta": space.unflatten(theta), "reference": space.unflatten(reference)}
    tensors = {k: {n: torch.from_numpy(v) for n, v in each.items()} for k, each in state.items()}
    figures = []
    for step in range(1, 4):
        theirs = _tensors(space, mask)
        grown = _ours(space, theta, reference, mask)
        chosen = _authors(tensors, theirs)
        same = all(torch.equal(chosen[n], t) for n, t in _tensors(space, grown).items())
        assert same, f"{what}: the masks differ after growth {step}"
        found = medians(
            {
                "ours": partial(_ours, space, theta, reference, mask),
                "authors": partial(_authors, tensors, theirs),
            },
            repeats=repeats,
        )
        text = f"{what}, growth {step}, equal masks"
        figures.append(Figure(text, found["ours"], "the authors' rule", found["authors"], 2 / 3))
        mask = grown
    return figures


def _ours(space: ParameterSpace, theta: np.ndarray, reference: np.ndarray, mask: Mask) -> Mask:
    return choose(OFFICIAL, Seen(theta, reference), mask=mask, space=space)


def _tensors(space: ParameterSpace, mask: Mask) -> dict[str, Tensor]:
    """A mask as the authors keep it: a dense float tensor for each parameter."""
    found = space.unflatten(mask.to_bool().astype(np.float32))
    return {name: torch.from_numpy(values) for name, values in found.items()}


def _authors(state: dict[str, dict[str, Tensor]], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    grown = dict(masks)
    for name, mask in masks.items():
        if "weight" not in name or mask.mean() > OFFICIAL.limit:
            continue
        delta = (state["theta"][name] - state["reference"][name]).abs()
        shared = delta[mask == 0]
        ordered, _ = torch.sort(shared)
        cut = ordered[round((1 - OFFICIAL.growth) * shared.numel())]
        grown[name] = torch.where(delta >= cut, torch.ones_like(mask), mask)
    return grown
