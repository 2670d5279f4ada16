"""Who may do what: every route, asked by everybody."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any
from uuid import uuid4

import pytest
from fastapi.routing import APIRoute

from app import webhooks
from app.auth import ROLES, Scope
from workers import sweep

from .factories import (
    REPORT,
    Caller,
    Client,
    Json,
    Project,
    TestClient,
    announce,
    complete,
    contribute,
    drain,
    due_jobs,
    make_client,
    make_clients,
    make_model,
    make_project,
    make_run,
    make_space,
    make_token,
    ok,
    refused,
    upload,
)

OWNER, OPERATOR, AUDITOR = "owner", "operator", "auditor"
VIEWER, CLIENT = "viewer", "client"
STAFF = {OWNER, OPERATOR, AUDITOR, VIEWER}
EVERYBODY = STAFF | {CLIENT}
HANDS, READERS = {OWNER, OPERATOR}, {OWNER, OPERATOR, AUDITOR, CLIENT}
AUDITS = {OWNER, AUDITOR}
NOBODY_NEEDS_A_KEY: set[str] = set()

# Who may call; a set of no roles means that no key is asked for.
ALLOWED: dict[str, set[str]] = {
    "POST /v1/clients": NOBODY_NEEDS_A_KEY,
    "GET /health/live": NOBODY_NEEDS_A_KEY,
    "GET /health/ready": NOBODY_NEEDS_A_KEY,
    "POST /v1/check-ins": {CLIENT},
    "POST /v1/assignments/{assignment_id}/uploads": {CLIENT},
    "POST /v1/assignments/{assignment_id}/evaluations": {CLIENT},
    "POST /v1/assignments/{assignment_id}/ablation": {CLIENT},
    "POST /v1/assignments/{assignment_id}/decline": {CLIENT},
    "GET /v1/uploads/{upload_id}": {CLIENT, *HANDS},
    "POST /v1/uploads/{upload_id}/parts": {CLIENT, *HANDS},
    "POST /v1/uploads/{upload_id}/complete": {CLIENT, *HANDS},
    "GET /v1/versions/{version_id}": READERS,
    "GET /v1/versions/{version_id}/download": READERS,
    "GET /v1/versions/{version_id}/lineage": STAFF,
    "GET /v1/versions/{version_id}/diff": STAFF,
    "GET /v1/versions/{version_id}/card": STAFF,
    "POST /v1/versions/{version_id}/ablations": HANDS,
    "GET /v1/versions/{version_id}/ablations": STAFF,
    "GET /v1/me": EVERYBODY,
    "POST /v1/me/key": EVERYBODY - {AUDITOR},
    "GET /v1/projects": STAFF,
    "POST /v1/projects": {OWNER},
    "GET /v1/projects/{project_id}": STAFF,
    "PATCH /v1/projects/{project_id}": {OWNER},
    "GET /v1/keys": AUDITS,
    "POST /v1/keys": {OWNER},
    "GET /v1/keys/{key_id}": AUDITS,
    "POST /v1/keys/{key_id}/rotate": {OWNER},
    "POST /v1/keys/{key_id}/revoke": {OWNER},
    "POST /v1/members": {OWNER},
    "GET /v1/members": AUDITS,
    "POST /v1/members/{member_id}/end": {OWNER},
    "POST /v1/webhooks": {OWNER},
    "GET /v1/webhooks": AUDITS,
    "GET /v1/webhooks/{webhook_id}": AUDITS,
    "PATCH /v1/webhooks/{webhook_id}": {OWNER},
    "POST /v1/webhooks/{webhook_id}/secret": {OWNER},
    "POST /v1/webhooks/{webhook_id}/test": {OWNER},
    "GET /v1/webhooks/{webhook_id}/deliveries": AUDITS,
    "POST /v1/deliveries/{delivery_id}/retry": {OWNER},
    "PATCH /v1/clients/{client_id}": HANDS,
    "POST /v1/enrolments": HANDS,
    "GET /v1/clients": STAFF,
    "GET /v1/clients/{client_id}": STAFF,
    "GET /v1/clients/{client_id}/conduct": STAFF,
    "POST /v1/clients/{client_id}/erase": {OWNER},
    "POST /v1/clients/{client_id}/{command}": HANDS,
    "POST /v1/models": HANDS,
    "GET /v1/models": STAFF,
    "GET /v1/models/{model_id}": STAFF,
    "GET /v1/models/{model_id}/space": STAFF,
    "POST /v1/models/{model_id}/uploads": HANDS,
    "POST /v1/runs": HANDS,
    "GET /v1/runs": STAFF,
    "GET /v1/runs/{run_id}": STAFF,
    "POST /v1/runs/{run_id}/{command}": HANDS,
    "GET /v1/runs/{run_id}/rounds": STAFF,
    "GET /v1/runs/{run_id}/versions": STAFF,
    "GET /v1/runs/{run_id}/evaluations": STAFF,
    "POST /v1/estimates": STAFF,
    "GET /v1/runs/{run_id}/estimate": STAFF,
    "GET /v1/runs/{run_id}/report": STAFF,
    "GET /v1/runs/{run_id}/comparison": STAFF,
    "GET /v1/runs/{run_id}/clients/{client_id}/explanation": {OWNER, OPERATOR, AUDITOR},
    "POST /v1/cohorts": HANDS,
    "GET /v1/cohorts": STAFF,
    "GET /v1/cohorts/{cohort_id}": STAFF,
    "GET /v1/cohorts/{cohort_id}/clients": STAFF,
    "GET /v1/models/{model_id}/channels": STAFF,
    "GET /v1/models/{model_id}/channels/{name}": STAFF,
    "PUT /v1/models/{model_id}/channels/{name}": HANDS,
    "POST /v1/models/{model_id}/channels/{name}/roll-back": HANDS,
    "POST /v1/rollouts": HANDS,
    "GET /v1/rollouts": STAFF,
    "GET /v1/rollouts/{rollout_id}": STAFF,
    "POST /v1/rollouts/{rollout_id}/{command}": HANDS,
    "GET /v1/rounds/{round_id}": STAFF,
    "POST /v1/rounds/{round_id}/cancel": HANDS,
    "GET /v1/rounds/{round_id}/manifest": AUDITS,
    "GET /v1/jobs": STAFF,
    "GET /v1/jobs/{job_id}": STAFF,
    "POST /v1/jobs/{job_id}/retry": HANDS,
    "GET /v1/ledger/entries": AUDITS,
    "GET /v1/ledger/checkpoint": EVERYBODY,
    "GET /v1/ledger/keys": EVERYBODY,
    "GET /v1/ledger/proofs/inclusion": EVERYBODY,
    "GET /v1/ledger/proofs/consistency": EVERYBODY,
}
HOOK = {"url": "https://example.org/told", "events": ["round.published"]}
NOWHERE = "00000000-0000-4000-8000-000000000000"
LISTS = [n.removeprefix("GET /v1/") for n in ALLOWED if re.fullmatch(r"GET /v1/[a-z]+s", n)]
# Orders that stand in the address; the first of each disturbs the least.
ORDERS = {
    "POST /v1/clients/{client_id}/{command}": ["suspend", "activate", "revoke"],
    "POST /v1/runs/{run_id}/{command}": ["pause", "start", "resume", "stop"],
    "POST /v1/rollouts/{rollout_id}/{command}": ["hold", "promote", "roll-back"],
}
WHY = {"reason": "agreed"}


def walk(routes: Iterable[Any]) -> Iterator[APIRoute]:
    """The routes of an application, whether its routers are flattened or kept.

    The page that shows the description is public and no operation; ``test_docs_page`` looks at it.
    """
    for route in routes:
        if isinstance(route, APIRoute):
            if not route.path.startswith("/docs"):
                yield route
        elif hasattr(route, "original_router"):
            yield from walk(route.original_router.routes)


def names(route: APIRoute) -> list[str]:
    return [f"{method} {route.path_format}" for method in sorted(route.methods)]


def scopes(route: APIRoute) -> list[Scope | None]:
    calls = [d.call for d in route.dependant.dependencies]
    return [call.scope for call in calls if hasattr(call, "scope")]


@dataclass
class World:
    """A project with something in every place, and everybody who may ask for it."""

    project: Project
    subjects: dict[str, str]
    bodies: dict[str, Json]
    callers: dict[str, Caller]
    strangers: dict[str, Caller]
    organisations: dict[str, Caller]  # keys of another organisation as a whole

    def ask(self, caller: Caller, name: str, *, command: str | None = None, **subjects: str) -> Any:
        """Ask for an operation; an order that is not named is one that can be taken back."""
        method, path = name.split(" ")
        command = command or next(iter(ORDERS.get(name, [""])))
        path = path.format(command=command, name="stable", **{**self.subjects, **subjects})
        if method == "GET":
            return caller.get(path)
        return caller.request(method, path, self.bodies.get(name))


def bodies_for(model_id: str, token: str) -> dict[str, Json]:
    file = announce(b"x" * 600)
    return {
        "POST /v1/clients": {"token": token, "name": "somebody"},
        "POST /v1/check-ins": {},
        "POST /v1/assignments/{assignment_id}/uploads": file,
        "POST /v1/assignments/{assignment_id}/evaluations": REPORT,
        "POST /v1/assignments/{assignment_id}/ablation": {"whole": None, "tensors": []},
        "POST /v1/assignments/{assignment_id}/decline": {},
        "POST /v1/versions/{version_id}/ablations": {},
        "POST /v1/enrolments": {},
        "POST /v1/me/key": {},
        "POST /v1/projects": {"name": "another"},
        "PATCH /v1/projects/{project_id}": {"client_limit": 1000},
        "POST /v1/keys": {"role": VIEWER},
        "POST /v1/keys/{key_id}/rotate": {},
        "POST /v1/members": {"subject": "somebody", "role": VIEWER},
        "POST /v1/webhooks": HOOK,
        "PATCH /v1/webhooks/{webhook_id}": {"events": ["run.paused"]},
        "PATCH /v1/clients/{client_id}": {"tags": ["seen"]},
        "POST /v1/models": {"name": "another", "space": make_space().to_json()},
        "POST /v1/models/{model_id}/uploads": file,
        "POST /v1/estimates": {"model_id": model_id, "clients": 20},
        "POST /v1/runs": {"name": "another", "model_id": model_id},
        "POST /v1/cohorts": {"name": "another", "rule": {"percent": 50}},
        "POST /v1/models/{model_id}/channels/{name}/roll-back": WHY,
        "POST /v1/rollouts/{rollout_id}/{command}": WHY,
    }


def roll_out(project: Project, model_id: str, version_ids: list[str]) -> dict[str, Any]:
    """A cohort, the channel stable and a rollout that moves it, and what more may be sent."""
    cohort = ok(project.owner.post("/v1/cohorts", {"name": "all", "rule": {"percent": 100}}), 201)
    old, new = version_ids
    path, pointed = f"/v1/models/{model_id}/channels/stable", {"version_id": old, **WHY}
    ok(project.owner.request("PUT", path, pointed))
    body = {"name": "first", "model_id": model_id, "version_id": new, "minimum": 1}
    rollout = ok(project.owner.post("/v1/rollouts", body), 201)
    return {
        "cohort_id": cohort["id"],
        "rollout_id": rollout["id"],
        "POST /v1/rollouts": {**body, "name": "another"},
        "PUT /v1/models/{model_id}/channels/{name}": pointed,
    }


def staff(project: Project) -> dict[str, Caller]:
    return {role: project.caller(role) for role in STAFF}


@pytest.fixture(scope="module")
def world(core: Any, api: TestClient) -> World:
    project, elsewhere = make_project(core, api), make_project(core, api)
    model = make_model(project)
    run = make_run(project, model, rounds=2)
    clients = make_clients(project, 2)
    for number, client in enumerate(clients):
        contribute(client, model, seed=number)
    drain(project)
    rounds = ok(project.owner.get(f"/v1/runs/{run['id']}/rounds"))["items"]
    assignment = clients[0].assignment()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(clients[0].post(path, announce(b"x" * 600)), 201)
    # A round whose cancellation disturbs nobody: that of a second run.
    second = make_run(project, model)
    spare = ok(project.owner.get(f"/v1/runs/{second['id']}/rounds"))["items"]
    sweep.seal(core)  # what other tests have left: a webhook follows so many entries at a time
    hook = ok(project.owner.post("/v1/webhooks", HOOK), 201)["webhook"]["id"]
    ok(project.owner.post(f"/v1/webhooks/{hook}/test"), 202)
    sweep.seal(core)
    with core.db.transaction("test", "test") as tx:
        webhooks.follow(tx)
    query = "SELECT id FROM deliveries WHERE webhook_id = :h ORDER BY seq DESC"
    ((delivery,), *_) = project.sql(query, h=hook)
    member = uuid4()
    project.sql(
        "INSERT INTO members (id, organisation_id, project_id, issuer, subject, name, role,"
        " created_at) SELECT :m, organisation_id, id, 'x', 'y', '', 'viewer', now()"
        " FROM projects WHERE id = :project",
        m=member,
    )
    versions = ok(project.owner.get(f"/v1/runs/{run['id']}/versions"))["items"]
    rolled = roll_out(project, model.id, [each["id"] for each in versions])
    # A job that nobody does.
    space = {"name": "waiting", "space": make_space().to_json()}
    waiting = ok(project.owner.post("/v1/models", space), 201)
    path = f"/v1/models/{waiting['id']}/uploads"
    complete(project.owner, upload(project.owner, path, b"x" * 600))
    return World(
        project,
        {
            "assignment_id": assignment["id"],
            "upload_id": ticket["id"],
            "version_id": rounds[0]["version_id"],
            "cohort_id": rolled.pop("cohort_id"),
            "rollout_id": rolled.pop("rollout_id"),
            "client_id": make_client(project).id,
            "model_id": model.id,
            "run_id": run["id"],
            "round_id": spare[0]["id"],
            "job_id": str(due_jobs(project)[0]),
            "project_id": str(project.id),
            "member_id": str(member),
            "webhook_id": hook,
            "delivery_id": str(delivery),
            "key_id": ok(project.owner.post("/v1/keys", {"role": VIEWER}), 201)["info"]["id"],
        },
        bodies_for(model.id, make_token(project)) | rolled,
        {**staff(project), CLIENT: clients[0]},
        {
            **staff(elsewhere),
            CLIENT: make_client(elsewhere),
            "neighbour": clients[1],
        },
        {role: elsewhere.organisation(role) for role in STAFF},
    )


# --- the tables themselves ---------------------------------------------------------------------


def test_every_route_is_in_the_table_and_says_who_may_call_it(api: TestClient) -> None:
    found = {name: route for route in walk(api.app.routes) for name in names(route)}
    assert found.pop("GET /metrics").include_in_schema is False  # test_metrics says who may
    assert set(found) == set(ALLOWED)
    for name, route in found.items():
        assert len(scopes(route)) == 1, f"{name} needs exactly one require(...) or public()"
        (scope,) = scopes(route)
        roles = {role for role, held in ROLES.items() if scope in held} if scope else set()
        assert roles == ALLOWED[name], name


def test_the_table_knows_every_operation_of_the_description(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {f"{m.upper()} {p}" for p, item in paths.items() for m in item} == set(ALLOWED)


def test_every_order_is_walked(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    told = {
        f"{method.upper()} {path}": set(parameter["schema"]["enum"])
        for path, item in paths.items()
        for method, operation in item.items()
        for parameter in operation.get("parameters", [])
        if parameter["name"] == "command"
    }
    assert told == {name: set(orders) for name, orders in ORDERS.items()}


def test_no_role_has_more_than_it_needs() -> None:
    assert set(ROLES) == EVERYBODY
    assert Scope.CLIENT_OWN not in ROLES[OWNER], "an administrator is nobody's agent"
    assert {s for s in ROLES[AUDITOR] if "admin" in s.value} == set()
    own = {Scope.CLIENT_OWN, Scope.VERSION_READ, Scope.UPLOAD, Scope.IDENTITY, Scope.KEY_OWN}
    assert ROLES[CLIENT] == own | {Scope.LEDGER_WITNESS}
    assert ROLES[VIEWER] < ROLES[OPERATOR] < ROLES[OWNER]
    assert ROLES[AUDITOR] < ROLES[OWNER]
    assert {role for role, held in ROLES.items() if Scope.MASK_READ in held} == STAFF - {VIEWER}
    assert not ROLES[OPERATOR] & {Scope.KEY_ADMIN, Scope.PROJECT_ADMIN, Scope.CLIENT_ERASE}


def test_an_auditor_changes_nothing(api: TestClient) -> None:
    asks = {"POST /v1/estimates"}  # a question that is too long for an address
    for name, roles in ALLOWED.items():
        assert AUDITOR not in roles or name.startswith("GET ") or name in asks, name


# --- every route, asked by everybody ---------------------------------------------------------


@pytest.mark.parametrize("name", ALLOWED)
def test_without_a_key(world: World, name: str) -> None:
    answer = world.ask(Caller(world.project.api, None), name)
    if ALLOWED[name]:
        refused(answer, 401, "key_missing")
    else:
        assert answer.status_code in {200, 201}


def test_without_a_key_nothing_is_said_about_the_question(world: World) -> None:
    nobody = Caller(world.project.api, None)
    refused(nobody.post("/v1/runs", {"nonsense": 1}), 401, "key_missing")
    refused(nobody.get("/v1/runs/nonsense"), 401, "key_missing")
    refused(world.callers[CLIENT].post("/v1/runs", {"nonsense": 1}), 403, "scope_missing")


@pytest.mark.parametrize("name", [n for n, roles in ALLOWED.items() if roles])
def test_roles_that_may_not(world: World, name: str) -> None:
    for role, order in product(EVERYBODY - ALLOWED[name], ORDERS.get(name, [None])):
        for caller in (world.callers[role], world.strangers[role]):
            refused(world.ask(caller, name, command=order), 403, "scope_missing")


@pytest.mark.parametrize("name", [n for n, roles in ALLOWED.items() if roles and "{" in n])
def test_another_tenant_finds_nothing(world: World, name: str) -> None:
    """Not even whether it exists: the answer is the one for an id that nobody has."""
    nowhere = dict.fromkeys(world.subjects, NOWHERE)
    for role, order in product(ALLOWED[name], ORDERS.get(name, [None])):
        stranger = world.strangers[role]
        found = refused(world.ask(stranger, name, command=order), 404, "not_found")
        empty = refused(world.ask(stranger, name, command=order, **nowhere), 404, "not_found")
        words = found["detail"]
        for subject in world.subjects.values():
            words = words.replace(subject, NOWHERE)
        assert words == empty["detail"]


@pytest.mark.parametrize("name", [n for n, roles in ALLOWED.items() if roles - {CLIENT}])
def test_a_key_of_an_organisation_reaches_its_own_projects_alone(world: World, name: str) -> None:
    """Naming a project of somebody else is like naming none that there is."""
    for role in STAFF & ALLOWED[name]:
        stranger = world.organisations[role]
        for project in (world.project.id, NOWHERE):
            caller = Caller(world.project.api, stranger.key, names=project)
            refused(world.ask(caller, name), 404, "not_found")


def test_a_neighbour_finds_nothing_of_another_client(world: World) -> None:
    neighbour = world.strangers["neighbour"]
    for name in ALLOWED:
        if "{assignment_id}" in name or "{upload_id}" in name:
            refused(world.ask(neighbour, name), 404, "not_found")
    body = {"pending": world.subjects["assignment_id"]}
    refused(neighbour.post("/v1/check-ins", body), 404, "not_found")


@pytest.mark.parametrize("what", LISTS)
def test_lists_show_the_own_project_alone(world: World, what: str) -> None:
    own = {row["id"] for row in ok(world.callers[OWNER].get(f"/v1/{what}"))["items"]}
    assert own
    for role in STAFF & ALLOWED[f"GET /v1/{what}"]:
        foreign = ok(world.strangers[role].get(f"/v1/{what}"))["items"]
        assert not own & {row["id"] for row in foreign}


@pytest.mark.parametrize("name", [n for n, roles in ALLOWED.items() if roles])
def test_roles_that_may(world: World, name: str) -> None:
    """Nobody who may is kept out; the state may still refuse what is asked."""
    for role in sorted(ALLOWED[name]):
        answer = world.ask(world.callers[role], name)
        if name == "GET /v1/rounds/{round_id}/manifest":
            refused(answer, 404, "manifest_missing")
        elif name == "GET /v1/runs/{run_id}/clients/{client_id}/explanation":
            refused(answer, 404, "not_found")  # it has no mask there
        elif name == "GET /v1/ledger/checkpoint":
            assert answer.status_code in {200, 404}
        elif name.startswith("GET /v1/ledger/proofs/"):
            refused(answer, 422, "request_invalid")  # of what, it was not told
        elif name == "POST /v1/members":
            refused(answer, 409, "no_issuer")
        elif name == "POST /v1/projects":
            refused(answer, 403, "organisation_key_needed")
        elif role != CLIENT and name.startswith("POST /v1/uploads/"):
            refused(answer, 403, "client_key_needed")  # another's update; weights they may send
        else:
            assert answer.status_code in {200, 201, 202, 409}, (role, answer.text)


# --- what a key opens, and for how long ------------------------------------------------------


def test_a_client_sees_its_own_work_only(project: Project) -> None:
    model = make_model(project)
    make_run(project, model)
    clients = make_clients(project, 2)
    found = [client.assignment() for client in clients]
    assert len({a["id"] for a in found}) == 2
    for client, assignment in zip(clients, found, strict=True):
        assert client.assignment()["id"] == assignment["id"], "asked again, given again"


def test_a_suspended_or_revoked_client_is_out_at_once(project: Project) -> None:
    model = make_model(project)
    make_run(project, model)
    client: Client = make_client(project)
    assignment = client.assignment()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(client.post(path, announce(b"x" * 600)), 201)
    asked = [
        ("POST", "/v1/check-ins", {}),
        ("POST", f"/v1/assignments/{assignment['id']}/uploads", announce(b"x" * 600)),
        ("POST", f"/v1/uploads/{ticket['id']}/parts", None),
        ("POST", f"/v1/uploads/{ticket['id']}/complete", None),
        ("POST", f"/v1/assignments/{assignment['id']}/decline", {}),
        ("GET", f"/v1/versions/{assignment['base']['id']}/download", None),
    ]
    for command, status, code in (
        ("suspend", 403, "client_suspended"),
        ("revoke", 401, "key_revoked"),
    ):
        ok(project.owner.post(f"/v1/clients/{client.id}/{command}"))
        for method, path, body in asked:
            answer = client.get(path) if method == "GET" else client.post(path, body)
            refused(answer, status, code)


def test_a_key_is_shown_once(project: Project) -> None:
    client = make_client(project)
    shown = ok(project.owner.get(f"/v1/clients/{client.id}"))
    assert str(client.key) not in str(shown)
    assert "key" not in shown
    stored = project.sql("SELECT * FROM keys WHERE client_id = :c", c=client.id)
    assert str(client.key).split("_")[2] not in str(stored)
    assert str(client.key).split("_")[2].encode() not in bytes(stored[0].digest)


def test_client_keys_cannot_be_made_on_the_command_line(project: Project) -> None:
    with pytest.raises(Exception, match="no role 'client'"):
        project.caller(CLIENT)
