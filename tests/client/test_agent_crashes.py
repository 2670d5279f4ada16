"""A process may die at every boundary: after each request, write and removal, and half way."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedselect import agent_state, evaluations, protocol, shelf

from .fake_site import NAME, NO_CONTROL, Killed, Life, Live, O, sites

STORY = {"rounds": 2, "fates": {(2, 1): "reject"}}
LONG_STORY = {"rounds": 2, "fates": {(1, 1): "abandon", (2, 1): "reject"}}


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with sites(monkeypatch) as make:
        yield make


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file goes in parts, so that a process can die between any two of them."""
    monkeypatch.setattr(protocol, "MULTIPART_FROM", 1)
    monkeypatch.setattr(protocol, "PART_SIZE", 200)


class Axe:
    """Kills at chosen boundaries, counted over all lives of a site."""

    def __init__(self, *at: int) -> None:
        self.at, self.count, self.last = set(at), 0, ""

    def __call__(self, where: str) -> None:
        if where.startswith("before"):  # nothing changed since the last boundary
            return
        self.count += 1
        if self.count in self.at:
            self.last = where
            raise Killed(where)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Axe]]:
    """While an axe is in this list, writes and removals of the agent's files are boundaries too."""
    axes: list[Axe] = []
    unlink, mkdir, pids = Path.unlink, Path.mkdir, itertools.count()

    def cut(where: str) -> None:
        for axe in axes:
            axe(where)

    def write(path: Path, *pieces: bytes | memoryview, durable: bool = True) -> None:
        data = b"".join(pieces)
        temporary = path.with_name(f".{path.name}.{next(pids)}")
        temporary.write_bytes(data[: len(data) // 2])
        cut(f"half way through {path.name}")
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        temporary.replace(path)
        cut(f"after writing {path.name}")

    def remove(path: Path, **options: Any) -> None:
        unlink(path, **options)
        cut(f"after removing {path.name}")

    def make(path: Path, **options: Any) -> None:
        mkdir(path, **options)
        cut(f"after making {path.name}")

    for module in (agent_state, shelf):
        monkeypatch.setattr(module, "write_atomically", write)
    monkeypatch.setattr(Path, "unlink", remove)
    monkeypatch.setattr(Path, "mkdir", make)
    yield axes
    axes.clear()


def survive(life: Life, axe: Axe, axes: list[Axe]) -> None:
    """Start the agent again and again until it ends by itself, checking what is always true."""
    life.cut = axe
    axes.append(axe)
    participations = 0
    for _ in range(len(axe.at) + 1):
        try:
            life.run()
            break
        except Killed:
            pass
        finally:
            record = life.record()
            assert participations <= record.participations <= len(life.other.published), axe.last
            participations = record.participations
            if record.committed is not None:
                assert life.state().participations == participations, axe.last
    axes.remove(axe)
    assert life.steps[-1].outcome is O.FINISHED, axe.last


def assert_same_files(life: Life, whole: Life, where: str = "") -> None:
    ours, theirs = life.files(), whole.files()
    assert ours.keys() == theirs.keys(), where
    assert life.record(**NO_CONTROL) == whole.record(**NO_CONTROL), where
    rest = {name for name in ours if not name.endswith("arm.json")}
    assert {n: ours[n] for n in rest} == {n: theirs[n] for n in rest}, where


def assert_same_end(life: Life, whole: Life, where: str) -> None:
    assert_same_files(life, whole, where)
    assert life.other.files == whole.other.files, where
    assert _evaluation(life) == _evaluation(whole), where
    assert list(life.other.clients) == [NAME], where
    assert life.other.sent == whole.other.sent, where  # the same bytes, however often
    assert life.other.published == [1, 2], where


def _evaluation(life: Life) -> evaluations.EvaluationReport | None:
    found = life.other.evaluation
    return found and found.model_copy(update=NO_CONTROL)


def test_a_crash_at_every_boundary_changes_nothing(live: Live, watched: list[Axe]) -> None:
    whole, counting = live(**STORY), Axe()
    survive(whole, counting, watched)
    assert whole.outcomes() == [
        *[O.TRAINED, O.COMMITTED],
        *[O.TRAINED, O.DISCARDED, O.TRAINED, O.COMMITTED],
        *[O.EVALUATED, O.FINISHED],
    ]
    assert counting.count > 80
    for at in range(1, counting.count + 1):
        life, axe = live(**STORY), Axe(at)
        survive(life, axe, watched)
        assert axe.last, at
        assert_same_end(life, whole, axe.last)


def test_a_crash_at_every_boundary_of_an_ablation_repeats_it_at_most(
    live: Live, watched: list[Axe]
) -> None:
    story = {"rounds": 1, "ablating": 1}
    whole, counting = live(**story), Axe()
    survive(whole, counting, watched)
    assert whole.outcomes()[-2:] == [O.ABLATED, O.FINISHED]
    for at in range(1, counting.count + 1):
        life, axe = live(**story), Axe(at)
        survive(life, axe, watched)
        assert_same_files(life, whole, axe.last)
        assert life.other.ablation == whole.other.ablation, axe.last
        assert life.explainer.asked <= 2, axe.last


def test_an_agent_that_dies_while_it_measures_does_it_again(live: Live, watched: list[Axe]) -> None:
    life = live(rounds=1, ablating=1)

    def kill() -> None:
        if life.explainer.asked == 1:
            raise Killed

    life.explainer.fault = kill
    with pytest.raises(Killed):
        life.run()
    life.run()
    assert life.explainer.asked == 2
    assert life.other.ablation is not None


def test_crashes_during_the_recovery_change_nothing(live: Live, watched: list[Axe]) -> None:
    whole, counting = live(**LONG_STORY), Axe()
    survive(whole, counting, watched)
    rng = random.Random(7)
    for _ in range(25):
        first = rng.randrange(1, counting.count)
        at = [first, *(first + n for n in rng.sample(range(1, 40), 4))]
        life, axe = live(**LONG_STORY), Axe(*at)
        survive(life, axe, watched)
        assert_same_end(life, whole, f"{at} {axe.last}")


def test_a_crash_at_every_boundary_of_a_file_in_parts_repeats_no_part(
    live: Live, watched: list[Axe], in_small_parts: None
) -> None:
    whole, counting = live(**STORY), Axe()
    survive(whole, counting, watched)
    parts = part_puts(whole)
    assert len(parts) == 3 * 4
    for at in range(1, counting.count + 1):
        life, axe = live(**STORY), Axe(at)
        survive(life, axe, watched)
        assert_same_end(life, whole, axe.last)
        assert part_puts(life) == parts, axe.last


def part_puts(life: Life) -> list[str]:
    """Every part that was sent, in order."""
    found = [r.url for r in life.other.seen if r.method == "PUT"]
    return [f"{url.path} {url.params['part']}" for url in found]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_connection_lost_at_any_call_changes_nothing(live: Live, moment: str) -> None:
    whole = live(**STORY)
    whole.run()
    for at in range(1, len(whole.other.seen) + 1):
        life, count = live(**STORY), 0

        def cut(where: str, at: int = at) -> None:
            nonlocal count
            count += where.startswith(moment)
            if count == at and where.startswith(moment):
                raise httpx.ReadError("connection reset")

        life.cut = cut
        life.run()
        assert len(life.waits) == 1
        assert_same_end(life, whole, f"{moment} call {at}")
        assert life.learner.trained == whole.learner.trained


def test_a_restart_after_the_upload_only_completes_it(live: Live, watched: list[Axe]) -> None:
    life = live(rounds=1)

    def cut(where: str) -> None:
        if where.startswith("before POST") and where.endswith("/complete"):
            raise Killed(where)

    life.cut = cut
    with pytest.raises(Killed):
        life.run()
    life.cut = lambda where: None
    life.run()
    assert life.learner.trained == 1
    assert len(life.other.signed) == 1
    assert sum(r.method == "PUT" for r in life.other.seen) == 1


def test_a_restart_in_the_middle_of_training_starts_it_again(
    live: Live, watched: list[Axe]
) -> None:
    whole, life = live(rounds=1), live(rounds=1)
    whole.run()

    def kill() -> None:
        if life.learner.trained == 1:
            raise Killed

    life.learner.fault = kill
    with pytest.raises(Killed):
        life.run()
    life.run()
    assert life.learner.trained == 2
    assert_same_files(life, whole)
