"""Sending files in parts: what is sent again, what is asked again, and when it is given up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedselect import protocol, uploads
from fedselect.sending import Source, announce, source
from fedselect.uploads import UploadReserve

from .fake_coordinator import NOW, STORE, answer, base64_of, refusal
from .fake_talk import Handler, talk

ID = UUID(int=7)
PART = 1000
DATA = bytes(range(256)) * 41  # 10,496 bytes: eleven parts, the last one of 496
TICKET = uploads.UploadTicket(id=ID, url=None, headers={}, expires_at=NOW)

Fault = Callable[["Store"], httpx.Response]


@pytest.fixture(autouse=True)
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MULTIPART_FROM", 2 * PART)
    monkeypatch.setattr(protocol, "PART_SIZE", PART)


def forget(store: Store) -> httpx.Response:
    store.parts.clear()
    return httpx.Response(404, text="<Code>NoSuchUpload</Code>")


def cut(store: Store) -> httpx.Response:
    raise httpx.WriteError("broken pipe")


def expire(store: Store) -> httpx.Response:
    store.signature += 1
    return refusal("AccessDenied")


@dataclass
class Store:
    """A coordinator and its store, for one file. ``faults`` come instead of the n-th PUT."""

    faults: dict[int, Fault] = field(default_factory=dict)
    always: Fault | None = None
    at_once: int = 4
    keeps_answers: set[int] = field(default_factory=set)  # PUTs that arrive, with the answer lost
    parts: dict[int, bytes] = field(default_factory=dict)
    signature: int = 0
    puts: int = 0
    asked: int = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/parts"):
            return self._missing()
        self.puts += 1
        fault = self.faults.get(self.puts, self.always)
        if fault is not None:
            return fault(self)
        number, body = int(request.url.params["part"]), request.content
        if request.url.params["signature"] != str(self.signature):
            return refusal("AccessDenied")
        assert body == DATA[(number - 1) * PART : number * PART]
        assert number not in self.parts, "what is there is not sent again"
        self.parts[number] = body
        if self.puts in self.keeps_answers:
            raise httpx.ReadError("reset")
        return httpx.Response(200)

    def _missing(self) -> httpx.Response:
        self.asked += 1
        announced = announce(DATA)
        lacking = [n for n in range(1, 12) if n not in self.parts]
        parts = [self._address(n, announced) for n in lacking[: self.at_once]]
        found = uploads.MissingParts(id=ID, missing=len(lacking), parts=parts, expires_at=NOW)
        return answer(200, found)

    def _address(self, number: int, announced: UploadReserve) -> uploads.PartAddress:
        start = (number - 1) * PART
        size = min(PART, len(DATA) - start)
        md5 = base64_of(announced.parts[number - 1])
        return uploads.PartAddress(
            number=number,
            start=start,
            size=size,
            url=f"{STORE}/f?part={number}&signature={self.signature}",
            headers={"content-length": str(size), "content-md5": md5},
        )


def send(make: Callable[[], Store]) -> tuple[list[Store], object, list[float]]:
    """Send the file with both clients, each to a fresh store."""
    stores: list[Store] = []

    def fresh() -> Handler:
        stores.append(make())
        return stores[-1]

    found = talk(fresh, "put_file", TICKET, DATA)
    return stores, found.result, found.waits


@pytest.mark.parametrize(
    ("make", "puts", "asked", "waits"),
    [
        pytest.param(lambda: Store(), 11, 4, 0, id="in batches of addresses"),
        pytest.param(lambda: Store(faults={3: cut}), 12, 5, 1, id="a cut costs one part"),
        pytest.param(lambda: Store(faults={1: expire}), 12, 5, 1, id="an expired address"),
        pytest.param(lambda: Store(keeps_answers={2}), 11, 5, 1, id="a lost answer costs nothing"),
        pytest.param(lambda: Store(faults={6: forget}), 17, 6, 1, id="a store that forgot"),
        pytest.param(
            lambda: Store(faults=dict.fromkeys(range(2, 21, 2), cut)), 21, 12, 10, id="ten cuts"
        ),
    ],
)
def test_a_file_in_parts_arrives(
    make: Callable[[], Store], puts: int, asked: int, waits: int
) -> None:
    stores, result, waited = send(make)
    for store in stores:
        assert b"".join(store.parts[n] for n in sorted(store.parts)) == DATA
        assert (store.puts, store.asked) == (puts, asked)
    assert isinstance(result, int)
    assert result >= len(DATA)
    assert len(waited) == waits


@pytest.mark.parametrize(
    ("fault", "code"), [(cut, "unreachable"), (expire, "store_refused"), (forget, "store_refused")]
)
def test_without_progress_it_is_given_up(fault: Fault, code: str) -> None:
    stores, result, waits = send(lambda: Store(always=fault))
    assert getattr(result, "code", None) == code
    assert [store.puts for store in stores] == [5, 5]
    for wait, ceiling in zip(waits, [0.5, 1, 2, 4, 8], strict=True):
        assert ceiling / 2 <= wait <= ceiling


def test_a_store_that_takes_parts_and_keeps_none_is_given_up() -> None:
    class Leaky(Store):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            reply = super().__call__(request)
            self.parts.clear()
            return reply

    stores, result, _ = send(Leaky)
    assert "has none of them" in str(result)
    assert stores[0].puts == 5 * 4


def test_a_refusal_of_the_coordinator_ends_it() -> None:
    class Over(Store):
        def _missing(self) -> httpx.Response:
            found = {"type": "urn:x", "title": "x", "status": 409, "detail": "over"}
            return httpx.Response(409, content=json.dumps(found | {"code": "assignment_expired"}))

    stores, result, _ = send(Over)
    assert getattr(result, "code", None) == "assignment_expired"
    assert stores[0].puts == 0


# --- what is announced -------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=5 * PART))
def test_an_announcement_describes_the_file_and_its_parts(data: bytes) -> None:
    found = announce(data)
    assert (found.size, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert found.md5 == hashlib.md5(data).hexdigest()
    pieces = [data[i : i + PART] for i in range(0, len(data), PART)]
    expected = [hashlib.md5(p).hexdigest() for p in pieces] if len(data) >= 2 * PART else []
    assert found.parts == expected
    assert found.part_size == (PART if expected else None)


def test_a_file_is_never_read_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def read(start: int, length: int) -> bytes:
        lengths.append(length)
        return DATA[start : start + length]

    file = Source(len(DATA), read)
    assert announce(file) == announce(DATA)
    talk(lambda: Store(), "put_file", TICKET, file)
    assert max(lengths) == PART


def test_a_source_of_bytes_copies_only_what_is_asked_for() -> None:
    assert source(DATA).read(5, 3) == DATA[5:8]


@pytest.mark.parametrize("parts", [[], ["0" * 32], ["0" * 32] * 12])
def test_a_wrong_number_of_parts_cannot_be_announced(parts: list[str]) -> None:
    honest = announce(DATA).model_dump()
    with pytest.raises(ValidationError, match="11 parts of 1000 bytes"):
        UploadReserve.model_validate(honest | {"parts": parts})
