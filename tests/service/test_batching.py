"""Calls that wait are done together; each gets its own answer, and an error is its caller's."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from app import wiring
from app.batching import Batcher

PATIENCE = 30


class Recorder:
    """Doubles numbers; the first batch lasts until it is let go."""

    def __init__(self):
        self.batches = []
        self.begun, self.free = Event(), Event()

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        self.begun.set()
        assert self.free.wait(PATIENCE)
        if 13 in numbers:
            raise RuntimeError("thirteen")
        return [ValueError(n) if n < 0 else 2 * n for n in numbers]


def ask_all(batcher, work, numbers):
    """The futures of one call that is under way and of those that came meanwhile."""
    with ThreadPoolExecutor(len(numbers)) as threads:
        first = threads.submit(batcher.ask, numbers[0])
        assert work.begun.wait(PATIENCE)
        rest = [threads.submit(batcher.ask, n) for n in numbers[1:]]
        while len(batcher._waiting) < len(rest):
            assert not first.done()
        work.free.set()
    return [first, *rest]


def test_a_call_alone_is_served_alone():
    work = Recorder()
    work.free.set()
    assert Batcher(work).ask(4) == 8
    assert work.batches == [[4]]


def test_calls_that_wait_are_done_together():
    work = Recorder()
    found = ask_all(Batcher(work), work, [1, 2, 3, 4])
    assert [each.result() for each in found] == [2, 4, 6, 8]
    assert len(work.batches) == 2
    assert sorted(work.batches[1]) == [2, 3, 4]


def test_no_batch_is_larger_than_allowed():
    work = Recorder()
    found = ask_all(Batcher(work, most=2), work, [1, 2, 3, 4, 5, 6])
    assert [each.result() for each in found] == [2, 4, 6, 8, 10, 12]
    assert [len(batch) for batch in work.batches] == [1, 2, 2, 1]


def test_a_refusal_is_its_callers_alone():
    work = Recorder()
    first, bad, good = ask_all(Batcher(work), work, [1, -2, 3])
    assert (first.result(), good.result()) == (2, 6)
    with pytest.raises(ValueError, match="-2"):
        bad.result()


def test_an_error_of_the_work_reaches_all_its_calls_and_the_next_ones_go_on():
    work = Recorder()
    batcher = Batcher(work)
    first, *rest = ask_all(batcher, work, [1, 13, 3])
    assert first.result() == 2
    for each in rest:
        with pytest.raises(RuntimeError, match="thirteen"):
            each.result()
    assert batcher.ask(5) == 10


def test_what_stays_is_out_of_the_collectors_sight() -> None:
    before = gc.get_freeze_count()
    wiring.settle()
    try:
        assert gc.get_freeze_count() > before + 100_000
    finally:
        gc.unfreeze()
