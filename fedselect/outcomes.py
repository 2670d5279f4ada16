"""What became of an agent's tentative work: of a coordinator's answer, what it says the end of.

Owns when work counts: its update accepted and its round published. Must not change anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedselect.agent_state import Arm
from fedselect.agentdocs import Tentative
from fedselect.checkindocs import CheckInAnswer, Outcome
from fedselect.lifecycle import SETTLED_ASSIGNMENTS, AssignmentState, RoundState

_LOST_ASSIGNMENTS = SETTLED_ASSIGNMENTS - {AssignmentState.ACCEPTED}
# Not a failed one: it may be tried again, and publish with this very update.
_LOST_ROUNDS = frozenset({RoundState.ABANDONED, RoundState.CANCELLED})


@dataclass(frozen=True, slots=True)
class End:
    """Tentative work that is over, and whether it counts."""

    arm: Arm
    tentative: Tentative
    outcome: Outcome
    counts: bool


def ended(pending: Sequence[tuple[Arm, Tentative]], answer: CheckInAnswer) -> Iterator[End]:
    """Of the tentative work, what the answer knows the end of."""
    told = [answer.pending, *answer.outcomes]
    outcomes = {outcome.assignment_id: outcome for outcome in told if outcome is not None}
    for arm, tentative in pending:
        outcome = outcomes.get(tentative.assignment)
        counts = None if outcome is None else _verdict(outcome)
        if outcome is not None and counts is not None:
            yield End(arm, tentative, outcome, counts)


def _verdict(outcome: Outcome) -> bool | None:
    """Whether the work counts; None: that is not known yet."""
    if outcome.state in _LOST_ASSIGNMENTS or outcome.round_state in _LOST_ROUNDS:
        return False
    if outcome.state is AssignmentState.ACCEPTED and outcome.round_state is RoundState.PUBLISHED:
        return True
    return None
