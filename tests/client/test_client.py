"""The SDK: retries, errors and secrets, for the blocking and the asyncio client alike."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from fedselect import checkindocs, protocol, uploads
from fedselect.client import Client, Retries, announce
from fedselect.errors import ServiceError

from .fake_coordinator import KEY, NOW, SERVER, STORE, TOKEN, Coordinator, answer, problem, refusal
from .fake_talk import Handler, script, talk

ID = UUID(int=7)
CHECKED_IN = checkindocs.CheckInAnswer(
    assignment=None, pending=None, retry_after_min=1, retry_after_max=2
)

# --- retries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_statuses_are_tried_again_with_one_idempotency_key(status: int) -> None:
    found = talk(script(problem(status, "away"), answer(200, CHECKED_IN)), "check_in")
    assert found.result == CHECKED_IN
    keys = {headers["idempotency-key"] for _, _, headers, _ in found.requests}
    assert len(found.requests) == 2
    assert len(keys) == 1
    assert len(keys.pop()) == 32


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.ReadError("reset")]
)
def test_a_lost_connection_is_tried_again(error: Exception) -> None:
    found = talk(script(error, error, answer(200, CHECKED_IN)), "check_in", ID)
    assert found.result == CHECKED_IN
    assert len(found.requests) == 3


def test_tries_are_bounded_and_waits_grow_with_jitter() -> None:
    found = talk(script(httpx.ConnectError("no route")), "check_in")
    assert isinstance(found.result, ServiceError)
    assert (found.result.code, found.result.status) == ("unreachable", 0)
    assert "ConnectError: no route" in str(found.result)
    assert len(found.requests) == 5
    for wait, ceiling in zip(found.waits, [0.5, 1, 2, 4], strict=True):
        assert ceiling / 2 <= wait <= ceiling


def test_the_backoff_never_overflows() -> None:
    patience = Retries(random.Random(0), first=5, longest=300)
    assert all(150 <= patience.backoff(n) <= 300 for n in (8, 100, 10**6))


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "86400"}, 60.0),
        (
            {
                "date": "Wed, 21 Oct 2026 07:28:00 GMT",
                "retry-after": "Wed, 21 Oct 2026 07:28:30 GMT",
            },
            30.0,
        ),
        (
            {
                "date": "Wed, 21 Oct 2026 07:28:00 GMT",
                "retry-after": "Wed, 21 Oct 2020 07:28:30 GMT",
            },
            0.0,
        ),
    ],
)
def test_retry_after_is_obeyed_up_to_a_cap(headers: dict[str, str], wait: float) -> None:
    found = talk(script(problem(503, "away", **headers), answer(200, CHECKED_IN)), "check_in")
    assert found.result == CHECKED_IN
    assert found.waits == ([wait] if wait else [])


@pytest.mark.parametrize("text", ["soon", "-5", "٣", "Wed, 21 Oct 2026 07:28:30 GMT"])
def test_a_strange_retry_after_counts_as_none(text: str) -> None:
    reply = httpx.Response(503, headers=[(b"retry-after", text.encode())])
    found = talk(script(reply, answer(200, CHECKED_IN)), "check_in")
    assert 0.25 <= found.waits[0] <= 0.5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422])
def test_a_refusal_is_final_and_keeps_its_code(status: int) -> None:
    found = talk(script(problem(status, "some_reason")), "check_in")
    assert len(found.requests) == 1
    assert (found.result.code, found.result.status) == ("some_reason", status)
    assert str(found.result) == "POST /v1/check-ins: refused: some_reason (request req-1)"


def test_our_own_first_try_still_at_work_is_waited_for() -> None:
    found = talk(script(problem(409, "idempotency_in_flight"), answer(200, CHECKED_IN)), "check_in")
    assert found.result == CHECKED_IN
    assert len(found.waits) == 1


def test_a_registration_whose_answer_was_lost_has_one_effect() -> None:
    others: list[Coordinator] = []

    def make() -> Handler:
        other = Coordinator()
        others.append(other)

        def handle(request: httpx.Request) -> httpx.Response:
            response = other(request)
            if len(other.seen) <= 3:
                raise httpx.ReadError("gone after the commit")
            return response

        return handle

    found = talk(make, "register", protocol.Registration(token=TOKEN, name="ward-7"), key=None)
    assert found.result.key == KEY
    assert [list(o.clients) for o in others] == [["ward-7"], ["ward-7"]]
    assert len(found.requests) == 4
    assert "authorization" not in found.requests[0][2]


def test_any_reason_can_be_given() -> None:
    found = talk(
        script(problem(409, "over")), "decline", ID, "loss\x1b[2J\r\n\ud800\tnan" + "x" * 600
    )
    reason = json.loads(found.requests[0][3])["reason"]
    assert reason.startswith("loss [2J \n \tnanx")
    assert len(reason) == 500


# --- answers that are no answers -----------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 302, 403, 404])
def test_a_page_of_html_is_a_service_error(status: int) -> None:
    found = talk(script(httpx.Response(status, html="<h1>Proxy</h1>")), "check_in")
    assert isinstance(found.result, ServiceError)
    assert found.result.code == ("answer_invalid" if status == 200 else f"http_{status}")
    assert found.result.status == status
    assert "Proxy" not in str(found.result)


def test_a_redirect_is_not_followed() -> None:
    elsewhere = httpx.Response(307, headers={"location": "https://evil.test/"})
    found = talk(script(elsewhere), "check_in")
    assert [url for _, url, _, _ in found.requests] == [f"{SERVER}/v1/check-ins"]


def test_an_unknown_field_is_ignored_and_a_missing_one_named() -> None:
    document = json.loads(CHECKED_IN.model_dump_json())
    found = talk(script(httpx.Response(200, json={**document, "new": 1})), "check_in")
    assert found.result == CHECKED_IN
    del document["retry_after_min"]
    found = talk(script(httpx.Response(200, json=document)), "check_in")
    assert "retry_after_min: missing" in str(found.result)


# --- files -------------------------------------------------------------------------------------


def ticket(data: bytes) -> uploads.UploadTicket:
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    headers = {"Content-Length": str(len(data)), "Content-MD5": md5}
    return uploads.UploadTicket(
        id=ID, url=f"{STORE}/a%2Fb?signature=s%2Bg%3D&x=1", headers=headers, expires_at=NOW
    )


def test_a_file_goes_to_its_signed_address_with_exactly_the_signed_headers() -> None:
    found = talk(
        script(httpx.Response(503), httpx.Response(200)), "put_file", ticket(b"data"), b"data"
    )
    assert found.result == 4
    assert len(found.requests) == 2
    method, url, headers, body = found.requests[1]
    assert (method, url, body) == ("PUT", f"{STORE}/a%2Fb?signature=s%2Bg%3D&x=1", b"data")
    assert set(headers) == {"host", "content-length", "content-md5"}


def test_a_refused_file_names_the_stores_code_and_hides_the_address() -> None:
    found = talk(script(refusal("BadDigest")), "put_file", ticket(b"data"), b"data")
    assert (found.result.code, found.result.status) == ("store_refused", 403)
    assert "BadDigest" in str(found.result)
    assert not {"signature", "store.test", "secret"} & set(str(found.result).split("/"))
    assert "signature" not in str(found.result)


def promised(data: bytes, **changes: Any) -> protocol.Download:
    digest = hashlib.sha256(data).hexdigest()
    whole: dict[str, Any] = {"sha256": digest, "size": len(data), "url": f"{STORE}/f?signature=s"}
    return protocol.Download(**{**whole, "expires_at": NOW + timedelta(1), **changes})


def test_a_download_is_checked_and_carries_no_key() -> None:
    data = b"version" * 1000
    found = talk(script(httpx.Response(200, content=data)), "fetch", promised(data))
    assert found.result == data
    assert set(found.requests[0][2]) == {"host", "accept-encoding"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sha256": "0" * 64}, "SHA-256 is"),
        ({"size": 6}, "more than 6 bytes"),
        ({"size": 8}, "got 7 bytes"),
    ],
)
def test_another_file_than_promised_is_refused(changes: dict[str, Any], text: str) -> None:
    found = talk(
        script(httpx.Response(200, content=b"version")), "fetch", promised(b"version", **changes)
    )
    assert found.result.code == "download_mismatch"
    assert text in str(found.result)


def test_an_endless_download_is_cut() -> None:
    class Endless(httpx.SyncByteStream):
        sent = 0

        def __iter__(self) -> Iterator[bytes]:
            while True:
                Endless.sent += 1
                yield bytes(65_536)

    handler = httpx.MockTransport(lambda request: httpx.Response(200, stream=Endless()))
    with (
        Client(SERVER, transport=handler) as client,
        pytest.raises(ServiceError, match="more than"),
    ):
        client.fetch(promised(b"version"))
    assert Endless.sent == 1


def test_weights_are_announced_sent_and_completed() -> None:
    data = b"weights"
    steps = [
        answer(201, ticket(data)),
        httpx.Response(200),
        answer(202, uploads.UploadStatus(id=ID, state="uploaded")),
    ]
    found = talk(script(*steps), "send_weights", ID, data)
    assert found.result.state == "uploaded"
    assert json.loads(found.requests[0][3]) == announce(data).model_dump()
    assert found.requests[2][1] == f"{SERVER}/v1/uploads/{ID}/complete"


# --- lists -------------------------------------------------------------------------------------


def clients(*names: str) -> list[Any]:
    return [
        protocol.ClientInfo(
            id=UUID(int=n), name=name, state="active", tags=[], created_at=NOW
        ).model_dump(mode="json")
        for n, name in enumerate(names)
    ]


def test_a_list_is_walked_page_by_page() -> None:
    pages = [
        httpx.Response(200, json={"items": clients("a", "b"), "next": "c+1"}),
        httpx.Response(200, json={"items": [], "next": "c2"}),
        httpx.Response(503),
        httpx.Response(200, json={"items": clients("z"), "next": None}),
    ]
    found = talk(script(*pages), "clients")
    assert [c.name for c in found.result] == ["a", "b", "z"]
    assert [url.partition("limit=200")[2] for _, url, _, _ in found.requests] == [
        "",
        "&cursor=c%2B1",
        "&cursor=c2",
        "&cursor=c2",
    ]


def test_a_damaged_page_is_a_service_error() -> None:
    found = talk(script(httpx.Response(200, json={"items": [{"id": KEY}]})), "clients")
    assert found.result.code == "answer_invalid"
    assert KEY not in str(found.result)
