"""A dry run at a site: what an estimate can measure before anybody adopts anything.

Owns the timing of a step, the coding of real deltas and one round of local updates, all in this
process; nothing is published or sent. Must not estimate (``estimate``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from fedselect.accounting import noise_rule
from fedselect.aggregate import Contribution, aggregate
from fedselect.deltafiles import step
from fedselect.deltas import DeltaEncoding, delta_encoding
from fedselect.errors import FedSelectError
from fedselect.estimatedocs import Measured
from fedselect.feedback import write_update
from fedselect.growth import bounds, course
from fedselect.heterogeneity import Divergence, divergence
from fedselect.layout import header_size, read_step_layout, read_update_layout
from fedselect.masks import Mask
from fedselect.noise import round_key
from fedselect.personal import PersonalState, derive_seed
from fedselect.policies import Privacy, RunSettings
from fedselect.private import noise_alone
from fedselect.simulate import Simulation, simulate
from fedselect.space import FloatVector, ParameterSpace
from fedselect.task import Task
from fedselect.training import TorchLearner
from fedselect.wire import (
    UpdateMeta,
    decode_version,
    encode_version,
    file_digest,
    update_values,
)

MOST_CLIENTS = 4  # that take part in a dry run of the coding
WARM = 3  # of its rounds do not count: what an encoding loses is added to the next deltas
COUNTED = 2  # rounds under the first masks, and as many under the last ones
TIMED_STEPS = 10
NOISY_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class DryRun:
    """What was measured, for an ``EstimateCreate``: its ``space``, ``examples``, ``measured``."""

    space: ParameterSpace
    examples: int
    measured: Measured


def measure(tasks: Mapping[str, Task], settings: RunSettings) -> DryRun:
    """Time a step of the first task and code real deltas of up to four of them; with
    ``privacy.dp`` simulate what its noise costs all of them.

    Raises:
        FedSelectError: no tasks.
        TrainingError: training failed.
    """
    if not tasks:
        raise FedSelectError("there is no task to measure", code="task_invalid")
    few = {name: TorchLearner(task) for name, task in list(tasks.items())[:MOST_CLIENTS]}
    learner = next(iter(few.values()))
    up, down = None, None
    if settings.wire.encoding != "f32":
        up, down = _coding(few, settings)
    measured = Measured(
        step_seconds=_step_seconds(learner, settings),
        value_bytes_up=up,
        value_bytes_down=down,
        accuracy_cost=noise_cost(tasks, settings),
    )
    return DryRun(learner.space, next(iter(tasks.values())).examples(), measured)


def _step_seconds(learner: TorchLearner, settings: RunSettings) -> float:
    """The second of two short trainings; the first one warms up. What a participation adds to its
    steps (loading, masks) is in it, spread over them.
    """
    steps = min(settings.training.steps or TIMED_STEPS, TIMED_STEPS)
    training = settings.training.model_copy(update={"steps": steps, "epochs": None})
    short = settings.model_copy(update={"training": training})
    base = learner.initial()
    taken = 0.0
    for number in (1, 2):
        begun = time.perf_counter()
        learner.participate(None, base, settings=short, seed=number)
        taken = time.perf_counter() - begun
    return taken / steps


# --- what coding takes -------------------------------------------------------------------------


def _coding(learners: Mapping[str, TorchLearner], settings: RunSettings) -> tuple[float, float]:
    """Bytes of coded values per shared element up, and per element down.

    A few rounds under the first masks, and a few under masks as large as they become: what is left
    of a delta without its largest elements is harder to code. Either counts as long as it lasts.
    """
    space = next(iter(learners.values())).space
    stages = course(settings.policy, space, settings.rounds)
    own = [stage.personal - stages[0].personal for stage in stages]
    lasting = sum((s.stop - s.first) * more for s, more in zip(stages, own, strict=True))
    least, most = bounds(settings.policy, space)
    share = (stages[-1].personal - least) / max(1, most - least)
    federation = _Federation(learners, _short(settings, share=share, clients=len(learners)))
    for _ in range(WARM):
        federation.round()
    first = _mean([federation.round() for _ in range(COUNTED)])
    if not own[-1]:
        return first
    last = _mean([federation.round() for _ in range(COUNTED)])
    weight = lasting / own[-1] / settings.rounds
    mixed = [(1 - weight) * one + weight * two for one, two in zip(first, last, strict=True)]
    return mixed[0], mixed[1]


def _mean(found: list[tuple[float, float]]) -> tuple[float, float]:
    up, down = zip(*found, strict=True)
    return sum(up) / len(up), sum(down) / len(down)


def _short(settings: RunSettings, *, share: float, clients: int) -> RunSettings:
    """The run, but that a mask which changes does so at once, and no gate turns it down; ``share``
    is the personal one, at the end, of what may turn.
    """
    policy: dict[str, Any] = {"gate": "none"}
    if settings.policy.at_once:
        policy["start_round"] = WARM + COUNTED
    elif settings.policy.personal == "learned":
        policy |= {"growth": 1.0, "limit": share, "limit_mode": "cap", "interval": 1}
        policy["start_round"] = WARM + COUNTED - 1
    few = {"min_contributors": min(clients, settings.round.min_contributors)}
    return settings.model_copy(
        update={
            "policy": settings.policy.model_copy(update=policy),
            "round": settings.round.model_copy(update=few),
        }
    )


class _Federation:
    """Clients of a run of deltas, round by round; what their coded values take is kept apart."""

    def __init__(self, learners: Mapping[str, TorchLearner], settings: RunSettings) -> None:
        self._learners, self._settings = learners, settings
        self._encoding: DeltaEncoding = delta_encoding(settings.wire.encoding)
        self._states: dict[str, PersonalState] = {}
        self._number = 0
        first = next(iter(learners.values()))
        self._space = first.space
        self._version = encode_version(self._space.digest, first.initial())

    def round(self) -> tuple[float, float]:
        """Bytes per shared element of an update, on average, and per element of the delta."""
        self._number += 1
        dim, digest = self._space.dim, self._space.digest
        base = decode_version(self._version, space_digest=digest, dim=dim)
        sizes, parts = [], []
        for name in self._learners:
            data, mask = self._update(name, base)
            values = read_update_layout(data[: header_size(data)]).sections["values"].count
            sizes.append(values / max(1, mask.shared))
            parts.append(Contribution(mask, update_values(data, mask)))
        mean = aggregate(np.zeros_like(base), parts, self._settings.round.min_contributors)
        self._version, delta = step(self._version, mean, space=digest, encoding=self._encoding)
        frames = read_step_layout(delta[: header_size(delta)]).sections["values"].count
        return sum(sizes) / len(sizes), frames / dim

    def _update(self, name: str, base: FloatVector) -> tuple[bytes, Mask]:
        before = self._states.get(name)
        seed = derive_seed(self._settings, name, self._number)
        done = self._learners[name].participate(before, base, settings=self._settings, seed=seed)
        meta = UpdateMeta(
            space=self._space.digest,
            run="dry",
            round=self._number,
            assignment=name,
            base_version=file_digest(self._version),
            mask_version=self._number,
            examples=done.examples,
            encoding=self._encoding,
        )
        data, self._states[name] = write_update(
            meta, done, base=base, before=before, known=None, send_mask=True
        )
        return data, done.mask


# --- what noise costs ---------------------------------------------------------------------------


def noise_cost(tasks: Mapping[str, Task], settings: RunSettings) -> float | None:
    """Points of pooled accuracy that the noise of ``privacy.dp`` alone costs; None without it.

    Two runs of the tasks that are alike but for the noise of a goal of clients on every version:
    what clipping costs is not in it. Of a long run the first ``NOISY_ROUNDS`` rounds.
    """
    if settings.privacy.dp is None:
        return None
    space = TorchLearner(next(iter(tasks.values()))).space
    rule = noise_rule(settings, space)
    key = sha256(f"dry run/{settings.seed}".encode()).digest()

    def noise(number: int) -> FloatVector:
        return noise_alone(rule, round_key(key, str(number)), space.dim)

    few = {"min_contributors": min(len(tasks), settings.round.min_contributors)}
    short = settings.model_copy(
        update={
            "rounds": min(settings.rounds, NOISY_ROUNDS),
            "privacy": Privacy(),
            "round": settings.round.model_copy(update=few),
        }
    )
    plain, noised = (_pooled(simulate(tasks, short, noise=each)) for each in (None, noise))
    return 100 * (plain - noised)


def _pooled(done: Simulation) -> float:
    """What all clients together get right of their held-out examples, each after its training."""
    scores = [found["post"] for found in done.scores.values()]
    return sum(s.correct for s in scores) / max(1, sum(s.total for s in scores))


# --- how clients pull --------------------------------------------------------------------------


def pull(tasks: Mapping[str, Task], settings: RunSettings) -> Divergence:
    """How differently the clients of a federation pull: one round of local updates, twice.

    Raises:
        SettingsError: fewer than 3 clients.
        SpaceError: their models differ.
    """
    learners = {name: TorchLearner(task) for name, task in tasks.items()}
    base = next(iter(learners.values())).initial()
    first, second = (
        [
            _moved(learner, base, settings, seed=derive_seed(settings, name, number))
            for name, learner in learners.items()
        ]
        for number in (1, 2)
    )
    return divergence(first, second)


def _moved(
    learner: TorchLearner, base: FloatVector, settings: RunSettings, *, seed: int
) -> FloatVector:
    """What one client would send in a first round, 0 where nothing ever travels."""
    update = learner.participate(None, base, settings=settings, seed=seed).theta - base
    update[Mask.initial(learner.space).to_bool()] = 0
    return update
