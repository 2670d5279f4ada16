"""The simulation: five hundred seeds keep every invariant, and wrong rules do not stay unseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from fedselect import leases, lifecycle
from fedselect.lifecycle import AfterRound, Decision, RoundEvent, RoundState

from .proofs import Figures, Room
from .simulation import Broken, Coordinator, World
from .simulation_proof import simulated_lives

PATIENCE = 300  # seeds until a wrong rule must have shown itself
Patch = pytest.MonkeyPatch


def test_five_hundred_lives(tmp_path) -> None:
    figures: Figures = simulated_lives(Room(tmp_path, 1), seeds=500)
    assert figures.met, figures.measured


def test_a_seed_is_one_life() -> None:
    assert World(7).live() == World(7).live() != World(8).live()


# --- wrong rules -------------------------------------------------------------------------------


def transition(event: tuple[str, str], to: str | None) -> Callable[[Patch], None]:
    """Another line in the table of assignments, or one line less."""
    state, name = lifecycle.AssignmentState(event[0]), lifecycle.AssignmentEvent(event[1])
    table = dict(lifecycle.ASSIGNMENT_TRANSITIONS)
    table.pop((state, name), None)
    if to is not None:
        table[state, name] = lifecycle.AssignmentState(to)
    return lambda patch: patch.setattr(lifecycle, "ASSIGNMENT_TRANSITIONS", table)


def facts(**change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """A decision that does not look at what it should."""

    def patch(patch: Patch) -> None:
        right = lifecycle.decide

        def wrong(seen: Any, event: Any, *, policy: Any, now: Any) -> Decision:
            changed = {name: make(seen) for name, make in change.items()}
            return right(dataclasses.replace(seen, **changed), event, policy=policy, now=now)

        patch.setattr(lifecycle, "decide", wrong)

    return patch


def policy(**change: Any) -> Callable[[Patch], None]:
    """A decision by another policy than the run's."""

    def patch(patch: Patch) -> None:
        right = lifecycle.decide

        def wrong(seen: Any, event: Any, *, policy: Any, now: Any) -> Decision:
            return right(seen, event, policy=policy.model_copy(update=change), now=now)

        patch.setattr(lifecycle, "decide", wrong)

    return patch


def rule(module: Any, name: str, wrong: Callable[..., Any]) -> Callable[[Patch], None]:
    """``wrong`` in the place of a rule; it gets the right one first."""

    def patch(patch: Patch) -> None:
        right = getattr(module, name)
        patch.setattr(module, name, lambda *args, **more: wrong(right, *args, **more))

    return patch


def cancel_anything(right: Any, seen: Any, event: Any, **more: Any) -> Decision:
    if event is RoundEvent.CANCEL:
        return Decision(RoundState.CANCELLED)
    return right(seen, event, **more)


def abandon_what_fails(right: Any, seen: Any, event: Any, **more: Any) -> Decision:
    found = right(seen, event, **more)
    failed = found.to is RoundState.FAILED
    return Decision(RoundState.ABANDONED) if failed else found


def then(right: Any, wrong: dict[AfterRound, AfterRound], *args: Any, **more: Any) -> AfterRound:
    found = right(*args, **more)
    return wrong.get(found, found)


def after(wrong: dict[AfterRound, AfterRound]) -> Callable[[Patch], None]:
    return rule(
        lifecycle, "after_round", lambda right, *args, **more: then(right, wrong, *args, **more)
    )


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "a sum of other updates is used": rule(Coordinator, "fits", lambda *_: True),
    "no fence": rule(leases, "held", lambda right, *_: True),
    "a fence that looks at the state alone": rule(
        leases, "held", lambda right, state, *_: state == "leased"
    ),
    "a live lease is taken": rule(
        leases, "claimable", lambda right, state, **_: state in {"due", "leased"}
    ),
    "an orphaned job is never taken": rule(
        leases, "claimable", lambda right, state, **more: state == "due" and right(state, **more)
    ),
    "a job that is done is taken again": rule(
        leases, "claimable", lambda right, state, **more: state == "done" or right(state, **more)
    ),
    "the epoch does not grow": rule(
        leases,
        "claim",
        lambda right, epoch, attempts, **more: right(epoch - 1, attempts, **more),
    ),
    "attempts are not counted": rule(
        leases, "claim", lambda right, epoch, attempts, **more: right(epoch, 0, **more)
    ),
    "a job fails at its first error": rule(leases, "after_error", lambda *_, **__: None),
    "closing does not wait for verification": facts(pending=lambda seen: 0),
    "what is being verified counts as accepted": facts(
        accepted=lambda seen: seen.accepted + seen.pending, pending=lambda seen: 0
    ),
    "open assignments are forgotten": facts(open=lambda seen: 0),
    "the report deadline never comes": facts(
        report_ends=lambda seen: seen.report_ends.replace(year=2100)
    ),
    "no quorum": policy(quorum=0),
    "a quorum that is too high": policy(quorum=3),
    "a round that has ended is cancelled": rule(lifecycle, "decide", cancel_anything),
    "a failed round is abandoned": rule(lifecycle, "decide", abandon_what_fails),
    "an assignment never expires": transition(("reserved", "expire"), None),
    "a late update is uploaded": transition(("reserved", "miss"), "uploaded"),
    "a corrupt file is accepted": transition(("uploaded", "reject"), "accepted"),
    "an accepted file is rejected": transition(("uploaded", "accept"), "rejected"),
    "a round follows itself": after({AfterRound.NEXT: AfterRound.RETRY}),
    "a paused run goes on": after({AfterRound.NOTHING: AfterRound.NEXT}),
    "an abandoned round is not tried again": after({AfterRound.RETRY: AfterRound.NOTHING}),
    "a run does not know its end": after({AfterRound.EVALUATE: AfterRound.NEXT}),
    "clients try for ever": rule(
        lifecycle, "may_try_again", lambda right, state, attempt, policy: state == "rejected"
    ),
}


def caught_after(patch: Callable[[Patch], None]) -> int | None:
    """How many seeds it took to see a wrong rule; None if it stays unseen."""
    with pytest.MonkeyPatch.context() as context:
        patch(context)
        for seed in range(PATIENCE):
            try:
                World(seed).live()
            except Broken:
                return seed + 1
    return None


def test_wrong_rules_are_seen() -> None:
    found = {name: caught_after(patch) for name, patch in MUTANTS.items()}
    unseen = {name for name, seeds in found.items() if seeds is None}
    assert len(MUTANTS) >= 10
    assert len(unseen) <= len(MUTANTS) // 10, unseen


def test_the_right_rules_are_not_a_mutant() -> None:
    assert caught_after(lambda _: None) is None


def some_lives() -> None:
    for seed in range(PATIENCE):
        World(seed).live()


def test_a_break_names_what_broke(monkeypatch) -> None:
    MUTANTS["no quorum"](monkeypatch)
    with pytest.raises(Broken, match="quorum"):
        some_lives()
