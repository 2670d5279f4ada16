"""Serving what the coordinator says: the agent's side of channels, rollouts and rollbacks.

Owns when another version is served, and the personal part that goes with it. The first time, that
is the part which counts in the version's arm, or without one that of a single participation here
which is sent to nobody; from then on it is the one that was kept. Files are ``shelf``.
"""

from __future__ import annotations

from uuid import UUID

from pydantic import ValidationError

from fedselect.agent_state import AgentFolder, Arm
from fedselect.checkindocs import Serving
from fedselect.errors import TrainingError
from fedselect.fetching import Versions
from fedselect.personal import Learner, PersonalState, derive_seed
from fedselect.policies import RunSettings
from fedselect.shelf import Pair, Shelf
from fedselect.space import FloatVector
from fedselect.wire import decode_version


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
        self._given_up: tuple[UUID, str] | None = None

    def due(self, wanted: Serving | None) -> bool:
        """Whether something else should be served; not what this process could not serve."""
        if wanted is None or wanted.space_digest != self._learner.space.digest:
            return False
        served, place = self._shelf.served, (wanted.arm_id, wanted.version.sha256)
        same = served is not None and served.is_of(*place) and served.channel == wanted.channel
        return not same and place != self._given_up

    def give_up(self, wanted: Serving) -> None:
        """Do not try this one again; what is served stays."""
        self._given_up = (wanted.arm_id, wanted.version.sha256)

    def to(self, wanted: Serving) -> None:
        """Serve another version, with the personal part that it had here before if it had one.

        Raises:
            ServiceError: the version cannot be fetched.
            WireError, TrainingError: it is of another model, or the training for it fails.
        """
        pair = self._shelf.find(wanted.arm_id, wanted.version.sha256) or self._made(wanted)
        self._shelf.serve(pair.model_copy(update={"channel": wanted.channel}))

    def state(self, arm: UUID, sha256: str) -> PersonalState | None:
        """The personal part that a version is served with, if it is kept here."""
        pair = self._shelf.find(arm, sha256)
        return self._shelf.state(pair, self._learner.space) if pair else None

    def model(self, wanted: Serving) -> FloatVector:
        """A version as it is served here, or would be: shape (D,).

        Raises:
            ServiceError, WireError, TrainingError: as of :meth:`to`.
        """
        space, arm = self._learner.space, self._folder.arm(wanted.arm_id)
        data = self._versions.file(arm, wanted.version)
        base = decode_version(data, space_digest=space.digest, dim=space.dim)
        kept = self.state(wanted.arm_id, wanted.version.sha256)
        return (kept or self._present(arm, wanted, base)).personalized(base)

    def _present(self, arm: Arm, wanted: Serving, base: FloatVector) -> PersonalState:
        """The part that counts now in a version's arm, or without one that of one participation."""
        return arm.committed(self._learner.space) or self._personalized(wanted, base)

    def _made(self, wanted: Serving) -> Pair:
        space, arm = self._learner.space, self._folder.arm(wanted.arm_id)
        data = self._versions.file(arm, wanted.version)
        base = decode_version(data, space_digest=space.digest, dim=space.dim)
        state, committed = self._present(arm, wanted, base), arm.record.committed
        version, kept = self._shelf.store(wanted.arm_id, data, state.pieces(space))
        return Pair(
            channel=wanted.channel,
            arm=wanted.arm_id,
            number=wanted.version.number,
            version=version,
            state=kept,
            participations=state.participations,
            round=committed.round if committed else 0,
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
