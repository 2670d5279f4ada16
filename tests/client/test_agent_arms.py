"""An agent in a run of two arms: their states never mix, whenever it dies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedselect.agentdocs import ArmRecord
from fedselect.personal import PersonalState

from .fake_arms import Arms
from .fake_coordinator import SPACE, Coordinator
from .fake_site import NAME, NO_CONTROL, Killed, Life, Live, O, sites
from .test_agent_crashes import Axe, watched

__all__ = ["watched"]  # a fixture
STORY: tuple[dict[tuple[int, int], str], ...] = ({(2, 1): "reject"}, {(1, 1): "abandon"})


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with sites(monkeypatch) as make:
        yield make


@pytest.fixture
def trial(live: Live) -> Callable[..., tuple[Life, Arms]]:
    """A site in a run of two arms that start from different weights."""

    def make(*fates: dict[tuple[int, int], str], **changes: Any) -> tuple[Life, Arms]:
        told = fates or ({}, {})
        settings = {"rounds": 2, **changes}
        arms = Arms(
            *(
                Coordinator(**{"reach": 1.0 + number, **settings}, fates=dict(each), arm=number)
                for number, each in enumerate(told)
            )
        )
        life = live()
        life.other = arms  # type: ignore[assignment]
        return life, arms

    return make


def folder(life: Life, arm: Coordinator) -> Path:
    return life.path / "arms" / str(arm._known("arm"))


def record(life: Life, arm: Coordinator, **changes: object) -> ArmRecord:
    path = folder(life, arm) / "arm.json"
    found = ArmRecord.model_validate_json(path.read_bytes()) if path.exists() else ArmRecord()
    return found.model_copy(update=changes)


def state(life: Life, arm: Coordinator) -> PersonalState:
    committed = record(life, arm).committed
    assert committed is not None
    return PersonalState.from_bytes((folder(life, arm) / committed.state.name).read_bytes(), SPACE)


def alone(live: Live, arm: Coordinator, **changes: Any) -> Life:
    """The same arm as a run of its own."""
    life = live(rounds=arm.rounds, fates=dict(arm.fates), reach=arm.reach, **changes)
    life.run()
    return life


def test_arms_do_not_wait_for_each_other(trial: Any) -> None:
    life, _ = trial()
    life.run()
    both = [O.TRAINED, O.TRAINED, O.COMMITTED, O.COMMITTED]
    assert life.outcomes() == [*both, *both, O.EVALUATED, O.EVALUATED, O.FINISHED]
    assert life.learner.trained == 4


def test_each_arm_ends_as_a_run_of_its_own_would(trial: Any, live: Live) -> None:
    life, arms = trial(*STORY)
    life.run()
    for arm in arms.arms:
        single = alone(live, arm)
        assert arm.files == single.other.files
        assert arm.published == single.other.published == [1, 2]
        assert state(life, arm).to_bytes(SPACE) == single.state().to_bytes(SPACE)
        mine, theirs = (
            r.model_dump(exclude={"committed", "earlier"})
            for r in (record(life, arm, **NO_CONTROL), single.record(**NO_CONTROL))
        )
        assert mine == theirs
        assert arm.evaluation.model_copy(update=NO_CONTROL) == single.other.evaluation.model_copy(
            update=NO_CONTROL
        )
    assert arms.arms[0].files[-1] != arms.arms[1].files[-1]


def test_it_asks_for_the_outcome_of_all_that_is_pending(trial: Any) -> None:
    life, arms = trial()
    life.run()
    assert all(body.waiting is not None for body in arms.check_ins)
    assert max(len(body.waiting or ()) for body in arms.check_ins) == 1


@pytest.mark.parametrize("encoding", [None, "int8"])
def test_a_version_is_fetched_whole_only_once(trial: Any, encoding: str | None) -> None:
    life, arms = trial(rounds=4, delta=encoding)
    life.run()
    for arm in arms.arms:
        found, sizes = record(life, arm), [len(each) for each in arm.files]
        if encoding is None:
            assert found.bytes_received == sum(sizes)
        else:
            assert found.delta_bytes_received == sum(map(len, arm.steps))
            assert found.bytes_received == sizes[0] + found.delta_bytes_received


def test_what_two_arms_share_is_fetched_once(trial: Any) -> None:
    life, arms = trial(reach=1.0)
    life.run()
    one, two = (record(life, arm).bytes_received for arm in arms.arms)
    assert arms.arms[0].files == arms.arms[1].files, "the same learner, the same start"
    assert one + two < 2 * sum(map(len, arms.arms[0].files))
    assert two < one


def test_an_assignment_that_nobody_knows_is_discarded_and_no_other(trial: Any) -> None:
    life, arms = trial()
    life.run(steps=2)
    assert [step.outcome for step in life.steps] == [O.TRAINED, O.TRAINED]
    first = min(arms.arms, key=lambda arm: str(arm._known("arm")))
    arms.forgotten = {row.id for row in first.rows}
    life.run(steps=1)
    assert life.steps[-1].outcome is O.DISCARDED
    assert record(life, first).tentative is None
    (other,) = (arm for arm in arms.arms if arm is not first)
    assert record(life, other).tentative is not None


def test_an_unknown_one_among_the_waiting_stays_until_it_is_asked_for(trial: Any) -> None:
    life, arms = trial()
    life.run(steps=2)
    last = max(arms.arms, key=lambda arm: str(arm._known("arm")))
    arms.forgotten = {row.id for row in last.rows}
    life.run(steps=1)
    assert record(life, last).tentative is not None
    arms.forgotten = set()
    life.run()
    assert life.steps[-1].outcome is O.FINISHED
    assert [arm.published for arm in arms.arms] == [[1, 2], [1, 2]]


# --- kill -9 -----------------------------------------------------------------------------------


def survive(life: Life, arms: Arms, axe: Axe, axes: list[Axe]) -> None:
    """Start the agent again and again until it ends by itself, checking what is always true."""
    life.cut = axe
    axes.append(axe)
    before = [0] * len(arms.arms)
    for _ in range(len(axe.at) + 1):
        try:
            life.run(steps=200)
            break
        except Killed:
            pass
        finally:
            for number, arm in enumerate(arms.arms):
                found = record(life, arm)
                assert before[number] <= found.participations <= len(arm.published), axe.last
                before[number] = found.participations
                if found.committed is not None:
                    assert state(life, arm).participations == found.participations, axe.last
    axes.remove(axe)
    assert life.steps[-1].outcome is O.FINISHED, axe.last


def assert_same_end(one: tuple[Life, Arms], other: tuple[Life, Arms], where: str) -> None:
    (life, arms), (whole, expected) = one, other
    for mine, theirs in zip(arms.arms, expected.arms, strict=True):
        assert mine.files == theirs.files, where
        assert mine.published == theirs.published == [1, 2], where
        assert mine.sent == theirs.sent, where
        ours, them = record(life, mine, **NO_CONTROL), record(whole, theirs, **NO_CONTROL)
        assert ours == them, where
        assert state(life, mine).to_bytes(SPACE) == state(whole, theirs).to_bytes(SPACE), where
        assert mine.evaluation is not None, where
        assert theirs.evaluation is not None
        assert mine.evaluation.model_copy(update=NO_CONTROL) == theirs.evaluation.model_copy(
            update=NO_CONTROL
        ), where
        kept = {path.name for path in folder(life, mine).iterdir()}
        assert kept == {path.name for path in folder(whole, theirs).iterdir()}, where
    assert list(arms.clients) == [NAME], where


def test_a_crash_at_every_third_boundary_changes_nothing_in_either_arm(
    trial: Any, watched: list[Axe]
) -> None:
    whole, counting = trial(*STORY), Axe()
    survive(*whole, counting, watched)
    assert counting.count > 150
    for at in range(1, counting.count + 1, 3):  # test_agent_crashes dies at every one, in one arm
        one, axe = trial(*STORY), Axe(at)
        survive(*one, axe, watched)
        assert axe.last, at
        assert_same_end(one, whole, f"{at} {axe.last}")


def test_crashes_during_the_recovery_change_nothing_in_either_arm(
    trial: Any, watched: list[Axe]
) -> None:
    whole, counting = trial(*STORY), Axe()
    survive(*whole, counting, watched)
    rng = random.Random(11)
    for _ in range(25):
        first = rng.randrange(1, counting.count)
        at = [first, *(first + n for n in rng.sample(range(1, 60), 5))]
        one, axe = trial(*STORY), Axe(*at)
        survive(*one, axe, watched)
        assert_same_end(one, whole, f"{at} {axe.last}")
