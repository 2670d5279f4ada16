"""A whole run in one process: the service's rules, files and kernels without its servers.

Owns the in-process federation. Must not add a rule of its own: what a simulated run computes, the
service computes from the same updates bit for bit (same torch build, one torch thread).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import numpy as np

from fedselect.accounting import noise_rule
from fedselect.aggregate import Contribution, aggregate
from fedselect.deltafiles import step
from fedselect.downloads import DeltaFacts, cheapest
from fedselect.errors import FedSelectError, SpaceError
from fedselect.feedback import write_update
from fedselect.filesizes import version_size
from fedselect.masks import Mask
from fedselect.noise import round_key
from fedselect.personal import Participation, PersonalState, Score, derive_seed
from fedselect.policies import RunSettings
from fedselect.private import private_mean
from fedselect.space import FloatVector, ParameterSpace
from fedselect.task import Task
from fedselect.training import TorchLearner
from fedselect.wire import (
    Update,
    UpdateMeta,
    UpdatePlan,
    decode_update,
    decode_version,
    encode_version,
    file_digest,
)

RUN = "simulation"
Order = Callable[[int, list[str]], list[str]]


@dataclass(frozen=True)
class Simulation:
    """What a simulated run leaves behind; the mappings are keyed by client name.

    ``versions`` are the SHA-256 (hex) of the version files, index 0 the start; ``values`` (D,) is
    the last version. ``bytes_up`` counts update files; ``bytes_down`` what a client fetches: the
    version that each of its rounds starts from, or the deltas to it, and at the end the last one
    and version 0. ``personal`` is the personal share (0 to 1) of the mask of the last upload.
    """

    space: ParameterSpace
    versions: list[str]
    values: FloatVector
    states: dict[str, PersonalState]
    scores: dict[str, dict[str, Score]]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    personal: dict[str, float]


def simulate(
    tasks: Mapping[str, Task],
    settings: RunSettings,
    *,
    order: Order | None = None,
    progress: Callable[[int], None] | None = None,
    noise: Callable[[int], FloatVector] | None = None,
) -> Simulation:
    """Run all rounds, then let every client evaluate.

    Version 0 are the weights of the first task's model. ``order(round, names)`` says who takes part
    in a round, in the order in which the updates count as accepted (all of them by name if None):
    sums are taken in it, see also :func:`sampled`. A client that comes later starts from the shared
    model of its first round. ``progress(round)`` is called after each round; rounds count from 1.
    ``noise(round)`` (D,) is added to what each round publishes, to see what it would cost.

    Raises:
        FedSelectError: no tasks, or an order of nobody, of strangers or of somebody twice.
        SpaceError: the tasks' models differ.
        TrainingError: a client's training failed.
    """
    run = SimulatedRun(tasks, settings)
    for number in range(1, settings.rounds + 1):
        accepted = run.names if order is None else order(number, list(run.names))
        run.round(accepted, noise=None if noise is None else noise(number))
        if progress is not None:
            progress(number)
    return run.result()


def simulate_arms(
    tasks: Mapping[str, Task],
    settings: RunSettings,
    *,
    ids: Mapping[str, str] | None = None,
    order: Callable[[str, int, list[str]], list[str]] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Simulation]:
    """:func:`simulate` each arm of a run, by name; they share nothing but version 0.

    Randomized arms are split by ``ids`` of the clients, their names if None. ``order`` and
    ``progress`` are also told the arm. ``bytes_down`` counts each arm as if it were alone; in the
    service a file that two arms share is fetched once.

    Raises:
        FedSelectError: as :func:`simulate`; or a randomized arm has too few clients.
    """
    arms = settings.arms and settings.arms.settled(len(tasks))
    settings = settings.model_copy(update={"arms": arms})
    mine = {name: settings.arms_of((ids or {}).get(name, name)) for name in tasks}
    if arms is not None and arms.mode == "randomized":
        arms.check_split(Counter(first for first, *_ in mine.values()))
    return {
        policy.name: simulate(
            {name: task for name, task in tasks.items() if policy.name in mine[name]},
            settings.of_arm(policy.name),
            order=order and partial(order, policy.name),
            progress=progress and partial(progress, policy.name),
        )
        for policy in settings.policies
    }


def sampled(share: float, seed: int) -> Order:
    """An order in which each round draws the same share (0 to 1) of all clients, at least one.

    Raises:
        FedSelectError: not a share.
    """
    if not 0 < share <= 1:
        raise FedSelectError(f"a share is above 0 and at most 1, got {share}", code="task_invalid")

    def order(number: int, names: list[str]) -> list[str]:
        drawn = sorted(
            names, key=lambda name: sha256(f"{seed}\0{number}\0{name}".encode()).digest()
        )
        return sorted(drawn[: max(1, round(share * len(names)))])

    return order


class SimulatedRun:
    """A run in this process, round by round, for those who look at it on its way.

    ``names`` are the clients in order; their ``learners`` may be asked to score, which changes
    nothing.

    Raises:
        FedSelectError: no tasks, or a run with arms.
        SpaceError: the tasks' models differ.
    """

    def __init__(self, tasks: Mapping[str, Task], settings: RunSettings) -> None:
        if settings.arms is not None:
            raise FedSelectError(
                "a run with arms is simulated by simulate_arms", code="task_invalid"
            )
        self.settings = settings
        self._clients = _enrol(tasks)
        self._coordinator = _Coordinator(next(iter(self._clients.values())).learner)
        self._origin = self._coordinator.values
        self.names = sorted(self._clients)

    @property
    def learners(self) -> dict[str, TorchLearner]:
        """Each client's learner."""
        return {name: client.learner for name, client in self._clients.items()}

    @property
    def values(self) -> FloatVector:
        """The newest version, shape (D,)."""
        return self._coordinator.values

    @property
    def version(self) -> str:
        """SHA-256 (hex) of the newest version's file."""
        return self._coordinator.versions[-1]

    @property
    def space(self) -> ParameterSpace:
        """The parameter space, of D elements."""
        return self._coordinator.space

    def round(self, accepted: Sequence[str], *, noise: FloatVector | None = None) -> None:
        """Run the next round with some clients, in the order in which their updates count;
        ``noise`` (D,) is added to what it publishes.

        Raises:
            FedSelectError: nobody, strangers, or somebody twice.
            TrainingError: a client's training failed.
        """
        order = _checked(list(accepted), self.names)
        number = len(self._coordinator.versions)
        updates = {
            name: self._clients[name].take_part(self._coordinator, self.settings, number=number)
            for name in sorted(order)
        }
        parts = [updates[name] for name in order]
        self._coordinator.publish(parts, self.settings, noise=noise)

    def states(self) -> dict[str, PersonalState]:
        """Each client's state; who never took part has the shared model."""
        return {
            name: client.final_state(self.values, self.settings)
            for name, client in self._clients.items()
        }

    def bytes_up(self) -> dict[str, int]:
        """Bytes of the update files that each client has sent."""
        return {name: client.bytes_up for name, client in self._clients.items()}

    def result(self) -> Simulation:
        """What the run leaves behind, once every client has evaluated."""
        states, clients = self.states(), self._clients
        return Simulation(
            space=self.space,
            versions=self._coordinator.versions,
            values=self.values,
            states=states,
            scores={
                name: client.learner.evaluate(
                    states[name], self.values, settings=self.settings, origin=self._origin
                )
                for name, client in clients.items()
            },
            bytes_up=self.bytes_up(),
            bytes_down={name: each.fetched(self._coordinator) for name, each in clients.items()},
            personal={name: state.merge_mask.share(self.space) for name, state in states.items()},
        )


class _Coordinator:
    """The line of versions, without storage and database."""

    def __init__(self, first: TorchLearner) -> None:
        self.space = first.space
        self.values = first.initial()
        self.versions: list[str] = []
        self._file = b""
        self._steps: list[DeltaFacts] = []
        self._record(encode_version(self.space.digest, self.values))

    def publish(
        self,
        accepted: Sequence[Update],
        settings: RunSettings,
        *,
        noise: FloatVector | None = None,
    ) -> None:
        """Aggregate a round's updates in the order accepted, and add ``noise`` (D,)."""
        by_examples = settings.round.weighting == "examples"
        parts = [
            Contribution(u.mask, u.values, float(u.meta.examples) if by_examples else 1.0)
            for u in accepted
        ]
        encoding = settings.wire.encoding
        base = self.values if encoding == "f32" else np.zeros_like(self.values)
        if settings.privacy.dp is None:
            found = aggregate(base, parts, settings.round.min_contributors)
        else:
            found = self._noised(parts, settings)
        if noise is not None:
            found = found + noise
        if encoding == "f32":
            self._record(encode_version(self.space.digest, found))
        else:
            self._record(*step(self._file, found, space=self.space.digest, encoding=encoding))

    def _noised(self, parts: Sequence[Contribution], settings: RunSettings) -> FloatVector:
        rule = noise_rule(settings, self.space)
        secret = sha256(f"{RUN}/{settings.seed}".encode()).digest()  # as good as any, and known
        key = round_key(secret, self.versions[-1])
        return private_mean(self.values, parts, rule, key, deltas=settings.wire.encoding != "f32")

    def _record(self, file: bytes, delta: bytes | None = None) -> None:
        self._file = file
        self.values = decode_version(file, space_digest=self.space.digest, dim=self.space.dim)
        self.versions.append(file_digest(file))
        if delta is not None:
            before, newest = self.versions[-2:]
            self._steps.append(DeltaFacts(before, newest, len(delta)))

    def way(self, held: Container[str]) -> int:
        """Bytes from versions that a client holds to the newest, as the service would choose."""
        newest, size = self.versions[-1], len(self._file)
        chain = cheapest(self._steps[::-1], target=newest, size=size, held=held)
        if newest in held:
            return 0
        return size if chain is None else sum(each.size for each in chain)


class _Client:
    """One client's agent and the coordinator's memory of its mask, in one place."""

    def __init__(self, name: str, learner: TorchLearner) -> None:
        self.name = name
        self.learner = learner
        self.bytes_up = 0
        self._bytes_down = 0
        self._held: set[str] = set()
        self._state: PersonalState | None = None
        self._known: Mask | None = None
        self._mask_version = 0

    def take_part(self, coordinator: _Coordinator, settings: RunSettings, *, number: int) -> Update:
        """Train, write the update file and read it back as the coordinator would."""
        self._fetch(coordinator)
        seed = derive_seed(settings, self.name, number)
        result = self.learner.participate(
            self._state, coordinator.values, settings=settings, seed=seed
        )
        meta = self._meta(coordinator, settings, result, number=number)
        data, state = write_update(
            meta,
            result,
            base=coordinator.values,
            before=self._state,
            known=self._known,
            send_mask=meta.mask_version > self._mask_version,
        )
        update = decode_update(data, self._plan(meta, settings))
        self._state = state
        self._known, self._mask_version = update.mask, update.meta.mask_version
        self.bytes_up += len(data)
        return update

    def final_state(self, values: FloatVector, settings: RunSettings) -> PersonalState:
        """The state after the last round; who never took part has the shared model (D,)."""
        if self._state is None:
            return PersonalState.start(values, settings.policy.first_mask(self.learner.space))
        return self._state

    def fetched(self, coordinator: _Coordinator) -> int:
        """Bytes of all versions, once the last one and version 0 are here to be evaluated."""
        self._fetch(coordinator)
        origin = coordinator.versions[0] not in self._held
        return self._bytes_down + (version_size(coordinator.space.dim) if origin else 0)

    def _fetch(self, coordinator: _Coordinator) -> None:
        """Get the newest version; an agent holds it and, if it had that, version 0."""
        self._bytes_down += coordinator.way(self._held)
        first, newest = coordinator.versions[0], coordinator.versions[-1]
        self._held = {newest, *({first} & self._held)}

    def _meta(
        self,
        coordinator: _Coordinator,
        settings: RunSettings,
        result: Participation,
        *,
        number: int,
    ) -> UpdateMeta:
        return UpdateMeta(
            space=self.learner.space.digest,
            run=RUN,
            round=number,
            assignment=f"{self.name}/{number}",
            base_version=coordinator.versions[-1],
            mask_version=self._mask_version + (result.mask != self._known),
            examples=result.examples,
            encoding=settings.wire.encoding,
        )

    def _plan(self, meta: UpdateMeta, settings: RunSettings) -> UpdatePlan:
        lower, upper = settings.policy.bounds(self.learner.space)
        return UpdatePlan(
            space=meta.space,
            run=meta.run,
            round=meta.round,
            assignment=meta.assignment,
            base_version=meta.base_version,
            encoding=settings.wire.encoding,
            lower=lower,
            upper=upper,
            known_mask=self._known,
            known_mask_version=self._mask_version,
        )


def _enrol(tasks: Mapping[str, Task]) -> dict[str, _Client]:
    if not tasks:
        raise FedSelectError("there is no client to simulate", code="task_invalid")
    clients = {name: _Client(name, TorchLearner(task)) for name, task in tasks.items()}
    first = next(iter(clients.values()))
    for client in clients.values():
        if client.learner.space.digest != first.learner.space.digest:
            raise SpaceError(
                f"the model of client {client.name!r} has another parameter space than that of "
                f"{first.name!r}; all clients of a run need the same model"
            )
    return clients


def _checked(accepted: list[str], names: list[str]) -> list[str]:
    if not accepted or len(set(accepted)) < len(accepted) or not set(accepted) <= set(names):
        raise FedSelectError(f"order() must return some of {names}, each once, got {accepted}")
    return accepted
