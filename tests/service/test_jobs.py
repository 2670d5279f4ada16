"""Jobs: leases and their renewal, failures and retries, and work that nobody takes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import UUID

import pytest
from sqlalchemy import update

from app import jobs
from app.jobs import Lease, Progress
from app.storage import S3Storage
from app.tables import Job
from app.wiring import Coordinator
from workers import aggregation, running

from .conftest import MovableClock
from .factories import (
    Client,
    Json,
    Project,
    contribute,
    drain,
    due_jobs,
    everything,
    make_clients,
    make_model,
    make_run,
    ok,
    refused,
)


@pytest.fixture
def due(project: Project) -> UUID:
    """A verification that is due."""
    model = make_model(project)
    make_run(project, model)
    contribute(make_clients(project, 1)[0], model)
    (job,) = due_jobs(project)
    return job


def claim(project: Project, job: UUID) -> Lease | None:
    with project.core.db.transaction("test", "test") as tx:
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


# --- failing and retrying --------------------------------------------------------------------


@dataclass
class Failing:
    """A round whose aggregation fails as long as ``broken`` is set."""

    project: Project
    run: Json
    clients: list[Client]
    assignments: list[Json]
    broken: bool = True

    def aggregate(self, core: Coordinator, lease: Lease, progress: Progress) -> None:
        if self.broken:
            raise RuntimeError("the disk is full")
        aggregation.aggregate_part(core, lease, progress)

    def rounds(self) -> list[tuple[int, str]]:
        found = everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")
        return [(r["attempt"], r["state"]) for r in found]

    def round_id(self) -> str:
        return str(everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")[0]["id"])

    def run_state(self) -> str:
        return str(ok(self.project.owner.get(f"/v1/runs/{self.run['id']}"))["state"])

    def job(self, kind: str = "aggregate") -> Json:
        found = everything(self.project.owner, "/v1/jobs")
        return dict(next(job for job in found if job["kind"] == kind))

    def outcome(self) -> Json:
        return dict(self.clients[0].check_in(pending=self.assignments[0]["id"]))


@pytest.fixture
def failing(project: Project, clock: MovableClock, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """A round that has used up its attempts."""
    model = make_model(project)
    run, clients = make_run(project, model, rounds=2), make_clients(project, 2)
    found = [contribute(client, model, seed=n) for n, client in enumerate(clients)]
    case = Failing(project, run, clients, found)
    monkeypatch.setitem(running.HANDLERS, "aggregate", case.aggregate)
    for _ in range(project.core.settings.job_attempts):
        drain(project)
        clock.advance(60)
    return case


def test_a_failed_round_rests_and_loses_nothing(failing: Failing) -> None:
    assert failing.rounds() == [(1, "failed")]
    assert failing.run_state() == "paused"
    job = failing.job()
    assert (job["state"], job["attempts"]) == ("failed", 5)
    assert "the disk is full" in job["error"]
    answer = failing.outcome()
    assert answer["assignment"] is None, "the client keeps what it did, and waits"
    assert (answer["pending"]["state"], answer["pending"]["round_state"]) == ("accepted", "failed")
    query = "SELECT body FROM ledger_entries WHERE project_id = :project AND action = 'job.failed'"
    ((body,),) = failing.project.sql(query)
    assert body["kind"] == "aggregate"
    assert body["attempts"] == 5


def test_a_retried_job_publishes_the_very_same_manifest(failing: Failing) -> None:
    owner, round_path = failing.project.owner, f"/v1/rounds/{failing.round_id()}"
    before = ok(owner.get(round_path))["manifest_sha256"]
    failing.broken = False
    answer = ok(owner.post(f"/v1/jobs/{failing.job()['id']}/retry"))
    assert (answer["state"], answer["attempts"]) == ("due", 0)
    assert failing.rounds() == [(1, "aggregating")]
    assert failing.run_state() == "running"
    drain(failing.project)
    assert failing.rounds() == [(1, "published"), (1, "selecting")]
    assert ok(owner.get(round_path))["manifest_sha256"] == before
    assert failing.outcome()["pending"]["round_state"] == "published"


def test_a_retried_job_may_fail_again(failing: Failing, clock: MovableClock) -> None:
    ok(failing.project.owner.post(f"/v1/jobs/{failing.job()['id']}/retry"))
    for _ in range(5):
        assert failing.rounds() == [(1, "aggregating")]
        drain(failing.project)
        clock.advance(60)
    assert failing.rounds() == [(1, "failed")]
    assert failing.run_state() == "paused"


def test_resuming_gives_a_failed_round_up(failing: Failing) -> None:
    owner = failing.project.owner
    ok(owner.post(f"/v1/runs/{failing.run['id']}/resume"))
    assert failing.rounds() == [(1, "cancelled"), (2, "selecting")]
    assert failing.run_state() == "running"
    answer = failing.outcome()
    assert answer["pending"]["round_state"] == "cancelled"
    assert answer["assignment"]["kind"] == "train"
    found = refused(owner.post(f"/v1/jobs/{failing.job()['id']}/retry"), 409, "round_cancelled")
    assert "cannot retry" in found["detail"]


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_failed_round_can_be_ended(failing: Failing, how: str) -> None:
    owner = failing.project.owner
    path = f"/v1/runs/{failing.run['id']}/stop"
    if how == "cancel":
        path = f"/v1/rounds/{failing.round_id()}/cancel"
    ok(owner.post(path))
    assert failing.rounds() == [(1, "cancelled")]
    assert failing.run_state() == ("stopped" if how == "stop" else "paused")


def test_what_cannot_be_retried_says_why(
    project: Project, due: UUID, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/v1/jobs/{due}"
    assert ok(project.owner.get(path))["state"] == "due"
    assert ok(project.owner.post(f"{path}/retry"))["state"] == "due"
    assert claim(project, due) is not None
    assert "until" in refused(project.owner.post(f"{path}/retry"), 409, "job_leased")["detail"]
    clock.advance(project.core.settings.lease + 1)
    monkeypatch.setitem(running.HANDLERS, "verify", _broken)
    for _ in range(5):
        running.run_job(project.core, due)
        clock.advance(60)
    assert ok(project.owner.get(path))["state"] == "failed"
    refused(project.owner.post(f"{path}/retry"), 409, "job_final")
    done = everything(project.owner, "/v1/jobs", state="done")[0]
    refused(project.owner.post(f"/v1/jobs/{done['id']}/retry"), 409, "job_done")
    refused(project.owner.post(f"/v1/jobs/{UUID(int=1)}/retry"), 404, "not_found")


def _broken(*_: object) -> None:
    raise RuntimeError("broken")


def test_a_waiting_job_can_be_hurried(
    project: Project, due: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error a job waits; who has repaired the cause need not."""
    with monkeypatch.context() as patch:
        patch.setitem(running.HANDLERS, "verify", _broken)
        running.run_job(project.core, due)
    assert due not in due_jobs(project), "it waits"
    ok(project.owner.post(f"/v1/jobs/{due}/retry"))
    drain(project)
    assert ok(project.owner.get(f"/v1/jobs/{due}"))["state"] == "done"


def test_another_tenant_sees_no_job(other: Project, due: UUID) -> None:
    refused(other.owner.get(f"/v1/jobs/{due}"), 404, "not_found")
    refused(other.owner.post(f"/v1/jobs/{due}/retry"), 404, "not_found")


class _RollBack(Exception):
    pass


# --- the store is away -----------------------------------------------------------------------


def test_a_store_that_is_away_costs_no_attempt_for_an_hour(
    project: Project, due: UUID, clock: MovableClock
) -> None:
    nowhere = project.core.settings.model_copy(update={"s3_endpoint": "http://127.0.0.1:9"})
    away = replace(project.core, storage=S3Storage(nowhere))

    def work(core: Coordinator) -> Json:
        running.run_job(core, due)
        clock.advance(10)
        return dict(ok(project.owner.get(f"/v1/jobs/{due}")))

    for _ in range(project.core.settings.job_attempts + 1):
        job = work(away)
        assert (job["state"], job["attempts"]) == ("due", 0)
        assert "the object store does not answer" in job["error"]
    clock.advance(3600)
    assert work(away)["attempts"] == 1, "a job is not patient for ever"
    clock.advance(10)
    job = work(project.core)
    assert (job["state"], job["attempts"]) == ("done", 2)


# --- ringing again, and nobody comes ---------------------------------------------------------


def test_the_bell_is_not_rung_again_and_again(
    project: Project, due: UUID, clock: MovableClock
) -> None:
    def ring() -> bool:
        with project.core.db.transaction("test", "test") as tx:
            return due in jobs.overdue(tx, grace=2, limit=1000)

    assert not ring()
    clock.advance(3)
    assert [ring(), ring()] == [True, False]
    clock.advance(jobs.RING_AGAIN)
    assert [ring(), ring()] == [True, False]


def test_work_that_nobody_takes_is_noticed(
    project: Project, due: UUID, clock: MovableClock
) -> None:
    def stalled() -> bool:
        """As if this project were alone: nothing is committed."""
        with suppress(_RollBack), project.core.db.transaction("test", "test") as tx:
            others = update(Job).where(Job.project_id != project.id)
            tx.session.execute(others.values(state="done", finished_at=None))
            found = jobs.stalled(tx, seconds=30)
            raise _RollBack
        return found is not None

    assert not stalled()
    clock.advance(31)
    assert stalled()
    assert claim(project, due) is not None
    assert not stalled(), "somebody works"
    clock.advance(project.core.settings.lease + 1)
    assert not stalled(), "the lease has only just run out"
    clock.advance(31)
    assert stalled()
    running.run_job(project.core, due)
    assert not stalled()


# --- one bell, and what follows from it --------------------------------------------------------


def test_who_is_rung_for_goes_on_with_what_its_project_s_rounds_need(
    project: Project, other: Project
) -> None:
    """The last verification, the sum, the version and the clearing up: nobody rings between."""
    for each in (project, other):
        model = make_model(each)
        make_run(each, model)
        for seed, client in enumerate(make_clients(each, 2)):
            contribute(client, model, seed=seed)
    first, second = due_jobs(project)
    running.answer(project.core, first)
    assert due_jobs(project) == [second], "verifying waits for its own bell"
    running.answer(project.core, second)
    assert due_jobs(project) == []
    found = everything(project.owner, "/v1/jobs")
    kinds = sorted(job["kind"] for job in found if job["state"] == "done")
    assert kinds == ["aggregate", "discard", "publish", "verify", "verify", "verify"]
    assert len(due_jobs(other)) == 2, "another project's bells are heard when they ring"
    running.answer(project.core, first)  # a message that comes twice


def test_a_job_that_failed_waits_although_its_worker_goes_on(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(project)
    make_run(project, model, goal=1, quorum=1, min_contributors=1)
    contribute(make_clients(project, 1)[0], model)
    (job,) = due_jobs(project)
    monkeypatch.setitem(running.HANDLERS, "aggregate", _broken)
    running.answer(project.core, job)
    found = everything(project.owner, "/v1/jobs")
    assert [(j["state"], j["attempts"]) for j in found if j["kind"] == "aggregate"] == [("due", 1)]
