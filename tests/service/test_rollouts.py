"""Cohorts, channels and rollouts: who gets which version, and whether it may go on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import text

from app import channels, rollouts
from app.tables import Rollout
from workers import sweep

from .factories import (
    REPORT,
    contribute,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    ok,
    pass_time,
    refused,
)
from .rolling import WHY, World, scores


@pytest.fixture
def world(project):
    found = World(project)
    found.set()
    return found


FEW = {"gates": {"mean_gain": None, "worst_decile_drop": None}}  # what six clients can tell


# --- cohorts -----------------------------------------------------------------------------------


def test_cohorts_by_name_tag_and_share(project):
    old, new = make_client(project, tags=["old"]), make_client(project, tags=["new"])
    owner = project.owner
    rules = {"by-name": {"clients": [old.name]}, "by-tag": {"tag": "new"}, "all": {"percent": 100}}
    for (name, rule), members in zip(rules.items(), ([old], [new], [old, new]), strict=True):
        cohort = ok(owner.post("/v1/cohorts", {"name": name, "rule": rule}), 201)
        assert cohort["members"] == len(members)
        found = everything(owner, f"/v1/cohorts/{cohort['id']}/clients", limit=1)
        assert [each["id"] for each in found] == [client.id for client in members]
    assert [each["name"] for each in everything(owner, "/v1/cohorts", limit=2)] == list(rules)
    refused(
        owner.post("/v1/cohorts", {"name": "all", "rule": {"tag": "x"}}), 409, "cohort_name_taken"
    )
    refused(owner.post("/v1/cohorts", {"name": "x", "rule": {"clients": ["no"]}}), 404, "not_found")
    refused(owner.post("/v1/cohorts", {"name": "x", "rule": {}}), 422, "request_invalid")


def test_names_of_clients_are_not_kept_beside_them(project):
    client = make_client(project)
    body = {"name": "one", "rule": {"clients": [client.name]}}
    cohort = ok(project.owner.post("/v1/cohorts", body), 201)
    assert cohort["rule"]["clients"] == [client.name]
    ok(project.owner.request("PATCH", f"/v1/clients/{client.id}", {"name": "renamed"}))
    found = ok(project.owner.get(f"/v1/cohorts/{cohort['id']}"))
    assert (found["rule"]["clients"], found["members"]) == (["renamed"], 1)
    kept = project.sql("SELECT rule FROM cohorts WHERE project_id = :project")
    written = project.sql("SELECT body FROM ledger_entries WHERE action = 'cohort.created'")
    assert client.name not in repr([*kept, *written])
    ok(project.owner.post(f"/v1/clients/{client.id}/erase"))
    found = ok(project.owner.get(f"/v1/cohorts/{cohort['id']}"))
    assert (found["rule"]["clients"], found["members"]) == ([f"erased-{client.id}"], 0)


def test_a_run_of_a_cohort_asks_its_members_alone(project):
    inside, outside = make_clients(project, 2), make_client(project)
    rule = {"clients": [each.name for each in inside]}
    cohort = ok(project.owner.post("/v1/cohorts", {"name": "some", "rule": rule}), 201)
    model = make_model(project)
    run = make_run(project, model, cohort_id=cohort["id"])
    assert run["cohort_id"] == cohort["id"]
    assert outside.check_in()["assignment"] is None
    for seed, client in enumerate(inside):
        contribute(client, model, seed=seed)
    drain(project)
    assert outside.check_in()["assignment"] is None
    assert [client.assignment()["kind"] for client in inside] == ["evaluate"] * 2


# --- channels ----------------------------------------------------------------------------------


def test_a_channel_says_what_clients_serve_and_goes_back_once(project):
    world = World(project)
    client = next(iter(world.clients.values()))
    assert world.served(client) is None
    world.set(number=1)
    assert world.served(client) == ("stable", 1)
    world.set(number=2)
    found = client.check_in()["serving"]
    assert found["version"] == world.versions[2]
    assert found["arm_id"] == world.run["arm_id"]
    assert found["space_digest"] == world.model.space.digest
    back = f"{world.channels}/stable/roll-back"
    assert ok(world.owner.post(back, WHY))["version"]["number"] == 1
    assert world.served(client) == ("stable", 1)
    refused(world.owner.post(back, WHY), 409, "channel_without_previous")
    moves = [body for _, body in world.entries("channel.moved")]
    assert [(m["from"], m["to"], m["reason"]) for m in moves] == [
        (a and world.versions[a]["id"], world.versions[b]["id"], "agreed")
        for a, b in ((None, 1), (1, 2), (2, 1))
    ]


def test_moving_to_where_it_is_moves_nothing(world):
    before = ok(world.owner.get(f"{world.channels}/stable"))
    assert world.set() == before
    assert len(world.entries("channel.moved")) == 1


def test_a_channel_is_changed_from_what_was_read_alone(world):
    path = f"{world.channels}/stable"
    tag = world.owner.get(path).headers["ETag"]
    body = {"version_id": world.versions[2]["id"], **WHY}
    ok(world.owner.request("PUT", path, body, **{"If-Match": tag}))
    body = {"version_id": world.versions[1]["id"], **WHY}
    refused(world.owner.request("PUT", path, body, **{"If-Match": tag}), 412, "etag_mismatch")


def test_the_pilot_channel_serves_its_cohort_alone(world):
    inside, outside, *_ = world.clients.values()
    rule = {"clients": [inside.name]}
    cohort = ok(world.owner.post("/v1/cohorts", {"name": "pilot", "rule": rule}), 201)
    world.set("pilot", number=2, cohort_id=cohort["id"])
    assert [world.served(each) for each in (inside, outside)] == [("pilot", 2), ("stable", 1)]
    assert {each["name"] for each in everything(world.owner, world.channels)} == {"stable", "pilot"}
    body = {"version_id": world.versions[1]["id"], **WHY}
    refused(world.owner.request("PUT", f"{world.channels}/pilot", body), 422, "channel_cohort")
    body["cohort_id"] = cohort["id"]
    refused(world.owner.request("PUT", f"{world.channels}/stable", body), 422, "channel_cohort")


def test_versions_that_cannot_be_served(world, other):
    theirs = make_model(world.project)
    found = ok(world.owner.get(f"/v1/models/{theirs.id}"))["initial_version"]
    path = f"/v1/models/{theirs.id}/channels/stable"
    refused(world.owner.get(path), 404, "not_found")
    body = {"version_id": found["id"], **WHY}
    refused(world.owner.request("PUT", path, body), 409, "version_unfit")
    body = {"version_id": world.versions[1]["id"], **WHY}
    refused(world.owner.request("PUT", path, body), 409, "version_unfit")
    refused(other.owner.request("PUT", f"{world.channels}/stable", body), 404, "not_found")


def test_clients_are_told_what_they_may_have_to_serve(world, other):
    client = next(iter(world.clients.values()))
    arm = world.run["arm_id"]

    def pinned():
        found = client.check_in()["pinned"]
        assert {each["arm_id"] for each in found} <= {arm}
        return [each["number"] for each in found]

    assert pinned() == [1]
    rollout = world.start(**FEW)
    assert pinned() == [1, 2], "also before a stage has reached it"
    ok(world.order(rollout, "roll-back"))
    assert pinned() == [1]
    world.set(number=2)
    assert pinned() == [1, 2], "the channel can go back"
    assert make_client(other).check_in()["pinned"] == []


# --- rollouts ----------------------------------------------------------------------------------


def test_a_good_version_goes_from_stage_to_stage_to_everybody(world):
    rollout = world.start(**FEW)
    assert (rollout["state"], rollout["stage"], rollout["stage_clients"]) == ("running", 1, 2)
    members, control = (world.group(rollout, which) for which in ("members", "control"))
    assert (len(members), len(control)) == (2, 2)
    others = [c for c in world.clients.values() if c not in members]
    assert {world.served(each) for each in members} == {("stable", 2)}
    assert {world.served(each) for each in others} == {("stable", 1)}
    assert {c.assignment()["base"]["number"] for c in members} == {2}
    assert {c.assignment()["base"]["number"] for c in control} == {1}

    found = world.report(rollout, stage=3)
    assert (found["state"], found["judgements"][0]["verdict"]) == ("passed", "pass")
    found = ok(world.order(rollout, "promote"))
    assert (found["state"], found["stage"], found["stage_clients"]) == ("running", 2, 4)
    assert {each.id for each in members} < {each["client_id"] for each in found["members"]}
    world.report(rollout, stage=3)
    found = ok(world.order(rollout, "promote", reason="for everybody"))
    assert (found["state"], found["ended_at"] is not None) == ("promoted", True)
    assert {world.served(each) for each in world.clients.values()} == {("stable", 2)}
    states = ["running", "passed", "running", "passed", "promoted"]
    assert [each["to_state"] for each in found["decisions"]] == states
    assert found["decisions"][-1]["reason"] == "for everybody"
    assert found["decisions"][-1]["actor"].startswith("key:")
    actions = [action for action, _ in world.entries("rollout.")]
    assert actions == [
        *("rollout.started", "rollout.judged", "rollout.passed"),
        *("rollout.advanced", "rollout.judged", "rollout.passed", "rollout.promoted"),
    ]
    assert world.entries("channel.moved")[-1][1]["to"] == world.versions[2]["id"]
    # The channel can still go back, for everybody at once.
    ok(world.owner.post(f"{world.channels}/stable/roll-back", WHY))
    assert {world.served(each) for each in world.clients.values()} == {("stable", 1)}


def test_an_automatic_rollout_needs_nobody(world):
    rollout = world.start(**FEW, automatic=True)
    assert world.report(rollout, stage=3)["stage"] == 2
    assert world.report(rollout, stage=3)["state"] == "promoted"
    assert world.served(next(iter(world.clients.values()))) == ("stable", 2)


def test_a_bad_version_is_held_and_rolled_back(world):
    rollout = world.start(**FEW)
    members = world.group(rollout, "members")
    found = world.report(rollout, stage=scores(0, harmed=True))
    assert (found["state"], found["judgements"][0]["verdict"]) == ("held", "fail")
    (harm,) = [g for g in found["judgements"][0]["gates"] if g["gate"] == "harmed_share"]
    assert (harm["verdict"], harm["figure"], harm["limit"]) == ("fail", 1.0, 0.1)
    assert harm["control"]["value"] == 0
    assert "harmed_share is 1" in found["reason"]
    told = [each["gain"] for each in found["members"]]
    assert [(gain["points"], gain["harmed"]) for gain in told] == [(-40, True)] * 2
    assert [each["gain"]["points"] for each in found["control"]] == [0, 0]
    assert world.entries("rollout.held")[0][1]["reason"] == found["reason"]
    assert {world.served(each) for each in members} == {("stable", 2)}  # held, not undone
    found = ok(world.order(rollout, "roll-back", reason="harm in two wards"))
    assert found["state"] == "rolled_back"
    assert {world.served(each) for each in world.clients.values()} == {("stable", 1)}
    (entry,) = world.entries("rollout.rolled_back")
    assert entry[1]["reason"] == "harm in two wards"
    for command in ("promote", "hold", "roll-back"):
        refused(world.order(rollout, command), 409, "rollout_rolled_back")
    world.start(**FEW)  # the channel is free again


def test_harm_rolls_back_at_once_if_the_rollout_says_so(world):
    rollout = world.start(**FEW, roll_back_on_harm=True, automatic=True)
    assert world.report(rollout, stage=scores(0, harmed=True))["state"] == "rolled_back"
    assert {world.served(each) for each in world.clients.values()} == {("stable", 1)}


def test_too_few_clients_for_a_mean_leave_it_to_a_person(world):
    rollout = world.start()
    found = world.report(rollout, stage=3)
    assert (found["state"], found["judgements"][0]["verdict"]) == ("held", "insufficient")
    assert "insufficient evidence" in found["reason"]
    judged = world.entries("rollout.judged")[0][1]
    assert judged["gates"]["mean_gain"].startswith("insufficient: mean_gain is 3")
    assert ok(world.order(rollout, "promote"))["state"] == "running"


def test_what_few_clients_will_not_tell_is_said_at_the_start(world):
    (note,) = world.start()["notes"]
    assert note.startswith("mean_gain and worst_decile_drop can tell in no stage")
    assert "there are 2 and 4 and 2." in note
    (rollout,) = everything(world.owner, "/v1/rollouts")
    assert rollout["notes"] == [note]
    ok(world.order(rollout, "roll-back"))
    assert world.start(**FEW)["notes"] == []


def test_ten_clients_a_group_give_a_difference_between_groups(project):
    world = World(project, count=20)
    world.set()
    rollout = world.start(minimum=10, stages=[50, 100])
    for number, client in enumerate(world.group(rollout, "members")):
        path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
        ok(client.post(path, {**REPORT, **scores(number)}), 201)
    for client in world.group(rollout, "control"):
        path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
        ok(client.post(path, {**REPORT, **scores(2)}), 201)
    pass_time(project)
    found = world.show(rollout)
    gates = {gate["gate"]: gate for gate in found["judgements"][0]["gates"]}
    assert gates["mean_gain"]["figure"] == 4.5 - 2
    assert gates["mean_gain"]["interval"]["low"] < 2.5 < gates["mean_gain"]["interval"]["high"]
    assert gates["worst_decile_drop"]["figure"] == 2  # exactly at its limit
    assert {gate["verdict"] for gate in gates.values()} == {"pass"}
    assert found["state"] == "passed"


def test_a_stage_waits_until_its_deadline_and_no_longer(world, clock):
    rollout = world.start(**FEW, stage_seconds=100)
    one, two = world.group(rollout, "members")
    ok(one.post(f"/v1/assignments/{one.assignment()['id']}/evaluations", {**REPORT, **scores(1)}))
    pass_time(world.project)
    assert world.show(rollout)["state"] == "running"
    clock.advance(101)
    assert two.check_in()["assignment"] is None
    pass_time(world.project)
    found = world.show(rollout)
    assert found["state"] == "held"
    (rate,) = [g for g in found["judgements"][0]["gates"] if g["gate"] == "rejection_rate"]
    assert (rate["verdict"], rate["figure"]) == ("fail", 0.5)
    assert {each["evaluation"] for each in found["members"]} == {"accepted", "expired"}


def test_who_has_left_meanwhile_has_refused_nothing(world, clock):
    rollout = world.start(**FEW, stage_seconds=100)
    one, two = world.group(rollout, "members")
    ok(one.post(f"/v1/assignments/{one.assignment()['id']}/evaluations", {**REPORT, **scores(1)}))
    ok(world.owner.post(f"/v1/clients/{two.id}/suspend"))
    clock.advance(101)
    pass_time(world.project)
    found = world.show(rollout)
    (rate,) = [g for g in found["judgements"][0]["gates"] if g["gate"] == "rejection_rate"]
    assert (found["state"], rate["figure"], rate["stage"]["clients"]) == ("passed", 0, 1)


def test_who_follows_the_pilot_channel_is_not_dealt_to_a_rollout_of_stable(world):
    inside, *_ = world.clients.values()
    rule = {"clients": [inside.name]}
    cohort = ok(world.owner.post("/v1/cohorts", {"name": "pilot", "rule": rule}), 201)
    world.set("pilot", number=2, cohort_id=cohort["id"])
    rollout = world.start(**FEW, stages=[100])
    assert inside not in world.group(rollout, "members") + world.group(rollout, "control")
    assert (rollout["stage_clients"], rollout["control_clients"]) == (3, 2)
    assert world.served(inside) == ("pilot", 2)


def test_a_run_does_not_wait_for_a_rollout_nor_show_its_evaluations(world):
    path = f"/v1/runs/{world.run['id']}"
    assert ok(world.owner.get(path))["state"] == "finished"
    before = everything(world.owner, f"{path}/evaluations")
    report = ok(world.owner.get(f"{path}/report"))
    rollout = world.start(**FEW)
    world.report(rollout, stage=3)
    assert ok(world.owner.get(path))["state"] == "finished"
    assert everything(world.owner, f"{path}/evaluations") == before
    again = ok(world.owner.get(f"{path}/report"))
    assert again["clients"] == report["clients"]


def test_an_order_of_an_administrator_ends_what_is_asked(world):
    rollout = world.start(**FEW)
    members = world.group(rollout, "members")
    refused(world.order(rollout, "promote"), 409, "rollout_running")
    assert ok(world.order(rollout, "hold"))["state"] == "held"
    assert [each.check_in()["assignment"] for each in members] == [None, None]
    refused(world.order(rollout, "hold"), 409, "rollout_held")
    refused(world.order(rollout, "promote", reason=""), 422, "request_invalid")


def test_one_rollout_at_a_time_moves_a_channel(world):
    rollout = world.start(**FEW)
    refused(world.owner.post("/v1/rollouts", world.body()), 409, "rollout_active")
    body = {"version_id": world.versions[2]["id"], **WHY}
    path = f"{world.channels}/stable"
    refused(world.owner.request("PUT", path, body), 409, "rollout_active")
    refused(world.owner.post(f"{path}/roll-back", WHY), 409, "rollout_active")
    ok(world.order(rollout, "roll-back"))
    refused(
        world.owner.post("/v1/rollouts", world.body(name=rollout["name"])),
        409,
        "rollout_name_taken",
    )


def test_rollouts_that_cannot_begin(project):
    world = World(project)
    refused(world.owner.post("/v1/rollouts", world.body()), 409, "channel_unset")
    world.set(number=2)
    refused(world.owner.post("/v1/rollouts", world.body()), 409, "version_unfit")
    world.set(number=1)
    refused(world.owner.post("/v1/rollouts", world.body(minimum=4)), 422, "rollout_too_small")
    refused(world.owner.post("/v1/rollouts", world.body(stages=[100, 5])), 422, "request_invalid")
    assert everything(world.owner, "/v1/rollouts") == []


def test_starting_twice_with_one_key_starts_one(world):
    body = world.body()
    found = [ok(world.owner.post("/v1/rollouts", body, once="k"), 201) for _ in range(2)]
    assert found[0] == found[1]
    assert len(everything(world.owner, "/v1/rollouts")) == 1


def test_two_who_promote_what_both_have_read_go_one_stage_further(world):
    rollout = world.start(**FEW)
    path = f"/v1/rollouts/{rollout['id']}"
    ok(world.owner.post(f"{path}/hold", WHY))
    tag = world.owner.get(path).headers["ETag"]
    first = world.owner.request("POST", f"{path}/promote", WHY, **{"If-Match": tag})
    assert ok(first)["stage"] == 2
    assert first.headers["ETag"] == world.owner.get(path).headers["ETag"] != tag
    second = world.owner.request("POST", f"{path}/promote", WHY, **{"If-Match": tag})
    refused(second, 412, "etag_mismatch")
    assert world.show(rollout)["stage"] == 2


def test_a_channel_is_rolled_back_from_what_was_read_alone(world):
    path = f"{world.channels}/stable"
    world.set(number=1)
    tag = world.owner.get(path).headers["ETag"]
    world.set(number=2)
    order = partial(world.owner.request, "POST", f"{path}/roll-back", WHY)
    refused(order(**{"If-Match": tag}), 412, "etag_mismatch")
    tag = world.owner.get(path).headers["ETag"]
    assert ok(order(**{"If-Match": tag}))["version"]["number"] == 1


def test_promoting_and_rolling_back_at_once_give_one_result(world):
    for _ in range(4):
        world.set(number=1)
        rollout = world.start(**FEW, stages=[100])
        world.report(rollout, stage=3)
        with ThreadPoolExecutor(2) as pool:
            order = partial(world.order, rollout)
            answers = list(pool.map(order, ("promote", "roll-back")))
        assert sorted(a.status_code for a in answers) == [200, 409], [a.text for a in answers]
        state = world.show(rollout)["state"]
        wanted = 2 if state == "promoted" else 1
        assert state in {"promoted", "rolled_back"}
        assert {world.served(each) for each in world.clients.values()} == {("stable", wanted)}


@pytest.mark.parametrize("table", ["models", "rollouts"])
def test_its_locks_keep_nobody_from_pointing_at_what_it_locks(world, table):
    """Who publishes a version or reports an evaluation holds the run that a rollout locks next."""
    rollout = world.start(**FEW)
    found = {"models": world.model.id, "rollouts": rollout["id"]}[table]
    core = world.project.core
    with core.db.transaction("test", "test") as tx:
        rollouts._locked(tx, UUID(rollout["id"]))
        channels.promote(tx, tx.session.get_one(Rollout, UUID(rollout["id"])), reason="x")
        with core.db.transaction("test", "test") as other:
            other.session.execute(text("SET LOCAL lock_timeout = '5s'"))
            pointing = text(f"SELECT 1 FROM {table} WHERE id = :id FOR KEY SHARE")
            assert other.session.scalar(pointing, {"id": found}) == 1


def test_two_sweeps_judge_a_stage_once(world):
    rollout = world.start(**FEW)
    world.report(rollout, stage=3)
    sweep.sweep(world.project.core)
    assert len(world.show(rollout)["judgements"]) == 1
    assert len(world.entries("rollout.judged")) == 1


def test_two_tenants_never_see_each_others(world, other):
    rollout = world.start(**FEW)
    cohort = ok(world.owner.post("/v1/cohorts", {"name": "x", "rule": {"percent": 5}}), 201)
    for path in (f"/v1/rollouts/{rollout['id']}", f"/v1/cohorts/{cohort['id']}", world.channels):
        refused(other.owner.get(path), 404, "not_found")
    for path in ("/v1/rollouts", "/v1/cohorts"):
        assert everything(other.owner, path) == []
    theirs = World(other)
    assert theirs.served(next(iter(theirs.clients.values()))) is None
    refused(theirs.owner.post("/v1/rollouts", world.body()), 404, "not_found")
    body = {"version_id": theirs.versions[1]["id"], **WHY, "cohort_id": cohort["id"]}
    refused(theirs.owner.request("PUT", f"{theirs.channels}/pilot", body), 404, "not_found")


def floats(value):
    if isinstance(value, dict | list):
        return [
            f
            for each in (value.values() if isinstance(value, dict) else value)
            for f in floats(each)
        ]
    return [value] if isinstance(value, float) else []


def test_entries_hold_numbers_as_text(world):
    world.report(world.start(**FEW), stage=3)
    found = world.entries("rollout.")
    assert len(found) == 3
    assert floats([body for _, body in found]) == []
