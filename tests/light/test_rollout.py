"""The life of a rollout: every state meets every event."""

from __future__ import annotations

from itertools import product

import pytest

from fedselect.errors import LifecycleError
from fedselect.rollout import (
    ACTIVE_ROLLOUTS,
    RolloutDecided,
    RolloutEvent,
    RolloutFacts,
    decide,
    together,
)
from fedselect.rolloutdocs import GateVerdict, GroupFigure, RolloutState, Verdict

S, E = RolloutState, RolloutEvent
RUNNING, PASSED, HELD = S.RUNNING, S.PASSED, S.HELD
PROMOTED, BACK = S.PROMOTED, S.ROLLED_BACK
# What an event leads to in the first of two stages; None: nothing; a word: the code of the refusal.
TABLE = {
    (RUNNING, E.JUDGE): PASSED,
    (RUNNING, E.PROMOTE): "rollout_running",
    (RUNNING, E.HOLD): HELD,
    (RUNNING, E.ROLL_BACK): BACK,
    (PASSED, E.JUDGE): None,
    (PASSED, E.PROMOTE): RUNNING,
    (PASSED, E.HOLD): HELD,
    (PASSED, E.ROLL_BACK): BACK,
    (HELD, E.JUDGE): None,
    (HELD, E.PROMOTE): RUNNING,
    (HELD, E.HOLD): "rollout_held",
    (HELD, E.ROLL_BACK): BACK,
    (PROMOTED, E.JUDGE): None,
    (PROMOTED, E.PROMOTE): "rollout_promoted",
    (PROMOTED, E.HOLD): "rollout_promoted",
    (PROMOTED, E.ROLL_BACK): "rollout_promoted",
    (BACK, E.JUDGE): None,
    (BACK, E.PROMOTE): "rollout_rolled_back",
    (BACK, E.HOLD): "rollout_rolled_back",
    (BACK, E.ROLL_BACK): "rollout_rolled_back",
}


def facts(state=RUNNING, *, stage=0, automatic=False, harm=False):
    return RolloutFacts(state, stage, 2, automatic, harm)


def gate(name="mean_gain", verdict=Verdict.PASS):
    return GateVerdict(
        gate=name,
        verdict=verdict,
        unit="points",
        figure=1,
        interval=None,
        keeps="at least",
        limit=0,
        stage=GroupFigure(clients=1, value=1),
        control=None,
        text=f"{name} says {verdict.value}",
    )


def test_the_table_is_complete():
    assert set(TABLE) == set(product(S, E))


@pytest.mark.parametrize(("state", "event"), TABLE)
def test_every_state_and_event(state, event):
    wanted = TABLE[state, event]
    if isinstance(wanted, S) or wanted is None:
        found = decide(facts(state), event, gates=[gate()], reason="why")
        assert (found and found.to) == wanted
    else:
        with pytest.raises(LifecycleError) as refused:
            decide(facts(state), event, reason="why")
        assert refused.value.code == wanted


def test_what_has_ended_has_no_way_out():
    for state, event in TABLE:
        if state not in ACTIVE_ROLLOUTS:
            assert not isinstance(TABLE[state, event], S)


@pytest.mark.parametrize("state", [PASSED, HELD])
def test_promoting_the_last_stage_promotes_the_version(state):
    assert decide(facts(state), E.PROMOTE, reason="ok") == RolloutDecided(RUNNING, 1, "ok")
    last = decide(facts(state, stage=1), E.PROMOTE, reason="ok")
    assert last == RolloutDecided(PROMOTED, 1, "ok")


@pytest.mark.parametrize(("stage", "to", "then"), [(0, RUNNING, 1), (1, PROMOTED, 1)])
def test_an_automatic_rollout_goes_on_by_itself(stage, to, then):
    found = decide(facts(stage=stage, automatic=True), E.JUDGE, gates=[gate()])
    assert (found.to, found.stage) == (to, then)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INSUFFICIENT])
def test_a_gate_that_fails_or_cannot_tell_holds(automatic, verdict):
    gates = [gate(), gate("latency", verdict)]
    found = decide(facts(automatic=automatic), E.JUDGE, gates=gates)
    assert (found.to, found.stage) == (HELD, 0)
    assert "latency says" in found.reason
    assert "mean_gain" not in found.reason


@pytest.mark.parametrize(
    ("name", "verdict", "harm", "to"),
    [
        ("harmed_share", Verdict.FAIL, True, BACK),
        ("harmed_share", Verdict.FAIL, False, HELD),
        ("mean_gain", Verdict.FAIL, True, HELD),
        ("harmed_share", Verdict.INSUFFICIENT, True, HELD),
    ],
)
def test_harm_rolls_back_at_once_if_the_rollout_says_so(name, verdict, harm, to):
    assert decide(facts(harm=harm), E.JUDGE, gates=[gate(name, verdict)]).to is to


def test_a_failure_outweighs_what_cannot_be_told():
    every = [gate(), gate("latency", Verdict.INSUFFICIENT), gate("harmed_share", Verdict.FAIL)]
    assert [together(every[:k]) for k in (0, 1, 2, 3)] == [
        Verdict.PASS,
        Verdict.PASS,
        Verdict.INSUFFICIENT,
        Verdict.FAIL,
    ]
