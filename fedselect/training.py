"""Local training of one client in torch: LocalAlt or joint SGD, masks, and scoring.

Owns the learner that the agent and the simulator drive. Must not know rounds, files or the network,
and never choose what turns personal (``selection``). Equal inputs give equal bits only with the
same torch build and the same number of torch threads; setting the threads is the program's
business, not this module's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedselect.budgets import FINE_TUNING, LOCAL_ONLY, finishing, seeded, without_others
from fedselect.errors import SpaceError, TrainingError
from fedselect.evidence import NOTHING, SQUARED_GRADIENT
from fedselect.following import Trained, conclude
from fedselect.gathering import Squares, Window, met, wanted
from fedselect.holdout import Fold, gain, set_aside
from fedselect.masks import Mask
from fedselect.modelspace import space_of
from fedselect.moves import Moves, Trainable, rates, shares, split
from fedselect.personal import Participation, PersonalState, Score, derive_seed
from fedselect.policies import Policy, RunSettings
from fedselect.space import FloatVector, Role, Slot
from fedselect.task import Batch, Task

Hits = Tensor | None  # which held-out examples were right, one truth value each
_FOLD = "held-out fold"  # stands for the client's name in the seed that sets examples aside


class TorchLearner:
    """A :class:`~fedselect.personal.Learner` for a task: plain SGD on its torch model.

    The model is built once, with torch's generator seeded, so that a ``build_model`` that draws
    its weights gives every site the same ones. Every participation loads all it needs from the
    state: nothing of an earlier one is left behind. ``space`` is the model's parameter space (D
    elements).

    Raises:
        SpaceError: the model's tensors have no clear roles (see :func:`space_of`).
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        with seeded(0):
            self.model = task.build_model()
        self.space = space_of(self.model, task.roles())
        self.trainable = self._find_trainable()
        saved = self.model.state_dict()
        self._outside = {  # what a forward pass may move besides the space, at its start
            name: buffer.clone()
            for name, buffer in self.model.named_buffers()
            if name not in saved or not buffer.is_floating_point()
        }
        self._integers = sorted(saved.keys() & self._outside.keys())
        self._initial = self._read()

    def initial(self) -> FloatVector:
        """The weights of ``build_model`` as one vector of shape (D,): a run's version 0."""
        return self._initial.copy()

    def participate(
        self, state: PersonalState | None, base: FloatVector, *, settings: RunSettings, seed: int
    ) -> Participation:
        """Merge, train one budget with the state's mask, grow the mask if it is due.

        ``base`` (D,) is the shared model; ``state`` None means a newcomer, who starts from it.
        The merge uses the mask of the last upload, the training the grown one (ALGORITHM §1.7,
        decision 9). torch is seeded with ``seed``; the caller's generators are left alone.

        Raises:
            TrainingError: no batches, or a result that is not finite (decision 4).
            SpaceError: the state or the base belongs to a model of another size.
        """
        state, window = self.begin(state, base, settings)
        with seeded(seed):
            own = self._train_own(state, base, settings)
            start = state.merge(base)
            theta = self._train(start, state.mask, state.buffers, settings=settings, window=window)
            examples = self.task.examples()
        state = replace(state, evidence=window.told(state.evidence))
        done = Trained(start, theta, own, examples, self._integer_buffers())
        return conclude(state, done, policy=settings.policy, space=self.space, seed=seed)

    def begin(
        self, state: PersonalState | None, base: FloatVector, settings: RunSettings
    ) -> tuple[PersonalState, Window]:
        """What a participation starts from, and what it is to gather; the gate judges if it is due.

        Raises:
            TrainingError: the task's examples are not those that the gate had set aside.
            SpaceError: the state or the base belongs to a model of another size.
        """
        if state is None:
            state = PersonalState.start(base, settings.policy.first_mask(self.space))
        self.check_size(base, state)
        self.task.batch_size = settings.training.batch_size
        state, window = self._prepare(state, base, settings)
        window.rates = rates(settings.policy, state.mask)
        return state, window

    def evaluate(
        self,
        state: PersonalState,
        base: FloatVector,
        *,
        settings: RunSettings,
        origin: FloatVector,
        trained: Mapping[str, FloatVector] | None = None,
    ) -> dict[str, Score]:
        """Score five models on the same held-out batches, all in eval mode.

        ``start``: ``origin`` (D,) as it is; ``global``: ``base`` (D,) with only those tensors of
        this client that never travel; ``pre``: ``base`` with its personal elements merged in;
        ``post``: its model as last trained, or fine-tuned from ``pre`` if the policy says so;
        ``local_only``: trained from ``origin`` with everything personal and joint steps, for as
        many participations and gradient steps as ``post`` has behind it, in batches that depend on
        the run's seed only. A second local model is both ``pre`` and ``post``. ``local_only`` and
        ``post`` are trained here, unless ``trained`` has them.

        Raises:
            TrainingError: no batches, or a result that is not finite.
            SpaceError: the state or the base belongs to a model of another size.
        """
        self.check_size(base, state)
        self.task.batch_size = settings.training.batch_size
        stays = Mask.initial(self.space).to_bool()
        if trained is None:
            trained = {
                "local_only": self._alone(state.participations, origin, settings),
                "post": self.finished(state, base, settings),
            }
        models = {
            "local_only": trained["local_only"],
            "start": origin,
            "global": np.where(stays, state.theta, base),
            "pre": state.personalized(base),
            "post": trained["post"],
        }
        return self.scores(models.items(), own="post", settings=settings)

    def scores(
        self, models: Iterable[tuple[str, FloatVector]], *, own: str, settings: RunSettings
    ) -> dict[str, Score]:
        """Score models (D,) on the same held-out batches; ``both`` counts what ``own`` got right,
        too. They are asked for one by one, so that they need not be in memory together.
        """
        found = self.scored(models, settings=settings)
        ours = found[own][1]
        return {name: replace(each, both=_both(hits, ours)) for name, (each, hits) in found.items()}

    def scored(
        self, models: Iterable[tuple[str, FloatVector]], *, settings: RunSettings
    ) -> dict[str, tuple[Score, Hits]]:
        """The same, with which held-out examples each model gets right."""
        self.task.batch_size = settings.training.batch_size
        found = {}
        for name, theta in models:
            with seeded(settings.seed):  # the same examples in the same order for every model
                found[name] = self._score(theta)
        return found

    # --- what the next mask is judged by ---------------------------------------------------------

    def _prepare(
        self, state: PersonalState, base: FloatVector, settings: RunSettings
    ) -> tuple[PersonalState, Window]:
        """Take note of the shared model ``base`` (D,) that followed the client's own, let the gate
        judge if it is time, and say what this participation gathers.
        """
        policy, now = settings.policy, state.participations
        state = replace(state, evidence=met(policy, state, base))
        window = Window()
        if SQUARED_GRADIENT in wanted(policy, now):
            window.squares = Squares(self.trainable, self.space.dim)
        if policy.gate == "none":
            return state, window
        if policy.gathers(now):
            window.fold = self._fold(state, settings)
            evidence = replace(state.evidence, fold=window.fold.digest)
            state = replace(state, evidence=evidence)
        elif now and policy.due(now - 1):
            state = self._gated(state, self._fold(state, settings))
        return state, window

    def _fold(self, state: PersonalState, settings: RunSettings) -> Fold:
        with seeded(derive_seed(settings, _FOLD, 0)):  # the same examples every time
            fold = set_aside(self.task.train_batches())
        if state.evidence.fold not in {"", fold.digest}:
            raise TrainingError(
                "train_batches() gives other examples than before under the same seed of torch, so "
                "the hold-out gate would be judged by examples that were trained on; take all "
                "chance in it from torch's global generator, or run a policy without a gate"
            )
        return fold

    def _gated(self, state: PersonalState, fold: Fold) -> PersonalState:
        """The state with its mask, or without one, as the gate decides."""

        def loss(theta: FloatVector) -> float:
            self._load(theta, {})
            self.model.eval()
            with torch.no_grad():
                found = [
                    (float(self.task.loss(self.model, batch)), count)
                    for batch, count in fold.batches(self.task.batch_size)
                ]
            return sum(mean * count for mean, count in found) / sum(count for _, count in found)

        never, seen = Mask.initial(self.space), state.evidence
        if state.mask == never:  # nothing was chosen: there is nothing to turn down
            return replace(state, evidence=NOTHING, gated=False)
        less = gain(loss, state.mask, never, trained=seen.trained, shared=seen.shared)
        keeps = less > 0  # a loss that is not a number keeps nothing
        mask = state.mask if keeps else never
        return replace(state, mask=mask, evidence=NOTHING, gated=not keeps)

    # --- training ------------------------------------------------------------------------------

    def _train(
        self,
        start: FloatVector,
        mask: Mask,
        buffers: Mapping[str, npt.NDArray[Any]],
        *,
        settings: RunSettings,
        window: Window,
    ) -> FloatVector:
        self._load(start, buffers)
        self.model.train()
        for moves, batches in self.phases(settings, mask, window):
            for batch in batches:
                self._step(batch, moves, settings, window)
        theta = self._read()
        for slot in self.space.with_role(Role.FROZEN):  # a buffer moves without any gradient
            theta[slot.offset : slot.stop] = start[slot.offset : slot.stop]
        self.check_finite(theta)
        return theta

    def _train_own(
        self, state: PersonalState, base: FloatVector, settings: RunSettings
    ) -> FloatVector | None:
        """The second local model, trained on its half of the budget: Ditto (Li et al., ICML 2021,
        arXiv 2012.04221), which takes steps of  ∇F(v) + λ·(v − w)  with w the shared model.
        """
        if settings.policy.proximal is None:
            return None
        anchor = Window(anchor=torch.tensor(base))
        start = base if state.own is None else state.own
        return self._train(start, state.mask, state.buffers, settings=settings, window=anchor)

    def finished(
        self, state: PersonalState, base: FloatVector, settings: RunSettings
    ) -> FloatVector:
        """What a client uses at the end (D,): as last trained, or fine-tuned from ``base``."""
        policy = settings.policy
        if not policy.finetune:
            return state.theta if state.own is None else state.own
        with seeded(derive_seed(settings, FINE_TUNING, state.participations)):
            return self._train(
                state.merge(base),
                state.mask,
                state.buffers,
                settings=finishing(settings),
                window=Window(),
            )

    def phases(
        self, settings: RunSettings, mask: Mask, window: Window
    ) -> Iterator[tuple[Moves, Iterator[Batch]]]:
        """What moves, and on which batches, one phase after the other (ALGORITHM §1.3).

        Joint: one phase moves everything. Alternating: first the personal part, then the shared
        one. With ``steps``, personal gets half of them, unless one part is empty: then the other
        gets all. With ``epochs``, each epoch is one full pass for either part, empty or not, as
        in the authors' code. A second model gets half of the steps, rounded down.
        """
        moving = self._moving(settings.policy)
        everything: Moves = [(parameter, None) for _, parameter in moving]
        joint = settings.policy.schedule == "joint"
        parts = [everything] if joint else list(split(moving, mask))
        if settings.training.steps is None:
            for _ in range(settings.training.epochs or 0):
                for moves in parts:
                    yield moves, self._one_pass(window.fold)
            return
        stream, steps = self._endless(window.fold), settings.training.steps
        if settings.policy.proximal is not None:
            steps = steps // 2 if window.anchor is not None else steps - steps // 2
        for moves, count in zip(parts, shares(steps, parts), strict=True):
            yield moves, islice(stream, count)

    def _moving(self, policy: Policy) -> Trainable:
        """The trainable parameters that this policy lets move, with their slots."""
        if policy.trains == "all":
            return self.trainable
        head = self.space.head()
        return [(slot, parameter) for slot, parameter in self.trainable if slot not in head]

    def _step(self, batch: Batch, moves: Moves, settings: RunSettings, window: Window) -> None:
        training = settings.training
        self.model.zero_grad()
        torch.autograd.backward(self.task.loss(self.model, batch))
        if training.clip_norm is not None:
            trainable = [parameter for _, parameter in self.trainable]
            nn.utils.clip_grad_norm_(trainable, training.clip_norm)
        with torch.no_grad():
            if window.squares is not None:
                window.squares.add()
            if window.anchor is not None or window.rates is not None:
                window.bend(self.trainable, settings.policy.proximal)
            for parameter, moving in moves:
                if parameter.grad is None:
                    continue
                if moving is not None:
                    parameter.grad.view(moving.dtype).bitwise_and_(moving)
                parameter.add_(parameter.grad, alpha=-training.learning_rate)

    def _one_pass(self, fold: Fold | None) -> Iterator[Batch]:
        empty = True
        source = fold.one_pass(self.task.batch_size) if fold else self.task.train_batches()
        for batch in source:
            empty = False
            yield batch
        if empty:
            raise TrainingError(
                "train_batches() gave no batch; each call must start a new pass over the data"
            )

    def _endless(self, fold: Fold | None) -> Iterator[Batch]:
        while True:
            yield from self._one_pass(fold)

    def _alone(
        self, participations: int, origin: FloatVector, settings: RunSettings
    ) -> FloatVector:
        alone = without_others(settings)
        theta, mask = origin, Mask.full(self.space.dim)
        buffers: dict[str, npt.NDArray[Any]] = {}
        for number in range(1, participations + settings.policy.finetune + 1):
            with seeded(derive_seed(settings, LOCAL_ONLY, number)):
                theta = self._train(theta, mask, buffers, settings=alone, window=Window())
            buffers = self._integer_buffers()
        return theta

    def _score(self, theta: FloatVector) -> tuple[Score, Hits]:
        """The score, and which examples were right if the task tells of single ones."""
        self._load(theta, {})
        self.model.eval()
        singly = type(self.task).outcome is Task.outcome
        hits: list[Tensor] = []
        correct, total, loss = 0, 0, 0.0
        with torch.no_grad():
            for batch in self.task.eval_batches():
                if singly:
                    each = self.task.hits(self.model, batch).to("cpu", torch.bool).reshape(-1)
                    hits.append(each)
                    right, count = int(each.sum()), len(each)
                else:
                    right, count = self.task.outcome(self.model, batch)
                loss += float(self.task.loss(self.model, batch)) * count
                correct, total = correct + right, total + count
        every = torch.cat(hits) if hits else None
        return Score(correct, total, loss / total if total else 0.0), every

    # --- between the model and flat vectors ----------------------------------------------------

    def _find_trainable(self) -> Trainable:
        """Every distinct parameter that learns, with its slot; tied ones may share a slot."""
        slots = {t.data_ptr(): slot for slot, t in self._tensors() if t.numel()}
        found = []
        for name, parameter in self.model.named_parameters():
            slot = slots.get(parameter.data_ptr())
            if slot is None and parameter.numel():
                raise SpaceError(f"parameter {name!r} is missing from the model's state_dict")
            if slot is not None and slot.role is Role.FROZEN:
                parameter.requires_grad_(False)
            if slot is not None and parameter.requires_grad:
                found.append((slot, parameter))
        return found

    def _tensors(self) -> list[tuple[Slot, Tensor]]:
        # Looked up each time: a forward pass may put another tensor in a buffer's place.
        saved = self.model.state_dict(keep_vars=True)
        return [(slot, saved[slot.name]) for slot in self.space.slots]

    def _read(self) -> FloatVector:
        flat = np.empty(self.space.dim, dtype=np.float32)
        for slot, tensor in self._tensors():
            values = tensor.detach().to("cpu", torch.float32)
            flat[slot.offset : slot.stop] = values.reshape(-1).numpy()
        return flat

    def _load(self, flat: FloatVector, buffers: Mapping[str, npt.NDArray[Any]]) -> None:
        source = torch.tensor(flat)
        present = dict(self.model.named_buffers())
        with torch.no_grad():
            for slot, tensor in self._tensors():
                tensor.copy_(source[slot.offset : slot.stop].view(slot.shape))
            for name, initial in self._outside.items():
                value = torch.tensor(buffers[name]) if name in buffers else initial
                present[name].copy_(value.reshape(initial.shape))

    def _integer_buffers(self) -> dict[str, npt.NDArray[Any]]:
        saved = self.model.state_dict()
        return {name: saved[name].cpu().numpy().copy() for name in self._integers}

    def train_once(self, start: FloatVector, settings: RunSettings) -> FloatVector:
        """One budget from ``start`` (D,), everything shared, on batches of torch's generator."""
        nothing = Mask.empty(self.space.dim)
        return self._train(start, nothing, {}, settings=settings, window=Window())

    def check_size(self, base: FloatVector, state: PersonalState) -> None:
        """Raise SpaceError if the state or the base belongs to a model of another size."""
        if not base.shape == state.theta.shape == (self.space.dim,):
            raise SpaceError(
                f"a model of {base.size} and a state of {state.theta.size} elements do not fit "
                f"this task's model of {self.space.dim}"
            )

    def check_finite(self, theta: FloatVector) -> None:
        """Raise TrainingError if a trained model (D,) has values that are not finite."""
        if np.isfinite(theta).all():
            return
        tensors = self.space.unflatten(theta)
        name = next(n for n, values in tensors.items() if not np.isfinite(values).all())
        raise TrainingError(
            f"training left tensor {name!r} with values that are not finite; lower "
            "training.learning_rate or set training.clip_norm"
        )


def _both(hits: Hits, others: Hits) -> int | None:
    if hits is None or others is None or hits.shape != others.shape:
        return None
    return int((hits & others).sum())
