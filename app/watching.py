"""Around every request: its id, its line in the log, its time in the metrics, its span.

Owns the very first and the very last look at a request, refused ones included. Must not change what
is asked or answered, nor write down more of an address than the route's template.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import uuid4

from app import logs, metrics, tracing

log = logging.getLogger("fedselect.access")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # a label takes no others
QUIET = ("/health/", "/metrics")  # asked every few seconds
UNKNOWN = "unknown"  # the route of a path that leads nowhere, or of a request refused before


class Watched:
    """The outermost layer; gives each request the id that its answer will carry."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        wanted = headers.get(b"x-request-id", "")
        scope["request_id"] = wanted if REQUEST_ID.match(wanted) else uuid4().hex
        parent = {"traceparent": headers.get(b"traceparent", "")}
        status = 500
        begun = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with (
            logs.about(request=scope["request_id"]),
            tracing.span("request", kind="server", parent=parent) as span,
        ):
            try:
                await self._app(scope, receive, noting)
            finally:
                span.say(**logs.current())
                _tell(scope, status, time.perf_counter() - begun, span)


def _tell(scope: Message, status: int, seconds: float, span: tracing.Span) -> None:
    method = scope["method"] if scope["method"] in METHODS else "other"
    route = getattr(scope.get("route"), "path", UNKNOWN)
    metrics.HTTP.labels(method, route, status).observe(seconds)
    span.http(method, route, status)
    level = logging.DEBUG if scope["path"].startswith(QUIET) else logging.INFO
    facts = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
    log.log(level, "%s %s: %d", method, route, status, extra={"facts": facts})
