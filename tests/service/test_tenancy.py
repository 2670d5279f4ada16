"""Organisations, projects, keys and their rotation, as their owner uses them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from .conftest import MovableClock
from .factories import (
    Caller,
    Project,
    everything,
    make_client,
    make_model,
    make_run,
    make_token,
    ok,
    refused,
)


def issued(caller: Caller, **body: object) -> Caller:
    found = ok(caller.post("/v1/keys", {"role": "owner", **body}), 201)
    return Caller(caller.api, found["key"])


def whoami(caller: Caller) -> dict[str, object]:
    return dict(ok(caller.get("/v1/me")))


# --- organisations and projects ----------------------------------------------------------------


def test_an_organisation_makes_projects_and_works_in_them(project: Project) -> None:
    boss = project.organisation()
    assert whoami(boss)["project_id"] is None
    refused(boss.get("/v1/runs"), 422, "project_required")
    made = ok(boss.post("/v1/projects", {"name": "second"}), 201)
    assert {p["id"] for p in everything(boss, "/v1/projects")} == {str(project.id), made["id"]}
    second = Caller(boss.api, boss.key, names=made["id"])
    ok(second.post("/v1/enrolments", {}), 201)
    assert whoami(second)["project_id"] == made["id"]
    refused(boss.post("/v1/projects", {"name": "second"}), 409, "project_name_taken")


def test_a_key_of_a_project_stays_in_it(project: Project) -> None:
    boss = project.organisation()
    made = ok(boss.post("/v1/projects", {"name": "second"}), 201)
    assert [p["id"] for p in everything(project.owner, "/v1/projects")] == [str(project.id)]
    refused(project.owner.get(f"/v1/projects/{made['id']}"), 404, "not_found")
    outside = Caller(project.api, project.owner.key, names=made["id"])
    refused(outside.get("/v1/runs"), 404, "not_found")
    same = Caller(project.api, project.owner.key, names=project.id)
    ok(same.get("/v1/runs"))
    wrong = Caller(project.api, project.owner.key, names="nonsense")
    refused(wrong.get("/v1/runs"), 422, "request_invalid")


def test_a_project_is_changed_from_the_state_that_was_read(project: Project) -> None:
    path = f"/v1/projects/{project.id}"
    tag = project.owner.get(path).headers["etag"]
    answer = project.owner.request("PATCH", path, {"client_limit": 5}, **{"If-Match": tag})
    assert ok(answer)["client_limit"] == 5
    late = project.owner.request("PATCH", path, {"client_limit": 6}, **{"If-Match": tag})
    refused(late, 412, "etag_mismatch")
    fresh = {"If-Match": answer.headers["etag"]}
    assert (
        ok(project.owner.request("PATCH", path, {"name": "renamed"}, **fresh))["client_limit"] == 5
    )
    assert ok(project.owner.request("PATCH", path, {"client_limit": None}))["client_limit"] is None
    query = "SELECT count(*) FROM ledger_entries WHERE project_id = :project AND action = :a"
    assert project.sql(query, a="project.changed") == [(3,)]


def test_a_client_is_renamed_and_tagged(project: Project) -> None:
    client, other = make_client(project), make_client(project)
    path = f"/v1/clients/{client.id}"
    changed = ok(project.owner.request("PATCH", path, {"tags": ["pilot"], "name": "ward-9"}))
    assert (changed["tags"], changed["name"]) == (["pilot"], "ward-9")
    taken = project.owner.request("PATCH", path, {"name": other.name})
    refused(taken, 409, "client_name_taken")
    entries = project.sql("SELECT * FROM ledger_entries WHERE project_id = :project")
    assert "client.renamed" in str(entries)
    assert "ward-9" not in str(entries)


def test_no_more_clients_than_allowed(project: Project) -> None:
    spare = [make_token(project) for _ in range(3)]
    path = f"/v1/projects/{project.id}"
    ok(project.owner.request("PATCH", path, {"client_limit": 2}))
    refused(project.owner.post("/v1/enrolments", {}), 409, "client_limit")
    nobody = Caller(project.api, None)
    first = ok(nobody.post("/v1/clients", {"token": spare[0], "name": "a"}), 201)
    ok(nobody.post("/v1/clients", {"token": spare[1], "name": "b"}), 201)
    third = {"token": spare[2], "name": "c"}
    refused(nobody.post("/v1/clients", third), 409, "client_limit")
    ok(project.owner.post(f"/v1/clients/{first['client']['id']}/revoke"))
    ok(nobody.post("/v1/clients", third), 201)


def test_an_organisation_has_a_limit_for_all_its_projects(project: Project) -> None:
    project.sql(
        "UPDATE organisations SET client_limit = 1 WHERE id = "
        "(SELECT organisation_id FROM projects WHERE id = :project)"
    )
    make_client(project)
    refused(project.owner.post("/v1/enrolments", {}), 409, "client_limit")


def test_an_organisation_asks_for_the_same_in_each_of_its_projects(project: Project) -> None:
    """An Idempotency-Key is of a call in a project: a script goes through all of them with one."""
    boss = project.organisation()
    made = ok(boss.post("/v1/projects", {"name": "second"}), 201)
    both = [Caller(boss.api, boss.key, names=each) for each in (project.id, made["id"])]
    first, second = [ok(caller.post("/v1/enrolments", {}, once="1"), 201) for caller in both]
    assert first != second
    assert ok(both[1].post("/v1/enrolments", {}, once="1"), 201) == second
    nobody = Caller(boss.api, None)
    ok(nobody.post("/v1/clients", {"token": second["tokens"][0], "name": "ward-1"}), 201)
    assert [each["name"] for each in everything(both[1], "/v1/clients")] == ["ward-1"]
    assert everything(both[0], "/v1/clients") == []


# --- keys ----------------------------------------------------------------------------------------


def test_a_key_is_narrower_than_its_role(project: Project) -> None:
    narrow = issued(project.owner, scopes=["round:read"], name="dashboard")
    ok(narrow.get("/v1/runs"))
    refused(narrow.post("/v1/runs", {}), 403, "scope_missing")
    body = {"role": "viewer", "scopes": ["key:admin"]}
    refused(project.owner.post("/v1/keys", body), 422, "scope_unknown")
    some = issued(project.owner, scopes=["key:admin", "round:read"])
    refused(some.post("/v1/keys", {"role": "owner"}), 403, "scope_beyond")
    ok(some.post("/v1/keys", {"role": "viewer", "scopes": ["round:read"]}), 201)


def test_only_an_organisation_gives_keys_for_itself(project: Project) -> None:
    body = {"role": "auditor", "organisation": True}
    refused(project.owner.post("/v1/keys", body), 403, "organisation_key_needed")
    boss = project.organisation()
    found = ok(boss.post("/v1/keys", body), 201)
    assert found["info"]["project_id"] is None
    assert found["info"]["id"] in {k["id"] for k in everything(boss, "/v1/keys")}
    assert found["info"]["id"] not in {k["id"] for k in everything(project.owner, "/v1/keys")}
    refused(project.owner.get(f"/v1/keys/{found['info']['id']}"), 404, "not_found")


def test_a_key_ends_when_it_is_said_to(project: Project, clock: MovableClock) -> None:
    short = issued(project.owner, expires_in=60)
    child = issued(short, expires_in=3600)
    ok(child.get("/v1/me"))
    clock.advance(61)
    for caller in (short, child):
        refused(caller.get("/v1/me"), 401, "key_expired")


def test_a_key_is_rotated_without_a_gap(project: Project, clock: MovableClock) -> None:
    client = make_client(project)
    second = ok(client.post("/v1/me/key", {"grace": 100}), 201)
    new = Caller(project.api, second["key"])
    assert whoami(client)["id"] == whoami(new)["id"] == client.id
    refused(client.post("/v1/me/key", {}), 409, "key_rotated")
    third = ok(new.post("/v1/me/key", {"grace": 100}), 201)
    refused(client.get("/v1/me"), 401, "key_revoked")  # two live keys, never three
    ok(new.get("/v1/me"))
    clock.advance(101)
    refused(new.get("/v1/me"), 401, "key_expired")
    ok(Caller(project.api, third["key"]).post("/v1/check-ins", {}))


def test_who_rotates_the_key_of_others_gets_no_more_than_they_may_give(
    project: Project, clock: MovableClock
) -> None:
    """The successor is shown to who asks for it: it must not be a way to more rights or time."""
    owner, client = str(whoami(project.owner)["id"]), make_client(project)
    narrow = issued(project.owner, scopes=["key:admin", "round:read"])
    refused(narrow.post(f"/v1/keys/{owner}/rotate", {}), 403, "scope_beyond")
    theirs = str(client.key).split("_")[1]
    refused(project.owner.post(f"/v1/keys/{theirs}/rotate", {}), 403, "scope_beyond")
    ok(client.post("/v1/check-ins", {}))  # it works on, and has no successor yet
    ok(client.post("/v1/me/key", {}), 201)

    dashboard = whoami(issued(project.owner, role="viewer"))["id"]
    short = issued(project.owner, expires_in=60)
    made = ok(short.post(f"/v1/keys/{dashboard}/rotate", {}), 201)
    ok(Caller(project.api, made["key"]).get("/v1/me"))
    clock.advance(61)
    refused(Caller(project.api, made["key"]).get("/v1/me"), 401, "key_expired")


def test_the_same_rotation_twice_is_one(project: Project) -> None:
    client = make_client(project)
    first = client.post("/v1/me/key", {}, once="again")
    assert ok(first) == ok(client.post("/v1/me/key", {}, once="again"))


def test_a_revoked_key_opens_nothing(project: Project) -> None:
    other = issued(project.owner, role="operator")
    ok(project.owner.post(f"/v1/keys/{whoami(other)['id']}/revoke"))
    refused(other.get("/v1/runs"), 401, "key_revoked")
    refused(
        project.owner.post(f"/v1/keys/{whoami(project.owner)['id']}/rotate", {"grace": -1}),
        422,
        "request_invalid",
    )
    listed = everything(project.owner, "/v1/keys")
    assert str(project.owner.key) not in str(listed)
    assert [k["role"] for k in listed if k["revoked_at"]] == ["operator"]


def test_use_is_noted_to_the_minute(project: Project, clock: MovableClock) -> None:
    def used() -> object:
        (row,) = project.sql(
            "SELECT last_used_at FROM keys WHERE project_id = :project AND role = 'owner'"
        )
        return row[0]

    ok(project.owner.get("/v1/me"))
    first = used()
    ok(project.owner.get("/v1/me"))
    assert used() == first
    clock.advance(timedelta(minutes=2).total_seconds())
    ok(project.owner.get("/v1/me"))
    assert used() > first  # type: ignore[operator]


@pytest.mark.parametrize("role", ["operator", "owner"])
def test_nobody_sends_what_is_a_clients(project: Project, role: str) -> None:
    model = make_model(project)
    make_run(project, model)
    client = make_client(project)
    path = f"/v1/assignments/{client.assignment()['id']}/uploads"
    file = {"size": 600, "sha256": "0" * 64, "md5": "0" * 32}
    ticket = ok(client.post(path, file), 201)
    caller = project.caller(role)
    assert ok(caller.get(f"/v1/uploads/{ticket['id']}"))["state"] == "reserved"
    refused(caller.post(f"/v1/uploads/{ticket['id']}/complete"), 403, "client_key_needed")
