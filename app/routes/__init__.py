"""HTTP handlers: check the scope, open the transaction, call one function."""

from __future__ import annotations

from typing import Any

from fedselect.protocol import Problem

_TEXTS = {
    401: "No key, or one that is not valid.",
    403: "The key's role may not do this.",
    404: "Not there, or not yours.",
    409: "The present state forbids it.",
    410: "It was deleted, as the retention rules say.",
    412: "It was changed since it was read; nothing was done.",
    413: "The body is too large.",
    429: "More than one client may ask for; `Retry-After` says when there is room again.",
    422: "The request is invalid; `errors` says where.",
    503: "A server behind the coordinator does not answer.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of an operation, for its OpenAPI description.

    Whoever sends a key may name a project that is not there, and may call too often.
    """
    named = {404, 429} if 401 in statuses else set()
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {
        s: {"description": _TEXTS[s], "content": content} for s in sorted({*statuses, *named, 422})
    }
