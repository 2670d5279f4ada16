"""A whole run in one process: the service's rules, files and kernels without its servers.

Owns the course of an in-process federation; its two sides are ``inprocess``. Must not add a rule of
its own: what a simulated run computes, the service computes from the same updates bit for bit (same
torch build, one torch thread), unless all clients are trained at once (``batched``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from fedselect.batched import Job, Together
from fedselect.checkpoints import Checkpoint
from fedselect.errors import FedSelectError, SpaceError, TrainingError
from fedselect.inprocess import Client, Coordinator
from fedselect.personal import Participation, PersonalState, Score
from fedselect.policies import RunSettings
from fedselect.space import FloatVector, ParameterSpace
from fedselect.task import Task
from fedselect.training import TorchLearner
from fedselect.wire import Update, encode_version, file_digest

Order = Callable[[int, list[str]], list[str]]
Tamper = Callable[[int, FloatVector, dict[str, Update]], dict[str, Update]]


@dataclass(frozen=True)
class Simulation:
    """What a simulated run leaves behind; the mappings are keyed by client name.

    ``versions`` are the SHA-256 (hex) of the version files, index 0 the start; ``values`` (D,) is
    the last version. ``bytes_up`` counts update files; ``bytes_down`` what a client fetches: the
    version that each of its rounds starts from, or the deltas to it, and at the end the last one
    and version 0. ``personal`` is the personal share (0 to 1) of the mask of the last upload.
    ``one_by_one`` says why clients were not trained together, if that was asked for.
    """

    space: ParameterSpace
    versions: list[str]
    values: FloatVector
    states: dict[str, PersonalState]
    scores: dict[str, dict[str, Score]]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    personal: dict[str, float]
    one_by_one: str | None = None


@dataclass(frozen=True)
class Execution:
    """How a simulation is carried out, which changes nothing but rounding.

    ``vectorized`` trains all clients of a round at once, where that is possible (``batched``). With
    a ``checkpoint``, one that was ended goes on from the last, to the bits of one that never was.
    """

    vectorized: bool = False
    checkpoint: Checkpoint | None = None


def simulate(
    tasks: Mapping[str, Task],
    settings: RunSettings,
    *,
    order: Order | None = None,
    progress: Callable[[int], None] | None = None,
    noise: Callable[[int], FloatVector] | None = None,
    execution: Execution = Execution(),
) -> Simulation:
    """Run all rounds, then let every client evaluate.

    Version 0 are the weights of the first task's model. ``order(round, names)`` says who takes part
    in a round, in the order in which the updates count as accepted (all of them by name if None):
    sums are taken in it, see also :func:`sampled`. A client that comes later starts from the shared
    model of its first round. ``progress(round)`` is called after each round; rounds count from 1.
    ``noise(round)`` (D,) is added to what each round publishes, to see what it would cost.

    Raises:
        FedSelectError: no tasks, an order of nobody, of strangers or of somebody twice, or a
            checkpoint of another simulation.
        SpaceError: the tasks' models differ.
        TrainingError: a client's training failed.
    """
    run, checkpoint = SimulatedRun(tasks, settings, execution.vectorized), execution.checkpoint
    if checkpoint is not None:
        run.resume(checkpoint)
    for number in range(run.rounds + 1, settings.rounds + 1):
        accepted = run.names if order is None else order(number, list(run.names))
        run.round(accepted, noise=None if noise is None else noise(number))
        if checkpoint is not None and checkpoint.due(number, settings.rounds):
            run.save(checkpoint)
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
    nothing. ``one_by_one`` says why clients are not ``vectorized`` though that was asked for.
    Version 0 is ``start`` (D,), or the weights of the first client's model.

    Raises:
        FedSelectError: no tasks, or a run with arms.
        SpaceError: the tasks' models differ.
        WireError: ``start`` is of another size than they.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        settings: RunSettings,
        vectorized: bool = False,
        *,
        start: FloatVector | None = None,
    ) -> None:
        if settings.arms is not None:
            raise FedSelectError(
                "a run with arms is simulated by simulate_arms", code="task_invalid"
            )
        self.settings = settings
        self._clients = _enrol(tasks)
        first = next(iter(self._clients.values())).learner
        self._coordinator = Coordinator(first.space, first.initial() if start is None else start)
        self._origin = self._coordinator.values
        self.names = sorted(self._clients)
        self.one_by_one: str | None = None
        self._together: Together | None = None
        if vectorized:
            try:
                self._together = Together([self.learners[n] for n in self.names], settings)
            except TrainingError as error:
                self.one_by_one = str(error)

    @property
    def rounds(self) -> int:
        """How many rounds are done."""
        return len(self._coordinator.versions) - 1

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

    def round(
        self,
        accepted: Sequence[str],
        *,
        noise: FloatVector | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        """Run the next round with some clients, in the order in which their updates count;
        ``noise`` (D,) is added to what it publishes. ``tamper(round, base, updates)`` may hand in
        other updates than the clients', as attackers would.

        Raises:
            FedSelectError: nobody, strangers, or somebody twice.
            TrainingError: a client's training failed.
        """
        order = _checked(list(accepted), self.names)
        number = self.rounds + 1
        jobs = [
            self._clients[name].begin(self._coordinator, self.settings, number=number)
            for name in sorted(order)
        ]
        done = {} if self._together is None else self._together.participate(jobs, self.values)
        updates = {}
        for job in jobs:
            result = done.pop(job.name, None) or self._alone(job)
            updates[job.name] = self._clients[job.name].send(
                self._coordinator, self.settings, result, number=number
            )
        if tamper is not None:
            updates = tamper(number, self.values, updates)
        parts = [updates[name] for name in order]
        self._coordinator.publish(parts, self.settings, noise=noise)

    def _alone(self, job: Job) -> Participation:
        return job.learner.participate(
            job.state, self.values, settings=self.settings, seed=job.seed
        )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write all that the next rounds need."""
        clients = {name: client.saved() for name, client in self._clients.items()}
        checkpoint.write(self._coordinator.saved(clients), self.space, self._facts())

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            FedSelectError: it is damaged, or of another simulation.
        """
        found = checkpoint.read(self.space, self._facts())
        if found is not None:
            self._coordinator.restore(found)
            for name, part in found.clients.items():
                self._clients[name].restore(part)

    def _facts(self) -> dict[str, object]:
        return {
            "settings": self.settings.model_dump(mode="json"),
            "clients": self.names,
            "parameter space": self.space.digest,
            "first version": file_digest(encode_version(self.space.digest, self._origin)),
            "way of training": "one by one" if self._together is None else "together",
        }

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
        trained: dict[str, dict[str, FloatVector]] = {}
        if self._together is not None:
            trained = self._together.finish(
                states, self.learners, base=self.values, origin=self._origin
            )
        return Simulation(
            space=self.space,
            versions=self._coordinator.versions,
            values=self.values,
            states=states,
            scores={
                name: client.learner.evaluate(
                    states[name],
                    self.values,
                    settings=self.settings,
                    origin=self._origin,
                    trained=trained.get(name),
                )
                for name, client in clients.items()
            },
            bytes_up=self.bytes_up(),
            bytes_down={name: each.fetched(self._coordinator) for name, each in clients.items()},
            personal={name: state.merge_mask.share(self.space) for name, state in states.items()},
            one_by_one=self.one_by_one,
        )


def _enrol(tasks: Mapping[str, Task]) -> dict[str, Client]:
    if not tasks:
        raise FedSelectError("there is no client to simulate", code="task_invalid")
    clients = {name: Client(name, TorchLearner(task)) for name, task in tasks.items()}
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
