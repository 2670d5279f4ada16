"""Large files: in parts, over links that are cut, with expired addresses and forgetful stores."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import httpx
import numpy as np
import pytest
from pydantic import SecretStr
from store.servers import OTHERS, running

from app import staging
from app.errors import Missing
from app.main import create_app
from app.storage import S3Storage
from app.wiring import Coordinator
from fedselect import Kind, ParameterSpace, Role, wire
from fedselect.client import Client as Sdk
from fedselect.client import Retries
from fedselect.errors import ServiceError
from fedselect.protocol import PART_SIZE
from workers.clearing import clear

from .conftest import MovableClock
from .cutting import CuttingProxy, cutting
from .factories import (
    Caller,
    Client,
    Json,
    Model,
    Project,
    TestClient,
    announce,
    complete,
    deliver,
    drain,
    make_client,
    make_model,
    make_project,
    make_run,
    make_space,
    ok,
    piece_of,
    put,
    refused,
    train,
    upload,
)

SERVER = "http://coordinator.test"
SECOND = timedelta(seconds=1)
DIM = 5_500_000  # elements: 22 MB, three parts; an update of it is as large


def large_space(dim: int = DIM) -> ParameterSpace:
    return ParameterSpace.of([("wide.weight", (dim,), Kind.WEIGHT, Role.SELECTABLE)])


def version_of(space: ParameterSpace) -> bytes:
    values = np.random.default_rng(2).normal(size=space.dim).astype(np.float32)
    return wire.encode_version(space.digest, values)


@dataclass
class Sending:
    """A large file of a registered model, and where it is announced."""

    owner: Caller
    path: str
    data: bytes

    def reserve(self) -> Json:
        return dict(ok(self.owner.post(self.path, announce(self.data)), 201))

    def missing(self, ticket: Json) -> Json:
        return dict(ok(self.owner.post(f"/v1/uploads/{ticket['id']}/parts")))

    def put(self, part: Json) -> httpx.Response:
        return put(part, piece_of(self.data, part))


@pytest.fixture(scope="module")
def large() -> tuple[ParameterSpace, bytes]:
    space = large_space()
    return space, version_of(space)


@pytest.fixture
def sending(project: Project, large: tuple[ParameterSpace, bytes]) -> Sending:
    space, data = large
    model = ok(project.owner.post("/v1/models", {"name": "wide", "space": space.to_json()}), 201)
    return Sending(project.owner, f"/v1/models/{model['id']}/uploads", data)


def signed_until(url: str) -> datetime:
    """The end of an address as the store reads it."""
    query = parse_qs(urlsplit(url).query)
    signed = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return signed + int(query["X-Amz-Expires"][0]) * SECOND


def status(caller: Caller, ticket: Json) -> Json:
    return dict(ok(caller.get(f"/v1/uploads/{ticket['id']}")))


def multiparts(project: Project) -> set[str]:
    keys = {k for (k,) in project.sql("SELECT staging_key FROM uploads WHERE project_id=:project")}
    return {m.key for m in project.core.storage.multiparts("staging/")} & keys


# --- in parts ----------------------------------------------------------------------------------


def test_a_large_file_arrives_in_parts_and_only_the_service_completes_it(
    project: Project, sending: Sending
) -> None:
    ticket = sending.reserve()
    assert (ticket["url"], ticket["headers"]) == (None, {})
    todo = sending.missing(ticket)
    assert todo["missing"] == len(todo["parts"]) == 3
    assert [p["start"] for p in todo["parts"]] == [0, PART_SIZE, 2 * PART_SIZE]
    for done, part in enumerate(todo["parts"]):
        assert sending.missing(ticket)["missing"] == 3 - done
        assert sending.put(part).status_code == 200
    assert sending.missing(ticket)["parts"] == []
    assert multiparts(project), "a client has no way to complete it"
    complete(sending.owner, ticket)
    drain(project)
    assert status(sending.owner, ticket)["state"] == "accepted"
    assert not multiparts(project)


def test_the_same_file_goes_on_where_it_was_another_one_begins_anew(
    project: Project, sending: Sending
) -> None:
    ticket = sending.reserve()
    sending.put(sending.missing(ticket)["parts"][0])
    again = sending.reserve()
    assert again["id"] == ticket["id"]
    assert [p["number"] for p in sending.missing(again)["parts"]] == [2, 3]
    other = replace(sending, data=sending.data[:-1] + b"\0")
    fresh = other.reserve()
    assert fresh["id"] != ticket["id"]
    assert other.missing(fresh)["missing"] == 3


@pytest.mark.parametrize("fault", ["other bytes", "too short", "another part"])
def test_a_part_is_pinned_to_its_length_content_and_place(sending: Sending, fault: str) -> None:
    first, second, _ = sending.missing(ticket := sending.reserve())["parts"]
    content = piece_of(sending.data, first)
    if fault == "other bytes":
        answer = put(first, content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "too short":
        length = {"content-length": str(first["size"] - 1)}
        answer = put({**first, "headers": first["headers"] | length}, content[:-1])
    else:
        answer = put({**second, "headers": first["headers"]}, content)
    assert answer.status_code in {400, 403}
    assert sending.missing(ticket)["missing"] == 3


def test_completed_with_a_part_missing_it_is_refused_with_its_own_reason(
    project: Project, sending: Sending
) -> None:
    ticket = sending.reserve()
    for part in sending.missing(ticket)["parts"][::2]:
        sending.put(part)
    complete(sending.owner, ticket)
    refused(sending.owner.post(f"/v1/uploads/{ticket['id']}/parts"), 409, "upload_over")
    drain(project)
    found = status(sending.owner, ticket)
    assert (found["state"], found["reason"]) == ("rejected", "upload_parts")
    assert "1 of 3 parts are not in the store: 2" in found["detail"]


@pytest.mark.parametrize("begun", [False, True])
def test_completed_without_any_part_it_is_missing(
    project: Project, sending: Sending, begun: bool
) -> None:
    ticket = sending.reserve()
    if begun:
        sending.missing(ticket)
        (row,) = project.sql(
            "SELECT staging_key, multipart_id FROM uploads WHERE id = :id", id=ticket["id"]
        )
        project.core.storage.abort_multipart(*row)
    complete(sending.owner, ticket)
    drain(project)
    assert status(sending.owner, ticket)["reason"] == "upload_missing"


def test_verifying_again_after_a_crash_behind_the_completion(
    project: Project, sending: Sending
) -> None:
    ticket = sending.reserve()
    for part in sending.missing(ticket)["parts"]:
        sending.put(part)
    complete(sending.owner, ticket)
    query = "SELECT staging_key, multipart_id FROM uploads WHERE id = :id"
    (row,) = project.sql(query, id=ticket["id"])
    found = project.core.storage.list_parts(*row)
    project.core.storage.complete_multipart(*row, [(n, found[n].etag) for n in sorted(found)])
    drain(project)
    assert status(sending.owner, ticket)["state"] == "accepted"


def test_a_file_in_one_piece_has_no_parts(project: Project) -> None:
    model = make_model(project)
    make_run(project, model)
    client = make_client(project)
    assignment = client.assignment()
    body = announce(train(assignment, model.space).data)
    ticket = ok(client.post(f"/v1/assignments/{assignment['id']}/uploads", body), 201)
    refused(client.post(f"/v1/uploads/{ticket['id']}/parts"), 409, "upload_whole")


@pytest.mark.parametrize(
    "change",
    [
        {"part_size": PART_SIZE // 2},
        {"part_size": None, "parts": []},
        {"parts": ["0" * 32]},
        {"size": 1000},
    ],
)
def test_parts_that_are_not_cut_as_agreed_are_refused(sending: Sending, change: Json) -> None:
    body = announce(sending.data) | change
    assert (
        "parts" in refused(sending.owner.post(sending.path, body), 422, "request_invalid")["detail"]
    )


# --- deadlines and shut-out clients ------------------------------------------------------------


@dataclass
class Round:
    """A run on a large model, and a client with an update of it in parts."""

    project: Project
    client: Client
    assignment: Json
    data: bytes

    @property
    def path(self) -> str:
        return f"/v1/assignments/{self.assignment['id']}/uploads"


@pytest.fixture(scope="module")
def ward(
    core: Coordinator, api: TestClient, large: tuple[ParameterSpace, bytes]
) -> tuple[Project, Model]:
    """A tenant with a large model."""
    project = make_project(core, api)
    return project, make_model(project, space=large[0])


@pytest.fixture
def round_(ward: tuple[Project, Model]) -> Round:
    """A round of one client alone."""
    project, model = ward
    rules = {"goal": 1, "min_contributors": 1, "report_deadline": 600, "selection_deadline": 60}
    run = make_run(project, model, policy={"personal": "none"}, **rules)
    client = make_client(project)
    assignment = client.assignment()
    assert assignment["run"]["id"] == run["id"]
    return Round(project, client, assignment, train(assignment, model.space, seed=3).data)


def test_addresses_are_short_lived_and_never_past_the_deadline(
    round_: Round, clock: MovableClock
) -> None:
    ticket = ok(round_.client.post(round_.path, announce(round_.data)), 201)
    path = f"/v1/uploads/{ticket['id']}/parts"
    deadline = datetime.fromisoformat(round_.assignment["deadline"])
    for _ in range(2):
        todo = ok(round_.client.post(path))
        assert datetime.fromisoformat(todo["expires_at"]) == deadline
        # Begin and lifetime of an address are whole seconds, each rounded down.
        assert all(
            deadline - 2 * SECOND <= signed_until(p["url"]) <= deadline for p in todo["parts"]
        )
    clock.advance((deadline - clock()).total_seconds() - 0.5)
    refused(round_.client.post(path), 409, "assignment_expired")
    clock.advance(600)
    refused(round_.client.post(path), 409, "assignment_expired")
    refused(round_.client.post(round_.path, announce(round_.data)), 409, "assignment_expired")


@pytest.mark.parametrize(
    ("command", "code"), [("suspend", (403, "client_suspended")), ("revoke", (401, "key_revoked"))]
)
def test_a_client_that_is_shut_out_neither_sends_nor_completes(
    round_: Round, command: str, code: tuple[int, str]
) -> None:
    ticket = upload(round_.client, round_.path, round_.data)
    ok(round_.project.owner.post(f"/v1/clients/{round_.client.id}/{command}"))
    for call in ("parts", "complete"):
        refused(round_.client.post(f"/v1/uploads/{ticket['id']}/{call}"), *code)
    assert status(round_.project.owner, ticket)["state"] == "reserved"


def test_a_replaced_reservation_leaves_no_parts_behind(round_: Round) -> None:
    first = ok(round_.client.post(round_.path, announce(round_.data)), 201)
    ok(round_.client.post(f"/v1/uploads/{first['id']}/parts"))
    (before,) = round_.project.sql(
        "SELECT staging_key, multipart_id FROM uploads WHERE id = :id", id=first["id"]
    )
    other = round_.data[:-1] + b"\1"
    again = ok(round_.client.post(round_.path, announce(other)), 201)
    assert again["id"] == first["id"]
    keys = {m.key for m in round_.project.core.storage.multiparts("staging/")}
    assert before.staging_key not in keys
    deliver(round_.client, round_.assignment, round_.data)
    drain(round_.project)
    assert status(round_.client, first)["state"] == "accepted"


# --- over a link that is cut -------------------------------------------------------------------


class Bridge(httpx.BaseTransport):
    """The SDK's network: the coordinator in this process, the store behind the proxy."""

    def __init__(self, api: TestClient) -> None:
        self._api, self._net = api, httpx.HTTPTransport()
        self.asked: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not str(request.url).startswith(SERVER):
            return self._net.handle_request(request)
        self.asked.append(f"{request.method} {request.url.path}")
        body = request.read()
        answer = self._api.request(
            request.method, request.url.path, headers=dict(request.headers), content=body
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def close(self) -> None:
        self._net.close()


@dataclass
class Link:
    """A coordinator whose store is reached through a proxy, and the SDK at its other end."""

    core: Coordinator
    proxy: CuttingProxy
    bridge: Bridge
    sdk: Sdk
    waits: list[float]


@contextmanager
def link(core: Coordinator, key: str | None, *, every: int, **changes: Any) -> Iterator[Link]:
    endpoint = urlsplit(changes.get("s3_endpoint") or core.settings.s3_endpoint)
    with cutting((str(endpoint.hostname), int(endpoint.port or 80)), every=every) as proxy:
        changes |= {"s3_public_endpoint": f"http://127.0.0.1:{proxy.port}"}
        settings = core.settings.model_copy(update=changes)
        app = create_app(settings)
        app.state.core.close()
        there = replace(core, settings=settings, storage=S3Storage(settings))
        app.state.core = there
        bridge, waits = Bridge(TestClient(app, raise_server_exceptions=False)), []
        retries = Retries(random.Random(1))
        with Sdk(SERVER, key=key, retries=retries, sleep=waits.append, transport=bridge) as sdk:
            yield Link(there, proxy, bridge, sdk, waits)


def test_a_file_arrives_over_a_link_that_is_cut_again_and_again(
    project: Project, sending: Sending
) -> None:
    """Every cut costs at most one part, however often it happens."""
    space = large_space(12_000_000)
    data = version_of(space)
    model = ok(project.owner.post("/v1/models", {"name": "48", "space": space.to_json()}), 201)
    with link(project.core, project.owner.key, every=12_000_000) as wire_:
        done = wire_.sdk.send_weights(UUID(model["id"]), data)
    drain(project)
    assert status(project.owner, {"id": done.id})["state"] == "accepted"
    assert wire_.proxy.cuts >= 4
    again = wire_.proxy.sent - len(data)
    assert again < wire_.proxy.cuts * (PART_SIZE + 100_000)
    assert len(wire_.waits) == wire_.proxy.cuts, "a pause after each cut, no other"


def test_nothing_arrives_over_a_link_that_carries_no_part(
    project: Project, sending: Sending
) -> None:
    model = UUID(sending.path.split("/")[3])
    narrow = link(project.core, project.owner.key, every=PART_SIZE - 1)
    with narrow as wire_, pytest.raises(ServiceError) as caught:
        wire_.sdk.send_weights(model, sending.data)
    assert caught.value.code == "unreachable"
    assert wire_.proxy.cuts == Retries(random.Random(1)).tries


# --- clearing away -----------------------------------------------------------------------------


def test_what_is_over_is_cleared_away_and_what_is_live_stays(
    round_: Round, clock: MovableClock
) -> None:
    core, project = round_.project.core, round_.project
    ticket = ok(round_.client.post(round_.path, announce(round_.data)), 201)
    parts = ok(round_.client.post(f"/v1/uploads/{ticket['id']}/parts"))["parts"]
    put(parts[0], piece_of(round_.data, parts[0]))
    query = "SELECT staging_key, multipart_id FROM uploads WHERE id = :id"
    (row,) = project.sql(query, id=ticket["id"])
    replaced = "staging/" + "0" * 32
    core.storage.put(replaced, io.BytesIO(b"old"), 3)
    clear(core)
    assert replaced in set(core.storage.keys("staging/")), "too young"
    clock.advance(staging.GRACE.total_seconds() + 5)
    clear(core)
    assert replaced not in set(core.storage.keys("staging/"))
    assert core.storage.list_parts(*row), "the round still waits for it"
    clock.advance(1300)
    clear(core)
    with pytest.raises(Missing):
        core.storage.list_parts(*row)
    assert project.sql(query, id=ticket["id"]) == [(row.staging_key, None)]


def test_what_a_revoked_client_has_begun_is_cleared_away_at_once(round_: Round) -> None:
    core, project = round_.project.core, round_.project
    ticket = ok(round_.client.post(round_.path, announce(round_.data)), 201)
    ok(round_.client.post(f"/v1/uploads/{ticket['id']}/parts"))
    query = "SELECT staging_key, multipart_id FROM uploads WHERE id = :id"
    (row,) = project.sql(query, id=ticket["id"])
    ok(project.owner.post(f"/v1/clients/{round_.client.id}/suspend"))
    clear(core)
    assert core.storage.list_parts(*row) == {}, "suspended, it may come back"
    ok(project.owner.post(f"/v1/clients/{round_.client.id}/revoke"))
    clear(core)
    with pytest.raises(Missing):
        core.storage.list_parts(*row)


def test_a_file_that_is_sent_again_behind_its_verdict_is_cleared_away(
    round_: Round, clock: MovableClock
) -> None:
    """The address may outlive the verdict: what it brings in is no concern of anybody."""
    core = round_.project.core
    small = train(round_.assignment, make_space()).data  # of another model, so it is refused
    ticket = upload(round_.client, round_.path, small)
    complete(round_.client, ticket)
    drain(round_.project)
    assert status(round_.client, ticket)["state"] == "rejected"
    assert put(ticket, small).status_code == 200
    (key,) = round_.project.sql("SELECT staging_key FROM uploads WHERE id = :id", id=ticket["id"])[
        0
    ]
    assert key in set(core.storage.keys("staging/"))
    clock.advance(staging.GRACE.total_seconds() + 5)
    clear(core)
    assert key not in set(core.storage.keys("staging/"))


def test_unfinished_writes_of_a_dead_worker_are_cleared_away(
    project: Project, clock: MovableClock
) -> None:
    core = project.core
    key = f"accepted/{project.id}/{'0' * 64}"
    left = core.storage.create_multipart(key)
    core.storage.put_part(key, left, 1, bytes(100))
    clock.advance(core.settings.multipart_keep - 60)
    clear(core)
    assert core.storage.list_parts(key, left)
    clock.advance(120)
    clear(core)
    with pytest.raises(Missing):
        core.storage.list_parts(key, left)


# --- other stores ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(OTHERS))
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Json]:
    """The variables of a store of another maker."""
    with running(OTHERS[request.param], tmp_path_factory.mktemp("stores")) as variables:
        names = ("S3_ENDPOINT", "S3_REGION", "S3_BUCKET", "S3_ACCESS_KEY", "S3_SECRET_KEY")
        secret = {"S3_ACCESS_KEY", "S3_SECRET_KEY"}
        yield {n.lower(): SecretStr(variables[n]) if n in secret else variables[n] for n in names}


def test_what_a_worker_writes_at_this_moment_is_left_alone(
    core: Coordinator, elsewhere: Json
) -> None:
    settings = core.settings.model_copy(update=elsewhere)
    there = replace(core, settings=settings, storage=S3Storage(settings))
    key = f"accepted/{'1' * 32}/{'0' * 64}"
    begun = there.storage.create_multipart(key)
    etag = there.storage.put_part(key, begun, 1, b"1" * 100)
    clear(there)
    there.storage.complete_multipart(key, begun, [(1, etag)])
    assert there.storage.size(key) == 100


def test_a_store_that_cannot_resume_gets_the_file_again(
    project: Project, sending: Sending, elsewhere: Json
) -> None:
    """One cut, whatever the store makes of its parts: the file arrives."""
    model = UUID(sending.path.split("/")[3])
    with link(project.core, project.owner.key, every=15_000_000, **elsewhere) as wire_:
        wire_.proxy.most = 1
        done = wire_.sdk.send_weights(model, sending.data)
        drain(replace(project, core=wire_.core))
        clear(wire_.core)
    assert status(project.owner, {"id": done.id})["state"] == "accepted"
    assert wire_.proxy.cuts == 1
