"""The client SDK: ``Client`` for blocking programs, ``AsyncClient`` for asyncio.

Owns the two drivers, which send with httpx what a flow asks for, and the key: it is in no
exception, repr or log. The calls are ``operations``, their retries ``exchange``. Must not know
training, files or the state of an agent.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from uuid import UUID

import httpx

from fedselect import __version__
from fedselect.administration import Administration
from fedselect.errors import ServiceError
from fedselect.exchange import Ask, Flow, Reply, Retries
from fedselect.operations import Listing
from fedselect.sending import Source, announce

__all__ = ["AsyncClient", "Client", "Retries", "Source", "announce"]

TIMEOUT = httpx.Timeout(60, connect=10, pool=10)  # seconds; 60 of silence, not for a whole file

T = TypeVar("T")


class _Discreet(logging.Filter):
    """Cuts the query off signed addresses in httpx's own log: whoever reads it could use them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything pass."""
        if isinstance(record.args, tuple):
            record.args = tuple(_unsigned(each) for each in record.args)
        return True


def _unsigned(value: object) -> object:
    if isinstance(value, httpx.URL) and b"X-Amz-" in value.query:
        return value.copy_with(query=None)
    return value


# An application that turns INFO on, and our own agent, would otherwise write them down.
logging.getLogger("httpx").addFilter(_Discreet())


@dataclass(slots=True)
class Control:
    """Bytes of HTTP that are no file: the coordinator's documents, and the headers of all calls.

    As the messages are in HTTP/1.1, without the layers below; what a retry sends counts again.
    """

    sent: int = 0
    received: int = 0

    def take(self) -> tuple[int, int]:
        """Sent and received since this was last asked."""
        taken = (self.sent, self.received)
        self.sent = self.received = 0
        return taken


class _Connected(Administration):
    """A coordinator's address and the key for it; retries jitter unless they are given.

    ``control`` counts what was exchanged besides files.
    """

    _project: str | None = None

    def __init__(self, server: str, *, key: str | None, retries: Retries | None) -> None:
        super().__init__(retries or Retries(random.SystemRandom()))
        self.server = _address(server)
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ServiceError(
                "the key has characters that no key has; was it copied whole?", code="key_invalid"
            )
        self._key = key
        self.control = Control()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.server!r})"

    def _request(self, ask: Ask) -> httpx.Request:
        url = ask.url if ask.signed else self.server + ask.url
        request = httpx.Request(ask.method, url, headers=ask.headers, content=ask.content)
        if not ask.signed:
            request.headers["Accept"] = "application/json"
            request.headers["User-Agent"] = f"fedselect/{__version__}"
            if self._key is not None:
                request.headers["Authorization"] = f"Bearer {self._key}"
            if self._project is not None:
                request.headers["FedSelect-Project"] = self._project
        line = len(request.method) + 1 + len(request.url.raw_path)
        self.control.sent += _head_size(line, request.headers)
        self.control.sent += 0 if ask.signed else len(ask.content or b"")
        return request

    def _reply(self, response: httpx.Response, body: bytes, *, ask: Ask) -> Reply:
        self.control.received += _head_size(len(response.reason_phrase) + 4, response.headers)
        self.control.received += 0 if ask.signed else len(body)
        if self._key is not None and response.is_error:
            # A proxy's error page may repeat our request.
            body = body.replace(self._key.encode(), b"[key]")
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status_code, headers, body[: ask.limit], cut=len(body) > ask.limit)


def _head_size(line: int, headers: httpx.Headers) -> int:
    """Bytes of a message before its body, of which ``line`` are in the first line beside the
    version and the end.
    """
    fields = sum(len(name) + len(value) + 4 for name, value in headers.raw)
    return line + len(" HTTP/1.1\r\n") + fields + len("\r\n")


def _address(server: str) -> str:
    try:
        url = httpx.URL(server)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query:
        raise ServiceError(
            "the server's address must look like https://host:port", code="server_invalid"
        )
    return server.rstrip("/")


def _nothing(error: Exception) -> Reply:
    # A protocol error may repeat the header that it does not like; these two cannot.
    safe = isinstance(error, httpx.NetworkError | httpx.TimeoutException)
    name = type(error).__name__
    return Reply(0, reason=f"{name}: {error}" if safe and str(error) else name)


class Client(_Connected):
    """The blocking client. ``sleep`` may end early; ``transport`` stands in for the network.

    ``project`` is for a key of a whole organisation, which must say what a call is about.

    Raises:
        ServiceError: the address or the key cannot be one (``server_invalid``, ``key_invalid``).
    """

    def __init__(
        self,
        server: str,
        *,
        key: str | None = None,
        project: UUID | str | None = None,
        retries: Retries | None = None,
        sleep: Callable[[float], object] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(server, key=key, retries=retries)
        self._project = str(UUID(str(project))) if project is not None else None
        self._sleep = sleep
        self._http = httpx.Client(transport=transport, timeout=TIMEOUT)

    def drive(self, flow: Flow[T]) -> T:
        """Carry a flow to its end."""
        try:
            ask = next(flow)
            while True:
                if ask.after:
                    self._sleep(ask.after)
                ask = flow.send(self._send(ask))
        except StopIteration as end:
            answer: T = end.value
            return answer

    def walk(self, pages: Listing[T]) -> Iterator[T]:
        """All items of a list."""
        page = self.drive(pages.page(self._retries, None))
        yield from page.items
        while page.next:
            page = self.drive(pages.page(self._retries, page.next))
            yield from page.items

    def _send(self, ask: Ask) -> Reply:
        try:
            with closing(self._http.send(self._request(ask), stream=True)) as response:
                return self._reply(response, _read(response, ask.limit), ask=ask)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            return _nothing(error)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Connected):
    """The client for asyncio; see :class:`Client`."""

    def __init__(
        self,
        server: str,
        *,
        key: str | None = None,
        project: UUID | str | None = None,
        retries: Retries | None = None,
        sleep: Callable[[float], Coroutine[Any, Any, object]] = asyncio.sleep,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(server, key=key, retries=retries)
        self._project = str(UUID(str(project))) if project is not None else None
        self._sleep = sleep
        self._http = httpx.AsyncClient(transport=transport, timeout=TIMEOUT)

    async def drive(self, flow: Flow[T]) -> T:
        """Carry a flow to its end."""
        try:
            ask = next(flow)
            while True:
                if ask.after:
                    await self._sleep(ask.after)
                ask = flow.send(await self._send(ask))
        except StopIteration as end:
            answer: T = end.value
            return answer

    async def walk(self, pages: Listing[T]) -> AsyncIterator[T]:
        """All items of a list."""
        page = await self.drive(pages.page(self._retries, None))
        for item in page.items:
            yield item
        while page.next:
            page = await self.drive(pages.page(self._retries, page.next))
            for item in page.items:
                yield item

    async def _send(self, ask: Ask) -> Reply:
        try:
            response = await self._http.send(self._request(ask), stream=True)
            async with aclosing(response):
                return self._reply(response, await _aread(response, ask.limit), ask=ask)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            return _nothing(error)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _read(response: httpx.Response, limit: int) -> bytes:
    """The body, or more than ``limit`` bytes of it."""
    body = io.BytesIO()  # hands its bytes out without a copy
    for chunk in response.iter_bytes():
        body.write(chunk)
        if body.tell() > limit:
            break
    return body.getvalue()


async def _aread(response: httpx.Response, limit: int) -> bytes:
    body = io.BytesIO()  # hands its bytes out without a copy
    async for chunk in response.aiter_bytes():
        body.write(chunk)
        if body.tell() > limit:
            break
    return body.getvalue()
