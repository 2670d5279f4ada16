"""Plain functions that make what a test needs, through the interface a user has."""

from __future__ import annotations

import itertools
import re
import secrets
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import numpy as np
from contract.document import generated, plain
from sqlalchemy import select, text

from app import keys, tables, tenants
from app.tables import Job
from app.wiring import Coordinator
from fedselect import Kind, Mask, ParameterSpace, Role, RunSettings, sending, wire
from fedselect.deltas import quantise
from fedselect.space import FloatVector
from workers import running, sweep

from .secretforms import SECRET

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette would rather use a fork of httpx
    from fastapi.testclient import TestClient

Json = dict[str, Any]
numbers = itertools.count(1)


# --- asking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """Somebody with a key (or without one)."""

    api: TestClient = field(repr=False)
    key: str | None = field(repr=False)
    names: UUID | str | None = field(default=None, kw_only=True)  # the project it names

    def get(self, path: str, **params: Any) -> httpx.Response:
        return discreet(self.api.get(path, params=params, headers=self.headers()))

    def post(self, path: str, body: Any = None, *, once: str | None = None) -> httpx.Response:
        return discreet(self.api.post(path, json=body, headers=self.headers(once)))

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        given = {**self.headers(), **headers}
        return discreet(self.api.request(method, path, json=body, headers=given))

    def headers(self, once: str | None = None) -> dict[str, str]:
        found = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.names is not None:
            found["FedSelect-Project"] = str(self.names)
        return {**found, "Idempotency-Key": once} if once is not None else found


def discreet(response: httpx.Response) -> httpx.Response:
    """The answer, which repeats no secret if it is a refusal."""
    assert response.status_code < 400 or not re.search(SECRET, response.text), response.status_code
    return response


def ok(response: httpx.Response, status: int | None = None) -> Any:
    """The answer of a call that must succeed."""
    assert response.status_code < 300, (response.status_code, response.text)
    assert status is None or response.status_code == status
    return response.json()


def refused(response: httpx.Response, status: int, code: str) -> Json:
    """The problem document of a call that must be refused."""
    found = response.json()
    assert (response.status_code, found.get("code")) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert found["status"] == status
    assert found["type"] == f"urn:fedselect:problem:{code}"
    assert found["title"]
    assert found["detail"]
    assert found["request_id"] == response.headers["x-request-id"]
    assert code in _described(response), f"{status} {code} is not among the answers described"
    return dict(found)


def _described(response: httpx.Response) -> set[str]:
    """The codes that the interface's description gives for this operation and status."""
    asked = response.request
    for pattern, item in _paths():
        if pattern.fullmatch(asked.url.path) and asked.method.lower() in item:
            answers = item[asked.method.lower()]["responses"]
            # Too large a body is refused before anybody knows what is asked; a template of the
            # description may fit more than the route does.
            told = answers.get(str(response.status_code), {}).get("x-codes", [])
            return {*told, "body_too_large", "route_unknown", "method_not_allowed"}
    return {"route_unknown", "method_not_allowed", "body_too_large", "rate_limited"}


@cache
def _paths() -> list[tuple[re.Pattern[str], Json]]:
    return [
        (re.compile(re.sub(r"{\w+}", "[^/]+", path)), item)
        for path, item in plain(generated())["paths"].items()
    ]


def everything(caller: Caller, path: str, **params: Any) -> list[Json]:
    """All items of a list, page by page."""
    answer = ok(caller.get(path, **params))
    found: list[Json] = answer["items"]
    while answer["next"] is not None:
        answer = ok(caller.get(path, **params, cursor=answer["next"]))
        found += answer["items"]
    return found


# --- who ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """A tenant: its owner and its place in the database."""

    core: Coordinator = field(repr=False)
    api: TestClient = field(repr=False)
    id: UUID
    owner: Caller

    def caller(self, role: str) -> Caller:
        pepper = self.core.settings.pepper
        with self.core.db.transaction("test", "test") as tx:
            place = tx.session.get_one(tables.Project, self.id)
            return Caller(self.api, keys.first(tx, pepper, place, role=role).key)

    def organisation(self, role: str = "owner", *, names: UUID | str | None = None) -> Caller:
        """A key of the whole organisation that this project belongs to."""
        pepper = self.core.settings.pepper
        with self.core.db.transaction("test", "test") as tx:
            own = tx.session.get_one(tables.Project, self.id).organisation_id
            place = tx.session.get_one(tables.Organisation, own)
            key = keys.first(tx, pepper, place, role=role).key
        return Caller(self.api, key, names=names)

    def sql(self, query: str, **values: Any) -> list[Any]:
        """What the database says; ``:project`` is this project."""
        with self.core.db.transaction("test", "test") as tx:
            result = tx.session.execute(text(query), {"project": self.id, **values})
            return list(result) if result.returns_rows else []


@dataclass(frozen=True)
class Client(Caller):
    """A registered client with its key."""

    id: str = ""
    name: str = ""

    def check_in(self, **body: Any) -> Json:
        return dict(ok(self.post("/v1/check-ins", body)))

    def assignment(self, **body: Any) -> Json:
        found = self.check_in(**body)["assignment"]
        assert found is not None, "there is no work"
        return dict(found)


def make_project(core: Coordinator, api: TestClient) -> Project:
    with core.db.transaction("test", "test") as tx:
        name = f"test-{secrets.token_hex(6)}"
        project = tenants.ensure_project(tx, organisation=name, project=name)
        key = keys.first(tx, core.settings.pepper, project, role="owner").key
    return Project(core, api, project.id, Caller(api, key))


def make_token(project: Project, **body: Any) -> str:
    return str(ok(project.owner.post("/v1/enrolments", body), 201)["tokens"][0])


def make_client(project: Project, *, name: str | None = None, **body: Any) -> Client:
    name = name or f"client-{next(numbers):04}"
    body = {"token": make_token(project), "name": name, **body}
    answer = ok(Caller(project.api, None).post("/v1/clients", body), 201)
    return Client(project.api, answer["key"], answer["client"]["id"], name)


def make_clients(project: Project, count: int) -> list[Client]:
    return [make_client(project) for _ in range(count)]


# --- what --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A registered model with its verified initial weights."""

    id: str
    space: ParameterSpace = field(repr=False)
    weights: FloatVector = field(repr=False)


def make_space(*, rows: int = 20) -> ParameterSpace:
    """Every kind and role once; the number of elements is no multiple of 8."""
    return ParameterSpace.of(
        [
            ("layer.weight", (rows, 3), Kind.WEIGHT, Role.SELECTABLE),
            ("layer.bias", (3,), Kind.BIAS, Role.SHARED),
            ("norm.weight", (4,), Kind.NORM, Role.SELECTABLE),
            ("norm.running_mean", (6,), Kind.BUFFER, Role.PERSONAL),
        ]
    )


def make_model(
    project: Project,
    *,
    space: ParameterSpace | None = None,
    name: str | None = None,
    weights: FloatVector | None = None,
) -> Model:
    space = space or make_space()
    body = {"name": name or f"model-{next(numbers)}", "space": space.to_json()}
    model = ok(project.owner.post("/v1/models", body), 201)
    if weights is None:
        weights = np.random.default_rng(1).normal(size=space.dim).astype(np.float32)
    path = f"/v1/models/{model['id']}/uploads"
    ticket = upload(project.owner, path, wire.encode_version(space.digest, weights))
    complete(project.owner, ticket)
    drain(project)
    assert ok(project.owner.get(f"/v1/uploads/{ticket['id']}"))["state"] == "accepted"
    return Model(model["id"], space, weights)


def settings(
    *,
    rounds: int = 1,
    seed: int = 0,
    policy: Json | None = None,
    arms: Json | None = None,
    encoding: str = "f32",
    report: Json | None = None,
    dp: Json | None = None,
    disclosure: Json | None = None,
    influence: Json | None = None,
    **rules: Any,
) -> Json:
    """Run settings without over-selection or second tries; ``rules`` are those of the round."""
    goal = rules.get("goal", 2)
    plain = {"over_selection": 1, "client_attempts": 1, "retry_after": 1}
    rules = {"goal": goal, "quorum": goal, **plain, **rules}
    policy = policy or {"personal": "learned", "start_round": 0, "growth": 0}
    return {
        "rounds": rounds,
        "seed": seed,
        **({"arms": arms} if arms else {"policy": policy}),
        "training": {"steps": 2},
        "round": rules,
        "wire": {"encoding": encoding},
        "report": report or {},
        **({"privacy": {"dp": dp}} if dp else {}),
        "disclosure": disclosure or {},
        **({} if influence is None else {"influence": influence}),
    }


def make_run(
    project: Project,
    model: Model | None = None,
    *,
    start: bool = True,
    cohort_id: str | None = None,
    **rules: Any,
) -> Json:
    model = model or make_model(project)
    body = {"name": f"run-{next(numbers)}", "model_id": model.id, "settings": settings(**rules)}
    body |= {"cohort_id": cohort_id} if cohort_id else {}
    run = ok(project.owner.post("/v1/runs", body), 201)
    return dict(ok(project.owner.post(f"/v1/runs/{run['id']}/start"))) if start else dict(run)


# --- work --------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """An update file and what is in it."""

    data: bytes
    mask: Mask
    theta: FloatVector


def meta(assignment: Json, *, mask_sent: bool = True, **changes: Any) -> wire.UpdateMeta:
    """What an update for this assignment says of itself."""
    known = (assignment["mask"] or {"version": 0})["version"]
    honest = wire.UpdateMeta(
        space=assignment["space_digest"],
        run=assignment["run"]["id"],
        round=assignment["round"],
        assignment=assignment["id"],
        base_version=assignment["base"]["sha256"],
        mask_version=known + mask_sent,
        examples=7,
        encoding=assignment["run"]["settings"]["wire"]["encoding"],
    )
    return replace(honest, **changes)


def draw_mask(assignment: Json, space: ParameterSpace, *, seed: int, share: float = 0.3) -> Mask:
    """A mask that the run's policy allows."""
    policy = RunSettings.model_validate(assignment["run"]["settings"]).policy
    lower, upper = policy.bounds(space)
    drawn = Mask.from_bool(np.random.default_rng(seed).random(space.dim) < share)
    return lower | (drawn & upper)


def train(
    assignment: Json,
    space: ParameterSpace,
    /,
    *,
    seed: int = 0,
    mask: Mask | None = None,
    send_mask: bool = True,
    **changes: Any,
) -> Trained:
    """An update file as an agent would make it; ``changes`` are of its metadata.

    In a run of deltas, ``theta`` is the delta.
    """
    mask = mask or draw_mask(assignment, space, seed=seed)
    theta = np.random.default_rng(seed + 1000).normal(size=space.dim).astype(np.float32)
    described = meta(assignment, mask_sent=send_mask, **changes)
    encoding = assignment["run"]["settings"]["wire"]["encoding"]
    if encoding == "f32":
        data = wire.encode_update(described, theta, mask=mask, send_mask=send_mask)
    else:
        codes = quantise(theta, encoding, mask)
        data = wire.encode_delta(described, codes, mask=mask, send_mask=send_mask)
    return Trained(data, mask, theta)


def announce(data: bytes) -> Json:
    return sending.announce(data).model_dump(exclude_defaults=True)


def put(ticket: Json, data: bytes) -> httpx.Response:
    return ask_store("PUT", ticket["url"], content=data, headers=ticket["headers"])


def ask_store(method: str, url: str, **kwargs: Any) -> httpx.Response:
    """A call with a signed address; ``verify`` would read the CA bundle for plain HTTP, too."""
    return httpx.request(method, url, verify=False, **kwargs)


def upload(caller: Caller, path: str, data: bytes) -> Json:
    """Reserve at ``path`` and PUT the file, or its parts, with the signed addresses."""
    ticket = dict(ok(caller.post(path, announce(data)), 201))
    pieces = [(ticket, data)] if ticket["url"] else []
    if ticket["url"] is None:
        lacking = ok(caller.post(f"/v1/uploads/{ticket['id']}/parts"))["parts"]
        pieces = [(part, piece_of(data, part)) for part in lacking]
    for piece, content in pieces:
        answer = put(piece, content)
        assert answer.status_code == 200, answer.text
    return ticket


def piece_of(data: bytes, part: Json) -> bytes:
    return data[part["start"] : part["start"] + part["size"]]


def complete(caller: Caller, ticket: Json) -> Json:
    return dict(ok(caller.post(f"/v1/uploads/{ticket['id']}/complete"), 202))


SCORE = {"correct": 8, "total": 10, "loss": 0.4, "both": 8}
REPORT: Json = {
    "scores": {"pre": SCORE, "post": {**SCORE, "correct": 9, "both": 9}},
    "participations": 3,
    "personal_share": 0.25,
    "bytes_sent": 1000,
    "bytes_received": 2000,
}


def evaluate(client: Client, **changes: Any) -> Json:
    """Do the evaluation that the client is asked for; ``changes`` are of what it reports."""
    path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
    return dict(ok(client.post(path, {**REPORT, **changes}), 201))


def deliver(client: Client, assignment: Json, data: bytes) -> Json:
    """Upload and complete an update; what follows is a worker's."""
    ticket = upload(client, f"/v1/assignments/{assignment['id']}/uploads", data)
    assert complete(client, ticket)["state"] == "uploaded"
    return ticket


def contribute(client: Client, model: Model, *, seed: int = 0) -> Json:
    """One whole participation of a client, up to its verified update; returns the assignment."""
    assignment = client.assignment()
    deliver(client, assignment, train(assignment, model.space, seed=seed).data)
    return assignment


# --- the coordinator's own work ----------------------------------------------------------------


def due_jobs(project: Project) -> list[UUID]:
    query = select(Job.id).where(Job.project_id == project.id, Job.state == "due")
    with project.core.db.transaction("test", "test") as tx:
        return list(tx.session.scalars(query.where(Job.run_after <= tx.now)))


def drain(project: Project) -> None:
    """Do all work of this project that is due, as a worker would."""
    for _ in range(50):
        found = due_jobs(project)
        if not found:
            return
        for job in found:
            running.run_job(project.core, job)
    raise AssertionError("the work never ends")


def pass_time(project: Project) -> None:
    """What the scheduler does every second."""
    sweep.sweep(project.core)
    drain(project)
