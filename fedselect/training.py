"""Local training of one client in torch: LocalAlt or joint SGD, masks, and scoring.

Owns the parameter space of a torch model and the learner that the agent and the simulator drive.
Must not know rounds, files or the network, and never choose what turns personal (``selection``).
Equal inputs give equal bits only with the same torch build and the same number of torch threads;
setting the threads is the program's business, not this module's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedselect.errors import SpaceError, TrainingError
from fedselect.masks import Mask
from fedselect.personal import Participation, PersonalState, Score, derive_seed
from fedselect.policies import RunSettings, Training, preset
from fedselect.selection import next_mask
from fedselect.space import DEFAULT_ROLES, FloatVector, Kind, ParameterSpace, Role, Slot
from fedselect.task import Batch, Task

Hits = Tensor | None  # which held-out examples were right, one truth value each
Moves = list[tuple[nn.Parameter, Tensor | None]]  # what a step changes: all of it, or see _bits

_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_STATISTICS = {"running_mean", "running_var"}
_LOCAL_ONLY = "local-only"  # stands for the client's name in the seeds of the local-only baseline


def space_of(model: nn.Module, roles: Mapping[str, Role]) -> ParameterSpace:
    """The parameter space of a model: its floating tensors in ``state_dict`` order.

    Tied tensors are listed once, under their first name. The kind follows from the owning module
    and the attribute: a norm layer's ``weight`` is ``norm`` and its running statistics are
    ``buffer``; other parameters are ``weight`` or ``bias`` by what their name contains. The role is
    what ``roles`` says, else ``frozen`` without ``requires_grad``, else the kind's default
    (ALGORITHM §1.6). Integer buffers are left out.

    Raises:
        SpaceError: a tensor whose kind is unknown and whose role is not declared, a role for a
            tensor that does not exist, or tensors that share memory in different layouts.
    """
    tensors, aliases = _floating(model)
    _check_roles(roles, tensors, aliases)
    owners = dict(model.named_modules(remove_duplicate=False))
    rows = []
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        kind = _kind(owners.get(path), attribute, tensor)
        still = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if kind is None and not still and name not in roles:
            raise SpaceError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} is no weight, no bias and no "
                "running statistic, so nothing says whether it may be shared; declare it in your "
                f"task: def roles(self): return {{{name!r}: Role.SHARED}} (or SELECTABLE, "
                "PERSONAL, FROZEN)"
            )
        kind = kind or (Kind.WEIGHT if isinstance(tensor, nn.Parameter) else Kind.BUFFER)
        role = roles.get(name, Role.FROZEN if still else DEFAULT_ROLES[kind])
        rows.append((name, tuple(tensor.shape), kind, role))
    return ParameterSpace.of(rows)


def _kind(owner: nn.Module | None, attribute: str, tensor: Tensor) -> Kind | None:
    norm = isinstance(owner, _NORM_LAYERS)
    if not isinstance(tensor, nn.Parameter):
        return Kind.BUFFER if norm and attribute in _STATISTICS else None
    if "weight" in attribute:
        return Kind.NORM if norm else Kind.WEIGHT
    return Kind.BIAS if "bias" in attribute else None


def _floating(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct floating tensors by first name, and the first name by each further name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_at: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise SpaceError(f"state_dict entry {name!r} is no real tensor; it cannot be federated")
        if not tensor.is_floating_point():
            continue
        first = first_at.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        elif _layout(tensors[first]) == _layout(tensor):
            aliases[name] = first
        else:
            raise SpaceError(
                f"tensors {first!r} and {name!r} share memory in different layouts; give each its "
                "own tensor, or tie them as one parameter"
            )
    return tensors, aliases


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_roles(
    roles: Mapping[str, Role], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    for name in roles:
        if name in aliases:
            raise SpaceError(
                f"roles() names {name!r}, which is tied to {aliases[name]!r}: give that one a role"
            )
        if name not in tensors:
            raise SpaceError(
                f"roles() names {name!r}, but the model has no such floating tensor; it has "
                f"{', '.join(list(tensors)[:20])}"
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside, leave the caller's random generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


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
        with _seeded(0):
            self._model = task.build_model()
        self.space = space_of(self._model, task.roles())
        self._trainable = self._find_trainable()
        saved = self._model.state_dict()
        self._outside = {  # what a forward pass may move besides the space, at its start
            name: buffer.clone()
            for name, buffer in self._model.named_buffers()
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
        if state is None:
            state = PersonalState.start(base, settings.policy.first_mask(self.space))
        self._check_size(base, state)
        self.task.batch_size = settings.training.batch_size
        with _seeded(seed):
            theta = self._train(state.merge(base), state.mask, state.buffers, settings=settings)
            examples = self.task.examples()
        mask, reference = next_mask(
            settings.policy, state, theta=theta, space=self.space, seed=seed
        )
        following = PersonalState(
            participations=state.participations + 1,
            theta=theta,
            reference=reference,
            merge_mask=state.mask,
            mask=mask,
            buffers=self._integer_buffers(),
        )
        return Participation(theta, state.mask, examples, following)

    def evaluate(
        self, state: PersonalState, base: FloatVector, *, settings: RunSettings, origin: FloatVector
    ) -> dict[str, Score]:
        """Score five models on the same held-out batches, all in eval mode.

        ``start``: ``origin`` (D,) as it is; ``global``: ``base`` (D,) with only those tensors of
        this client that never travel; ``pre``: ``base`` with its personal elements merged in;
        ``post``: its model as last trained; ``local_only``: trained from ``origin`` with everything
        personal and joint steps, for as many participations and gradient steps as ``state`` has
        behind it, in batches that depend on the run's seed only.

        Raises:
            TrainingError: no batches, or a result that is not finite.
            SpaceError: the state or the base belongs to a model of another size.
        """
        self._check_size(base, state)
        self.task.batch_size = settings.training.batch_size
        stays = Mask.initial(self.space).to_bool()
        models = {
            "local_only": self._alone(state.participations, origin, settings),
            "start": origin,
            "global": np.where(stays, state.theta, base),
            "pre": state.merge(base),
            "post": state.theta,
        }
        found: dict[str, tuple[Score, Hits]] = {}
        for name, theta in models.items():
            with _seeded(settings.seed):  # the same examples in the same order for every model
                found[name] = self._score(theta)
        own = found["post"][1]
        return {name: replace(each, both=_both(hits, own)) for name, (each, hits) in found.items()}

    # --- training ------------------------------------------------------------------------------

    def _train(
        self,
        start: FloatVector,
        mask: Mask,
        buffers: Mapping[str, npt.NDArray[Any]],
        *,
        settings: RunSettings,
    ) -> FloatVector:
        self._load(start, buffers)
        self._model.train()
        for moves, batches in self._phases(settings, mask):
            for batch in batches:
                self._step(batch, moves, settings.training)
        theta = self._read()
        for slot in self.space.with_role(Role.FROZEN):  # a buffer moves without any gradient
            theta[slot.offset : slot.stop] = start[slot.offset : slot.stop]
        self._check_finite(theta)
        return theta

    def _phases(self, settings: RunSettings, mask: Mask) -> Iterator[tuple[Moves, Iterator[Batch]]]:
        """What moves, and on which batches, one phase after the other (ALGORITHM §1.3).

        Joint: one phase moves everything. Alternating: first the personal part, then the shared
        one. With ``steps``, personal gets half of them, unless one part is empty: then the other
        gets all. With ``epochs``, each epoch is one full pass for either part, empty or not, as
        in the authors' code.
        """
        everything: Moves = [(parameter, None) for _, parameter in self._trainable]
        joint = settings.policy.schedule == "joint"
        parts = [everything] if joint else list(self._split(mask))
        if settings.training.steps is None:
            for _ in range(settings.training.epochs or 0):
                for moves in parts:
                    yield moves, self._one_pass()
            return
        stream = self._endless()
        for moves, count in zip(parts, _shares(settings.training.steps, parts), strict=True):
            yield moves, islice(stream, count)

    def _split(self, mask: Mask) -> tuple[Moves, Moves]:
        """(personal, shared) moves of the trainable parameters under a mask, keyed by name."""
        bits = mask.to_bool()
        personal: Moves = []
        shared: Moves = []
        for slot, parameter in self._trainable:
            own = torch.from_numpy(bits[slot.offset : slot.stop]).view(slot.shape)
            count = int(own.sum())
            own = own.to(parameter.device)
            if count:
                personal.append((parameter, None if count == slot.size else _bits(own, parameter)))
            if count < slot.size:
                shared.append((parameter, _bits(~own, parameter) if count else None))
        return personal, shared

    def _step(self, batch: Batch, moves: Moves, training: Training) -> None:
        self._model.zero_grad()
        torch.autograd.backward(self.task.loss(self._model, batch))
        if training.clip_norm is not None:
            trainable = [parameter for _, parameter in self._trainable]
            nn.utils.clip_grad_norm_(trainable, training.clip_norm)
        with torch.no_grad():
            for parameter, moving in moves:
                if parameter.grad is None:
                    continue
                if moving is not None:
                    parameter.grad.view(moving.dtype).bitwise_and_(moving)
                parameter.add_(parameter.grad, alpha=-training.learning_rate)

    def _one_pass(self) -> Iterator[Batch]:
        empty = True
        for batch in self.task.train_batches():
            empty = False
            yield batch
        if empty:
            raise TrainingError(
                "train_batches() gave no batch; each call must start a new pass over the data"
            )

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self._one_pass()

    def _alone(
        self, participations: int, origin: FloatVector, settings: RunSettings
    ) -> FloatVector:
        training = settings.training
        if training.epochs is not None and settings.policy.schedule == "alternating":
            # Each of its epochs costs two passes; the baseline gets as many gradient steps.
            training = training.model_copy(update={"epochs": 2 * training.epochs})
        alone = settings.model_copy(update={"policy": preset("local"), "training": training})
        theta, mask = origin, Mask.full(self.space.dim)
        buffers: dict[str, npt.NDArray[Any]] = {}
        for number in range(1, participations + 1):
            with _seeded(derive_seed(settings, _LOCAL_ONLY, number)):
                theta = self._train(theta, mask, buffers, settings=alone)
            buffers = self._integer_buffers()
        return theta

    def _score(self, theta: FloatVector) -> tuple[Score, Hits]:
        """The score, and which examples were right if the task tells of single ones."""
        self._load(theta, {})
        self._model.eval()
        singly = type(self.task).outcome is Task.outcome
        hits: list[Tensor] = []
        correct, total, loss = 0, 0, 0.0
        with torch.no_grad():
            for batch in self.task.eval_batches():
                if singly:
                    each = self.task.hits(self._model, batch).to("cpu", torch.bool).reshape(-1)
                    hits.append(each)
                    right, count = int(each.sum()), len(each)
                else:
                    right, count = self.task.outcome(self._model, batch)
                loss += float(self.task.loss(self._model, batch)) * count
                correct, total = correct + right, total + count
        every = torch.cat(hits) if hits else None
        return Score(correct, total, loss / total if total else 0.0), every

    # --- between the model and flat vectors ----------------------------------------------------

    def _find_trainable(self) -> list[tuple[Slot, nn.Parameter]]:
        """Every distinct parameter that learns, with its slot; tied ones may share a slot."""
        slots = {t.data_ptr(): slot for slot, t in self._tensors() if t.numel()}
        found = []
        for name, parameter in self._model.named_parameters():
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
        saved = self._model.state_dict(keep_vars=True)
        return [(slot, saved[slot.name]) for slot in self.space.slots]

    def _read(self) -> FloatVector:
        flat = np.empty(self.space.dim, dtype=np.float32)
        for slot, tensor in self._tensors():
            values = tensor.detach().to("cpu", torch.float32)
            flat[slot.offset : slot.stop] = values.reshape(-1).numpy()
        return flat

    def _load(self, flat: FloatVector, buffers: Mapping[str, npt.NDArray[Any]]) -> None:
        source = torch.tensor(flat)
        present = dict(self._model.named_buffers())
        with torch.no_grad():
            for slot, tensor in self._tensors():
                tensor.copy_(source[slot.offset : slot.stop].view(slot.shape))
            for name, initial in self._outside.items():
                value = torch.tensor(buffers[name]) if name in buffers else initial
                present[name].copy_(value.reshape(initial.shape))

    def _integer_buffers(self) -> dict[str, npt.NDArray[Any]]:
        saved = self._model.state_dict()
        return {name: saved[name].cpu().numpy().copy() for name in self._integers}

    def _check_size(self, base: FloatVector, state: PersonalState) -> None:
        if not base.shape == state.theta.shape == (self.space.dim,):
            raise SpaceError(
                f"a model of {base.size} and a state of {state.theta.size} elements do not fit "
                f"this task's model of {self.space.dim}"
            )

    def _check_finite(self, theta: FloatVector) -> None:
        if np.isfinite(theta).all():
            return
        tensors = self.space.unflatten(theta)
        name = next(n for n, values in tensors.items() if not np.isfinite(values).all())
        raise TrainingError(
            f"training left tensor {name!r} with values that are not finite; lower "
            "training.learning_rate or set training.clip_norm"
        )


def _bits(moving: Tensor, parameter: Tensor) -> Tensor:
    """For each element all bits or none, as integers of the parameter's width.

    What a gradient keeps under them is itself or +0, also where it is not finite; and it is a
    tenth of the work of `masked_fill_`.
    """
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return -moving.to(width)


def _both(hits: Hits, others: Hits) -> int | None:
    if hits is None or others is None or hits.shape != others.shape:
        return None
    return int((hits & others).sum())


def _shares(steps: int, parts: list[Moves]) -> list[int]:
    if len(parts) == 1:
        return [steps]
    personal, shared = parts
    first = (steps // 2 if shared else steps) if personal else 0
    return [first, steps - first]
