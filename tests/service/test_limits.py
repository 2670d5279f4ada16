"""How many calls a key may make, on a real Redis and without one."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from app import auth
from app.errors import TooMany
from app.limits import Callers, OwnBuckets, Rate, SharedBuckets, spend
from app.main import create_app
from app.outermost import Outermost
from app.wiring import Coordinator

from .factories import Caller, Project, TestClient, ok, refused

SLOW = Rate(per_second=0.01, burst=5)  # none comes back while a test runs
NOWHERE = "redis://127.0.0.1:1/0"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    rate, full, now = Rate(per_second=2, burst=3), 0.0, 100.0
    for _ in range(3):
        full, wait = spend(full, now, rate)
        assert wait == 0
    full, wait = spend(full, now, rate)
    assert wait == pytest.approx(0.5)
    assert spend(full, now + 0.5, rate)[1] == 0
    _, wait = spend(full, now + 0.49, rate)
    assert wait == pytest.approx(0.01)


def test_refused_calls_cost_nothing() -> None:
    clock = Clock()
    buckets = OwnBuckets(Rate(per_second=1, burst=1), clock=clock)
    assert buckets.wait(b"a") == 0
    assert [buckets.wait(b"a") for _ in range(50)] == [1.0] * 50
    clock.now += 1
    assert buckets.wait(b"a") == 0
    assert buckets.wait(b"b") == 0, "everybody has a bucket of their own"


def test_many_processes_share_one_bucket(environment: dict[str, str]) -> None:
    who = secrets.token_bytes(8)
    url = environment["REDIS_URL"]
    both = [SharedBuckets(url, SLOW), SharedBuckets(url, SLOW)]
    waits = [both[i % 2].wait(who) for i in range(12)]
    assert [wait == 0 for wait in waits] == [True] * 5 + [False] * 7
    assert all(90 < wait <= 100 for wait in waits[5:])


def test_calls_at_the_same_moment_are_all_counted(environment: dict[str, str]) -> None:
    who, buckets = secrets.token_bytes(8), SharedBuckets(environment["REDIS_URL"], SLOW)
    waits: list[float] = []
    threads = [threading.Thread(target=lambda: waits.append(buckets.wait(who))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert Counter(wait == 0 for wait in waits) == {True: 5, False: 15}


def test_without_redis_each_process_holds_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    callers = Callers(NOWHERE, SLOW, at_once=4)
    for _ in range(5):
        callers.check_own("Bearer x", "peer")
        callers.check_shared("Bearer x")
    with pytest.raises(TooMany):
        callers.check_own("Bearer x", "peer")
    assert caplog.text.count("limits hold in each process alone") == 1, "it is left alone a while"


@pytest.fixture
def strict(core: Coordinator) -> Iterator[TestClient]:
    """A coordinator of its own that allows five calls."""
    settings = core.settings.model_copy(update={"calls_per_second": 0.01, "calls_burst": 5})
    with TestClient(create_app(settings), raise_server_exceptions=False) as api:
        yield api


def test_a_flood_is_refused_and_the_others_work_on(strict: TestClient, project: Project) -> None:
    loud = Caller(strict, project.owner.key)
    quiet = Caller(strict, project.caller("viewer").key)
    answers = [loud.get("/v1/me") for _ in range(8)]
    assert [a.status_code for a in answers] == [200] * 5 + [429] * 3
    refused(answers[-1], 429, "rate_limited")
    assert 90 < int(answers[-1].headers["retry-after"]) <= 101
    ok(quiet.get("/v1/me"))
    ok(Caller(strict, None).get("/health/live"))


def test_whoever_guesses_keys_is_slowed_down(strict: TestClient) -> None:
    """Calls without any key count for the address that they come from."""
    nobody = Caller(strict, None)
    codes = [nobody.post("/v1/clients", {"token": "x", "name": "x"}) for _ in range(7)]
    assert [c.status_code for c in codes] == [401] * 5 + [429] * 2


def test_a_key_is_one_caller_however_the_header_is_written(
    strict: TestClient, project: Project
) -> None:
    key = str(project.owner.key)
    written = [
        f"{word}{' ' * gap}{key}" for word in ("Bearer", "BEARER", "bEaReR") for gap in (1, 3)
    ]
    codes = [strict.get("/v1/me", headers={"Authorization": text}).status_code for text in written]
    assert codes == [200] * 5 + [429]


def test_the_key_that_opens_is_the_key_that_is_counted(
    strict: TestClient, project: Project
) -> None:
    """A second header does not give a call a bucket of its own."""
    codes = []
    for number in range(7):
        sent = [("Authorization", f"Bearer {project.owner.key}"), ("Authorization", f"x {number}")]
        codes.append(strict.get("/v1/me", headers=sent).status_code)
    assert codes == [200] * 5 + [429] * 2


def test_whoever_invents_keys_is_slowed_down_and_the_others_behind_the_address_are_not(
    strict: TestClient, core: Coordinator, project: Project
) -> None:
    ok(Caller(strict, project.owner.key).get("/v1/me"))
    invented = [auth.mint(auth.KEY_PREFIX, b"another pepper").text for _ in range(7)]
    answers = [Caller(strict, key).get("/v1/me") for key in invented]
    assert [a.status_code for a in answers] == [401] * 5 + [429] * 2
    refused(answers[-1], 429, "rate_limited")
    ok(Caller(strict, project.owner.key).get("/v1/me"))


def test_a_header_that_nobody_reads_gives_no_further_guesses(strict: TestClient) -> None:
    """Registration asks for no key, so each invented one would be a caller of its own."""
    body = {"token": "x", "name": "x"}
    codes = [Caller(strict, f"fsk_{n}").post("/v1/clients", body).status_code for n in range(7)]
    assert codes == [401] * 5 + [429] * 2


def test_another_process_counts_the_same_calls(
    strict: TestClient, core: Coordinator, project: Project
) -> None:
    loud = Caller(strict, project.owner.key)
    for _ in range(5):
        ok(loud.get("/v1/me"))
    settings = core.settings.model_copy(update={"calls_per_second": 0.01, "calls_burst": 5})
    with TestClient(create_app(settings), raise_server_exceptions=False) as second:
        refused(Caller(second, project.owner.key).get("/v1/me"), 429, "rate_limited")


# --- turns --------------------------------------------------------------------------------------


class Doors:
    """An application whose calls stay inside until they are let out."""

    def __init__(self) -> None:
        self.inside: list[bytes] = []
        self.open = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside.append(dict(scope["headers"])[b"authorization"])
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def calling(app: Outermost, key: bytes, sent: list[int]) -> asyncio.Task[None]:
    """A call of ``key``; the status of its answer is added to ``sent``."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            sent.append(message["status"])

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/me",
        "headers": [(b"authorization", key)],
        "client": ("127.0.0.1", 1),
        "request_id": "test",
        "query_string": b"",
    }
    return asyncio.create_task(app(scope, receive, send))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_one_callers_calls_wait_for_each_other_and_nobody_elses() -> None:
    async def story() -> None:
        doors, sent = Doors(), []
        callers = Callers(NOWHERE, Rate(100, 100), at_once=2)
        app = Outermost(doors, lambda _: 1000, callers)
        loud = [calling(app, b"loud", sent) for _ in range(5)]
        await settled()
        assert doors.inside == [b"loud"] * 2
        loud[2].cancel()  # whoever gives up waiting leaves the line
        other = calling(app, b"other", sent)
        await settled()
        assert doors.inside == [b"loud"] * 2 + [b"other"]
        doors.open.set()
        await asyncio.gather(*loud, other, return_exceptions=True)
        assert doors.inside.count(b"loud") == 4
        assert sent == [200] * 5
        assert not callers.turns._lines

    asyncio.run(story())


def test_refusals_of_a_flood_wait_and_the_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.outermost.HELD_BACK", 3600)
    monkeypatch.setattr("app.outermost.MOST_HELD_BACK", 2)

    async def story() -> None:
        doors, sent, served = Doors(), [], []
        doors.open.set()
        callers = Callers(NOWHERE, Rate(0.01, 1), at_once=2)
        app = Outermost(doors, lambda _: 1000, callers)
        await calling(app, b"loud", sent)
        held = [calling(app, b"loud", sent) for _ in range(2)]
        await settled()
        await calling(app, b"other", served)
        assert (sent, served) == ([200], [200]), "the refused ones still wait"
        await calling(app, b"loud", sent)
        assert sent == [200, 429], "no more than two are held back"
        for each in held:
            each.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert app._held == 0

    asyncio.run(story())
