"""Asking again: one effect and one answer, whatever happens to the first answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from .factories import (
    REPORT,
    Caller,
    Json,
    Project,
    announce,
    complete,
    contribute,
    drain,
    everything,
    make_client,
    make_clients,
    make_model,
    make_run,
    make_space,
    make_token,
    ok,
    put,
    refused,
    train,
)


def key() -> str:
    return uuid4().hex


@pytest.fixture
def nobody(project: Project) -> Caller:
    return Caller(project.api, None)


def test_a_registration_that_is_repeated_gives_the_same_key(
    project: Project, nobody: Caller
) -> None:
    """The answer was lost on the way: without this the token would be spent and the client lost."""
    body = {"token": make_token(project), "name": "ward-1"}
    once = key()
    first = ok(nobody.post("/v1/clients", body, once=once), 201)
    again = ok(nobody.post("/v1/clients", body, once=once), 201)
    assert again == first
    assert len(everything(project.owner, "/v1/clients")) == 1
    ok(Caller(project.api, again["key"]).post("/v1/check-ins", {}))


def test_the_same_key_with_another_body_is_refused(project: Project, nobody: Caller) -> None:
    body = {"token": make_token(project), "name": "ward-1"}
    once = key()
    ok(nobody.post("/v1/clients", body, once=once), 201)
    answer = nobody.post("/v1/clients", {**body, "name": "ward-2"}, once=once)
    refused(answer, 422, "idempotency_key_reused")
    assert len(everything(project.owner, "/v1/clients")) == 1


def test_another_key_is_another_call(project: Project, nobody: Caller) -> None:
    body = {"token": make_token(project), "name": "ward-1"}
    ok(nobody.post("/v1/clients", body, once=key()), 201)
    refused(nobody.post("/v1/clients", body, once=key()), 401, "enrolment_used")


def test_two_strangers_with_the_same_key_do_not_meet(
    project: Project, other: Project, nobody: Caller
) -> None:
    """Everybody who registers is anonymous: a key like ``1`` must not be taken by the first."""
    for tenant in (project, other):
        body = {"token": make_token(tenant), "name": "ward-1"}
        ok(nobody.post("/v1/clients", body, once="1"), 201)
    body = {"token": make_token(project), "name": "ward-2"}
    ok(nobody.post("/v1/clients", body, once="1"), 201)


def test_the_same_key_on_another_route_or_by_another_caller(
    project: Project, other: Project
) -> None:
    once = key()
    for tenant in (project, other):
        ok(tenant.owner.post("/v1/enrolments", {}, once=once), 201)
        body = {"name": "m", "space": make_space().to_json()}
        ok(tenant.owner.post("/v1/models", body, once=once), 201)


def test_a_call_that_was_refused_may_be_repeated(project: Project, nobody: Caller) -> None:
    """Only what had an effect is remembered."""
    make_client(project, name="ward-1")
    token, once = make_token(project), key()
    body = {"token": token, "name": "ward-1"}
    refused(nobody.post("/v1/clients", body, once=once), 409, "client_name_taken")
    body = {"token": token, "name": "ward-2"}
    ok(nobody.post("/v1/clients", body, once=once), 201)


CREATING: dict[str, tuple[str, Callable[[Project], Json]]] = {
    "enrolments": ("/v1/enrolments", lambda _: {"count": 2}),
    "models": ("/v1/models", lambda _: {"name": "m", "space": make_space().to_json()}),
    "runs": ("/v1/runs", lambda p: {"name": "r", "model_id": make_model(p).id}),
}


@pytest.mark.parametrize("what", CREATING)
def test_every_creating_call_happens_once(project: Project, what: str) -> None:
    path, make = CREATING[what]
    body, once = make(project), key()
    first = ok(project.owner.post(path, body, once=once), 201)
    assert ok(project.owner.post(path, body, once=once), 201) == first
    rows = project.sql(f"SELECT count(*) FROM {what} WHERE project_id = :project")[0][0]
    assert rows == {"enrolments": 2, "models": 2 - (what == "models"), "runs": 1}[what]
    refused(
        project.owner.post(path, {**body, **changed(what)}, once=once),
        422,
        "idempotency_key_reused",
    )


def changed(what: str) -> Json:
    return {"count": 3} if what == "enrolments" else {"name": "another"}


def test_a_body_written_differently_is_the_same_body(project: Project) -> None:
    once = key()
    headers = {**project.owner.headers(once), "Content-Type": "application/json"}
    texts = [b'{"count":1,"expires_in":3600}', b'{ "expires_in": 3600, "count": 1 }', b"{}"]
    answers = [project.api.post("/v1/enrolments", content=t, headers=headers) for t in texts]
    assert len({ok(a, 201)["tokens"][0] for a in answers}) == 1


def test_reserving_again_gives_the_same_ticket(project: Project) -> None:
    model = make_model(project)
    make_run(project, model)
    client = make_client(project)
    assignment = client.assignment()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    data = train(assignment, model.space).data
    once = key()
    first = ok(client.post(path, announce(data), once=once), 201)
    assert ok(client.post(path, announce(data), once=once), 201) == first
    put(first, data)
    assert [complete(client, first)["state"] for _ in range(2)] == ["uploaded", "uploaded"]
    drain(project)
    assert complete(client, first)["state"] == "accepted"
    jobs = [j for j in everything(project.owner, "/v1/jobs") if j["subject_id"] == first["id"]]
    assert len(jobs) == 1


def test_an_evaluation_is_counted_once(project: Project) -> None:
    model = make_model(project)
    run = make_run(project, model, goal=1, min_contributors=1)
    client = make_client(project)
    contribute(client, model)
    drain(project)
    path = f"/v1/assignments/{client.assignment()['id']}/evaluations"
    once = key()
    first = ok(client.post(path, REPORT, once=once), 201)
    for repeated in (once, key(), None):
        assert ok(client.post(path, REPORT, once=repeated), 201) == first
    assert len(ok(project.owner.get(f"/v1/runs/{run['id']}/evaluations"))["items"]) == 1


# --- at the same time --------------------------------------------------------------------------


def together(call: Callable[[], httpx.Response], crowd: int = 6) -> list[httpx.Response]:
    start = threading.Barrier(crowd)

    def one(_: int) -> httpx.Response:
        start.wait()
        return call()

    with ThreadPoolExecutor(crowd) as pool:
        return list(pool.map(one, range(crowd)))


def settled(call: Callable[[], httpx.Response]) -> Any:
    """What everybody hears in the end: the one answer, or that it is under way."""
    answers = together(call)
    good = [a.json() for a in answers if a.status_code == 201]
    assert good
    for answer in answers:
        if answer.status_code != 201:
            refused(answer, 409, "idempotency_in_flight")
    assert all(g == good[0] for g in good)
    assert ok(call(), 201) == good[0]
    return good[0]


def test_registrations_at_the_same_time(project: Project, nobody: Caller) -> None:
    body, once = {"token": make_token(project), "name": "ward-1"}, key()
    answer = settled(lambda: nobody.post("/v1/clients", body, once=once))
    (found,) = everything(project.owner, "/v1/clients")
    assert found["id"] == answer["client"]["id"]
    assert len(project.sql("SELECT 1 FROM keys WHERE client_id = :c", c=found["id"])) == 1


def test_models_at_the_same_time(project: Project) -> None:
    body, once = {"name": "m", "space": make_space().to_json()}, key()
    settled(lambda: project.owner.post("/v1/models", body, once=once))
    assert len(everything(project.owner, "/v1/models")) == 1


def test_a_token_without_a_key_at_the_same_time(project: Project, nobody: Caller) -> None:
    """A single-use token admits one, even if nobody sends an Idempotency-Key."""
    token, names = make_token(project), iter([f"ward-{n}" for n in range(6)])
    answers = together(lambda: nobody.post("/v1/clients", {"token": token, "name": next(names)}))
    assert sorted(a.status_code for a in answers) == [201] + [401] * 5
    for answer in answers:
        if answer.status_code == 401:
            refused(answer, 401, "enrolment_used")
    assert len(everything(project.owner, "/v1/clients")) == 1


def test_completing_at_the_same_time(project: Project) -> None:
    model = make_model(project)
    make_run(project, model)
    (client,) = make_clients(project, 1)
    assignment = client.assignment()
    data = train(assignment, model.space).data
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(client.post(path, announce(data)), 201)
    put(ticket, data)
    answers = together(lambda: client.post(f"/v1/uploads/{ticket['id']}/complete"))
    assert {ok(a, 202)["state"] for a in answers} == {"uploaded"}
    jobs = [j for j in everything(project.owner, "/v1/jobs") if j["subject_id"] == ticket["id"]]
    assert len(jobs) == 1


def test_checking_in_at_the_same_time(project: Project) -> None:
    """One client, six sessions: one assignment."""
    make_run(project, make_model(project), goal=5, quorum=2)
    client = make_client(project)
    answers = together(lambda: client.post("/v1/check-ins", {}))
    found = {(ok(a)["assignment"] or {}).get("id") for a in answers} - {None}
    assert len(found) == 1
    query = "SELECT count(*) FROM assignments WHERE project_id = :project"
    assert project.sql(query)[0][0] == 1


# --- what is kept ------------------------------------------------------------------------------


def test_answers_cannot_be_read_from_the_table(project: Project, nobody: Caller) -> None:
    token, once = make_token(project), key()
    body = {"token": token, "name": "ward-1"}
    answer = ok(nobody.post("/v1/clients", body, once=once), 201)
    (row,) = project.sql("SELECT * FROM idempotent_answers WHERE key = :key", key=once)
    dump = b"|".join(v if isinstance(v, bytes) else str(v).encode() for v in row)
    secret = answer["key"].split("_")[2]
    for word in (answer["key"], secret, token, token.split("_")[2], answer["client"]["id"]):
        assert word.encode() not in dump
    assert bytes.fromhex(secret) not in dump


def test_a_leaked_table_opens_nothing_without_the_request(project: Project, nobody: Caller) -> None:
    """Whoever may write the table, too, and asks with another body, gets no answer of others."""
    body, once = {"token": make_token(project), "name": "ward-1"}, key()
    ok(nobody.post("/v1/clients", body, once=once), 201)
    answer = nobody.post("/v1/clients", {**body, "tags": ["x"]}, once=once)
    assert "key" not in refused(answer, 422, "idempotency_key_reused")


@pytest.mark.parametrize("text", ["", "a b", "é".encode("latin-1"), "x" * 255])
def test_any_key_will_do(project: Project, text: Any) -> None:
    headers = {**project.owner.headers(), "Idempotency-Key": text}
    first = project.api.post("/v1/enrolments", json={}, headers=headers)
    again = project.api.post("/v1/enrolments", json={}, headers=headers)
    assert ok(first, 201) == ok(again, 201)


def test_a_key_that_is_too_long(project: Project) -> None:
    answer = project.owner.post("/v1/enrolments", {}, once="x" * 256)
    refused(answer, 422, "request_invalid")


def test_every_creating_route_takes_the_key(project: Project) -> None:
    paths = project.api.get("/openapi.json").json()["paths"]
    creating = [
        item["post"]
        for item in paths.values()
        if "201" in item.get("post", {}).get("responses", {})
    ]
    assert len(creating) == 18
    for operation in creating:
        assert "idempotency-key" in [p["name"].lower() for p in operation["parameters"]]
