"""Routes that are to go: what their answers and their description say until then.

Owns the headers ``Deprecation`` (RFC 9745), ``Sunset`` (RFC 8594) and the link to the successor
(RFC 8288). Which routes are deprecated, their modules say.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import Any

from fastapi import Depends, Response

NOTICE = timedelta(days=182)  # as docs/INTEGRATORS.md promises
TEXT = {"type": "string"}
HEADERS: dict[str, dict[str, Any]] = {
    "Deprecation": {"description": "Since when: `@`, seconds of Unix time.", "schema": TEXT},
    "Sunset": {"description": "When it goes, as an HTTP date.", "schema": TEXT},
    "Link": {"description": "What takes its place: `rel=successor-version`.", "schema": TEXT},
}


def deprecated(*, since: datetime, sunset: datetime, successor: str) -> dict[str, Any]:
    """Arguments for a route's decorator: it still works, and its answers say until when.

    ``since`` and ``sunset`` are in UTC; ``successor`` is the address of what to use instead.

    Raises:
        ValueError: it goes sooner than half a year after it was announced.
    """
    if sunset - since < NOTICE:
        raise ValueError(f"{since:%Y-%m-%d} to {sunset:%Y-%m-%d} is less than {NOTICE.days} days")
    told = {
        "Deprecation": f"@{since.timestamp():.0f}",
        "Sunset": format_datetime(sunset, usegmt=True),
        "Link": f'<{successor}>; rel="successor-version"',
    }

    def tell(response: Response) -> None:
        response.headers.update(told)

    return {"deprecated": True, "dependencies": [Depends(tell)]}
