"""Bad requests at the door: each gets a problem document with its own code, and never a 500."""

from __future__ import annotations

import base64
import json
import threading
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import errors
from sqlalchemy.exc import InternalError

from app import auth, tenants

from .conftest import MovableClock
from .factories import (
    Caller,
    Client,
    Json,
    Model,
    Project,
    TestClient,
    announce,
    make_client,
    make_model,
    make_project,
    make_run,
    make_space,
    make_token,
    ok,
    refused,
    settings,
    train,
)

NOWHERE = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def nobody(api: TestClient) -> Caller:
    return Caller(api, None)


@pytest.fixture(scope="module")
def tenant(core: Any, api: TestClient) -> Project:
    """A project for questions that change nothing."""
    return make_project(core, api)


@pytest.fixture(scope="module")
def model(tenant: Project) -> Model:
    return make_model(tenant)


@pytest.fixture(scope="module")
def client(tenant: Project) -> Client:
    return make_client(tenant)


# --- enrolment ---------------------------------------------------------------------------------


def sealed(text: str) -> str:
    """A token with a right checksum, which anybody can compute."""
    return f"{text}_{zlib.crc32(text.encode()):08x}"


def mistyped(token: str) -> str:
    return token[:-1] + ("0" if token[-1] != "0" else "1")


def test_a_mistyped_or_foreign_token(nobody: Caller, project: Project) -> None:
    token = make_token(project)
    wrong = [
        mistyped(token),
        token[:-9],
        "",
        "fse",
        "hello",
        "fse_1_2_3",
        sealed(f"fse_{'0' * 16}_{'0' * 64}"),
        sealed(f"{token[:20]}_{'0' * 64}"),
        sealed("fse_\0_\0"),
        sealed("fse_\ud7ff_\u00e4"),
        str(project.owner.key),
        token.replace("fse", "fsk"),
    ]
    for text in wrong:
        body = {"token": text, "name": "ward-1"}
        refused(nobody.post("/v1/clients", body), 401, "enrolment_unknown")
    ok(nobody.post("/v1/clients", {"token": f" {token}\n", "name": "ward-1"}), 201)


def test_a_used_token(nobody: Caller, project: Project) -> None:
    token = make_token(project)
    ok(nobody.post("/v1/clients", {"token": token, "name": "ward-1"}), 201)
    body = {"token": token, "name": "ward-2"}
    refused(nobody.post("/v1/clients", body), 401, "enrolment_used")


def test_an_expired_token(nobody: Caller, project: Project, clock: MovableClock) -> None:
    token = make_token(project, expires_in=600)
    body = {"token": token, "name": "ward-1"}
    clock.advance(600)
    refused(nobody.post("/v1/clients", body), 401, "enrolment_expired")
    clock.advance(-300)
    ok(nobody.post("/v1/clients", body), 201)


def test_a_name_that_is_taken_leaves_the_token_valid(nobody: Caller, project: Project) -> None:
    make_client(project, name="ward-1")
    token = make_token(project)
    refused(
        nobody.post("/v1/clients", {"token": token, "name": "ward-1"}), 409, "client_name_taken"
    )
    ok(nobody.post("/v1/clients", {"token": token, "name": "ward-2"}), 201)


def test_a_name_in_two_projects(project: Project, other: Project) -> None:
    for tenant in (project, other):
        make_client(tenant, name="ward-1")


@pytest.mark.parametrize("name", ["", "-a", "a b", "ä", "a" * 65, "a\n", "a\0", "a/b", None, 7])
def test_a_name_that_is_none(nobody: Caller, project: Project, name: Any) -> None:
    body = {"token": make_token(project), "name": name}
    refused(nobody.post("/v1/clients", body), 422, "request_invalid")


# --- keys --------------------------------------------------------------------------------------


def test_unknown_keys(api: TestClient, client: Client) -> None:
    key = str(client.key)
    wrong = [
        mistyped(key),
        key[:-1],
        key.upper(),
        f"{key} {key}",
        "hello",
        sealed(f"fsk_{'0' * 16}_{'0' * 64}"),
        sealed(key[:20] + "_" + "0" * 64),
        key.replace("fsk", "fse"),
    ]
    for text in wrong:
        refused(Caller(api, text).post("/v1/check-ins", {}), 401, "key_unknown")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic dTpw", "fsk_1"])
def test_no_key(api: TestClient, header: str | None) -> None:
    headers = {"Authorization": header} if header is not None else {}
    answer = api.get("/v1/runs", headers=headers)
    refused(answer, 401, "key_missing")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_that_is_not_ascii(api: TestClient) -> None:
    answer = api.get(
        "/v1/runs", headers={"Authorization": "Bearer fsk_\xe4_\xff".encode("latin-1")}
    )
    refused(answer, 401, "key_unknown")


def test_a_revoked_key(project: Project) -> None:
    client = make_client(project)
    project.sql("UPDATE keys SET revoked_at = now() WHERE client_id = :c", c=client.id)
    refused(client.post("/v1/check-ins", {}), 401, "key_revoked")


def test_an_expired_key(project: Project, clock: MovableClock) -> None:
    client = make_client(project)
    project.sql(
        "UPDATE keys SET expires_at = now() + interval '1 hour' WHERE client_id = :c", c=client.id
    )
    client.check_in()
    clock.advance(3601)
    refused(client.post("/v1/check-ins", {}), 401, "key_expired")


def test_a_suspended_client(project: Project) -> None:
    client = make_client(project)
    path = f"/v1/clients/{client.id}"
    assert ok(project.owner.post(f"{path}/suspend"))["state"] == "suspended"
    refused(client.post("/v1/check-ins", {}), 403, "client_suspended")
    assert ok(project.owner.post(f"{path}/activate"))["state"] == "active"
    client.check_in()


def test_a_revoked_client_stays_revoked(project: Project) -> None:
    client = make_client(project)
    path = f"/v1/clients/{client.id}"
    for _ in range(2):
        assert ok(project.owner.post(f"{path}/revoke"))["state"] == "revoked"
    refused(client.post("/v1/check-ins", {}), 401, "key_revoked")
    refused(project.owner.post(f"{path}/activate"), 409, "client_revoked")


def test_a_revoked_client_cannot_complete(project: Project) -> None:
    model = make_model(project)
    make_run(project, model)
    client = make_client(project)
    assignment = client.assignment()
    body = announce(train(assignment, model.space).data)
    ticket = ok(client.post(f"/v1/assignments/{assignment['id']}/uploads", body), 201)
    ok(project.owner.post(f"/v1/clients/{client.id}/revoke"))
    refused(client.post(f"/v1/uploads/{ticket['id']}/complete"), 401, "key_revoked")


# --- bodies ------------------------------------------------------------------------------------


def test_a_declared_body_that_is_too_large(api: TestClient) -> None:
    answer = api.post("/v1/check-ins", content=b" " * (64 * 1024 + 1))
    refused(answer, 413, "body_too_large")


def test_a_body_whose_length_lies(api: TestClient) -> None:
    answer = api.post("/v1/check-ins", content=b"{}", headers={"Content-Length": str(10**12)})
    refused(answer, 413, "body_too_large")


def test_a_chunked_body_that_is_too_large(api: TestClient) -> None:
    read: list[int] = []

    def chunks() -> Any:
        for number in range(1000):
            read.append(number)
            yield b" " * 1024

    refused(api.post("/v1/check-ins", content=chunks()), 413, "body_too_large")


def test_a_body_just_small_enough(tenant: Project) -> None:
    padding = " " * (64 * 1024 - 2)
    headers = {**tenant.owner.headers(), "Content-Type": "application/json"}
    ok(tenant.api.post("/v1/enrolments", content=f"{{{padding}}}", headers=headers), 201)


def test_a_models_description_may_be_larger(tenant: Project) -> None:
    space = make_space().to_json()
    for number in range(2000):
        tensor = {"name": f"layer{number}.weight", "shape": [1], "kind": "weight"}
        space["tensors"].append({**tensor, "role": "selectable"})
    body = {"name": "large", "space": space}
    assert len(json.dumps(body)) > 64 * 1024
    ok(tenant.owner.post("/v1/models", body), 201)
    body["space"] = {"tensors": ["x" * 5 * 1024**2]}
    refused(tenant.owner.post("/v1/models", body), 413, "body_too_large")


@pytest.mark.parametrize("body", [b"", b"{", b"{'a': 1}", b"[1,]", b"\xff", b"nul", b"{} {}"])
def test_invalid_json(tenant: Project, body: bytes) -> None:
    headers = {**tenant.owner.headers(), "Content-Type": "application/json"}
    answer = tenant.api.post("/v1/runs", content=body, headers=headers)
    found = refused(answer, 422, "json_invalid" if body else "request_invalid")
    assert not body or found["detail"].startswith("the body is not JSON")


def test_json_nested_beyond_reason(tenant: Project) -> None:
    headers = {**tenant.owner.headers(), "Content-Type": "application/json"}
    body = b'{"name": "deep", "space": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    answer = tenant.api.post("/v1/models", content=body, headers=headers)
    refused(answer, 422, "json_invalid")


@pytest.mark.parametrize("body", [None, [], "hello", 7, {}, {"name": 1}, {"name": "a"}])
def test_wrong_types(tenant: Project, body: Any) -> None:
    found = refused(tenant.owner.post("/v1/runs", body), 422, "request_invalid")
    assert found["errors"]


def test_another_content_type(tenant: Project) -> None:
    headers = {**tenant.owner.headers(), "Content-Type": "text/plain"}
    answer = tenant.api.post("/v1/enrolments", content=b'{"count": 1}', headers=headers)
    refused(answer, 422, "request_invalid")


# --- settings ----------------------------------------------------------------------------------


def create(tenant: Project, model: Model, **changes: Any) -> Any:
    body = {"name": f"run-{uuid4().hex[:8]}", "model_id": model.id, **changes}
    return tenant.owner.post("/v1/runs", body)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"settings": {"roundz": 3}}, "settings.roundz"),
        ({"settings": {"round": {"gaol": 3}}}, "settings.round.gaol"),
        ({"settings": {"policy": {"masks": True}}}, "settings.policy.masks"),
        ({"setting": {}}, "setting"),
    ],
)
def test_an_unknown_setting_is_named(
    tenant: Project, model: Model, changes: Json, name: str
) -> None:
    found = refused(create(tenant, model, **changes), 422, "setting_unknown")
    assert name in found["detail"]
    assert name in found["errors"][0]["where"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"round": {"goal": 3, "quorum": 4}}, "quorum 4 is above goal 3"),
        ({"round": {"goal": 2, "min_contributors": 3}}, "min_contributors 3 is above goal 2"),
        ({"rounds": 3, "policy": {"start_round": 30}}, "would ever be used"),
        ({"training": {"steps": 2, "epochs": 1}}, "exactly one"),
        ({"training": {}}, "exactly one"),
    ],
)
def test_settings_that_contradict_each_other(
    tenant: Project, model: Model, wrong: Json, words: str
) -> None:
    found = refused(create(tenant, model, settings=wrong), 422, "settings_invalid")
    assert words in found["detail"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"rounds": "many"},
        {"seed": -1},
        {"seed": 2**63},
        {"round": {"goal": 0}},
        {"round": {"over_selection": 0.5}},
        {"round": {"late": "accept"}},
        {"policy": {"growth": 1.5}},
        {"policy": {"personal": "some"}},
        {"training": {"steps": 1, "learning_rate": 0}},
        {"policy": {"name": "a\0b"}},
        {"policy": {"name": ""}},
    ],
)
def test_settings_out_of_range(tenant: Project, model: Model, wrong: Json) -> None:
    refused(create(tenant, model, settings=wrong), 422, "request_invalid")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "place",
    [
        '{{"training": {{"steps": 1, "clip_norm": {}}}}}',
        '{{"training": {{"steps": 1, "learning_rate": {}}}}}',
        '{{"round": {{"report_deadline": {}}}}}',
        '{{"policy": {{"growth": {}}}}}',
    ],
)
def test_numbers_that_are_none(tenant: Project, model: Model, place: str, value: str) -> None:
    """Python's JSON reader takes them; the database and the agents would not."""
    body = f'{{"name": "nan", "model_id": "{model.id}", "settings": {place.format(value)}}}'
    headers = {**tenant.owner.headers(), "Content-Type": "application/json"}
    answer = tenant.api.post("/v1/runs", content=body, headers=headers)
    refused(answer, 422, "request_invalid")


def test_a_model_without_weights(tenant: Project) -> None:
    body = {"name": "unweighted", "space": make_space().to_json()}
    bare = ok(tenant.owner.post("/v1/models", body), 201)
    body = {"name": "r", "model_id": bare["id"]}
    refused(tenant.owner.post("/v1/runs", body), 409, "model_without_weights")


def test_a_policy_that_does_not_fit_the_model(tenant: Project) -> None:
    space = {"tensors": [{"name": "b", "shape": [3], "kind": "bias", "role": "shared"}]}
    bare = ok(tenant.owner.post("/v1/models", {"name": "headless", "space": space}), 201)
    wrong = settings(policy={"personal": "head"})
    body = {"name": "r", "model_id": bare["id"], "settings": wrong}
    refused(tenant.owner.post("/v1/runs", body), 422, "space_invalid")


@pytest.mark.parametrize(
    "space",
    [
        {},
        {"tensors": []},
        {"tensors": {}},
        {"tensors": [7]},
        {"tensors": [{"name": "a"}]},
        {"tensors": [{"name": "a", "shape": [-1], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [1.5], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [2**40], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [2**33] * 9, "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [10**400], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [1], "kind": "weight", "role": "personal"}]},
        {"tensors": [{"name": "a", "shape": [1], "kind": "x", "role": "shared"}]},
        {"tensors": [{"name": "a\0", "shape": [1], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": [], "shape": [1], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [0], "kind": "weight", "role": "shared"}]},
        {"tensors": [{"name": "a", "shape": [1], "kind": "bias", "role": "shared"}] * 2},
    ],
)
def test_spaces_that_are_none(tenant: Project, space: Json) -> None:
    body = {"name": f"m-{uuid4().hex[:8]}", "space": space}
    refused(tenant.owner.post("/v1/models", body), 422, "space_invalid")


def test_names_that_are_taken(tenant: Project, model: Model) -> None:
    name = f"n-{uuid4().hex[:8]}"
    body = {"name": name, "space": make_space().to_json()}
    ok(tenant.owner.post("/v1/models", body), 201)
    refused(tenant.owner.post("/v1/models", body), 409, "model_name_taken")
    ok(create(tenant, model, name=name), 201)
    refused(create(tenant, model, name=name), 409, "run_name_taken")


@pytest.mark.parametrize("what", ["client", "model", "run"])
def test_names_that_are_taken_at_the_same_moment(project: Project, what: str) -> None:
    """Both look, both find the name free: one gets it, the other gets a 409."""
    nobody = Caller(project.api, None)
    model = make_model(project)
    calls: dict[str, Any] = {
        "client": lambda token: nobody.post("/v1/clients", {"token": token, "name": "same"}),
        "model": lambda _: project.owner.post(
            "/v1/models", {"name": "same", "space": model.space.to_json()}
        ),
        "run": lambda _: create(project, model, name="same"),
    }
    crowd = 6
    tokens = [make_token(project) for _ in range(crowd)]
    start = threading.Barrier(crowd)

    def call(token: str) -> Any:
        start.wait()
        return calls[what](token)

    with ThreadPoolExecutor(crowd) as pool:
        answers = list(pool.map(call, tokens))
    assert sorted(a.status_code for a in answers) == [201] + [409] * (crowd - 1)
    for answer in answers:
        if answer.status_code == 409:
            refused(answer, 409, f"{what}_name_taken")


# --- paths and lists ---------------------------------------------------------------------------


def test_unknown_routes_and_methods(tenant: Project) -> None:
    assert "/docs" in refused(tenant.owner.get("/v1/runes"), 404, "route_unknown")["detail"]
    # A slash too many is no redirect: its address would come from the Host that the caller sent.
    refused(tenant.owner.get("/v1/runs/"), 404, "route_unknown")
    refused(tenant.owner.get("/v2/runs"), 404, "route_unknown")
    refused(tenant.owner.get("/"), 404, "route_unknown")
    refused(tenant.owner.post(f"/v1/rounds/{NOWHERE}/explode"), 404, "route_unknown")
    answer = tenant.api.delete("/v1/check-ins", headers=tenant.owner.headers())
    detail = refused(answer, 405, "method_not_allowed")["detail"]
    assert answer.headers["allow"] == "POST"
    assert detail == "DELETE is not possible here; this path takes POST"


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/ledger/entries", "/v1/clients"])
def test_unknown_parameters_are_named(tenant: Project, path: str) -> None:
    found = refused(tenant.owner.get(path, limits=5, bogus=""), 422, "setting_unknown")
    assert found["detail"] == "unknown setting: query.bogus, query.limits"


@pytest.mark.parametrize("bad", ["1", "hello", NOWHERE[:-1], "%00", "é"])
def test_ids_that_are_none(tenant: Project, bad: str) -> None:
    for path in ("models", "runs", "rounds", "clients", "versions"):
        refused(tenant.owner.get(f"/v1/{path}/{bad}"), 422, "request_invalid")


@pytest.mark.parametrize("command", ["explode", "START", ""])
def test_commands_that_are_none(tenant: Project, model: Model, command: str) -> None:
    run = ok(create(tenant, model), 201)
    answer = tenant.owner.post(f"/v1/runs/{run['id']}/{command}")
    refused(answer, 404, "route_unknown")


@pytest.mark.parametrize("below", ["rounds", "versions", "evaluations"])
def test_a_list_is_no_command(tenant: Project, model: Model, below: str) -> None:
    run = ok(create(tenant, model), 201)
    answer = tenant.owner.post(f"/v1/runs/{run['id']}/{below}")
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET"


def test_a_method_that_is_none_is_told_all_that_there_are(tenant: Project) -> None:
    answer = tenant.owner.request("DELETE", "/v1/runs")
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, POST"


def test_things_that_are_not_there(tenant: Project, client: Client) -> None:
    for path in ("models", "runs", "rounds", "clients", "versions", "uploads"):
        refused(tenant.owner.get(f"/v1/{path}/{NOWHERE}"), 404, "not_found")
    refused(client.post("/v1/check-ins", {"pending": NOWHERE}), 404, "not_found")
    refused(create(tenant, Model(NOWHERE, make_space(), None)), 404, "not_found")  # type: ignore[arg-type]


def coded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "hello",
        "====",
        "é",
        coded([]),
        coded({}),
        coded(None),
        coded([1, 2]),
        coded(["2026-01-01", "x"]),
        coded(["x", NOWHERE]),
        coded(["2026-01-01T00:00:00+00:00", NOWHERE, 1]),
        coded(["2026-01-01T00:00:00+00:00", 7]),
    ],
)
def test_cursors_that_are_none(tenant: Project, cursor: str) -> None:
    refused(tenant.owner.get("/v1/clients", cursor=cursor), 422, "cursor_invalid")


@pytest.mark.parametrize("row", ["\0", "a\nb", "\ud800"])
def test_cursors_that_no_database_can_compare(tenant: Project, row: str) -> None:
    cursor = coded(["2026-01-01T00:00:00+00:00", row])
    refused(tenant.owner.get("/v1/keys", cursor=cursor), 422, "cursor_invalid")


@pytest.mark.parametrize(
    ("why", "status", "code"),
    [
        (errors.IdleInTransactionSessionTimeout(), 503, "database_unavailable"),
        (errors.DataCorrupted(), 500, "internal_error"),
    ],
)
def test_a_transaction_that_was_cut_off_may_be_tried_again(
    project: Project, monkeypatch: pytest.MonkeyPatch, why: Exception, status: int, code: str
) -> None:
    monkeypatch.setattr(tenants, "infos", Mock(side_effect=InternalError("", None, why)))
    answer = project.owner.get("/v1/projects")
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("bad", ["%00", "a%0Ab", "x"])
def test_keys_that_are_none(tenant: Project, bad: str) -> None:
    refused(tenant.owner.get(f"/v1/keys/{bad}"), 404, "not_found")
    refused(tenant.owner.post(f"/v1/keys/{bad}/revoke"), 404, "not_found")


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00", "9999-12-31T23:59:59-23:00", "2026-01-01"])
def test_cursors_at_the_edge_of_time(tenant: Project, at: str) -> None:
    ok(tenant.owner.get("/v1/clients", cursor=coded([at, NOWHERE])))


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "1.5"])
def test_limits_that_are_none(tenant: Project, limit: str) -> None:
    refused(tenant.owner.get("/v1/clients", limit=limit), 422, "request_invalid")


def test_ledger_cursors_that_are_none(tenant: Project) -> None:
    for cursor in ("-1", "x", str(2**62)):
        answer = tenant.owner.get("/v1/ledger/entries", cursor=cursor)
        refused(answer, 422, "request_invalid")
    assert ok(tenant.owner.get("/v1/ledger/entries", cursor=2**61))["items"] == []


def test_a_state_that_is_none(tenant: Project) -> None:
    refused(tenant.owner.get("/v1/jobs", state="lost"), 422, "request_invalid")


# --- evaluations -------------------------------------------------------------------------------


def test_scores_that_cannot_be(project: Project) -> None:
    client = make_client(project)
    path = f"/v1/assignments/{NOWHERE}/evaluations"
    rest = {"participations": 1, "personal_share": 0.1, "bytes_sent": 1, "bytes_received": 1}
    for score in (
        {"correct": 3, "total": 2, "loss": 0.1},
        {"correct": -1, "total": 2, "loss": 0.1},
        {"correct": 1, "total": 0, "loss": 0.1},
        {"correct": 1, "total": 2, "loss": -0.1},
        {"correct": 1, "total": 2, "loss": "NaN"},
        {"correct": 10**30, "total": 10**30, "loss": 0.1},
        {"correct": 1, "total": 2, "loss": 0.1, "both": 2},
        {"correct": 1, "total": 2, "loss": 0.1, "both": 1},  # with what, if there is no post
    ):
        answer = client.post(path, {"scores": {"pre": score}, **rest})
        refused(answer, 422, "request_invalid")
    answer = client.post(path, {"scores": {"best": {}}, **rest})
    refused(answer, 422, "request_invalid")


# --- request ids and texts -----------------------------------------------------------------


def test_the_request_id_is_the_callers_if_it_is_harmless(api: TestClient) -> None:
    answer = api.get("/v1/runs", headers={"X-Request-Id": "ward-7.42"})
    assert refused(answer, 401, "key_missing")["request_id"] == "ward-7.42"
    for text in ("a b", "x" * 65, "<script>", ""):
        answer = api.get("/v1/runs", headers={"X-Request-Id": text})
        assert refused(answer, 401, "key_missing")["request_id"] != text


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "\x1b[31m"])
def test_texts_that_cannot_be_kept(project: Project, text: str) -> None:
    make_run(project)
    client = make_client(project)
    assignment = client.assignment()
    path = f"/v1/assignments/{assignment['id']}/decline"
    body = json.dumps({"reason": text}).encode()
    headers = {**client.headers(), "Content-Type": "application/json"}
    answer = project.api.post(path, content=body, headers=headers)
    assert answer.status_code == 422
    refused(answer, 422, answer.json()["code"])
    ok(client.post(path, {"reason": "no power – später\nmehr 🙂"}))


def test_an_unknown_field_with_an_impossible_name(tenant: Project) -> None:
    headers = {**tenant.owner.headers(), "Content-Type": "application/json"}
    answer = tenant.api.post("/v1/enrolments", content=rb'{"\ud800\u0000": 1}', headers=headers)
    refused(answer, 422, answer.json()["code"])


# --- whatever comes ----------------------------------------------------------------------------

texts = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    ["", "\0", "\ud800", "a", NOWHERE, "0" * 64, "fsk_a_b_c", "9" * 400]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, -1, 0, 10**300])
    | st.floats()
    | texts
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
tensors = st.fixed_dictionaries(
    {
        "name": st.uuids().map(str),
        "shape": st.lists(st.integers(1, 9), max_size=3),
        "kind": st.sampled_from(["weight", "bias", "norm", "buffer"]),
        "role": st.sampled_from(["selectable", "shared", "personal", "frozen"]),
    }
)
SPECIAL = {"space": st.fixed_dictionaries({"tensors": st.lists(tensors, min_size=1, max_size=4)})}


def mostly(honest: Any) -> Any:
    """Seven times what is asked for, once anything at all."""
    return st.integers(0, 7).flatmap(lambda n: honest if n else documents)


def shaped(schema: Json, components: Json, name: str = "") -> Any:
    """What the schema asks for, with a lie here and there."""
    if "$ref" in schema:
        return shaped(components[schema["$ref"].rpartition("/")[2]], components, name)
    if "anyOf" in schema:
        return st.one_of(*(shaped(s, components, name) for s in schema["anyOf"]))
    if name in SPECIAL:
        return mostly(SPECIAL[name])
    kind = schema.get("type")
    if "enum" in schema:
        return mostly(st.sampled_from(schema["enum"]))
    if kind == "object" and "properties" in schema:
        fields = {n: shaped(s, components, n) for n, s in schema["properties"].items()}
        required = {n: s for n, s in fields.items() if n in schema.get("required", [])}
        rest = {n: s for n, s in fields.items() if n not in required}
        return mostly(st.fixed_dictionaries(required, optional=rest))
    if kind == "object":
        names = shaped(schema.get("propertyNames", {"type": "string"}), components)
        inner = schema.get("additionalProperties")
        below = shaped(inner, components) if isinstance(inner, dict) else documents
        return mostly(
            st.dictionaries(names.filter(lambda n: isinstance(n, str)), below, max_size=3)
        )
    if kind == "array":
        items = schema.get("items")
        return mostly(st.lists(shaped(items, components) if items else documents, max_size=3))
    if kind in {"integer", "number"}:
        low, high = (float(schema.get(w, d)) for w, d in (("minimum", 0), ("maximum", 2**40)))
        numbers = st.integers(int(low), int(high)) | st.just(int(low) + 1)
        return mostly(numbers if kind == "integer" else numbers | st.floats(low, high))
    if kind == "string":
        return mostly(strings(schema, name))
    return documents


def strings(schema: Json, name: str) -> Any:
    if schema.get("format") == "uuid":
        return st.uuids().map(str)
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True).map(
            lambda t: t[: schema.get("maxLength")]
        )
    return texts


def post_routes(api: TestClient) -> list[tuple[str, Json]]:
    document = api.get("/openapi.json").json()
    return [(path, item["post"]) for path, item in document["paths"].items() if "post" in item]


@pytest.fixture(scope="module")
def subjects(tenant: Project, model: Model) -> dict[str, str]:
    """Something real behind every name that occurs in a path."""
    run = make_run(tenant, model, goal=50, quorum=2, report_deadline=10**6)
    holder = make_client(tenant)
    assignment = holder.assignment()
    rounds = ok(tenant.owner.get(f"/v1/runs/{run['id']}/rounds"))["items"]
    path = f"/v1/assignments/{assignment['id']}/uploads"
    ticket = ok(holder.post(path, announce(b"x" * 100)), 201)
    return {
        "client_id": str(make_client(tenant).id),
        "model_id": model.id,
        "run_id": run["id"],
        "round_id": rounds[-1]["id"],
        "assignment_id": assignment["id"],
        "upload_id": ticket["id"],
        "key": str(holder.key),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_body_is_a_bug(
    tenant: Project, subjects: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fuzz every POST with the right role: it may be refused, but never with a 5xx."""
    monkeypatch.setitem(SPECIAL, "model_id", st.just(subjects["model_id"]))
    document = tenant.api.get("/openapi.json").json()
    components = document["components"]["schemas"]
    roles = {"client": Caller(tenant.api, subjects["key"]), "owner": tenant.owner}
    routes = post_routes(tenant.api)
    assert len(routes) >= 12
    bodies = [
        (path, shaped(found["content"]["application/json"]["schema"], components))
        for path, operation in routes
        if (found := operation.get("requestBody"))
    ]
    assert len(bodies) >= 8

    seen: Counter[int] = Counter()

    @hypothesis_settings(
        max_examples=24 * len(bodies),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(bodies), st.data())
    def attack(route: tuple[str, Any], data: Any) -> None:
        # One body an example: there is a limit to what one may draw.
        path, bodies_of = route
        body = json.dumps(data.draw(bodies_of)).encode()
        where = path.format_map(defaultdict(lambda: str(UUID(int=0)), subjects))
        for caller in roles.values():
            headers = {**caller.headers(), "Content-Type": "application/json"}
            answer = tenant.api.post(where, content=body, headers=headers)
            seen[answer.status_code // 100] += 1
            assert answer.status_code < 500, (where, body, answer.text)
            if answer.status_code >= 400:
                refused(answer, answer.status_code, answer.json()["code"])

    attack()
    assert seen[2] > 30, "some of it must come through the first door"


def test_the_checksum_refuses_a_typing_error_without_the_database(core: Any) -> None:
    token = auth.mint(auth.KEY_PREFIX, b"p" * 32)
    assert auth.read(token.text, auth.KEY_PREFIX) is not None
    for position in range(4, len(token.text)):
        wrong = "f" if token.text[position] != "f" else "e"
        changed = token.text[:position] + wrong + token.text[position + 1 :]
        assert auth.read(changed, auth.KEY_PREFIX) is None
