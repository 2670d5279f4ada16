"""Jobs: leases and their renewal."""

from __future__ import annotations

from uuid import UUID

import pytest

from app import jobs
from app.jobs import Lease
from workers import running

from .conftest import MovableClock
from .factories import Project, contribute, due_jobs, make_clients, make_model, make_run


@pytest.fixture
def due(project: Project) -> UUID:
    """A verification that is due."""
    model = make_model(project)
    make_run(project, model)
    contribute(make_clients(project, 1)[0], model)
    (job,) = due_jobs(project)
    return job


def claim(project: Project, job: UUID) -> Lease | None:
    with project.core.db.transaction("test") as tx:
        return jobs.claim(tx, job, seconds=project.core.settings.lease)


def until(project: Project, job: UUID) -> float:
    """When the lease ends, in seconds."""
    query = "SELECT extract(epoch FROM lease_until) FROM jobs WHERE id = :job"
    return float(project.sql(query, job=job)[0][0])


def test_progress_renews_at_most_once_in_a_quarter_of_a_lease(
    project: Project, due: UUID, clock: MovableClock
) -> None:
    seconds = [0.0]
    lease = claim(project, due)
    assert lease is not None
    quarter = project.core.settings.lease / 4
    progress = running.Renewal(project.core, lease, clock=lambda: seconds[0])
    first = until(project, due)
    clock.advance(quarter)
    for _ in range(3):
        progress()
    assert until(project, due) == first, "the handler's own clock says that it is too early"
    seconds[0] = quarter
    progress()
    renewed = until(project, due)
    assert renewed >= first + quarter
    clock.advance(1)
    seconds[0] = 2 * quarter - 0.01
    progress()
    assert until(project, due) == renewed


def test_who_has_lost_the_lease_hears_it_from_progress(
    project: Project, due: UUID, clock: MovableClock
) -> None:
    lease = claim(project, due)
    assert lease is not None
    seconds = iter([0.0, 1e9])
    progress = running.Renewal(project.core, lease, clock=lambda: next(seconds))
    clock.advance(project.core.settings.lease + 1)
    second = claim(project, due)
    assert second is not None
    assert (second.epoch, second.attempt) == (2, 2)
    with pytest.raises(jobs.LeaseLost):
        progress()
