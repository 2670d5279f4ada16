"""Scores: what ranks the elements of a tensor when a client's mask is chosen.

Owns the scores, each one a function with its formula and source, and the registry that policies are
checked against: a new score is one function and one registration (docs/POLICIES.md). Must not
choose elements (``selection``) or gather what scores judge by (``training``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.evidence import (
    DISSENT,
    DRIFT,
    NOTHING,
    OWN_MOVE,
    SQUARED_DRIFT,
    SQUARED_GRADIENT,
    Evidence,
)
from fedselect.space import FloatVector, Slot

REFERENCE = "reference"  # needed by a score that looks at :attr:`Seen.reference`

ACCUMULATORS = frozenset({REFERENCE, OWN_MOVE, SQUARED_GRADIENT, DRIFT, SQUARED_DRIFT})

Ranks = npt.NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """All that a client knows when its mask is chosen; vectors have shape (D,).

    ``theta`` is the trained model, ``reference`` what it was at the last choice (at first the
    shared model that the client started from), ``seed`` that of this participation.
    """

    theta: FloatVector
    reference: FloatVector
    seed: int = 0
    evidence: Evidence = NOTHING

    def change(self, slot: Slot) -> FloatVector:
        """|θ − r| of a tensor, shape (slot.size,)."""
        part = slice(slot.offset, slot.stop)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever chooses looks and says so
            change: FloatVector = np.abs(self.theta[part] - self.reference[part])
        return change

    def mean(self, name: str, slot: Slot) -> FloatVector:
        """Mean of an accumulator's terms, shape (slot.size,); 0 where nothing was gathered."""
        total = self.evidence.sums.get(name)
        if total is None:
            return np.zeros(slot.size, dtype=np.float32)
        return total[slot.offset : slot.stop] / np.float32(self.evidence.terms[name])

    def dissent(self, slot: Slot) -> FloatVector | None:
        """1 − agreement of all clients, shape (slot.size,); None if nobody has told."""
        return self.mean(DISSENT, slot) if DISSENT in self.evidence.sums else None


Rule = Callable[[Seen, Slot], Ranks]


@dataclass(frozen=True, slots=True)
class Score:
    """A rule, and the accumulators (or ``REFERENCE``) that a client keeps for it."""

    rule: Rule
    needs: frozenset[str]


SCORES: dict[str, Score] = {}


def score(name: str, *needs: str) -> Callable[[Rule], Rule]:
    """Register a score.

    Its rule gives a tensor's elements values ≥ 0, shape (slot.size,), that can be compared between
    tensors. Larger is more personal; 0 says that there is no evidence, and is never chosen. Among
    equals the lower index is chosen first.

    Raises:
        ValueError: it needs what no client gathers.
    """

    unknown = set(needs) - ACCUMULATORS
    if unknown:
        raise ValueError(
            f"score {name!r} needs {', '.join(sorted(unknown))}, which no client gathers; there "
            f"are {', '.join(sorted(ACCUMULATORS))}"
        )

    def register(rule: Rule) -> Rule:
        SCORES[name] = Score(rule, frozenset(needs))
        return rule

    return register


@score("delta", REFERENCE)
def delta(seen: Seen, slot: Slot) -> Ranks:
    """Δ = |θ − r|: how far an element has moved since the last choice.

    Source: GradSelect of FedSelect (Tamirisa et al., CVPR 2024, arXiv 2404.02478), as its authors'
    code has it. Δ holds the steps of several participations *and* the others' averages.
    """
    return seen.change(slot)


@score("local_delta", OWN_MOVE)
def local_delta(seen: Seen, slot: Slot) -> Ranks:
    """Mean over participations of |θ − θ_start|: how far own training moves an element.

    θ_start is the merged model that a participation's training begins with. Unlike Δ of ``delta``
    it holds nothing of what the federation moves for everybody, which after a long time without a
    choice is most of Δ. Source: the Δ of docs/STUDY.md's golden figures; our own.
    """
    return seen.mean(OWN_MOVE, slot)


@score("fisher", SQUARED_GRADIENT)
def fisher(seen: Seen, slot: Slot) -> Ranks:
    """h = mean over local steps of grad²: the diagonal of the empirical Fisher information.

    The gradient is a batch's, clipped if the run clips, of all elements whatever moves in the step.
    Source: the importance of elastic weight consolidation (Kirkpatrick et al., PNAS 114:3521, 2017,
    arXiv 1612.00796), with batches in place of single examples.
    """
    return seen.mean(SQUARED_GRADIENT, slot)


@score("drift", SQUARED_GRADIENT, DRIFT, SQUARED_DRIFT)
def drift(seen: Seen, slot: Slot) -> Ranks:
    """h · max(0, mean(δ)² − var(δ)/n): what it costs to be overwritten, time after time.

    δ is the own trained model − the shared one met at the next participation, n the number of δ,
    var their sample variance (n − 1; 0 of a single one); mean(δ)² − var/n estimates the square of
    the true mean without bias. With h of ``fisher`` it is twice the second-order rise of the loss
    of Optimal Brain Damage (LeCun et al., NeurIPS 1989), for a step from θ to the shared model.
    Source: our own combination.
    """
    count = seen.evidence.terms.get(DRIFT, 0)
    mean, squares = seen.mean(DRIFT, slot), seen.mean(SQUARED_DRIFT, slot)
    noise = (squares - mean * mean) / np.float32(count - 1) if count > 1 else np.float32(0)
    lasting: Ranks = np.maximum(mean * mean - noise, 0)
    return seen.mean(SQUARED_GRADIENT, slot) * lasting


@score("random", REFERENCE)
def chance(seen: Seen, slot: Slot) -> Ranks:
    """Random bits where Δ > 0: the control, which takes as many of the same candidates.

    Drawn for the participation's seed and the tensor's name, so that they can be drawn again.
    """
    return np.where(seen.change(slot) > 0, random_keys(seen.seed, slot), np.uint64(0))


def random_keys(seed: int, slot: Slot) -> npt.NDArray[np.uint64]:
    """64 random bits for each element, shape (slot.size,)."""
    # Raw bits of a bit generator: numpy keeps these stable between releases, ``Generator`` not.
    digest = hashlib.sha256(f"{seed}\0{slot.name}".encode()).digest()
    return np.random.PCG64(int.from_bytes(digest, "little")).random_raw(slot.size)
