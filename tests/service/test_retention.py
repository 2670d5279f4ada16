"""Collections: what is old and not needed goes, what is needed stays, and a crash loses nothing."""

from __future__ import annotations

import io
from uuid import uuid4

import pytest

from app import retention
from app.errors import Unavailable
from app.retention import COLLECTOR
from fedselect import Mask
from workers import sweep

from .campaign import Campaign, eager
from .factories import (
    contribute,
    deliver,
    drain,
    evaluate,
    everything,
    make_clients,
    make_model,
    make_run,
    ok,
    pass_time,
    refused,
    train,
)
from .test_objects import problems

DAY = 86_400


@pytest.fixture
def campaign(project):
    return Campaign(project)


def test_nothing_young_goes(campaign):
    before = campaign.keys()
    retention.collect(campaign.core, strays=True)
    assert campaign.keys() == before
    assert all(campaign.recomputable().values())


def test_what_a_channel_points_at_or_can_go_back_to_is_kept(campaign, clock):
    old = eager(campaign.core, retain_versions=30)
    found = {each["number"]: each["id"] for each in campaign.versions()}
    path = f"/v1/models/{campaign.model.id}/channels/stable"
    for number in (1, 2):
        body = {"version_id": found[number], "reason": "first"}
        ok(campaign.project.owner.request("PUT", path, body))
    clock.advance(91 * DAY)
    retention.collect(old)
    assert campaign.recomputable() == dict.fromkeys(range(4), True)
    ok(campaign.project.owner.post(f"{path}/roll-back", {"reason": "back"}))
    retention.collect(old)
    assert campaign.recomputable() == {0: True, 1: True, 2: False, 3: True}


def test_behind_the_window_only_what_is_pinned_stays_recomputable(campaign, clock):
    clock.advance(91 * DAY)
    retention.collect(campaign.core)
    assert campaign.recomputable() == {0: True, 1: False, 2: False, 3: True}
    # initial weights; the two updates and masks of version 3; every version file
    assert len(campaign.keys("accepted/")) == 3
    assert len(campaign.keys("masks/")) == 2
    assert len(campaign.keys("versions/")) == 3
    assert problems(campaign.project) == ([], {})
    refused(campaign.manifest(1), 410, "version_unrecomputable")
    kept = ok(campaign.manifest(1, files=False))
    assert kept["downloads"] == {}
    assert len(kept["manifest"]["updates"]) == 2
    assert len(ok(campaign.manifest(3))["downloads"]) == 5
    marks = campaign.project.sql(
        "SELECT body->>'number', body->>'reason' FROM ledger_entries WHERE project_id = :project "
        "AND action = 'version.unrecomputable' ORDER BY id"
    )
    assert marks == [("1", "window"), ("2", "window")]


def test_the_run_goes_on_and_masks_may_be_left_out(campaign):
    retention.collect(eager(campaign.core, recompute_window=0, retain_orphans=0))
    assert campaign.recomputable() == {0: True, 1: False, 2: False, 3: True}
    for client in campaign.clients:
        assignment = client.assignment()
        ((key,),) = campaign.project.sql(
            "SELECT object_key FROM masks WHERE client_id = :id ORDER BY number DESC LIMIT 1",
            id=client.id,
        )
        mask = Mask.from_bytes(campaign.model.space.dim, campaign.core.storage.read(key))
        made = train(assignment, campaign.model.space, seed=5, mask=mask, send_mask=False)
        deliver(client, assignment, made.data)
    drain(campaign.project)
    assert max(v["number"] for v in campaign.versions()) == 4


def test_a_rehearsal_tells_the_same_and_changes_nothing(campaign, clock):
    clock.advance(91 * DAY)
    before = campaign.keys()
    found = retention.rehearse(campaign.core)
    assert found.dry_run
    assert campaign.keys() == before
    assert all(campaign.recomputable().values())
    done = retention.collect(campaign.core)
    assert [(k.kind, k.count, k.bytes) for k in found.kinds] == [
        (k.kind, k.count, k.bytes) for k in done.kinds
    ]
    assert not retention.rehearse(campaign.core).kinds


def test_small_batches_come_to_the_same(campaign, clock):
    clock.advance(91 * DAY)
    retention.collect(eager(campaign.core, gc_batch=1))
    assert campaign.recomputable() == {0: True, 1: False, 2: False, 3: True}
    assert len(campaign.keys("accepted/")) == 3


def test_files_of_a_round_without_a_version_go_after_their_week(campaign, clock):
    contribute(campaign.clients[0], campaign.model, seed=77)
    drain(campaign.project)
    (last,) = (r for r in campaign.rounds() if r["number"] == 4)
    ok(campaign.project.owner.post(f"/v1/rounds/{last['id']}/cancel"))
    assert len(campaign.keys("accepted/")) == 8
    clock.advance(6 * DAY)
    retention.collect(campaign.core)
    assert len(campaign.keys("accepted/")) == 8
    clock.advance(2 * DAY)
    retention.collect(campaign.core)
    assert len(campaign.keys("accepted/")) == 7
    assert problems(campaign.project) == ([], {})


def test_old_version_files_go_only_if_an_operator_says_so(campaign, clock):
    clock.advance(91 * DAY)
    retention.collect(campaign.core)
    retention.collect(eager(campaign.core, retain_versions=30))
    found = {v["number"]: v["id"] for v in campaign.versions()}
    refused(campaign.project.owner.get(f"/v1/versions/{found[1]}/download"), 410, "version_deleted")
    for number in (0, 2, 3):  # version 2 is the base of the newest, which is recomputable
        ok(campaign.project.owner.get(f"/v1/versions/{found[number]}/download"))
    assert problems(campaign.project) == ([], {})


def test_orphans_strays_partials_and_quarantine_go_by_age(campaign, clock):
    core, project = campaign.core, campaign.project
    ended, busy = (r["id"] for r in campaign.rounds()[::3])
    new = {
        "stray": f"accepted/{project.id}/{uuid4().hex}",
        "refused": f"quarantine/{project.id}/{uuid4().hex}",
        "left": f"partials/{ended}/0",
        "needed": f"partials/{busy}/0",
    }
    for key in new.values():
        core.storage.put(key, io.BytesIO(b"abc"), 3)
    clock.advance(2 * DAY)
    retention.collect(core, strays=True)
    left = {name for name, key in new.items() if core.storage.size(key) is not None}
    assert left == {"refused", "needed"}
    clock.advance(29 * DAY)
    retention.collect(core)
    assert core.storage.size(new["refused"]) is None
    assert core.storage.size(new["needed"]) == 3
    core.storage.delete([new["needed"]])


def test_old_answers_and_evaluations_go(project, clock):
    model = make_model(project)
    run = make_run(project, model)
    clients = make_clients(project, 2)
    for seed, client in enumerate(clients):
        contribute(client, model, seed=seed)
    drain(project)
    for client in clients:
        evaluate(client)
    project.owner.post("/v1/enrolments", {}, once="an-old-key")
    clock.advance(8 * DAY)
    count = "SELECT count(*) FROM idempotent_answers WHERE key = 'an-old-key'"
    assert project.sql(count) == [(1,)]
    retention.collect(project.core)
    assert project.sql(count) == [(0,)]
    path = f"/v1/runs/{run['id']}/evaluations"
    assert len(everything(project.owner, path)) == 2
    clock.advance(3 * DAY)
    retention.collect(eager(project.core, retain_evaluations=10))
    assert everything(project.owner, path) == []


# --- crashes and races ---------------------------------------------------------------------------


def begin(campaign, **settings):
    """The first step of a collection, after which its process dies."""
    with campaign.core.db.transaction("test", "test") as tx:
        deletion, _ = retention._begin(
            tx, eager(campaign.core, **settings).settings, [], limit=None
        )
    return deletion


def in_ledger(campaign, deletion):
    return [
        row[0]
        for row in campaign.project.sql(
            "SELECT action FROM ledger_entries WHERE subject = :subject ORDER BY id",
            subject=f"deletion:{deletion}",
        )
    ]


@pytest.mark.parametrize("deleted", [0, 1, 1000])
def test_a_deletion_that_was_begun_is_ended_by_whoever_comes_next(campaign, clock, deleted):
    clock.advance(91 * DAY)
    deletion = begin(campaign)
    doomed = [
        row[0]
        for row in campaign.project.sql(
            "SELECT key FROM objects WHERE deletion_id = :id", id=deletion
        )
    ]
    campaign.core.storage.delete(doomed[:deleted])  # the process died somewhere in here
    assert in_ledger(campaign, deletion) == ["deletion.begun"]
    assert problems(campaign.project) == ([], {})
    retention.finish_begun(campaign.core)
    assert in_ledger(campaign, deletion) == ["deletion.begun", "deletion.done"]
    assert all(campaign.core.storage.size(key) is None for key in doomed)
    assert problems(campaign.project) == ([], {})
    retention.carry_out(campaign.core, deletion)  # a zombie that comes back
    assert in_ledger(campaign, deletion) == ["deletion.begun", "deletion.done"]
    begun, done = campaign.project.sql(
        "SELECT body FROM ledger_entries WHERE subject = :subject ORDER BY id",
        subject=f"deletion:{deletion}",
    )
    assert {n: begun[0][n] for n in ("objects", "bytes", "keys_sha256")} == done[0]


def test_masks_of_a_run_that_promises_it_go_early(project, other, clock):
    """Pinned or not; the newest of each client stays while the run goes on, as it needs it."""
    campaign = Campaign(project, disclosure={"mask_days": 0.003})  # 259 seconds
    without, eagerly = Campaign(other), eager(campaign.core, retain_orphans=0)
    clock.advance(100)
    retention.collect(eagerly)
    assert all(campaign.recomputable().values())
    clock.advance(200)
    retention.collect(eagerly)
    assert campaign.recomputable() == {0: True, 1: False, 2: False, 3: False}
    assert all(without.recomputable().values())
    refused(campaign.manifest(3), 410, "version_unrecomputable")
    assert len(campaign.keys("masks/")) == 2, "the newest of each client"
    assert len(without.keys("masks/")) == 2 * 3
    reasons = [e["reason"] for e in campaign.entries("version.unrecomputable")][-3:]
    assert reasons == ["mask_days"] * 3
    campaign.round(3)  # masks may still be left out: those that a next update refers to are there
    assert campaign.versions()[-1]["number"] == 4
    clock.advance(8 * DAY)
    pass_time(project)  # nobody evaluates: the run ends by itself
    retention.collect(campaign.core)
    own = campaign.project.sql(
        "SELECT o.key FROM objects o JOIN masks m ON m.object_key = o.key"
        " WHERE m.arm_id = :arm AND o.deletion_id IS NULL",
        arm=campaign.run["arm_id"],
    )
    assert own == [], "the run is over: no mask and no update of it is left"


def test_a_mask_that_is_sent_again_while_it_is_deleted_is_written_again(campaign, clock):
    """The race: an old mask's object goes while a new update brings the same bytes."""
    ((key,),) = campaign.project.sql(
        "SELECT object_key FROM masks WHERE client_id = :id AND number = 1",
        id=campaign.clients[0].id,
    )
    old = Mask.from_bytes(campaign.model.space.dim, campaign.core.storage.read(key))
    deletion = begin(campaign, recompute_window=0, retain_orphans=0)
    assert campaign.project.sql("SELECT deletion_id FROM objects WHERE key = :k", k=key) == [
        (deletion,)
    ]
    first, second = campaign.clients
    assignment = first.assignment()
    deliver(first, assignment, train(assignment, campaign.model.space, seed=8, mask=old).data)
    drain(campaign.project)  # the worker finds the key doomed and gives the job back
    assert campaign.project.sql(
        "SELECT state FROM uploads WHERE assignment_id = :id", id=assignment["id"]
    ) == [("uploaded",)]
    retention.finish_begun(campaign.core)
    assert campaign.core.storage.size(key) is None
    clock.advance(5)
    drain(campaign.project)
    contribute(second, campaign.model, seed=9)
    drain(campaign.project)
    assert campaign.core.storage.read(key) == old.to_bytes()
    assert max(v["number"] for v in campaign.versions()) == 4
    assert problems(campaign.project) == ([], {})


def test_only_one_deletes(campaign, clock):
    clock.advance(91 * DAY)
    with campaign.core.db.singleton(COLLECTOR) as mine:
        assert mine
        with pytest.raises(Unavailable) as refusal:
            retention.collect(campaign.core)
    assert refusal.value.code == "retention_busy"
    assert all(campaign.recomputable().values())


def test_the_scheduler_collects_and_ends_what_was_begun(campaign, clock):
    clock.advance(91 * DAY)
    deletion = begin(campaign)
    sweep.sweep(campaign.core)
    assert in_ledger(campaign, deletion) == ["deletion.begun", "deletion.done"]
    clock.advance(91 * DAY)
    sweep.collect(campaign.core)
    assert problems(campaign.project) == ([], {})


def test_shared_bytes_stay_as_long_as_anybody_needs_them(project, clock):
    """A mask that a young and an old version share."""

    model = make_model(project)
    make_run(project, model, rounds=3)
    clients = make_clients(project, 2)
    masks = {}

    def one_round(seed):
        for number, client in enumerate(clients):
            assignment = client.assignment()
            made = train(assignment, model.space, seed=seed + number, mask=masks.get(client.id))
            masks.setdefault(client.id, made.mask)
            deliver(client, assignment, made.data)
        drain(project)

    one_round(0)
    one_round(10)
    clock.advance(91 * DAY)
    retention.collect(project.core)
    keys = {
        row[0] for row in project.sql("SELECT object_key FROM masks WHERE project_id = :project")
    }
    assert len(keys) == 2
    assert all(project.core.storage.size(key) is not None for key in keys)
    assert problems(project) == ([], {})
