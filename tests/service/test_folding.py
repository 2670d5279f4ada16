"""Sums formed while updates arrive: the same bits as without, whatever comes in between."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field, replace
from uuid import UUID

import pytest

from app import jobs, manifests, sums
from app.jobs import LeaseLost
from fedselect import Kind, ParameterSpace, Role
from fedselect.manifestdocs import GROUP, Manifest
from fedselect.masks import BLOCK
from fedselect.recompute import recompute
from workers import folding, running, shards

from .campaign import eager
from .factories import (
    Client,
    Json,
    Model,
    Project,
    deliver,
    drain,
    due_jobs,
    everything,
    make_clients,
    make_model,
    make_run,
    ok,
    refused,
    train,
)
from .test_erasure import erase
from .test_objects import problems

SPACE = ParameterSpace.of(
    [
        ("wide.weight", (BLOCK + 1000,), Kind.WEIGHT, Role.SELECTABLE),
        ("wide.bias", (3,), Kind.BIAS, Role.SHARED),
    ]
)


@dataclass
class Gathering:
    """A round of two shards that goes on gathering; everything is folded."""

    project: Project
    model: Model
    run: Json
    clients: list[Client]
    sent: int = 0
    read: list[str] = field(default_factory=list)

    def contribute(self, count: int) -> None:
        """The next clients deliver, one after the other, and are verified; nothing else is done."""
        for client in self.clients[self.sent : self.sent + count]:
            assignment = client.assignment()
            seed = self.sent = self.sent + 1
            made = train(assignment, SPACE, seed=seed, examples=1 + seed % 5)
            deliver(client, assignment, made.data)
            (job,) = (job for job in due_jobs(self.project) if self.kind(job) == "verify")
            running.run_job(self.project.core, job)

    def kind(self, job: UUID) -> str:
        return str(self.project.sql("SELECT kind FROM jobs WHERE id = :job", job=job)[0][0])

    def due(self, kind: str = "fold") -> list[UUID]:
        return [job for job in due_jobs(self.project) if self.kind(job) == kind]

    def fold(self) -> None:
        for job in self.due():
            running.run_job(self.project.core, job)

    def folded(self) -> list[int]:
        """Groups in the sum of each shard."""
        query = "SELECT groups FROM partial_sums WHERE project_id = :project ORDER BY part"
        return [row[0] for row in self.project.sql(query)]

    def keys(self) -> set[str]:
        return {
            row[0]
            for row in self.project.sql(
                "SELECT object_key FROM partial_sums WHERE project_id = :project"
            )
        }

    def stored(self) -> set[str]:
        found = everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")
        store = self.project.core.storage
        return {key for r in found for key in store.keys(f"partials/{r['id']}/")}

    def round(self) -> Json:
        return dict(everything(self.project.owner, f"/v1/runs/{self.run['id']}/rounds")[0])

    def manifest(self) -> Manifest:
        ((body,),) = self.project.sql(
            "SELECT body FROM manifests m JOIN rounds r ON r.id = m.round_id "
            "WHERE r.project_id = :project"
        )
        return Manifest.model_validate(json.loads(body))

    def published(self) -> tuple[str, str]:
        """SHA-256 of the published version, and of what the reference makes of its manifest."""
        ((sha256, key),) = self.project.sql(
            "SELECT sha256, object_key FROM versions WHERE project_id = :project AND number = 1"
        )
        assert hashlib.sha256(self.project.core.storage.read(key)).hexdigest() == sha256
        wanted = recompute(self.manifest(), self.project.core.storage.read)
        return sha256, hashlib.sha256(wanted).hexdigest()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of a model that is quickly sent."""
    for module in (manifests, sums):
        monkeypatch.setattr(module, "SHARD", BLOCK)


@pytest.fixture
def gathering(project: Project, monkeypatch: pytest.MonkeyPatch) -> Gathering:
    return make(project, monkeypatch, clients=GROUP + 2)


@pytest.fixture
def two_groups(project: Project, monkeypatch: pytest.MonkeyPatch) -> Gathering:
    return make(project, monkeypatch, clients=2 * GROUP + 2)


def make(
    project: Project, monkeypatch: pytest.MonkeyPatch, *, clients: int, **rules: object
) -> Gathering:
    project = replace(project, core=eager(project.core, fold_from=0))
    model = make_model(project, space=SPACE)
    run = make_run(project, model, **{"goal": clients, "quorum": 2, **rules})
    case = Gathering(project, model, run, make_clients(project, clients))
    right = shards.read_update

    def noted(storage, update, start, stop):
        case.read.append(update.object)
        return right(storage, update, start, stop)

    monkeypatch.setattr(shards, "read_update", noted)
    return case


def close(case: Gathering) -> None:
    """Everybody else delivers, and the round is published."""
    case.contribute(len(case.clients))
    case.read.clear()
    drain(case.project)
    assert case.round()["state"] == "published"


# --- growing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_a_folded_round_is_published_to_the_bits_of_the_reference(
    project: Project, monkeypatch: pytest.MonkeyPatch, weighting: str
) -> None:
    case = make(project, monkeypatch, clients=2 * GROUP + 4, weighting=weighting)
    case.contribute(GROUP - 1)
    assert case.due() == []
    case.contribute(1)
    assert len(case.due()) == 2, "one for each shard"
    case.fold()
    assert (case.folded(), case.due()) == ([1, 1], [])
    case.contribute(GROUP + 1)
    case.fold()
    assert case.folded() == [2, 2]
    assert case.stored() == case.keys(), "the sums before are deleted"
    close(case)
    first = {u.object for u in case.manifest().updates[: 2 * GROUP]}
    assert not first & set(case.read), "what was folded is not read again"
    assert len(case.read) == 2 * 4
    sha256, wanted = case.published()
    assert sha256 == wanted
    assert (case.folded(), case.stored()) == ([], set())
    assert problems(case.project) == ([], {})


def test_a_fold_that_comes_late_takes_all_that_is_complete(two_groups: Gathering) -> None:
    two_groups.contribute(2 * GROUP + 1)
    assert len(two_groups.due()) == 2, "one open job for each shard, however many groups wait"
    two_groups.fold()
    assert two_groups.folded() == [2, 2]
    two_groups.fold()
    close(two_groups)
    sha256, wanted = two_groups.published()
    assert sha256 == wanted


def test_a_round_that_closes_before_it_is_folded_loses_nothing(gathering: Gathering) -> None:
    gathering.contribute(GROUP)
    running.run_job(gathering.project.core, gathering.due()[0])
    assert len(gathering.folded()) == 1, "one shard is folded, the other one is not"
    close(gathering)
    sha256, wanted = gathering.published()
    assert sha256 == wanted
    query = "SELECT state, error FROM jobs WHERE project_id = :project AND kind = 'fold'"
    ended = {tuple(row) for row in gathering.project.sql(query)}
    assert ended == {("done", None), ("done", "no longer needed")}


def test_small_rounds_are_not_folded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(project, monkeypatch, clients=2 * GROUP + 1)
    most = len(case.clients) * SPACE.dim
    case.project = replace(case.project, core=eager(project.core, fold_from=most + 1))
    case.contribute(GROUP)
    assert case.due() == []
    case.project = replace(case.project, core=eager(project.core, fold_from=most))
    case.contribute(GROUP)
    assert len(case.due()) == 2


def test_a_group_that_completes_while_another_is_folded_is_folded_next(
    two_groups: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_groups.contribute(GROUP)
    job, _ = two_groups.due()
    right, once = folding.pack, [True]

    def busy(held, *, most):
        if once:
            once.clear()
            two_groups.contribute(GROUP)
        return right(held, most=most)

    monkeypatch.setattr(folding, "pack", busy)
    running.run_job(two_groups.project.core, job)
    assert two_groups.folded() == [1]
    assert job in two_groups.due(), "nobody rang, and yet it is due again"
    two_groups.fold()
    assert two_groups.folded() == [2, 2]


# --- what does not fit, and what fails ---------------------------------------------------------


@pytest.mark.parametrize("damage", ["another digest", "no object", "a short object"])
def test_a_sum_that_does_not_fit_is_not_used(gathering: Gathering, damage: str) -> None:
    gathering.contribute(GROUP)
    gathering.fold()
    storage = gathering.project.core.storage
    if damage == "another digest":
        query = "UPDATE partial_sums SET digest = 'x' WHERE project_id = :project"
        gathering.project.sql(query)
    elif damage == "no object":
        storage.delete(sorted(gathering.keys()))
    else:
        for key in sorted(gathering.keys()):
            storage.put(key, io.BytesIO(b"short"), 5)
    close(gathering)
    assert len(gathering.read) == 2 * len(gathering.clients)
    sha256, wanted = gathering.published()
    assert sha256 == wanted


def test_a_fold_that_fails_for_good_does_not_hurt_its_round(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch, clock
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setitem(running.HANDLERS, "fold", broken)
        gathering.contribute(GROUP)
        for _ in range(gathering.project.core.settings.job_attempts):
            gathering.fold()
            clock.advance(60)
    failed = [j for j in everything(gathering.project.owner, "/v1/jobs") if j["kind"] == "fold"]
    assert {(job["state"], job["attempts"]) for job in failed} == {("failed", 5)}
    assert gathering.round()["state"] in {"selecting", "collecting"}
    path = f"/v1/jobs/{failed[0]['id']}/retry"
    refused(gathering.project.owner.post(path), 409, f"round_{gathering.round()['state']}")
    gathering.contribute(GROUP)
    assert gathering.due() == [], "what has failed stays failed"
    close(gathering)
    sha256, wanted = gathering.published()
    assert sha256 == wanted


def test_a_round_that_is_retried_does_not_fold_again(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch, clock
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setitem(running.HANDLERS, "aggregate", broken)
        patch.setitem(running.HANDLERS, "fold", broken)
        gathering.contribute(GROUP)
        for _ in range(gathering.project.core.settings.job_attempts):
            gathering.fold()
            clock.advance(60)
        gathering.contribute(len(gathering.clients))
        for _ in range(gathering.project.core.settings.job_attempts):
            drain(gathering.project)
            clock.advance(60)
    assert gathering.round()["state"] == "failed"
    found = everything(gathering.project.owner, "/v1/jobs")
    job = next(job for job in found if (job["kind"], job["state"]) == ("aggregate", "failed"))
    ok(gathering.project.owner.post(f"/v1/jobs/{job['id']}/retry"))
    assert gathering.due("fold") == []
    drain(gathering.project)
    sha256, wanted = gathering.published()
    assert sha256 == wanted


def test_a_cancelled_round_leaves_no_sums(gathering: Gathering) -> None:
    gathering.contribute(GROUP)
    gathering.fold()
    assert len(gathering.stored()) == 2
    ok(gathering.project.owner.post(f"/v1/rounds/{gathering.round()['id']}/cancel"))
    drain(gathering.project)
    assert (gathering.stored(), gathering.folded()) == (set(), [])


def test_who_folds_for_a_round_that_was_cancelled_meanwhile_clears_up(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathering.contribute(GROUP)
    job, other = gathering.due()
    right = folding.pack

    def late(held, *, most):
        ok(gathering.project.owner.post(f"/v1/rounds/{gathering.round()['id']}/cancel"))
        drain(gathering.project)
        return right(held, most=most)

    running.run_job(gathering.project.core, other)
    monkeypatch.setattr(folding, "pack", late)
    running.run_job(gathering.project.core, job)
    assert (gathering.stored(), gathering.folded(), gathering.due()) == (set(), [], [])


# --- withdrawal --------------------------------------------------------------------------------


def test_what_is_withdrawn_before_the_freeze_is_not_in_the_version(two_groups: Gathering) -> None:
    """Its group and what follows are summed anew: the bits are those of a round without it."""
    two_groups.contribute(2 * GROUP + 1)
    two_groups.fold()
    old = two_groups.keys()
    leaver = two_groups.clients[2]
    ((file,),) = two_groups.project.sql(
        "SELECT object_key FROM updates WHERE client_id = :id", id=leaver.id
    )
    report = erase(two_groups.project, leaver)
    assert (report.updates, report.waiting, report.open_rounds) == (1, 0, [])
    storage = two_groups.project.core.storage
    assert storage.size(file) is None
    assert two_groups.stored() == set(), "the sums that hold it are gone with it"
    assert two_groups.folded() == []
    two_groups.fold()
    assert two_groups.folded() == [2, 2]
    assert not old & two_groups.keys()
    close(two_groups)  # one client is gone, nobody is left to report
    manifest = two_groups.manifest()
    assert leaver.id not in {u.client for u in manifest.updates}
    assert [u.number for u in manifest.updates] == [n for n in range(1, 19) if n != 3]
    sha256, wanted = two_groups.published()
    assert sha256 == wanted
    assert erase(two_groups.project, leaver).versions == []
    assert problems(two_groups.project) == ([], {})


def test_a_sum_that_is_being_formed_when_one_withdraws_is_not_kept(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathering.contribute(GROUP + 1)
    job, other = gathering.due()
    right, once = folding.pack, [True]

    def interrupted(held, *, most):
        if once:
            once.clear()
            erase(gathering.project, gathering.clients[0])
        return right(held, most=most)

    monkeypatch.setattr(folding, "pack", interrupted)
    running.run_job(gathering.project.core, job)
    assert (gathering.folded(), gathering.stored()) == ([], set())
    assert set(gathering.due()) == {job, other}
    gathering.fold()
    assert gathering.folded() == [1, 1]


def test_a_withdrawal_may_leave_no_whole_group(gathering: Gathering) -> None:
    gathering.contribute(GROUP)
    gathering.fold()
    erase(gathering.project, gathering.clients[0])
    gathering.fold()
    assert (gathering.folded(), gathering.stored(), gathering.due()) == ([], set(), [])
    gathering.contribute(1)
    gathering.fold()
    assert gathering.folded() == [1, 1]


def test_nothing_is_withdrawn_from_a_frozen_manifest(gathering: Gathering) -> None:
    gathering.contribute(GROUP)
    gathering.fold()
    gathering.contribute(len(gathering.clients))
    assert gathering.round()["state"] == "aggregating"
    leaver = gathering.clients[2]
    report = erase(gathering.project, leaver)
    assert [str(r) for r in report.open_rounds] == [gathering.round()["id"]]
    drain(gathering.project)
    assert leaver.id in {u.client for u in gathering.manifest().updates}
    ((key, sha256),) = gathering.project.sql(
        "SELECT object_key, sha256 FROM versions WHERE project_id = :project AND number = 1"
    )
    assert hashlib.sha256(gathering.project.core.storage.read(key)).hexdigest() == sha256


def test_a_lost_lease_is_no_error_of_the_fold(gathering: Gathering) -> None:
    gathering.contribute(GROUP)
    job, _ = gathering.due()
    with gathering.project.core.db.transaction("test", "test") as tx:
        lease = jobs.claim(tx, job, seconds=30)
        assert lease is not None
        jobs.restart(tx, "fold", lease.subject_id)
    with pytest.raises(LeaseLost):
        folding.fold(gathering.project.core, lease, lambda: None)
    assert gathering.stored() == set()
