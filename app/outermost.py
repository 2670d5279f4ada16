"""What stands before every request: its headers, floods, bodies that are too large.

Owns the layer around the application. Must not know routes or what any of them does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from fastapi import Request

from app.errors import TooLarge, TooMany
from app.limits import Callers
from app.problems import problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
NO_CSP = b"default-src 'none'; frame-ancestors 'none'"
PAGE_CSP = b"default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'"
HELD_BACK = 1.0  # seconds, about, until a call beyond a key's rate is refused
MOST_HELD_BACK = 1000  # calls of a process at a time; they cost their connections alone


class Outermost:
    """Gives each answer its id and security headers, stops floods and oversized bodies."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        limit: Callable[[str], int],
        callers: Callers,
    ) -> None:
        self._app = app
        self._limit = limit
        self._callers = callers
        self._held = 0
        self._rng = random.SystemRandom()

    async def _hold_back(self) -> None:
        """Let a flood wait for its refusals: a caller that asks again at once would otherwise use
        up the process with them. Not all at the same moment, for they come back together.
        """
        if self._held >= MOST_HELD_BACK:
            return
        self._held += 1
        try:
            await asyncio.sleep(HELD_BACK * self._rng.uniform(0.5, 1.5))
        finally:
            self._held -= 1

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_headers(send, scope)
        if scope["path"].startswith("/health/"):
            await self._serve(scope, receive, send, nullcontext())
            return
        peer = (scope.get("client") or ("unknown", 0))[0]
        try:
            who = self._callers.check_own(_authorization(scope), peer)
        except TooMany as refusal:
            await self._hold_back()
            await problem(Request(scope), refusal)(scope, receive, send)
            return
        await self._serve(scope, receive, send, self._callers.turns.of(who))

    async def _serve(
        self, scope: Message, receive: Receive, send: Send, turn: AbstractAsyncContextManager[None]
    ) -> None:
        """Read the body, at whatever pace it comes, then wait for the caller's turn."""
        limit = self._limit(scope["path"])
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await _refuse_body(scope, receive, send, limit)
            return
        body = await _read_body(receive, limit)
        if body is None:
            await _refuse_body(scope, receive, send, limit)
            return
        async with turn:
            await self._app(scope, _replay(body, receive), send)


def _authorization(scope: Message) -> str:
    """The header as the routes read it: the first, if there are several."""
    found = (value for name, value in scope["headers"] if name == b"authorization")
    return str(next(found, b"").decode("latin-1"))


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None as soon as it is longer than the limit."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def once() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse_body(scope: Message, receive: Receive, send: Send, limit: int) -> None:
    refusal = TooLarge(f"the body is larger than the {limit} bytes that are read")
    response = problem(Request(scope), refusal)
    await response(scope, receive, send)


def _with_headers(send: Send, scope: Message) -> Send:
    # Nothing of ours runs in a browser but the page at /docs, whose scripts are its own.
    page = scope["path"] == "/docs"
    extra = [
        (b"x-request-id", scope["request_id"].encode()),
        (b"content-security-policy", PAGE_CSP if page else NO_CSP),
        (b"x-frame-options", b"DENY"),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
        (b"referrer-policy", b"no-referrer"),
    ]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = message.get("headers", [])
            named = {name for name, _ in own}  # a page of ours may bring a policy of its own
            message["headers"] = [*own, *(pair for pair in extra if pair[0] not in named)]
        await send(message)

    return sending
