"""The rules of runs, rounds and assignments as pure functions and tables.

Owns every state, event and decision; time is an argument. Must not read clocks, rows or sockets:
the coordinator, the simulator and the tests all ask the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from fedselect.errors import LifecycleError
from fedselect.policies import RoundPolicy

# --- assignments -------------------------------------------------------------------------------


class AssignmentState(StrEnum):
    """One client's place in one round, or in the evaluation of a version."""

    ASSIGNED = "assigned"
    RESERVED = "reserved"
    UPLOADED = "uploaded"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXPIRED = "expired"
    LATE = "late"
    DECLINED = "declined"


class AssignmentEvent(StrEnum):
    """What can happen to an assignment."""

    RESERVE = "reserve"
    COMPLETE = "complete"
    ACCEPT = "accept"
    REJECT = "reject"
    EXPIRE = "expire"
    MISS = "miss"  # completed behind the deadline
    DECLINE = "decline"
    REPORT = "report"  # an evaluation arrived
    WITHDRAW = "withdraw"  # its client is erased while the round gathers


_A, _E = AssignmentState, AssignmentEvent
ASSIGNMENT_TRANSITIONS: dict[tuple[AssignmentState, AssignmentEvent], AssignmentState] = {
    (_A.ASSIGNED, _E.RESERVE): _A.RESERVED,
    (_A.ASSIGNED, _E.EXPIRE): _A.EXPIRED,
    (_A.ASSIGNED, _E.DECLINE): _A.DECLINED,
    (_A.ASSIGNED, _E.REPORT): _A.ACCEPTED,
    (_A.RESERVED, _E.RESERVE): _A.RESERVED,
    (_A.RESERVED, _E.COMPLETE): _A.UPLOADED,
    (_A.RESERVED, _E.EXPIRE): _A.EXPIRED,
    (_A.RESERVED, _E.MISS): _A.LATE,
    (_A.RESERVED, _E.DECLINE): _A.DECLINED,
    (_A.UPLOADED, _E.ACCEPT): _A.ACCEPTED,
    (_A.UPLOADED, _E.REJECT): _A.REJECTED,
    (_A.ACCEPTED, _E.WITHDRAW): _A.REJECTED,
    (_A.EXPIRED, _E.MISS): _A.LATE,
}
# A repeated ``complete`` is answered with the present state and changes nothing.
COMPLETED = frozenset({_A.UPLOADED, _A.ACCEPTED, _A.REJECTED, _A.LATE})
OPEN_ASSIGNMENTS = frozenset({_A.ASSIGNED, _A.RESERVED})
SETTLED_ASSIGNMENTS = frozenset({_A.ACCEPTED, _A.REJECTED, _A.EXPIRED, _A.LATE, _A.DECLINED})


def next_assignment_state(state: AssignmentState, event: AssignmentEvent) -> AssignmentState:
    """The state that follows.

    Raises:
        LifecycleError: the table has no such transition (code ``assignment_<state>``).
    """
    found = ASSIGNMENT_TRANSITIONS.get((state, event))
    if found is None:
        raise LifecycleError(
            f"the assignment is {state.value}, so it cannot {event.value}",
            code=f"assignment_{state.value}",
        )
    return found


# --- rounds ------------------------------------------------------------------------------------


class RoundState(StrEnum):
    """Where a round stands."""

    SELECTING = "selecting"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    PUBLISHED = "published"
    ABANDONED = "abandoned"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RoundEvent(StrEnum):
    """What can happen to a round."""

    JOIN = "join"  # a client was assigned
    SETTLE = "settle"  # an assignment reached its end
    TICK = "tick"  # time has passed
    PUBLISH = "publish"  # the new version is written
    FAIL = "fail"  # aggregation used up its attempts
    RETRY = "retry"  # an admin has its failed jobs tried again
    CANCEL = "cancel"  # an admin ends it


# A failed round has not ended: its manifest stands, an administrator decides what follows.
TERMINAL_ROUNDS = frozenset({RoundState.PUBLISHED, RoundState.ABANDONED, RoundState.CANCELLED})
GATHERING_ROUNDS = frozenset({RoundState.SELECTING, RoundState.COLLECTING})
CLOSING_MEAN = 0.2  # seconds between two check-ins of a client whose round is being aggregated
CLOSING_RATE = 100  # check-ins a second of all of them together


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """What the decision may look at; counts are clients.

    ``open`` may still deliver, ``pending`` have uploaded on time and wait for verification,
    ``again`` were rejected and may have another attempt.
    """

    state: RoundState
    selection_ends: datetime
    report_ends: datetime
    assigned: int
    open: int
    pending: int
    accepted: int
    again: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """The state to go to (None: stay) and why, in words for the history."""

    to: RoundState | None
    reason: str = ""


STAY = Decision(None)


def wanted(policy: RoundPolicy) -> int:
    """How many clients a round assigns: the goal with its over-selection, rounded up."""
    return policy.places


def decide(facts: RoundFacts, event: RoundEvent, *, policy: RoundPolicy, now: datetime) -> Decision:
    """What a round does next.

    A late ``settle`` or ``tick`` at a round that has ended is normal and changes nothing.

    Raises:
        LifecycleError: joining, publishing, failing, retrying or cancelling in a state that
            forbids it.
    """
    state = facts.state
    if event is RoundEvent.CANCEL and state not in TERMINAL_ROUNDS:
        return Decision(RoundState.CANCELLED, "cancelled by an administrator")
    if event in {RoundEvent.PUBLISH, RoundEvent.FAIL} and state is RoundState.AGGREGATING:
        if event is RoundEvent.PUBLISH:
            return Decision(RoundState.PUBLISHED, f"{facts.accepted} updates aggregated")
        return Decision(RoundState.FAILED, "aggregation used up its attempts")
    if event is RoundEvent.RETRY and state is RoundState.FAILED:
        return Decision(RoundState.AGGREGATING, "tried again by an administrator")
    if event is RoundEvent.JOIN and state is RoundState.SELECTING:
        return _after_join(facts, policy)
    if event in {RoundEvent.SETTLE, RoundEvent.TICK}:
        return _close(facts, policy, now) if state in GATHERING_ROUNDS else STAY
    raise LifecycleError(
        f"the round is {state.value}, so it cannot {event.value}", code=f"round_{state.value}"
    )


def _after_join(facts: RoundFacts, policy: RoundPolicy) -> Decision:
    if facts.assigned >= wanted(policy):
        return Decision(RoundState.COLLECTING, f"{facts.assigned} clients assigned")
    return STAY


def _close(facts: RoundFacts, policy: RoundPolicy, now: datetime) -> Decision:
    if facts.state is RoundState.SELECTING and facts.accepted < policy.goal:
        return _end_selection(facts, policy, now)
    # What was uploaded on time counts, so the round waits for its verification.
    if facts.pending:
        return STAY
    if facts.accepted >= policy.goal:
        return Decision(RoundState.AGGREGATING, f"goal of {policy.goal} reached")
    # For who was rejected and may try again the round waits only if it needs them.
    hoping = facts.open or (facts.again and facts.accepted < policy.quorum)
    if hoping and now < facts.report_ends:
        return STAY
    why = "the report deadline passed" if hoping else "nobody is left to report"
    if facts.accepted >= policy.quorum:
        return Decision(RoundState.AGGREGATING, f"{why} with {facts.accepted} updates")
    return Decision(
        RoundState.ABANDONED, f"{why} with {facts.accepted} updates, quorum is {policy.quorum}"
    )


def _end_selection(facts: RoundFacts, policy: RoundPolicy, now: datetime) -> Decision:
    if now < facts.selection_ends:
        return STAY
    if facts.assigned >= policy.quorum:
        return Decision(
            RoundState.COLLECTING, f"the selection deadline passed with {facts.assigned} clients"
        )
    return Decision(
        RoundState.ABANDONED,
        f"only {facts.assigned} clients came before the selection deadline, quorum is "
        f"{policy.quorum}",
    )


# --- runs --------------------------------------------------------------------------------------


class RunState(StrEnum):
    """Where a run stands."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    STOPPED = "stopped"


class RunEvent(StrEnum):
    """What can happen to a run."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    EVALUATE = "evaluate"  # the last round is published
    FINISH = "finish"  # every evaluation is in, or its deadline has passed


_R, _V = RunState, RunEvent
RUN_TRANSITIONS: dict[tuple[RunState, RunEvent], RunState] = {
    (_R.CREATED, _V.START): _R.RUNNING,
    (_R.CREATED, _V.STOP): _R.STOPPED,
    (_R.RUNNING, _V.PAUSE): _R.PAUSED,
    (_R.RUNNING, _V.STOP): _R.STOPPED,
    (_R.RUNNING, _V.EVALUATE): _R.EVALUATING,
    (_R.PAUSED, _V.RESUME): _R.RUNNING,
    (_R.PAUSED, _V.STOP): _R.STOPPED,
    # A round that was gathering when the run was paused may still publish as the last one.
    (_R.PAUSED, _V.EVALUATE): _R.EVALUATING,
    (_R.EVALUATING, _V.STOP): _R.STOPPED,
    (_R.EVALUATING, _V.FINISH): _R.FINISHED,
}


def next_run_state(state: RunState, event: RunEvent) -> RunState:
    """The state that follows.

    Raises:
        LifecycleError: the table has no such transition (code ``run_<state>``).
    """
    found = RUN_TRANSITIONS.get((state, event))
    if found is None:
        raise LifecycleError(
            f"the run is {state.value}, so it cannot {event.value}", code=f"run_{state.value}"
        )
    return found


class AfterRound(StrEnum):
    """What a run does when a round has ended."""

    NEXT = "next"  # open the next round
    RETRY = "retry"  # open the same round again, from the same base version
    EVALUATE = "evaluate"  # the run is complete
    PAUSE = "pause"  # an administrator has to look
    NOTHING = "nothing"  # the run does not go on


@dataclass(frozen=True, slots=True)
class Ended:
    """A round of one arm that ended, or failed; ``arms_left`` are others that have rounds to go."""

    state: RoundState
    number: int
    attempt: int = 1
    arms_left: int = 0


def after_round(run: RunState, ended: Ended, *, rounds: int, max_attempts: int) -> AfterRound:
    """What follows a round in an arm of so many ``rounds``."""
    published = ended.state is RoundState.PUBLISHED
    if published and ended.number >= rounds:
        alive = run in {_R.RUNNING, _R.PAUSED}
        return AfterRound.EVALUATE if alive and not ended.arms_left else AfterRound.NOTHING
    if run is not _R.RUNNING:
        return AfterRound.NOTHING
    if published:
        return AfterRound.NEXT
    if ended.state is RoundState.ABANDONED and ended.attempt < max_attempts:
        return AfterRound.RETRY
    return AfterRound.PAUSE


def may_try_again(state: AssignmentState, attempt: int, policy: RoundPolicy) -> bool:
    """Whether a client gets a further attempt in a round that still gathers."""
    return state is AssignmentState.REJECTED and attempt < policy.client_attempts


def retry_window(mean: float) -> tuple[float, float]:
    """(min, max) seconds until the next check-in; agents draw uniformly.

    After a herd (all clients at once) the load peaks at 1.39 times its mean and evens out; a window
    of 0.5 to 1.5 times the mean would peak at 1.5.
    """
    return 0.25 * mean, 1.75 * mean


def closing_window(mean: float, *, crowd: int) -> tuple[float, float]:
    """The window while a round is being aggregated, for the ``crowd`` clients that wait for it.

    Its version is seconds away, so they may ask sooner than in the run's ``mean`` seconds, but all
    together no more than ``CLOSING_RATE`` times a second.
    """
    return retry_window(min(mean, max(CLOSING_MEAN, crowd / CLOSING_RATE)))
