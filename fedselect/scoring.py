"""What a client says of a version: its scores there, and what its own part is worth.

Owns which models an evaluation compares, and the report of it. A version is judged with the
personal part that goes with it, as it is served. Must not train for a round or change what counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from fedselect.agent_state import Arm
from fedselect.checkindocs import Assignment
from fedselect.client import Client
from fedselect.errors import ServiceError, TrainingError
from fedselect.evaluations import EvaluationReport
from fedselect.fetching import Versions
from fedselect.personal import Explainer, Learner, PersonalState, Score
from fedselect.space import FloatVector
from fedselect.switching import Switch

_GONE = frozenset({404, 410})  # asking again brings no file back


class Scorer:
    """Does a client's evaluations and ablations; without an ``explainer`` no ablations."""

    def __init__(
        self,
        client: Client,
        learner: Learner,
        versions: Versions,
        switch: Switch,
        explainer: Explainer | None,
    ) -> None:
        self._client = client
        self._learner = learner
        self._versions = versions
        self._switch = switch
        self._explainer = explainer

    def evaluate(self, arm: Arm, work: Assignment) -> None:
        """Score the models that an evaluation asks for, and report.

        Raises:
            ServiceError: a version cannot be fetched now, or the report is not taken.
            TrainingError, WireError: this client cannot do it.
        """
        space, settings = self._learner.space, work.run.settings
        with _for_good():
            base = self._versions.base(arm, work)
            state = self._switch.part(work.arm_id, work.base)
            state = state or PersonalState.start(base, settings.policy.first_mask(space))
            scores = self._scores(arm, work, state, base)
        counted = arm.committed(space)
        arm.tally()
        report = {
            "scores": {name: asdict(score) for name, score in scores.items()},
            "participations": state.participations,
            "personal_share": state.merge_mask.share(space),
            "bytes_sent": arm.record.bytes_sent,
            "bytes_received": arm.record.bytes_received,
            "delta_bytes_received": arm.record.delta_bytes_received,
            "control_sent": arm.record.control_sent,
            "control_received": arm.record.control_received,
            "gated": state.gated,
            "divergence": self._versions.divergence(arm, counted, base) if counted else None,
            "labels": self._explainer.labels() if self._explainer is not None else None,
        }
        self._client.evaluate(work.id, _report(report).disclosed(settings))

    def _scores(
        self, arm: Arm, work: Assignment, state: PersonalState, base: FloatVector
    ) -> dict[str, Score]:
        settings = work.run.settings
        if work.against is None:
            origin = self._versions.origin(arm, work)
            return self._learner.evaluate(state, base, settings=settings, origin=origin)
        before = self._switch.model(work.against, arm)
        models = ("post", state.personalized(base)), ("before", before)
        return self._learner.scores(models, own="post", settings=settings)

    def ablate(self, arm: Arm, work: Assignment) -> None:
        """Score a version with this client's present part and without, and report.

        Raises:
            ServiceError, TrainingError, WireError: as of :meth:`evaluate`.
        """
        with _for_good():
            base = self._versions.base(arm, work)
        state = arm.committed(self._learner.space)  # the last mask is what explanations speak of
        if state is None or self._explainer is None:
            raise TrainingError("nothing of this run's model is this client's own")
        found = self._explainer.ablate(state, base, settings=work.run.settings)
        arm.tally()
        self._client.ablate(work.id, found.disclosed(work.run.settings))


@contextmanager
def _for_good() -> Iterator[None]:
    """A version file that is gone for good makes the client unable, it does not make it wait."""
    try:
        yield
    except ServiceError as error:
        if error.status not in _GONE:
            raise
        raise TrainingError(str(error)) from error


def _report(numbers: dict[str, Any]) -> EvaluationReport:
    try:
        return EvaluationReport.model_validate(numbers)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise TrainingError(
            f"the evaluation cannot be reported: {where}: {fault['msg']}"
        ) from error
