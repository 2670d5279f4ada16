"""Serving what the coordinator says: the agent's side of channels, rollouts and rollbacks.

Owns when another version is served, and the personal part that goes with it. The first time, that
is the part which counted when the version was published, or for a client that had none in its arm
by then that of a single participation here which is sent to nobody; from then on it is the one that
was kept. Files are ``shelf`` and ``agent_state``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

from pydantic import ValidationError

from fedselect.agent_state import AgentFolder, Arm
from fedselect.checkindocs import Pinned, Serving
from fedselect.errors import SpaceError, TrainingError
from fedselect.fetching import Versions
from fedselect.personal import Learner, PersonalState, derive_seed
from fedselect.policies import RunSettings
from fedselect.protocol import VersionInfo
from fedselect.shelf import Pair, Shelf
from fedselect.space import FloatVector
from fedselect.wire import decode_version

LONGEST = 64  # check-ins to pass before a version that could not be fetched is tried again


class Switch:
    """Keeps a client's ``serving/`` as the answers of its check-ins want it."""

    def __init__(
        self, folder: AgentFolder, learner: Learner, versions: Versions, *, name: str
    ) -> None:
        self._folder = folder
        self._learner = learner
        self._versions = versions
        self._name = name
        self._shelf = Shelf(folder.path)
        self._failed: tuple[UUID, str] | None = None
        self._failures = 0
        self._pause: int | None = 0  # check-ins until the failed one is tried again; None: never
        self._pinned: dict[UUID, set[int]] | None = None

    def due(self, wanted: Serving) -> bool:
        """Whether something else should be served; asked once for every check-in.

        What this process could not serve is not tried again, or not at once (:meth:`failed`).
        """
        served, place = self._shelf.served, (wanted.arm_id, wanted.version.sha256)
        if served is not None and served.is_of(*place) and served.channel == wanted.channel:
            return False
        if place != self._failed:
            return True
        if self._pause:
            self._pause -= 1
            return False
        return self._pause is not None

    def failed(self, wanted: Serving, *, may_pass: bool) -> None:
        """It could not be served: what is served stays. If that ``may_pass`` it is tried again,
        after ever more check-ins.
        """
        place = (wanted.arm_id, wanted.version.sha256)
        self._failures = self._failures + 1 if place == self._failed else 1
        self._failed = place
        self._pause = min(LONGEST, 2 ** (self._failures - 1)) if may_pass else None

    def pin(self, pinned: Sequence[Pinned]) -> bool:
        """Keep the personal parts that go with these versions; whether they are others than those
        of the check-in before, so that records of arms may have changed.
        """
        wanted: defaultdict[UUID, set[int]] = defaultdict(set)
        for each in pinned:
            wanted[each.arm_id].add(each.number)
        if wanted == self._pinned:
            return False
        self._folder.keep_parts(wanted)
        self._pinned = dict(wanted)
        return True

    def to(self, wanted: Serving) -> None:
        """Serve another version, with the personal part that it had here before if it had one.

        Raises:
            ServiceError: the version cannot be fetched.
            SpaceError, WireError: it is of another model.
            TrainingError: the training for it fails.
        """
        ours = self._learner.space.digest
        if wanted.space_digest != ours:
            raise SpaceError(
                f"it is of a model with parameter space {wanted.space_digest[:12]}…, this task's "
                f"is {ours[:12]}…; start the agent with the task of that model, or give each model "
                "that is served a project of its own",
                code="space_mismatch",
            )
        pair = self._shelf.find(wanted.arm_id, wanted.version.sha256) or self._made(wanted)
        self._shelf.serve(pair.model_copy(update={"channel": wanted.channel}))

    def part(self, arm: UUID, version: VersionInfo) -> PersonalState | None:
        """The personal part that goes with a version: the one that it is served with, or the one
        that counted when it was published; None for a client that had none in its arm by then.
        """
        pair = self._shelf.find(arm, version.sha256)
        if pair is not None:
            return self._shelf.state(pair, self._learner.space)
        return self._folder.arm(arm).counted(version.number, self._learner.space)

    def model(self, wanted: Serving, opened: Arm) -> FloatVector:
        """A version as it is served here, or would be: shape (D,). ``opened`` is the arm at work,
        which counts what is fetched if the version is of it.

        Raises:
            ServiceError, WireError, TrainingError: as of :meth:`to`.
        """
        space, own = self._learner.space, opened.id == wanted.arm_id
        arm = opened if own else self._folder.arm(wanted.arm_id)
        data = self._versions.file(arm, wanted.version)
        base = decode_version(data, space_digest=space.digest, dim=space.dim)
        part = self.part(wanted.arm_id, wanted.version) or self._personalized(wanted, base)
        return part.personalized(base)

    def _made(self, wanted: Serving) -> Pair:
        space, number = self._learner.space, wanted.version.number
        arm = self._folder.arm(wanted.arm_id)
        data = self._versions.file(arm, wanted.version)
        base = decode_version(data, space_digest=space.digest, dim=space.dim)
        state = arm.counted(number, space) or self._personalized(wanted, base)
        version, kept = self._shelf.store(wanted.arm_id, data, state.pieces(space))
        counted = arm.record.at(number)
        return Pair(
            channel=wanted.channel,
            arm=wanted.arm_id,
            number=number,
            version=version,
            state=kept,
            participations=state.participations,
            round=counted.round if counted else 0,
        )

    def _personalized(self, wanted: Serving, base: FloatVector) -> PersonalState:
        """One participation from ``base`` (D,) that nobody hears of; the same after a crash."""
        try:
            settings = RunSettings.model_validate(wanted.settings)
        except ValidationError as error:
            raise TrainingError(
                f"version {wanted.version.number} is personalized with settings that this agent "
                "does not know; install a newer fedselect at the client"
            ) from error
        seed = derive_seed(settings, self._name, 0)
        return self._learner.participate(None, base, settings=settings, seed=seed).state
