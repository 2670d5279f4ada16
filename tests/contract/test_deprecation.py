"""A route that is to go says so, in its description and in every answer, half a year before."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from app import description
from app.auth import Scope
from app.deprecation import NOTICE, deprecated
from app.web import require
from fedselect.protocol import Answer

SINCE = datetime(2027, 1, 1, tzinfo=UTC)
SUNSET = datetime(2027, 9, 1, tzinfo=UTC)
MARK = deprecated(since=SINCE, sunset=SUNSET, successor="/v2/things")


class Things(Answer):
    """Some."""

    count: int = 0


def _app() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/things", operation_id="listThings", **MARK)
    def things() -> Things:
        return Things()

    @app.get("/v1/others", operation_id="listOthers")
    def others(_: object = require(next(iter(Scope)))) -> Things:
        return Things()

    return app


def test_its_answers_say_when_it_goes() -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://coordinator") as client:
            return await client.get("/v1/things")

    answer = asyncio.run(ask())
    assert answer.json() == {"count": 0}
    assert answer.headers["Deprecation"] == f"@{SINCE.timestamp():.0f}"
    assert parsedate_to_datetime(answer.headers["Sunset"]) == SUNSET
    assert answer.links["successor-version"]["url"] == "/v2/things"


def test_its_description_says_so() -> None:
    app = _app()
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    paths = description.complete(app.openapi(), routes)["paths"]
    operation = paths["/v1/things"]["get"]
    assert operation["deprecated"]
    assert {"Deprecation", "Sunset", "Link"} <= set(operation["responses"]["200"]["headers"])
    assert "Sunset" not in paths["/v1/others"]["get"]["responses"]["200"]["headers"]


def test_nobody_is_given_less_than_half_a_year() -> None:
    deprecated(since=SINCE, sunset=SINCE + NOTICE, successor="/")
    with pytest.raises(ValueError, match="182 days"):
        deprecated(since=SINCE, sunset=SINCE + NOTICE - timedelta(days=1), successor="/")
