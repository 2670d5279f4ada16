"""A client withdraws: what it sent goes, what remains in sums is said, the others stay whole."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from app import retention
from app.encrypted import KeyRing
from app.errors import Unavailable
from app.retention import COLLECTOR
from app.storage import S3Storage
from fedselect.protocol import VersionInfo
from fedselect.retention import Erasure
from workers import running

from .campaign import Campaign
from .factories import (
    contribute,
    deliver,
    drain,
    due_jobs,
    evaluate,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    ok,
    refused,
    train,
    upload,
)
from .test_objects import problems


def erase(project, client):
    return Erasure.model_validate(ok(project.owner.post(f"/v1/clients/{client.id}/erase")))


@pytest.fixture
def finished(project):
    """A finished run of two rounds, evaluated by both of its clients."""
    campaign = Campaign(project, rounds=2, published=2)
    for client in campaign.clients:
        evaluate(client)
    return campaign


def test_all_that_it_has_sent_is_gone(finished):
    leaver, other = finished.clients
    files = finished.project.sql(
        "SELECT object_key FROM updates WHERE client_id = :id UNION "
        "SELECT object_key FROM masks WHERE client_id = :id",
        id=leaver.id,
    )
    assert len(files) == 4
    before = finished.keys()
    report = erase(finished.project, leaver)
    assert (report.updates, report.masks, report.evaluations) == (2, 2, 1)
    assert (report.waiting, report.open_rounds) == (0, [])
    assert finished.keys() == before - {key for (key,) in files}
    assert problems(finished.project) == ([], {})
    evaluations = everything(finished.project.owner, f"/v1/runs/{finished.run['id']}/evaluations")
    assert [e["client_name"] for e in evaluations] == [other.name]
    refused(leaver.post("/v1/check-ins", {}), 401, "key_revoked")


def test_its_name_and_tags_are_gone_from_every_table(finished, project):
    client = make_client(project, name="Sankt-Hedwig-7", tags=["oncology-ward"])
    report = erase(project, client)
    assert report.pseudonym == f"erased-{client.id}"
    assert ok(project.owner.get(f"/v1/clients/{client.id}"))["tags"] == []
    tables = project.sql(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    )
    assert len(tables) > 15
    for (table,) in tables:
        found = project.sql(
            f"SELECT count(*) FROM {table} t WHERE t::text ~ 'Sankt-Hedwig-7|oncology-ward'"
        )
        assert found == [(0,)], table


def test_the_versions_that_hold_its_contribution_are_named_and_marked(finished):
    report = erase(finished.project, finished.clients[0])
    versions = [VersionInfo.model_validate(v) for v in finished.versions()]
    assert [(v.number, v.id) for v in report.versions] == [
        (v.number, v.id) for v in versions if v.number
    ]
    assert [v.recomputable for v in versions] == [True, False, False]
    assert {str(v.run_id) for v in report.versions} == {finished.run["id"]}
    refused(finished.manifest(2), 410, "version_unrecomputable")
    for version in versions:
        ok(finished.project.owner.get(f"/v1/versions/{version.id}/download"))
    reasons = finished.project.sql(
        "SELECT body->>'reason' FROM ledger_entries WHERE project_id = :project "
        "AND action = 'version.unrecomputable'"
    )
    assert reasons == [("client_erased",)] * 2


def test_the_ledger_tells_it_by_ids_and_the_report_counts_what_stays(finished):
    client = finished.clients[0]
    report = erase(finished.project, client)
    rows = finished.project.sql(
        "SELECT action, body FROM ledger_entries WHERE subject = :s ORDER BY id",
        s=f"client:{client.id}",
    )
    assert [row[0] for row in rows] == ["client.registered", "client.revoked", "client.erased"]
    assert client.name not in json.dumps([row[1] for row in rows])
    assert report.ledger_entries >= len(rows)
    assert len(report.stays) == 4


def test_asking_again_gives_the_same_and_writes_nothing(finished):
    client = finished.clients[0]
    count = "SELECT count(*) FROM ledger_entries WHERE project_id = :project"
    first = erase(finished.project, client)
    before = finished.project.sql(count)
    assert erase(finished.project, client) == first
    assert finished.project.sql(count) == before


def test_what_a_gathering_round_has_accepted_is_withdrawn(project):
    model = make_model(project)
    run = make_run(project, model, goal=2, quorum=1, min_contributors=1)
    leaver, other = make_clients(project, 2)
    assignment = contribute(leaver, model, seed=1)
    drain(project)
    report = erase(project, leaver)
    assert (report.updates, report.masks, report.waiting, report.open_rounds) == (1, 1, 0, [])
    assert project.sql(
        "SELECT state, reason FROM assignments WHERE id = :id", id=assignment["id"]
    ) == [("rejected", "client_erased")]
    contribute(other, model, seed=2)
    drain(project)
    versions = everything(project.owner, f"/v1/runs/{run['id']}/versions")
    assert [(v["number"], v["recomputable"]) for v in versions] == [(0, True), (1, True)]
    ((body,),) = project.sql(
        "SELECT m.body FROM manifests m JOIN rounds r ON r.id = m.round_id "
        "WHERE r.project_id = :project"
    )
    assert [u["client"] for u in json.loads(body)["updates"]] == [other.id]
    assert erase(project, leaver).versions == []
    assert problems(project) == ([], {})


def test_what_a_closed_round_aggregates_waits_for_its_end(project):
    campaign = Campaign(project, rounds=2, published=1)
    leaver = campaign.clients[0]
    for seed, client in enumerate(campaign.clients):
        contribute(client, campaign.model, seed=50 + seed)
        (job,) = due_jobs(project)
        running.run_job(project.core, job)
    report = erase(project, leaver)
    (open_round,) = (r["id"] for r in campaign.rounds() if r["state"] == "aggregating")
    assert [str(id) for id in report.open_rounds] == [open_round]
    assert (report.updates, report.waiting) == (1, 2)  # its update of this round, and the mask
    drain(project)
    assert [v["number"] for v in campaign.versions()] == [0, 1, 2]
    report = erase(project, leaver)
    assert (report.updates, report.masks, report.waiting, report.open_rounds) == (2, 2, 0, [])
    assert [v.number for v in report.versions] == [1, 2]
    assert campaign.recomputable() == {0: True, 1: False, 2: False}
    assert problems(project) == ([], {})


def test_an_update_that_is_being_verified_is_rejected_and_the_round_goes_on(project):
    model = make_model(project)
    run = make_run(project, model, goal=2, quorum=1)
    leaver, other = make_clients(project, 2)
    assignment = leaver.assignment()
    deliver(leaver, assignment, train(assignment, model.space, seed=1).data)
    contribute(other, model, seed=2)
    erase(project, leaver)
    drain(project)
    assert project.sql(
        "SELECT state, reason FROM assignments WHERE id = :id", id=assignment["id"]
    ) == [("rejected", "client_erased")]
    assert ok(project.owner.get(f"/v1/runs/{run['id']}"))["published"] == 1
    report = erase(project, leaver)
    assert report.versions == []


def test_an_open_assignment_expires_and_its_staged_file_goes(project):
    model = make_model(project)
    make_run(project, model)
    leaver, _ = make_clients(project, 2)
    assignment = leaver.assignment()
    data = train(assignment, model.space, seed=1).data
    ticket = upload(leaver, f"/v1/assignments/{assignment['id']}/uploads", data)
    ((key,),) = project.sql("SELECT staging_key FROM uploads WHERE id = :id", id=ticket["id"])
    assert project.core.storage.size(key) == len(data)
    erase(project, leaver)
    assert project.core.storage.size(key) is None
    assert project.sql("SELECT state FROM assignments WHERE id = :id", id=assignment["id"]) == [
        ("expired",)
    ]


def test_work_that_it_takes_at_the_last_moment_is_ended_too(project, monkeypatch):
    model = make_model(project)
    make_run(project, model)
    leaver, _ = make_clients(project, 2)
    taken = []

    @contextmanager
    def late(core, *, alone=retention.alone):
        with alone(core):
            taken.append(leaver.assignment())
            deliver(leaver, taken[0], train(taken[0], model.space, seed=1).data)
            yield

    monkeypatch.setattr(retention, "alone", late)
    report = erase(project, leaver)
    drain(project)
    query = "SELECT state, reason FROM assignments WHERE id = :id"
    ended = project.sql(query, id=taken[0]["id"])
    assert (ended, report.waiting) == ([("rejected", "client_erased")], 0)
    assert not project.sql("SELECT 1 FROM updates WHERE client_id = :id", id=leaver.id)


@pytest.mark.parametrize("plain", [True, False])
def test_bytes_that_are_another_client_s_as_well_stay_for_that_client(project, plain):
    """In plain equal masks are one object, encrypted each has its own."""
    if plain:
        project = replace(project, core=replace(project.core, ring=KeyRing(())))
    model = make_model(project)
    make_run(project, model, rounds=2)
    leaver, other = make_clients(project, 2)
    assignment = leaver.assignment()
    made = train(assignment, model.space, seed=1)
    deliver(leaver, assignment, made.data)
    assignment = other.assignment()
    deliver(other, assignment, train(assignment, model.space, seed=2, mask=made.mask).data)
    drain(project)
    report = erase(project, leaver)
    assert (report.updates, report.masks, report.waiting) == ((1, 0, 1) if plain else (1, 1, 0))
    ((key,),) = project.sql("SELECT object_key FROM masks WHERE client_id = :id", id=other.id)
    assert project.core.storage.read(key) == made.mask.to_bytes()
    assert problems(project) == ([], {})


def test_a_crash_in_the_middle_is_made_good(finished, monkeypatch):
    """The store goes away after the rows have said what goes."""
    client = finished.clients[0]
    with monkeypatch.context() as patch:

        def away(self, keys):
            raise Unavailable("the object store does not answer", code="storage_unavailable")

        patch.setattr(S3Storage, "delete", away)
        answer = finished.project.owner.post(f"/v1/clients/{client.id}/erase")
        refused(answer, 503, "storage_unavailable")
    assert problems(finished.project) == ([], {})
    retention.finish_begun(finished.core)
    report = erase(finished.project, client)
    assert (report.updates, report.masks, report.waiting) == (2, 2, 0)
    assert problems(finished.project) == ([], {})


def test_it_waits_while_somebody_else_deletes(finished):
    with finished.core.db.singleton(COLLECTOR) as mine:
        assert mine
        answer = finished.project.owner.post(f"/v1/clients/{finished.clients[0].id}/erase")
        refused(answer, 503, "retention_busy")
    assert ok(finished.project.owner.get(f"/v1/clients/{finished.clients[0].id}"))["state"] == (
        "active"
    )


def test_nobody_erases_another_project_s_client(project, other):
    client = make_client(project)
    refused(other.owner.post(f"/v1/clients/{client.id}/erase"), 404, "not_found")
    refused(project.caller("auditor").post(f"/v1/clients/{client.id}/erase"), 403, "scope_missing")


def test_masks_wait_while_a_file_of_the_project_is_being_verified(project):
    """Its mask may be the same bytes, written already and not yet named by any row."""
    campaign = Campaign(project, rounds=2, published=1)
    leaver, other = campaign.clients
    assignment = other.assignment()
    deliver(other, assignment, train(assignment, campaign.model.space, seed=3).data)
    report = erase(project, leaver)
    assert (report.updates, report.masks, report.waiting) == (1, 0, 1)
    drain(project)
    report = erase(project, leaver)
    assert (report.updates, report.masks, report.waiting) == (1, 1, 0)
    assert problems(project) == ([], {})


def test_its_refused_files_go_as_well(project):
    model = make_model(project)
    make_run(project, model)
    leaver, _ = make_clients(project, 2)
    assignment = leaver.assignment()
    deliver(leaver, assignment, train(assignment, model.space, seed=1, space="0" * 64).data)
    drain(project)
    ((id, state),) = project.sql(
        "SELECT id, state FROM uploads WHERE assignment_id = :id", id=assignment["id"]
    )
    assert state == "rejected"
    key = project.core.ring.named(f"quarantine/{project.id}/{id}")
    project.core.storage.put(key, io.BytesIO(b"abc"), 3)
    erase(project, leaver)
    assert project.core.storage.size(key) is None
