"""What a client gathers, between two choices of its mask, for the score and the gate to judge by.

Owns the accumulators and their file form. They are part of the personal state: kept, committed and
discarded with it, never sent. Must not know how a score uses them (``scores``) or when they are
gathered (``Policy.gathers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.space import FloatVector

SQUARED_GRADIENT = "squared_gradient"  # a term for each gradient step
DRIFT = "drift"  # own trained model − the shared one that it met next; a term each participation
SQUARED_DRIFT = "squared_drift"
OWN_MOVE = "own_move"  # |own trained model − the one that training started from|; likewise
DISSENT = "dissent"  # 1 − agreement of all clients, told by the coordinator (``agreement``); a term
_SUM, _TRAINED, _SHARED = "sum.", "pair.trained.", "pair.shared."


@dataclass(frozen=True)
class Evidence:
    """Sums of shape (D,) by accumulator, and of how many terms each is.

    ``trained`` and ``shared`` (D,) are for the gate: the model after each participation, and the
    shared one that the client met next. ``fold`` is the digest of the examples that were withheld.
    """

    sums: Mapping[str, FloatVector] = field(default_factory=dict)
    terms: Mapping[str, int] = field(default_factory=dict)
    trained: tuple[FloatVector, ...] = ()
    shared: tuple[FloatVector, ...] = ()
    fold: str = ""

    def with_terms(self, name: str, values: FloatVector, count: int = 1) -> Evidence:
        """With the sum of ``count`` more terms of an accumulator."""
        total = self.sums[name] + values if name in self.sums else values
        terms = self.terms.get(name, 0) + count
        sums = {**self.sums, name: np.asarray(total, dtype=np.float32)}
        return replace(self, sums=sums, terms={**self.terms, name: terms})

    def with_pair(self, trained: FloatVector, shared: FloatVector) -> Evidence:
        """With one more own model and the shared one that followed it."""
        return replace(self, trained=(*self.trained, trained), shared=(*self.shared, shared))

    def pairs(self) -> Evidence:
        """What the gate judges by, without what the score did."""
        return replace(self, sums={}, terms={})

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """All vectors, by their names in a state file."""
        found: dict[str, npt.NDArray[Any]] = {f"{_SUM}{n}": v for n, v in sorted(self.sums.items())}
        found |= {f"{_TRAINED}{i:04}": vector for i, vector in enumerate(self.trained)}
        return found | {f"{_SHARED}{i:04}": vector for i, vector in enumerate(self.shared)}

    def facts(self) -> dict[str, Any]:
        """The rest, as plain JSON; empty if there is nothing."""
        facts = {"terms": dict(sorted(self.terms.items())), "fold": self.fold}
        return {name: value for name, value in facts.items() if value}

    @classmethod
    def read(cls, tensors: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> Evidence:
        """Undo :meth:`tensors` and :meth:`facts`; other tensors are left alone."""
        return cls(
            {n.removeprefix(_SUM): v for n, v in tensors.items() if n.startswith(_SUM)},
            facts.get("terms", {}),
            tuple(tensors[n] for n in sorted(tensors) if n.startswith(_TRAINED)),
            tuple(tensors[n] for n in sorted(tensors) if n.startswith(_SHARED)),
            facts.get("fold", ""),
        )


NOTHING = Evidence()
