"""Ablation: what a client's personal part is worth, tensor by tensor, on its own held-out data.

Owns the models that are compared and the numbers that are taken of values; the scoring is the
learner's. What it gives are numbers alone (``explaindocs``). Must not know rounds, files or the
network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from fedselect.choices import of_upload
from fedselect.errors import TrainingError
from fedselect.evaluations import ScoreReport
from fedselect.explaindocs import LEAST_ELEMENTS, MOST_ABLATED, AblationReport, TensorAblation
from fedselect.masks import BoolVector, Mask
from fedselect.personal import PersonalState, Score
from fedselect.policies import RunSettings
from fedselect.space import FloatVector, Slot
from fedselect.training import TorchLearner

WHOLE, WITHOUT = "whole", "without"


class TorchExplainer:
    """A :class:`~fedselect.personal.Explainer` for a learner and its task."""

    def __init__(self, learner: TorchLearner, *, tell_labels: bool = False) -> None:
        self._learner = learner
        self._tell_labels = tell_labels

    def labels(self) -> dict[str, int] | None:
        """Training examples by label, if the site agreed to tell them (``tell_labels``) and its
        batches are ``(inputs, labels)`` with whole numbers for labels; else None.
        """
        if not self._tell_labels:
            return None
        counts: Counter[str] = Counter()
        for batch in self._learner.task.train_batches():
            labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
            if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
                return None
            counts.update(map(str, labels.tolist()))
        return dict(counts)

    def ablate(
        self, state: PersonalState, base: FloatVector, *, settings: RunSettings
    ) -> AblationReport:
        """Score ``base`` (D,) with the client's own elements merged in, then with the shared values
        back in place of all that the policy chose, and of each tensor's part of it.

        Of many tensors, those with the most chosen elements.

        Raises:
            TrainingError: a result is not finite.
            SpaceError: the state or the base belongs to a model of another size.
        """
        space = self._learner.space
        self._learner.check_size(base, state)
        chosen = state.merge_mask - Mask.initial(space)
        counts = chosen.per_slot(space)
        slots = sorted(space.slots, key=lambda slot: (-counts[slot.name], slot.offset))
        slots = [slot for slot in slots[:MOST_ABLATED] if counts[slot.name]]
        parts = _Parts(state, base, chosen.to_bool())
        scores = self._learner.scores(parts.models(slots), own=WHOLE, settings=settings)
        chose = _choices(state, settings, self._learner)
        try:
            return AblationReport(
                whole=_reported(scores[WHOLE]),
                without=_reported(scores[WITHOUT]),
                tensors=[
                    TensorAblation(
                        name=slot.name,
                        score=_reported(scores[_key(slot)]),
                        **(parts.distance(slot) | chose.get(slot.name, {}))
                        if counts[slot.name] >= LEAST_ELEMENTS
                        else {},
                    )
                    for slot in slots
                ],
            )
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise TrainingError(f"the ablation cannot be reported: {fault['msg']}") from error


class _Parts:
    """The models that are compared, of a state, the shared values (D,), and which elements were
    chosen.
    """

    def __init__(self, state: PersonalState, base: FloatVector, chosen: BoolVector) -> None:
        self._whole = state.personalized(base)
        self.merged, self.base, self.chosen = state.merge(base), base, chosen

    def models(self, slots: list[Slot]) -> Iterator[tuple[str, FloatVector]]:
        yield WHOLE, self._whole
        yield WITHOUT, np.where(self.chosen, self.base, self.merged)
        for slot in slots:
            model, part = self.merged.copy(), slice(slot.offset, slot.stop)
            np.copyto(model[part], self.base[part], where=self.chosen[part])
            yield _key(slot), model

    def distance(self, slot: Slot) -> dict[str, float]:
        """How far the personal values are from the shared ones, in percent of these."""
        part = slice(slot.offset, slot.stop)
        own = self.merged[part][self.chosen[part]].astype(np.float64)
        shared = self.base[part][self.chosen[part]].astype(np.float64)
        length = float(np.linalg.norm(shared))
        if not length:
            return {}
        return {"distance_percent": _rounded(100 * float(np.linalg.norm(own - shared)) / length)}


def _choices(
    state: PersonalState, settings: RunSettings, learner: TorchLearner
) -> dict[str, dict[str, float]]:
    """By tensor, the Δ of its elements when they were chosen, where it was Δ that decided."""
    policy = settings.policy
    if policy.personal != "learned" or policy.score != "delta":
        return {}
    return {
        name: {
            "threshold": _rounded(choice.threshold),
            "delta_chosen": _rounded(choice.delta / choice.chosen),
            "delta_shared": _rounded(choice.left),
        }
        for name, choice in of_upload(state.choices, learner.space).items()
    }


def _rounded(value: float) -> float:
    """Three digits tell all that a person can use, and nobody a value to the bit."""
    return float(f"{value:.3g}")


def _key(slot: Slot) -> str:
    return f"tensor {slot.name}"


def _reported(score: Score) -> ScoreReport | None:
    return ScoreReport(**asdict(score)) if score.total else None
