"""Zombies cannot publish: a few trials on real processes; ``zombies.haunt`` says what one is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .factories import Project
from .zombies import Haunted, Puppet, haunt, haunted, puppet


@pytest.fixture(scope="module")
def worker(environment: dict[str, str]) -> Iterator[Puppet]:
    with puppet(environment) as found:
        yield found


@pytest.fixture
def case(project: Project) -> Haunted:
    return haunted(project)


@pytest.mark.parametrize(
    ("kind", "points"), [("verify", [9]), ("aggregate", [10, 13]), ("publish", [11])]
)
def test_a_zombie_changes_nothing(
    case: Haunted, worker: Puppet, kind: str, points: list[int]
) -> None:
    found = [haunt(case, worker, kind=kind, point=point) for point in points]
    assert False not in found, case.log
    assert True in found, case.log
