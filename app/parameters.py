"""Query parameters: a misspelt filter must not silently give the whole list.

Owns which names a route knows. Must not know what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from app.errors import Invalid


def refuse_unknown(request: Request) -> None:
    """Check the names in the address of a request.

    Raises:
        Invalid: setting_unknown, with the names that the route does not know.
    """
    route: APIRoute = request.scope["route"]
    unknown = set(request.query_params) - set(_known(route.dependant))
    if unknown:
        names = ", ".join(f"query.{name}" for name in sorted(unknown))
        raise Invalid(f"unknown setting: {names[:300]}", code="setting_unknown")


def _known(part: Dependant) -> Iterator[str]:
    yield from (field.alias for field in part.query_params)
    for inner in part.dependencies:
        yield from _known(inner)
