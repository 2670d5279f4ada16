"""Statements that are built once: many threads may be the first to compile them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy.dialects import postgresql

from app import checkins
from workers import verify

THREADS, ROUNDS = 8, 60
BUILT = {
    "situation": checkins._situation,
    "places": checkins._places,
    "evaluations": checkins._evaluations,
    "wanted": verify._wanted,
}


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", BUILT)
def test_threads_compile_it_at_the_same_time(name: str) -> None:
    """Found as answers 500 to the first check-ins of a process that was busy from the start."""

    def compiled(statement: Callable[[], Any], together: Barrier) -> str:
        together.wait(30)
        return str(statement().compile(dialect=postgresql.dialect()))

    for _ in range(ROUNDS):
        together = Barrier(THREADS)
        with ThreadPoolExecutor(THREADS) as pool:  # fresh threads, which have built nothing yet
            asked = [pool.submit(compiled, BUILT[name], together) for _ in range(THREADS)]
            assert len({each.result() for each in asked}) == 1
