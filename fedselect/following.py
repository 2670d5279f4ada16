"""What follows from a training, one client's or many at once: the next mask and the state.

Owns the step from a trained model to the state after it. Must not train, or know files and rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from fedselect.choices import following as following_choices
from fedselect.gathering import left, trained
from fedselect.personal import Participation, PersonalState
from fedselect.policies import Policy
from fedselect.selection import next_mask
from fedselect.space import FloatVector, ParameterSpace


@dataclass(frozen=True)
class Trained:
    """What a training made of ``start`` (D,): ``theta`` (D,), and the second local model ``own``
    (D,) if there is one; how many examples there are, and integer buffers by name.
    """

    start: FloatVector
    theta: FloatVector
    own: FloatVector | None
    examples: int
    buffers: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def conclude(
    state: PersonalState, done: Trained, *, policy: Policy, space: ParameterSpace, seed: int
) -> Participation:
    """Choose the next mask if it is due. ``state`` is the one that training started from, with the
    evidence that was gathered on the way; ``seed`` is that of the participation.

    Raises:
        TrainingError: a score is not finite.
    """
    theta = done.theta
    state = replace(state, evidence=trained(policy, state, done.start, theta))
    mask, reference = next_mask(policy, state, theta=theta, space=space, seed=seed)
    following = PersonalState(
        participations=state.participations + 1,
        theta=theta,
        reference=reference,
        merge_mask=state.mask,
        mask=mask,
        buffers=dict(done.buffers),
        evidence=left(policy, state),
        gated=state.gated,
        own=done.own,
        choices=following_choices(state, mask, theta=theta, space=space),
    )
    return Participation(theta, state.mask, done.examples, following)
