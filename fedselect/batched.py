"""Training many clients of one small model at once, as one stacked model (``torch.vmap``).

Owns the batched step and what may be batched. A client draws the same batches under the same seed
as alone, and what comes before and after a training is the same code; only sums inside a step may
be taken in another order. Must not choose, aggregate, or know rounds and files.

Not batched, and trained one by one: models with buffers (batch norm), or that draw random numbers
(dropout), not in float32 on the CPU, or that torch cannot batch; and clients whose own first step
is another one than the batched one. All policies are batched, the gate's held-out losses and
choosing masks apart.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedselect.budgets import FINE_TUNING, LOCAL_ONLY, finishing, seeded, without_others
from fedselect.errors import TrainingError
from fedselect.evidence import SQUARED_GRADIENT
from fedselect.following import Trained, conclude
from fedselect.gathering import Window
from fedselect.holdout import mapped
from fedselect.masks import Mask
from fedselect.moves import Moves
from fedselect.personal import Participation, PersonalState, derive_seed
from fedselect.policies import RunSettings, Training
from fedselect.space import FloatVector, Slot
from fedselect.task import Batch, Task
from fedselect.training import TorchLearner

ABREAST = 256  # clients in one stack, whose batches of a round are in memory together
CLOSE = 1e-3  # how far a first step may be from the client's own, as a part of its longest move
Rows = list[int]
Grads = Mapping[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One client's participation: its name, learner, state and seed."""

    name: str
    learner: TorchLearner
    state: PersonalState | None
    seed: int


@dataclass(frozen=True)
class Lesson:
    """One training from ``start`` (D,): what moves in each step, and on which batch.

    What moves is None for everything, else a vector (D,) of int32 with all bits or none.
    """

    learner: TorchLearner
    start: FloatVector
    steps: list[tuple[Tensor | None, Batch]]
    window: Window


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's garbage collector still, which thousands of batches would wake: it walks over
    all that torch has loaded, for longer than many steps take, and finds nothing to free.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Loss(nn.Module):
    """A task's loss as a module, so that the model in it can be called with other weights."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model, batch)


class Together:
    """All clients of a run, to be trained side by side with the model and loss of the first.

    Raises:
        TrainingError: they cannot be; the text says why.
    """

    def __init__(self, learners: Sequence[TorchLearner], settings: RunSettings) -> None:
        self._first = first = learners[0]
        self._settings = settings
        self._space = first.space
        self._slots = _parameters(first)
        learned = {slot.offset for slot, _ in first.trainable}
        self._learned = {n: slot for n, slot in self._slots.items() if slot.offset in learned}
        loss = _Loss(first.task, first.model)

        def one(weights: Grads, batch: Batch) -> Tensor:
            named = {f"model.{name}": value for name, value in weights.items()}
            found: Tensor = functional_call(loss, named, (batch,))
            return found

        self._losses = vmap(one, randomness="error")
        self._check(learners)

    def participate(self, jobs: Sequence[Job], base: FloatVector) -> dict[str, Participation]:
        """What :meth:`~fedselect.training.TorchLearner.participate` does, for each job by name.

        Raises:
            TrainingError: no batches, or a result that is not finite.
        """
        found: dict[str, Participation] = {}
        for part in _parts(jobs):
            found |= self._participate(part, base)
        return found

    def finish(
        self,
        states: Mapping[str, PersonalState],
        learners: Mapping[str, TorchLearner],
        *,
        base: FloatVector,
        origin: FloatVector,
    ) -> dict[str, dict[str, FloatVector]]:
        """By client, the two models that an evaluation trains: ``local_only`` and ``post``."""
        names = sorted(states)
        alone = self._alone({n: states[n].participations for n in names}, learners, origin)
        post = self._finished(states, learners, base)
        return {name: {"local_only": alone[name], "post": post[name]} for name in names}

    # --- trainings -------------------------------------------------------------------------------

    @_uncollected()
    def _participate(self, jobs: Sequence[Job], base: FloatVector) -> dict[str, Participation]:
        settings = self._settings
        begun = [job.learner.begin(job.state, base, settings) for job in jobs]
        own: list[Lesson] = []
        main: list[Lesson] = []
        examples = []
        for job, (state, window) in zip(jobs, begun, strict=True):
            with seeded(job.seed):  # in the order in which one client alone draws
                if settings.policy.proximal is not None:
                    pull = Window(anchor=torch.tensor(base))
                    start = base if state.own is None else state.own
                    own.append(self._lesson(job.learner, start, state.mask, pull))
                main.append(self._lesson(job.learner, state.merge(base), state.mask, window))
                examples.append(job.learner.task.examples())
        second = [theta for theta, _ in self._train(own, settings)]
        found = {}
        for i, (theta, squares) in enumerate(self._train(main, settings)):
            job, state, start = jobs[i], begun[i][0], main[i].start
            if squares is not None:
                told = state.evidence.with_terms(SQUARED_GRADIENT, squares, len(main[i].steps))
                state = replace(state, evidence=told)
            done = Trained(start, theta, second[i] if second else None, examples[i])
            found[job.name] = conclude(
                state, done, policy=settings.policy, space=self._space, seed=job.seed
            )
        return found

    def _alone(
        self, counts: Mapping[str, int], learners: Mapping[str, TorchLearner], origin: FloatVector
    ) -> dict[str, FloatVector]:
        """The local-only baseline, for as many participations as each client has taken."""
        settings = without_others(self._settings)
        budgets = {name: count + self._settings.policy.finetune for name, count in counts.items()}
        theta = dict.fromkeys(counts, origin)
        everything = Mask.full(self._space.dim)
        for number in range(1, max(budgets.values()) + 1):
            seed = derive_seed(self._settings, LOCAL_ONLY, number)
            still = {name: learners[name] for name, budget in budgets.items() if budget >= number}
            for part in _parts(list(still)):
                starts = {name: (theta[name], everything, seed) for name in part}
                theta |= self._trained(starts, still, settings)
        return theta

    def _finished(
        self,
        states: Mapping[str, PersonalState],
        learners: Mapping[str, TorchLearner],
        base: FloatVector,
    ) -> dict[str, FloatVector]:
        if not self._settings.policy.finetune:
            return {n: s.theta if s.own is None else s.own for n, s in states.items()}
        settings = finishing(self._settings)
        found: dict[str, FloatVector] = {}
        for part in _parts(sorted(states)):
            starts = {}
            for name in part:
                state = states[name]
                seed = derive_seed(self._settings, FINE_TUNING, state.participations)
                starts[name] = state.merge(base), state.mask, seed
            found |= self._trained(starts, learners, settings)
        return found

    @_uncollected()
    def _trained(
        self,
        starts: Mapping[str, tuple[FloatVector, Mask, int]],
        learners: Mapping[str, TorchLearner],
        settings: RunSettings,
    ) -> dict[str, FloatVector]:
        """The model of each client after one training, from where, with which mask and seed."""
        lessons = [self._drawn(learners[n], *start, settings) for n, start in starts.items()]
        trained = self._train(lessons, settings)
        return {name: theta for name, (theta, _) in zip(starts, trained, strict=True)}

    # --- lessons ---------------------------------------------------------------------------------

    def _drawn(
        self,
        learner: TorchLearner,
        start: FloatVector,
        mask: Mask,
        seed: int,
        settings: RunSettings,
    ) -> Lesson:
        learner.task.batch_size = settings.training.batch_size
        with seeded(seed):
            return self._lesson(learner, start, mask, Window(), settings)

    def _lesson(
        self,
        learner: TorchLearner,
        start: FloatVector,
        mask: Mask,
        window: Window,
        settings: RunSettings | None = None,
    ) -> Lesson:
        """Draw all batches of a training; torch is seeded by the caller."""
        slots = {id(parameter): slot for slot, parameter in learner.trainable}
        steps: list[tuple[Tensor | None, Batch]] = []
        for moves, batches in learner.phases(settings or self._settings, mask, window):
            bits = self._bits(moves, slots)
            steps += [(bits, batch) for batch in batches]
        return Lesson(learner, start, steps, window)

    def _bits(self, moves: Moves, slots: Mapping[int, Slot]) -> Tensor | None:
        if len(moves) == len(slots) and all(bits is None for _, bits in moves):
            return None
        flat = torch.zeros(self._space.dim, dtype=torch.int32)
        for parameter, bits in moves:
            slot = slots[id(parameter)]
            flat[slot.offset : slot.stop] = -1 if bits is None else bits.reshape(-1)
        return flat

    # --- the batched step ------------------------------------------------------------------------

    def _train(
        self, lessons: Sequence[Lesson], settings: RunSettings
    ) -> list[tuple[FloatVector, FloatVector | None]]:
        """The trained model (D,) of each lesson, and its squared gradients if they are wanted."""
        if not lessons:
            return []
        theta = torch.from_numpy(np.stack([lesson.start for lesson in lessons]))
        gathers = [lesson.window.squares is not None for lesson in lessons]
        squares = torch.zeros_like(theta) if any(gathers) else None
        for number in range(max(len(lesson.steps) for lesson in lessons)):
            for rows, batch in _stacked(lessons, number):
                part = _Part(theta, squares, [lessons[row] for row in rows], rows)
                self._step(part, batch, number, settings)
        for lesson, found in zip(lessons, theta.numpy(), strict=True):
            lesson.learner.check_finite(found)
        models = [row.copy() for row in theta.numpy()]
        if squares is None:
            return [(model, None) for model in models]
        sums = squares.numpy()
        return [(m, sums[i].copy() if gathers[i] else None) for i, m in enumerate(models)]

    def _step(self, part: _Part, batch: Batch, number: int, settings: RunSettings) -> None:
        """One step of plain SGD of every client in it, as ``TorchLearner`` takes it of one."""
        training, pull = settings.training, settings.policy.proximal
        theta = part.theta
        weights = {name: _view(theta, slot).detach() for name, slot in self._slots.items()}
        moving = {name: weights[name] for name in self._learned}
        grads = self._grads(weights, batch)
        if training.clip_norm is not None:
            _clip(grads, training.clip_norm)
        bits, anchor, rates = part.bits(number), part.anchor(), part.rates()
        for name, slot in self._learned.items():
            step = grads[name]
            if part.squares is not None:
                _view(part.squares, slot).addcmul_(step, step)
            if anchor is not None and pull is not None:
                aim = anchor[slot.offset : slot.stop].view(slot.shape)
                step.add_(moving[name] - aim, alpha=pull)
            if rates is not None:
                step.mul_(_view(rates, slot))
            if bits is not None:
                step.view(torch.int32).bitwise_and_(_view(bits, slot))
            moving[name].add_(step, alpha=-training.learning_rate)
        part.keep()

    def _grads(self, weights: Grads, batch: Batch) -> Grads:
        """Of each client's own loss: the gradient of a sum in which it has a term of its own."""
        leaves = {name: weights[name].detach().requires_grad_() for name in self._learned}
        total = self._losses({**weights, **leaves}, batch).sum()
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    # --- what may be batched ---------------------------------------------------------------------

    def _check(self, learners: Sequence[TorchLearner]) -> None:
        """See that a first step of each client is the same in company as it is alone."""
        training = self._settings.training
        once = Training(
            steps=1, batch_size=training.batch_size, learning_rate=training.learning_rate
        )
        probe = without_others(self._settings).model_copy(update={"training": once})
        nothing = Mask.empty(self._space.dim)
        for part in _parts(learners):
            lessons = [self._drawn(each, each.initial(), nothing, 0, probe) for each in part]
            try:
                found = self._train(lessons, probe)
            except RuntimeError as error:  # torch says in words what it cannot batch
                first = str(error).strip().splitlines()[0]
                raise TrainingError(f"torch cannot batch this model: {first}") from error
            for lesson, (theta, _) in zip(lessons, found, strict=True):
                with seeded(0):
                    alone = lesson.learner.train_once(lesson.start, probe)
                _compare(lesson.start, alone, theta)


@dataclass
class _Part:
    """The clients of a step whose batches have one shape: their rows of the whole stack."""

    whole: Tensor
    sums: Tensor | None
    lessons: list[Lesson]
    rows: Rows

    def __post_init__(self) -> None:
        self.theta, self.squares = self._mine(self.whole), self.sums
        if self.sums is not None:
            self.squares = self._mine(self.sums)

    def keep(self) -> None:
        """Put a copy back where it came from."""
        if self.theta is not self.whole:
            self.whole[self.rows] = self.theta
            if self.sums is not None and self.squares is not None:
                self.sums[self.rows] = self.squares

    def bits(self, number: int) -> Tensor | None:
        """What moves in each row, (rows, D) of int32; None for everything in all of them."""
        found = [lesson.steps[number][0] for lesson in self.lessons]
        if all(bits is None for bits in found):
            return None
        every = torch.full(self.theta.shape[1:], -1, dtype=torch.int32)
        return torch.stack([every if bits is None else bits for bits in found])

    def anchor(self) -> Tensor | None:
        """The model (D,) that pulls at all of them."""
        return self.lessons[0].window.anchor

    def rates(self) -> Tensor | None:
        """What each row's gradients are multiplied by, (rows, D); None for 1 in all of them."""
        found = [lesson.window.rates for lesson in self.lessons]
        if all(rates is None for rates in found):
            return None
        alike = torch.ones(self.theta.shape[1:])
        return torch.stack([alike if rates is None else rates for rates in found])

    def _mine(self, stack: Tensor) -> Tensor:
        return stack if len(self.rows) == len(stack) else stack[self.rows]


def _parameters(learner: TorchLearner) -> dict[str, Slot]:
    """Where each parameter is in the flat vector.

    Raises:
        TrainingError: the model has what a stack of flat vectors does not hold.
    """
    parameters = dict(learner.model.named_parameters())
    if any(True for _ in learner.model.buffers()):
        raise TrainingError("the model has buffers, such as the statistics of batch norm")
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in parameters.values()):
        raise TrainingError("the model is not in float32 on the CPU")
    slots = {slot.name: slot for slot in learner.space.slots}
    if parameters.keys() != slots.keys():
        raise TrainingError("the model's parameters share memory")
    return {name: slots[name] for name in parameters}


def _parts(every: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (every[start : start + ABREAST] for start in range(0, len(every), ABREAST))


def _stacked(lessons: Sequence[Lesson], number: int) -> list[tuple[Rows, Batch]]:
    """The rows that take this step, and their batches stacked; together if these have one shape."""
    rows = [row for row, lesson in enumerate(lessons) if number < len(lesson.steps)]
    found = {row: lessons[row].steps[number][1] for row in rows}
    try:  # nearly always they have, and to look first would cost as much as the stacking
        return [(rows, mapped(torch.stack, *found.values()))]
    except (RuntimeError, TrainingError):
        groups = _by_outline(found)
        return [(alike, mapped(torch.stack, *(found[row] for row in alike))) for alike in groups]


def _by_outline(batches: Mapping[int, Batch]) -> Iterable[Rows]:
    found: dict[Any, Rows] = {}
    for row, batch in batches.items():
        found.setdefault(_outline(batch), []).append(row)
    return found.values()


def _outline(batch: Batch) -> tuple[Any, ...]:
    """What a batch is made of, and the shapes of its tensors."""
    if isinstance(batch, Mapping):
        return type(batch), *((key, _outline(part)) for key, part in batch.items())
    if isinstance(batch, tuple | list):
        return type(batch), *map(_outline, batch)
    return type(batch), getattr(batch, "shape", None)


def _view(stack: Tensor, slot: Slot) -> Tensor:
    return stack[:, slot.offset : slot.stop].view(len(stack), *slot.shape)


def _clip(grads: Grads, limit: float) -> None:
    """Scale each client's whole gradient as ``clip_grad_norm_`` does."""
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in grads.values()])
    factor = (limit / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)
    for each in grads.values():
        each.mul_(factor.view(-1, *[1] * (each.dim() - 1)))


def _compare(start: FloatVector, alone: FloatVector, found: FloatVector) -> None:
    most = float(np.abs(alone - start).max(initial=0))
    apart = float(np.abs(alone - found).max(initial=0))
    if not apart <= CLOSE * most + 1e-6:
        raise TrainingError(
            f"a client's own first step and the batched one are {apart:.2g} apart: its loss or its "
            "model is another one than the first client's"
        )
