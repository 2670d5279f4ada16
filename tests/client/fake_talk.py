"""Making one call with both clients, each against a fresh other side, and comparing them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from fedselect.client import AsyncClient, Client, Retries
from fedselect.errors import ServiceError

from .fake_coordinator import KEY, SERVER

Handler = Callable[[httpx.Request], httpx.Response]


@dataclass
class Talk:
    """What one client did: its answer or error, its requests and its waits."""

    result: Any = None
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def talk(make: Callable[[], Handler], method: str, *args: Any, key: str | None = KEY) -> Talk:
    """Make one call with both clients, each against a fresh other side, and compare them."""
    blocking, asynchronous = Talk(), Talk()
    drive(make(), blocking, method, *args, key=key)
    asyncio.run(adrive(make(), asynchronous, method, *args, key=key))
    assert repr(blocking.result) == repr(asynchronous.result)
    assert blocking.waits == asynchronous.waits
    assert without_keys(blocking.requests) == without_keys(asynchronous.requests)
    return blocking


def without_keys(requests: list[Any]) -> list[Any]:
    return [
        (method, url, {n: v for n, v in headers.items() if n != "idempotency-key"}, body)
        for method, url, headers, body in requests
    ]


def recording(handler: Handler, into: Talk) -> httpx.MockTransport:
    def handle(request: httpx.Request) -> httpx.Response:
        into.requests.append(
            (request.method, str(request.url), dict(request.headers), request.content)
        )
        return handler(request)

    return httpx.MockTransport(handle)


def drive(handler: Handler, into: Talk, method: str, *args: Any, key: str | None) -> None:
    with Client(
        SERVER,
        key=key,
        retries=Retries(random.Random(1)),
        sleep=into.waits.append,
        transport=recording(handler, into),
    ) as client:
        try:
            result = getattr(client, method)(*args)
            into.result = list(result) if isinstance(result, Iterator) else result
        except ServiceError as error:
            into.result = error


async def adrive(handler: Handler, into: Talk, method: str, *args: Any, key: str | None) -> None:
    async def sleep(seconds: float) -> None:
        into.waits.append(seconds)

    async with AsyncClient(
        SERVER,
        key=key,
        retries=Retries(random.Random(1)),
        sleep=sleep,
        transport=recording(handler, into),
    ) as client:
        try:
            result = getattr(client, method)(*args)
            into.result = (
                [i async for i in result] if hasattr(result, "__aiter__") else await result
            )
        except ServiceError as error:
            into.result = error


def script(*steps: httpx.Response | Exception) -> Callable[[], Handler]:
    """A server that gives these answers in turn, the last one for ever."""

    def make() -> Handler:
        left = list(steps)

        def handle(request: httpx.Request) -> httpx.Response:
            step = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(step, Exception):
                raise step
            return httpx.Response(step.status_code, headers=step.headers, content=step.content)

        return handle

    return make
