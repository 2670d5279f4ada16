"""What one participation adds to the evidence that the next mask is chosen by.

Owns the accumulators while a model trains, when evidence is added or dropped, and what else goes
with a training's gradients. What is added up is named in ``evidence``; which score needs which is
``scores``. Must not train.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedselect.evidence import (
    DRIFT,
    NOTHING,
    OWN_MOVE,
    SQUARED_DRIFT,
    SQUARED_GRADIENT,
    Evidence,
)
from fedselect.holdout import Fold
from fedselect.moves import Trainable
from fedselect.personal import PersonalState
from fedselect.policies import Policy
from fedselect.scores import SCORES
from fedselect.space import FloatVector


class Squares:
    """Sums of squared gradients over steps, kept where the model is.

    Of parameters that are tied by their storage, the squares add up.
    """

    def __init__(self, trainable: Trainable, dim: int) -> None:
        self._steps, self._dim = 0, dim
        self._sums = [(slot, p, torch.zeros_like(p)) for slot, p in trainable]

    def add(self) -> None:
        """Count the gradients of a step, before a mask keeps any of them back."""
        self._steps += 1
        for _, parameter, total in self._sums:
            if parameter.grad is not None:
                total.addcmul_(parameter.grad, parameter.grad)

    def told(self, evidence: Evidence) -> Evidence:
        """The evidence with these sums, 0 where nothing learns."""
        flat = np.zeros(self._dim, dtype=np.float32)
        for slot, _, total in self._sums:
            values = total.detach().to("cpu", torch.float32)
            flat[slot.offset : slot.stop] += values.reshape(-1).numpy()
        return evidence.with_terms(SQUARED_GRADIENT, flat, self._steps)


@dataclass
class Window:
    """What a training gathers, the fold that it spares, the model (D,) that pulls at it, and what
    its gradients are multiplied by (D,).
    """

    squares: Squares | None = None
    fold: Fold | None = None
    anchor: torch.Tensor | None = None
    rates: torch.Tensor | None = None

    def bend(self, trainable: Trainable, strength: float | None) -> None:
        """Add the gradient of strength/2 · ‖θ − anchor‖², then multiply all by the rates."""
        pulled: set[int] = set()
        for slot, parameter in trainable:
            if parameter.grad is None:
                continue
            part = slice(slot.offset, slot.stop)
            if self.anchor is not None and strength and slot.offset not in pulled:  # once if tied
                pulled.add(slot.offset)
                aim = self.anchor[part].view(slot.shape).to(parameter)
                parameter.grad.add_(parameter - aim, alpha=strength)
            if self.rates is not None:
                parameter.grad.mul_(self.rates[part].view(slot.shape).to(parameter))

    def told(self, evidence: Evidence) -> Evidence:
        """The evidence with what was gathered."""
        return evidence if self.squares is None else self.squares.told(evidence)


def wanted(policy: Policy, participation: int) -> frozenset[str]:
    """The accumulators that this own participation adds to."""
    learned = policy.personal == "learned" and policy.gathers(participation)
    return SCORES[policy.score].needs if learned else frozenset()


def met(policy: Policy, state: PersonalState, base: FloatVector) -> Evidence:
    """The evidence once the shared model ``base`` (D,) is known that followed the client's own."""
    now, evidence = state.participations, state.evidence
    if not now:
        return evidence
    if DRIFT in wanted(policy, now):
        drift = state.theta - base
        evidence = evidence.with_terms(DRIFT, drift).with_terms(SQUARED_DRIFT, drift * drift)
    if policy.gate != "none" and policy.gathers(now - 1):
        evidence = evidence.with_pair(state.theta, base)
    return evidence


def trained(
    policy: Policy, state: PersonalState, start: FloatVector, theta: FloatVector
) -> Evidence:
    """The evidence once ``start`` (D,) has been trained to ``theta`` (D,)."""
    if OWN_MOVE not in wanted(policy, state.participations):
        return state.evidence
    return state.evidence.with_terms(OWN_MOVE, np.abs(theta - start))


def left(policy: Policy, state: PersonalState) -> Evidence:
    """What remains of the evidence after this participation: the gate is still to judge by it."""
    if not policy.due(state.participations):
        return state.evidence
    return NOTHING if policy.gate == "none" else state.evidence.pairs()
