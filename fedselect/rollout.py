"""How a rollout goes on, as a pure function.

Owns the transitions of rollouts; gates judge in ``gates``. Must not read clocks or rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fedselect.errors import LifecycleError
from fedselect.rolloutdocs import GateVerdict, RolloutState, Verdict


class RolloutEvent(StrEnum):
    """What can happen to a rollout."""

    JUDGE = "judge"  # a stage's evaluations are in, or its deadline has passed
    PROMOTE = "promote"  # an administrator lets it go on
    HOLD = "hold"  # an administrator stops it
    ROLL_BACK = "roll_back"  # an administrator ends it


_S, _E = RolloutState, RolloutEvent
ACTIVE_ROLLOUTS = frozenset({_S.RUNNING, _S.PASSED, _S.HELD})
ALLOWED: dict[RolloutEvent, frozenset[RolloutState]] = {
    _E.JUDGE: frozenset({_S.RUNNING}),
    _E.PROMOTE: frozenset({_S.PASSED, _S.HELD}),
    _E.HOLD: frozenset({_S.RUNNING, _S.PASSED}),
    _E.ROLL_BACK: ACTIVE_ROLLOUTS,
}


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """What the decision may look at; ``stage`` counts from 0 to ``stages`` − 1."""

    state: RolloutState
    stage: int
    stages: int
    automatic: bool
    roll_back_on_harm: bool


@dataclass(frozen=True, slots=True)
class RolloutDecided:
    """Where to go; running with a larger ``stage`` opens that one. ``reason`` is in words."""

    to: RolloutState
    stage: int
    reason: str


def together(gates: Sequence[GateVerdict]) -> Verdict:
    """One failed gate fails the stage; else one that cannot tell leaves it to a person."""
    said = {gate.verdict for gate in gates}
    for verdict in (Verdict.FAIL, Verdict.INSUFFICIENT):
        if verdict in said:
            return verdict
    return Verdict.PASS


def decide(
    facts: RolloutFacts,
    event: RolloutEvent,
    *,
    gates: Sequence[GateVerdict] = (),
    reason: str = "",
) -> RolloutDecided | None:
    """What a rollout does next; None: nothing, since it is not (any more) to be judged.

    ``gates`` are the verdicts of a ``judge``, ``reason`` an administrator's.

    Raises:
        LifecycleError: an order that the state forbids (code ``rollout_<state>``).
    """
    if facts.state not in ALLOWED[event]:
        if event is _E.JUDGE:
            return None
        words = event.value.replace("_", " ")
        raise LifecycleError(
            f"the rollout is {facts.state.value.replace('_', ' ')}, so you cannot {words} it",
            code=f"rollout_{facts.state.value}",
        )
    if event is _E.JUDGE:
        return _judged(facts, gates)
    if event is _E.PROMOTE:
        return _onwards(facts, reason)
    return RolloutDecided(_S.HELD if event is _E.HOLD else _S.ROLLED_BACK, facts.stage, reason)


def _judged(facts: RolloutFacts, gates: Sequence[GateVerdict]) -> RolloutDecided:
    verdict = together(gates)
    against = [gate for gate in gates if gate.verdict is verdict]
    if verdict is Verdict.PASS:
        reason = f"stage {facts.stage + 1} of {facts.stages} passed all gates"
        return _onwards(facts, reason) if facts.automatic else _stay(facts, _S.PASSED, reason)
    said = "; ".join(gate.text for gate in against)
    if verdict is Verdict.INSUFFICIENT:
        return _stay(facts, _S.HELD, f"insufficient evidence, an administrator decides: {said}")
    harmed = any(gate.gate == "harmed_share" for gate in against)
    back = harmed and facts.roll_back_on_harm
    return _stay(facts, _S.ROLLED_BACK if back else _S.HELD, f"a gate failed: {said}")


def _stay(facts: RolloutFacts, to: RolloutState, reason: str) -> RolloutDecided:
    return RolloutDecided(to, facts.stage, reason)


def _onwards(facts: RolloutFacts, reason: str) -> RolloutDecided:
    if facts.stage + 1 < facts.stages:
        return RolloutDecided(_S.RUNNING, facts.stage + 1, reason)
    return RolloutDecided(_S.PROMOTED, facts.stage, reason)
