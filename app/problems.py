"""Problem documents: every error as RFC 9457 describes it.

Owns how an error is shown. Which errors there are, and their codes, is ``app.errors``.
"""

from __future__ import annotations

import logging
import math
import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from app.errors import Invalid, Refusal, Unavailable, as_refusal
from fedselect.errors import FedSelectError
from fedselect.lifecycle import retry_window
from fedselect.policies import RoundPolicy
from fedselect.protocol import Problem

log = logging.getLogger(__name__)
CHECK_IN_PATH = "/v1/check-ins"
RETRY_MEAN = 4.0  # seconds until a call that may pass is tried again


def problem(request: Request, refusal: Refusal, errors: list[Any] | None = None) -> JSONResponse:
    """An error as RFC 9457 describes it."""
    document = Problem(
        type=f"urn:fedselect:problem:{refusal.code}",
        title=refusal.title,
        status=refusal.status,
        detail=str(refusal),
        code=refusal.code,
        request_id=request.scope.get("request_id"),
        errors=errors,
    )
    headers = None
    if _passes(refusal):
        headers = {"Retry-After": str(refusal.retry_after or _when(request))}
    if refusal.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(
        document.model_dump(exclude_none=True),
        refusal.status,
        headers,
        media_type="application/problem+json",
    )


def _passes(refusal: Refusal) -> bool:
    """Whether the same call may succeed later."""
    return refusal.status in {429, 503} or refusal.code == "client_suspended"


def _when(request: Request) -> str:
    """Seconds until the next try, drawn anew for each answer: after an outage all come at once."""
    waiting = request.url.path == CHECK_IN_PATH
    low, high = retry_window(RoundPolicy().retry_after if waiting else RETRY_MEAN)
    return str(math.ceil(low + (high - low) * secrets.randbelow(1000) / 1000))


def install_problem_handlers(app: FastAPI) -> None:
    """Turn every error into a problem document."""

    async def deliberate(request: Request, error: Exception) -> Response:
        if not isinstance(error, FedSelectError):
            raise error
        return problem(request, as_refusal(error))

    async def invalid(request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        return problem(request, *_explained(error))

    async def http(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        if error.status_code == 400:  # FastAPI could not read the body
            return problem(request, Invalid("the body is not JSON", code="json_invalid"))
        answer = problem(request, _no_route(request, error))
        known = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
        answer.headers.update(known or {})
        return answer

    app.add_exception_handler(FedSelectError, deliberate)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(kind, _database)
    app.add_exception_handler(InternalError, _cut_off)
    app.add_exception_handler(Exception, _bug)


async def _database(request: Request, error: Exception) -> Response:
    log.warning("database unavailable: %s", type(error).__name__)
    refusal = Unavailable("the database does not answer", code="database_unavailable")
    return problem(request, refusal)


async def _cut_off(request: Request, error: Exception) -> Response:
    # A process that got no turn for so long that the database gave its locks to others.
    ended = isinstance(error, InternalError) and getattr(error.orig, "sqlstate", "") == "25P03"
    return await (_database if ended else _bug)(request, error)


async def _bug(request: Request, error: Exception) -> Response:
    log.error("request %s failed", request.scope.get("request_id"), exc_info=error)
    refusal = Refusal("this is a bug; quote the request id", code="internal_error")
    refusal.status, refusal.title = 500, "Internal error"
    return problem(request, refusal)


def _no_route(request: Request, error: HTTPException) -> Refusal:
    detail, code = str(error.detail), "bad_request"
    if error.status_code == 404:
        detail, code = "there is no such path; /docs shows those that there are", "route_unknown"
    elif error.status_code == 405:
        detail = f"{request.method} is not possible here; this path takes {_allowed(request)}"
        code = "method_not_allowed"
    refusal = Refusal(detail, code=code)
    refusal.status, refusal.title = error.status_code, str(error.detail)
    return refusal


def _allowed(request: Request) -> str:
    """All methods of a path; the router knows only those of the first route that it tried."""
    routes = [each for each in request.app.state.routes if each.path_regex.match(request.url.path)]
    return ", ".join(sorted({method for route in routes for method in route.methods}))


def _explained(error: RequestValidationError) -> tuple[Refusal, list[Any]]:
    found = [{"where": _where(e), "problem": e["msg"]} for e in error.errors()]
    unknown = [_where(e) for e in error.errors() if e["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(unknown)
        return Invalid(f"unknown setting: {names[:300]}", code="setting_unknown"), found
    broken = next((e for e in error.errors() if e["type"] == "json_invalid"), None)
    if broken is not None:
        why = f"{broken['ctx']['error']} at character {broken['loc'][-1]}"
        return Invalid(f"the body is not JSON: {why}", code="json_invalid"), found
    first = f"{found[0]['where']}: {found[0]['problem']}" if found else "invalid"
    codes = {_code(e) for e in error.errors()}
    return Invalid(first, code=codes.pop() if len(codes) == 1 else None), found


def _where(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"])


def _code(error: Any) -> str:
    # Of the checks that pydantic leaves to us, those of settings ask whether they fit each other.
    contradiction = error["type"] == "value_error" and "settings" in error["loc"]
    return "settings_invalid" if contradiction else Invalid.code
