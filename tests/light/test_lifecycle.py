"""The rules of assignments, rounds and runs: every state × event has an asserted outcome."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.errors import LifecycleError
from fedselect.lifecycle import (
    ASSIGNMENT_TRANSITIONS,
    COMPLETED,
    GATHERING_ROUNDS,
    OPEN_ASSIGNMENTS,
    RUN_TRANSITIONS,
    SETTLED_ASSIGNMENTS,
    STAY,
    TERMINAL_ROUNDS,
    AfterRound,
    AssignmentEvent,
    AssignmentState,
    Ended,
    RoundEvent,
    RoundFacts,
    RoundState,
    RunEvent,
    RunState,
    after_round,
    closing_window,
    decide,
    may_try_again,
    next_assignment_state,
    next_run_state,
    retry_window,
    wanted,
)
from fedselect.policies import RoundPolicy

A, R, V = AssignmentState, RoundState, RunState
NO = None  # the table's word for "refused"

# --- assignments -------------------------------------------------------------------------------

# Columns: reserve complete accept reject expire miss decline report withdraw
ASSIGNMENTS = {
    A.ASSIGNED: [A.RESERVED, NO, NO, NO, A.EXPIRED, NO, A.DECLINED, A.ACCEPTED, NO],
    A.RESERVED: [A.RESERVED, A.UPLOADED, NO, NO, A.EXPIRED, A.LATE, A.DECLINED, NO, NO],
    A.UPLOADED: [NO, NO, A.ACCEPTED, A.REJECTED, NO, NO, NO, NO, NO],
    A.ACCEPTED: [*[NO] * 8, A.REJECTED],
    A.REJECTED: [NO] * 9,
    A.EXPIRED: [NO, NO, NO, NO, NO, A.LATE, NO, NO, NO],
    A.LATE: [NO] * 9,
    A.DECLINED: [NO] * 9,
}


@pytest.mark.parametrize(("state", "event"), list(product(AssignmentState, AssignmentEvent)))
def test_every_assignment_state_and_event(state, event):
    expected = ASSIGNMENTS[state][list(AssignmentEvent).index(event)]
    if expected is NO:
        with pytest.raises(LifecycleError) as caught:
            next_assignment_state(state, event)
        assert caught.value.code == f"assignment_{state.value}"
        assert event.value in str(caught.value)
    else:
        assert next_assignment_state(state, event) is expected


def test_the_named_sets_of_assignments():
    assert {*OPEN_ASSIGNMENTS, A.UPLOADED, *SETTLED_ASSIGNMENTS} == set(AssignmentState)
    assert not OPEN_ASSIGNMENTS & SETTLED_ASSIGNMENTS
    # An expired one can only be found late, an accepted one withdrawn: neither counts ever again.
    ways_out = {(s, e): to for (s, e), to in ASSIGNMENT_TRANSITIONS.items()}
    out = {s: ways_out[s, e] for s, e in ways_out if s in SETTLED_ASSIGNMENTS}
    assert out == {A.EXPIRED: A.LATE, A.ACCEPTED: A.REJECTED}
    after_complete = {A.UPLOADED, A.LATE, A.ACCEPTED, A.REJECTED}
    assert after_complete == COMPLETED


def test_only_an_upload_or_a_report_can_be_accepted():
    into = {(s, e) for (s, e), to in ASSIGNMENT_TRANSITIONS.items() if to is A.ACCEPTED}
    assert into == {(A.UPLOADED, AssignmentEvent.ACCEPT), (A.ASSIGNED, AssignmentEvent.REPORT)}


# --- rounds ------------------------------------------------------------------------------------

START = datetime(2026, 11, 1, tzinfo=UTC)
SELECTION_ENDS, REPORT_ENDS = START + timedelta(minutes=10), START + timedelta(hours=1)
TICK = timedelta(microseconds=1)
POLICY = RoundPolicy(goal=4, over_selection=1.5, quorum=2)


def facts(state: RoundState = R.COLLECTING, **changes) -> RoundFacts:
    counts = {"assigned": 6, "open": 6, "pending": 0, "accepted": 0}
    return RoundFacts(state, SELECTION_ENDS, REPORT_ENDS, **counts | changes)


def after(event: RoundEvent, now: datetime, *, policy: RoundPolicy = POLICY, **changes):
    return decide(facts(**changes), event, policy=policy, now=now).to


NEVER = "refused"
# Columns: join settle tick publish fail retry cancel; early in a round with nobody done.
ROUNDS = {
    R.SELECTING: [STAY.to, STAY.to, STAY.to, NEVER, NEVER, NEVER, R.CANCELLED],
    R.COLLECTING: [NEVER, STAY.to, STAY.to, NEVER, NEVER, NEVER, R.CANCELLED],
    R.AGGREGATING: [NEVER, STAY.to, STAY.to, R.PUBLISHED, R.FAILED, NEVER, R.CANCELLED],
    R.FAILED: [NEVER, STAY.to, STAY.to, NEVER, NEVER, R.AGGREGATING, R.CANCELLED],
    **{
        state: [NEVER, STAY.to, STAY.to, NEVER, NEVER, NEVER, NEVER]
        for state in (R.PUBLISHED, R.ABANDONED, R.CANCELLED)
    },
}


@pytest.mark.parametrize(
    ("table", "states", "events"),
    [
        (ASSIGNMENTS, AssignmentState, AssignmentEvent),
        (ROUNDS, RoundState, RoundEvent),
    ],
)
def test_the_tables_of_expectations_are_complete_products(table, states, events):
    assert set(table) == set(states)
    assert {len(row) for row in table.values()} == {len(events)}


@pytest.mark.parametrize(("state", "event"), list(product(RoundState, RoundEvent)))
def test_every_round_state_and_event(state, event):
    expected = ROUNDS[state][list(RoundEvent).index(event)]
    quiet = facts(state, assigned=1, open=1)
    if expected == NEVER:
        with pytest.raises(LifecycleError) as caught:
            decide(quiet, event, policy=POLICY, now=START)
        assert caught.value.code == f"round_{state.value}"
    else:
        assert decide(quiet, event, policy=POLICY, now=START).to is expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(TERMINAL_ROUNDS)),
    st.sampled_from(RoundEvent),
    st.tuples(*[st.integers(0, 9)] * 4),
    st.integers(-1, 2),
)
def test_a_round_that_has_ended_stays_ended(state, event, counts, hours):
    assigned, still_open, pending, accepted = counts
    ended = facts(state, assigned=assigned, open=still_open, pending=pending, accepted=accepted)
    now = START + timedelta(hours=hours)
    if event in {RoundEvent.SETTLE, RoundEvent.TICK}:
        assert decide(ended, event, policy=POLICY, now=now) is STAY
    else:
        with pytest.raises(LifecycleError):
            decide(ended, event, policy=POLICY, now=now)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([RoundEvent.SETTLE, RoundEvent.TICK]),
    st.sampled_from(sorted(GATHERING_ROUNDS)),
    st.tuples(*[st.integers(0, 9)] * 4),
    st.integers(0, 90),
)
def test_invariants_of_closing(event, state, counts, minutes):
    assigned, still_open, pending, accepted = counts
    now = START + timedelta(minutes=minutes)
    seen = facts(state, assigned=assigned, open=still_open, pending=pending, accepted=accepted)
    to = decide(seen, event, policy=POLICY, now=now).to
    if to is R.AGGREGATING:
        assert accepted >= POLICY.quorum
        assert not pending
    if to is R.ABANDONED and state is R.COLLECTING:
        assert accepted < POLICY.quorum
        assert not pending
    if state is R.COLLECTING and now >= REPORT_ENDS and not pending:
        assert to is not None
    assert to in {None, R.COLLECTING, R.AGGREGATING, R.ABANDONED}
    assert to is not state


@pytest.mark.parametrize(
    ("goal", "over_selection", "expected"),
    [
        (10, 1.3, 13),
        (10, 1.0, 10),
        (1, 1.3, 2),
        (3, 1.3, 4),
        (7, 1.1, 8),
        (100, 1.1, 110),
        (1000, 1.001, 1001),
        (3, 1.34, 5),
        (100_000, 10, 1_000_000),
    ],
)
def test_over_selection_rounds_up_but_not_for_float_dust(goal, over_selection, expected):
    policy = RoundPolicy(goal=goal, over_selection=over_selection, quorum=1, min_contributors=1)
    assert wanted(policy) == expected


def test_selection_ends_with_the_last_wanted_client():
    assert after(RoundEvent.JOIN, START, state=R.SELECTING, assigned=5) is None
    assert after(RoundEvent.JOIN, START, state=R.SELECTING, assigned=6) is R.COLLECTING


@pytest.mark.parametrize("event", [RoundEvent.TICK, RoundEvent.SETTLE])
def test_the_selection_deadline(event):
    before, at = SELECTION_ENDS - TICK, SELECTION_ENDS
    assert after(event, before, state=R.SELECTING, assigned=5) is None
    assert after(event, at, state=R.SELECTING, assigned=2) is R.COLLECTING
    assert after(event, at, state=R.SELECTING, assigned=1, open=1) is R.ABANDONED
    assert after(event, at, state=R.SELECTING, assigned=0, open=0) is R.ABANDONED
    assert after(event, before, state=R.SELECTING, assigned=0, open=0) is None


def test_the_goal_may_be_reached_while_still_selecting():
    seen = {"state": R.SELECTING, "assigned": 4, "open": 0, "accepted": 4}
    assert after(RoundEvent.SETTLE, START, **seen) is R.AGGREGATING
    assert after(RoundEvent.SETTLE, START, **seen | {"accepted": 3, "open": 1}) is None
    assert after(RoundEvent.SETTLE, START, **seen | {"pending": 1}) is None


def test_who_may_try_again_is_waited_for_only_without_a_quorum():
    before, at = REPORT_ENDS - TICK, REPORT_ENDS
    assert after(RoundEvent.SETTLE, before, open=0, accepted=1, again=1) is None
    assert after(RoundEvent.TICK, at, open=0, accepted=1, again=1) is R.ABANDONED
    assert after(RoundEvent.SETTLE, START, open=0, accepted=2, again=1) is R.AGGREGATING
    assert after(RoundEvent.SETTLE, START, open=0, accepted=1, again=0) is R.ABANDONED


@pytest.mark.parametrize("state", AssignmentState)
def test_only_a_rejected_client_gets_a_further_attempt(state):
    policy = RoundPolicy(client_attempts=3)
    found = [may_try_again(state, attempt, policy) for attempt in (1, 2, 3, 4)]
    assert found == ([True, True, False, False] if state is A.REJECTED else [False] * 4)
    assert RoundPolicy().client_attempts == 2


def test_everyone_settled_while_selecting_waits_for_more_clients():
    seen = {"state": R.SELECTING, "assigned": 3, "open": 0, "accepted": 3}
    assert after(RoundEvent.SETTLE, SELECTION_ENDS - TICK, **seen) is None
    assert after(RoundEvent.TICK, SELECTION_ENDS, **seen) is R.COLLECTING


def test_the_goal_closes_a_round_early():
    assert after(RoundEvent.SETTLE, START, open=3, accepted=3) is None
    assert after(RoundEvent.SETTLE, START, open=2, accepted=4) is R.AGGREGATING


def test_a_pending_verification_blocks_the_freeze():
    late = REPORT_ENDS + timedelta(days=1)
    for accepted in (0, 2, 4, 9):
        for now in (START, REPORT_ENDS, late):
            assert after(RoundEvent.TICK, now, open=0, pending=1, accepted=accepted) is None
    assert after(RoundEvent.SETTLE, late, open=0, accepted=2) is R.AGGREGATING


def test_the_report_deadline_with_and_without_a_quorum():
    before, at = REPORT_ENDS - TICK, REPORT_ENDS
    assert after(RoundEvent.TICK, before, open=4, accepted=2) is None
    assert after(RoundEvent.TICK, at, open=4, accepted=2) is R.AGGREGATING
    assert after(RoundEvent.TICK, at, open=4, accepted=1) is R.ABANDONED
    assert after(RoundEvent.TICK, at, open=6, accepted=0) is R.ABANDONED


def test_all_settled_early_closes_without_waiting():
    assert after(RoundEvent.SETTLE, START, open=0, accepted=3) is R.AGGREGATING
    assert after(RoundEvent.SETTLE, START, open=0, accepted=1) is R.ABANDONED
    assert after(RoundEvent.SETTLE, START, open=1, accepted=3) is None


def test_a_decision_says_why():
    decision = decide(facts(open=4, accepted=1), RoundEvent.TICK, policy=POLICY, now=REPORT_ENDS)
    assert decision.reason == "the report deadline passed with 1 updates, quorum is 2"
    for event in RoundEvent:
        for state in RoundState:
            try:
                found = decide(facts(state), event, policy=POLICY, now=REPORT_ENDS)
            except LifecycleError:
                continue
            assert bool(found.reason) == (found.to is not None)


# --- runs --------------------------------------------------------------------------------------

# Columns: start pause resume stop evaluate finish
RUNS = {
    V.CREATED: [V.RUNNING, NO, NO, V.STOPPED, NO, NO],
    V.RUNNING: [NO, V.PAUSED, NO, V.STOPPED, V.EVALUATING, NO],
    V.PAUSED: [NO, NO, V.RUNNING, V.STOPPED, V.EVALUATING, NO],
    V.EVALUATING: [NO, NO, NO, V.STOPPED, NO, V.FINISHED],
    V.FINISHED: [NO] * 6,
    V.STOPPED: [NO] * 6,
}


@pytest.mark.parametrize(("state", "event"), list(product(RunState, RunEvent)))
def test_every_run_state_and_event(state, event):
    expected = RUNS[state][list(RunEvent).index(event)]
    if expected is NO:
        with pytest.raises(LifecycleError) as caught:
            next_run_state(state, event)
        assert caught.value.code == f"run_{state.value}"
    else:
        assert next_run_state(state, event) is expected


def test_the_table_of_runs_is_a_complete_product():
    assert set(RUNS) == set(RunState)
    assert {len(row) for row in RUNS.values()} == {len(RunEvent)}


def test_terminal_runs_have_no_way_out():
    assert not {state for state, _ in RUN_TRANSITIONS} & {V.FINISHED, V.STOPPED}
    assert set(RUN_TRANSITIONS.values()) | {V.CREATED} == set(RunState)


# What a running run does, by how its round ended: inside / in its last round / tries used up.
RUNNING = {
    R.PUBLISHED: [AfterRound.NEXT, AfterRound.EVALUATE, AfterRound.NEXT],
    R.ABANDONED: [AfterRound.RETRY, AfterRound.RETRY, AfterRound.PAUSE],
    R.FAILED: [AfterRound.PAUSE] * 3,
    R.CANCELLED: [AfterRound.PAUSE] * 3,
}
PLACES = [(3, 1), (9, 1), (3, 5)]  # (number, attempt) of 9 rounds with 5 tries


# A failed round has not ended, but its run must not go on either.
ENDS = sorted({*TERMINAL_ROUNDS, R.FAILED})


@pytest.mark.parametrize(("run", "ended"), list(product(RunState, ENDS)))
def test_what_follows_a_round(run, ended):
    for place, (number, attempt) in enumerate(PLACES):
        expected = RUNNING[ended][place] if run is V.RUNNING else AfterRound.NOTHING
        if run is V.PAUSED and ended is R.PUBLISHED and number == 9:
            expected = AfterRound.EVALUATE
        found = after_round(run, Ended(ended, number, attempt), rounds=9, max_attempts=5)
        assert found is expected


@pytest.mark.parametrize("run", RunState)
@pytest.mark.parametrize("left", [1, 7])
def test_a_run_is_evaluated_when_its_last_arm_is_through(run, left):
    found = after_round(run, Ended(R.PUBLISHED, 9, arms_left=left), rounds=9, max_attempts=5)
    assert found is AfterRound.NOTHING
    for ended in ENDS:
        for place in ((8, 1), (8, 5)):
            alone = after_round(run, Ended(ended, *place), rounds=9, max_attempts=5)
            among = Ended(ended, *place, arms_left=left)
            assert after_round(run, among, rounds=9, max_attempts=5) is alone


@pytest.mark.parametrize("attempt", [1, 4, 5, 6])
def test_the_last_try_pauses_the_run(attempt):
    found = after_round(V.RUNNING, Ended(R.ABANDONED, 1, attempt), rounds=9, max_attempts=5)
    assert found is (AfterRound.RETRY if attempt < 5 else AfterRound.PAUSE)


def test_evaluating_is_an_event_the_run_can_take():
    for run in (V.RUNNING, V.PAUSED):
        assert next_run_state(run, RunEvent.EVALUATE) is V.EVALUATING


# --- check-ins ---------------------------------------------------------------------------------

CLIENTS, MEAN, WINDOWS = 10_000, 30.0, 20


def load_after_a_herd(window: tuple[float, float], *, seed: int) -> np.ndarray:
    """Check-ins in bins of a tenth of the mean, relative to the mean load; shape (bins,).

    All clients check in at time 0 (which is not counted), and then whenever the window says.
    """
    rng = np.random.default_rng(seed)
    times = np.zeros(CLIENTS)
    bins = np.zeros(WINDOWS * 10)
    while (times < WINDOWS * MEAN).any():
        times = times + rng.uniform(*window, size=CLIENTS)
        places = (times / (MEAN / 10)).astype(int)
        bins += np.bincount(places[places < len(bins)], minlength=len(bins))
    return bins / (CLIENTS / 10)


@pytest.mark.parametrize("seed", range(5))
def test_a_herd_is_spread(seed):
    """Peak over mean stays below 1.5 in every bin, even those of the herd's own first window."""
    load = load_after_a_herd(retry_window(MEAN), seed=seed)
    assert load.max() <= 1.45
    evened_out = load[50:]
    assert abs(evened_out.mean() - 1) < 0.01
    assert evened_out.max() < 1.15


def test_the_simulation_sees_a_narrower_window():
    narrow = (0.5 * MEAN, 1.5 * MEAN)
    assert max(load_after_a_herd(narrow, seed=seed).max() for seed in range(20)) > 1.5
    assert load_after_a_herd((0.9 * MEAN, 1.1 * MEAN), seed=0).max() > 3


def test_who_waits_for_a_version_may_ask_sooner_but_not_all_at_once():
    assert closing_window(30, crowd=4) == retry_window(0.2)
    assert closing_window(0.1, crowd=4) == retry_window(0.1)
    low, high = closing_window(30, crowd=1000)
    assert 1000 / ((low + high) / 2) == 100  # check-ins a second
    assert closing_window(30, crowd=100_000) == retry_window(30)


def test_check_ins_are_spread_around_the_mean():
    low, high = retry_window(30)
    assert (low, high) == (7.5, 52.5)
    assert (low + high) / 2 == 30
