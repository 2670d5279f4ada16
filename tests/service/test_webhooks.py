"""Webhooks, against a receiver that really listens."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from app import outbound, webhooks
from app.errors import Invalid, Unavailable
from app.main import create_app
from app.webhooks import PAUSES
from app.wiring import Coordinator
from fedselect.hooks import sign, verify
from workers import sweep
from workers.deliver import deliver, forget

from .conftest import MovableClock
from .factories import (
    REPORT,
    Caller,
    Json,
    Project,
    TestClient,
    everything,
    make_client,
    ok,
    refused,
)
from .provider import Quiet, serving
from .rolling import World


@dataclass
class Receiver:
    """Notes what arrives and answers as it is told."""

    port: int = 0
    answer: int = 204
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/told?by=us"

    def events(self) -> list[str]:
        return [json.loads(body)["event"] for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(found.answer)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()

    with serving(Handler) as found.port:
        yield found


@dataclass
class Office:
    """A coordinator that may call private addresses, a project, and time that passes."""

    core: Coordinator
    owner: Caller
    project: Project

    def hook(self, receiver: Receiver, *events: str) -> Json:
        body = {"url": receiver.url, "events": list(events) or ["client.registered"]}
        return dict(ok(self.owner.post("/v1/webhooks", body), 201))

    def work(self) -> None:
        sweep.seal(self.core)
        while self._follow():  # a step alone may end among the entries of other tests
            pass
        deliver(self.core)

    def _follow(self) -> int:
        with self.core.db.transaction("test", "test") as tx:
            return webhooks.follow(tx)

    def deliveries(self, hook: Json, **params: Any) -> list[Json]:
        return everything(self.owner, f"/v1/webhooks/{hook['webhook']['id']}/deliveries", **params)


@pytest.fixture
def office(core: Coordinator, project: Project) -> Iterator[Office]:
    settings = core.settings.model_copy(update={"webhook_private": True})
    own = replace(core, settings=settings)
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as api:
        app.state.core.close()
        app.state.core = own
        yield Office(own, Caller(api, project.owner.key), project)
    project.sql("UPDATE webhooks SET state = 'disabled'")


def genuine(secret: str, headers: dict[str, str], body: bytes, *, now: float) -> bool:
    names = {"message": "webhook-id", "timestamp": "webhook-timestamp"}
    parts = {name: headers[header] for name, header in names.items()}
    signature = headers["webhook-signature"]
    return verify(secret, **parts, signature=signature, body=body, now=now)


def test_what_happens_is_told_once_signed_and_in_order(office: Office, receiver: Receiver) -> None:
    make_client(office.project)  # before anybody asked
    sweep.seal(office.core)
    hook = office.hook(receiver, "client.registered", "client.suspended")
    client = make_client(office.project)
    ok(office.owner.post(f"/v1/clients/{client.id}/suspend"))
    ok(office.owner.post(f"/v1/clients/{client.id}/activate"))
    office.work()
    office.work()
    assert receiver.events() == ["client.registered", "client.suspended"]
    headers, body = receiver.got[0]
    assert genuine(hook["secret"], headers, body, now=time.time())
    assert not genuine(hook["secret"], headers, body + b" ", now=time.time())
    assert not genuine(hook["secret"], headers, body, now=time.time() + 301)
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert json.loads(body)["subject"] == f"client:{client.id}"
    assert client.name not in body.decode()
    assert [d["state"] for d in office.deliveries(hook)] == ["delivered"] * 2


def test_another_project_hears_nothing(office: Office, receiver: Receiver, other: Project) -> None:
    office.hook(receiver)
    make_client(other)
    office.work()
    assert receiver.got == []


def test_a_rollout_that_is_held_and_a_client_that_is_harmed_are_told(
    office: Office, receiver: Receiver
) -> None:
    world = World(office.project)
    world.set()
    sweep.seal(office.core)
    office.hook(receiver, "rollout.held", "client.harmed")
    rollout = world.start()
    found = world.report(rollout, stage=3)
    assert found["state"] == "held"
    office.work()
    (held,) = [json.loads(body) for _, body in receiver.got]
    assert (held["event"], held["subject"]) == ("rollout.held", f"rollout:{rollout['id']}")
    ok(world.order(rollout, "roll-back"))
    bad = {"pre": 800, "local_only": 800, "post": 500}
    scores = {n: {"correct": c, "total": 1000, "loss": 0.4} for n, c in bad.items()}
    rollout = world.start(gates={"baseline": "local_only"})
    (member, *_) = world.group(rollout, "members")
    path = f"/v1/assignments/{member.assignment()['id']}/evaluations"
    ok(member.post(path, {**REPORT, "scores": scores}), 201)
    office.work()
    told = json.loads(receiver.got[1][1])
    assert (told["event"], told["subject"]) == ("client.harmed", f"client:{member.id}")
    assert member.name not in str(receiver.got)
    assert len(receiver.got) == 2


def test_a_receiver_that_fails_is_asked_again_until_it_is_given_up(
    office: Office, receiver: Receiver, clock: MovableClock
) -> None:
    hook = office.hook(receiver)
    receiver.answer = 503
    make_client(office.project)
    for pause in (*PAUSES, 0):
        office.work()
        office.work()  # too early: nothing happens
        clock.advance(pause + 1)
    assert len(receiver.got) == len(PAUSES) + 1
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    (dead,) = office.deliveries(hook, state="dead")
    assert (dead["status"], dead["error"]) == (503, "answered 503")
    query = "SELECT count(*) FROM ledger_entries WHERE project_id = :project AND action = :a"
    assert office.project.sql(query, a="webhook.given_up") == [(1,)]
    receiver.answer = 200
    ok(office.owner.post(f"/v1/deliveries/{dead['id']}/retry"))
    office.work()
    assert [d["state"] for d in office.deliveries(hook)] == ["delivered"]
    again = office.owner.post(f"/v1/deliveries/{dead['id']}/retry")
    refused(again, 409, "delivery_done")


def test_a_redirect_is_not_followed(office: Office, receiver: Receiver) -> None:
    hook = office.hook(receiver)
    receiver.answer = 302
    make_client(office.project)
    office.work()
    (found,) = office.deliveries(hook)
    assert (found["state"], found["status"]) == ("waiting", 302)


def test_a_new_secret_signs_beside_the_old_one_for_a_day(
    office: Office, receiver: Receiver, clock: MovableClock
) -> None:
    hook = office.hook(receiver)
    new = ok(office.owner.post(f"/v1/webhooks/{hook['webhook']['id']}/secret"), 201)
    assert new["secret"] != hook["secret"]
    for wait, valid in ((0, [True, True]), (86_401, [False, True])):
        clock.advance(wait)
        make_client(office.project)
        office.work()
        headers, body = receiver.got[-1]
        now = int(headers["webhook-timestamp"])
        both = (hook["secret"], new["secret"])
        assert [genuine(secret, headers, body, now=now) for secret in both] == valid


def test_a_test_reaches_the_one_that_is_tested(office: Office, receiver: Receiver) -> None:
    first, second = office.hook(receiver), office.hook(receiver)
    path = f"/v1/webhooks/{first['webhook']['id']}"
    ok(office.owner.post(f"{path}/test"), 202)
    office.work()
    assert receiver.events() == ["webhook.tested"]
    assert office.deliveries(second) == []
    tag = office.owner.get(path).headers["etag"]
    change = {"state": "disabled"}
    ok(office.owner.request("PATCH", path, change, **{"If-Match": tag}))
    late = office.owner.request("PATCH", path, change, **{"If-Match": tag})
    refused(late, 412, "etag_mismatch")
    refused(office.owner.post(f"{path}/test"), 409, "webhook_disabled")
    make_client(office.project)
    sweep.seal(office.core)
    ok(office.owner.request("PATCH", path, {"state": "active"}))
    office.work()
    assert receiver.events() == ["webhook.tested", "client.registered"], "of the second alone"


# --- where they may not go -------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "10.1.2.3", "169.254.169.254", "192.168.0.1"),
        *("0.0.0.0", "[::ffff:127.0.0.1]", "[fd00::1]", "2130706433", "100.64.0.1", "224.0.0.1"),
        *("[fec0::1]", "[2002:a00:1::1]", "[64:ff9b::a00:1]", "[::10.0.0.1]", "[fe80::1]"),
    ],
)
def test_private_addresses_are_never_called(host: str) -> None:
    with pytest.raises((Invalid, Unavailable)) as found:
        outbound.post(f"https://{host}/", b"", {}, private=False)
    assert found.value.code == "webhook_address"


def test_plain_http_is_refused_when_it_is_asked_for(project: Project) -> None:
    body = {"url": "http://example.org/", "events": ["run.paused"]}
    refused(project.owner.post("/v1/webhooks", body), 422, "webhook_address")
    body = {"url": "ftp://example.org/", "events": ["run.paused"]}
    refused(project.owner.post("/v1/webhooks", body), 422, "request_invalid")
    body = {"url": "https://example.org/", "events": ["no.such"]}
    refused(project.owner.post("/v1/webhooks", body), 422, "request_invalid")


def test_a_receiver_that_answers_for_ever_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps a time limit of each step from ever being reached."""
    monkeypatch.setattr(outbound, "LONGEST", 0.3)
    gone, dripped = threading.Event(), []

    def drip(server: socket.socket) -> None:
        with server.accept()[0] as connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not gone.wait(0.02):
                connection.sendall(b"x")
                dripped.append(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        try:
            with pytest.raises(Unavailable) as found:
                outbound.post(f"http://127.0.0.1:{server.getsockname()[1]}/", b"", {}, private=True)
        finally:
            gone.set()
            thread.join(10)
    assert found.value.code == "webhook_unreachable"
    assert dripped


def test_a_disabled_one_is_not_sent_its_deliveries_again(
    office: Office, receiver: Receiver
) -> None:
    hook = office.hook(replace(receiver, port=1))
    make_client(office.project)
    office.work()
    (delivery,) = office.deliveries(hook)
    path = f"/v1/webhooks/{hook['webhook']['id']}"
    ok(office.owner.request("PATCH", path, {"state": "disabled"}))
    again = f"/v1/deliveries/{delivery['id']}/retry"
    refused(office.owner.post(again), 409, "webhook_disabled")
    ok(office.owner.request("PATCH", path, {"state": "active"}))
    assert ok(office.owner.post(again))["attempts"] == 0


def test_nobody_there_is_no_crash(office: Office, receiver: Receiver) -> None:
    gone = replace(receiver, port=1)
    hook = office.hook(gone)
    make_client(office.project)
    office.work()
    (found,) = office.deliveries(hook)
    assert (found["state"], found["status"], found["error"]) == ("waiting", None, "ConnectError")


def test_who_does_not_answer_is_not_asked_for_each_event(
    office: Office, receiver: Receiver, clock: MovableClock
) -> None:
    hook = office.hook(receiver)
    path = f"/v1/webhooks/{hook['webhook']['id']}"
    gone = replace(receiver, port=1)
    ok(office.owner.request("PATCH", path, {"url": gone.url}))
    clients = [make_client(office.project) for _ in range(3)]
    office.work()
    errors = [d["error"] for d in office.deliveries(hook)]
    assert sorted(errors) == ["ConnectError"] + ["held back: no answer before it"] * 2
    ok(office.owner.request("PATCH", path, {"url": receiver.url}))
    clock.advance(PAUSES[0] + 1)
    office.work()
    told = [json.loads(body)["subject"] for _, body in receiver.got]
    assert told == [f"client:{client.id}" for client in clients], "in the order of the ledger"


def test_the_standards_own_example() -> None:
    """The vector of the Standard Webhooks specification's reference library."""
    signature = sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        message="msg_p5jXN8AQM9LWM0D4loKWxJek",
        timestamp=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_ended_long_ago_is_forgotten(office: Office, receiver: Receiver) -> None:
    hook = office.hook(receiver)
    for _ in range(2):
        make_client(office.project)
    office.work()
    old, kept = office.deliveries(hook)
    office.project.sql(
        "UPDATE deliveries SET finished_at = finished_at - interval '15 days' WHERE id = :i",
        i=old["id"],
    )
    forget(office.core)
    assert [each["id"] for each in office.deliveries(hook)] == [kept["id"]]
