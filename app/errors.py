"""Problems the coordinator answers with (RFC 9457), and how library errors become them.

Owns status and code of every refusal; 500 means a bug. Must not know routes.

Refusal
├── Invalid          422  the request is well-formed but cannot be
├── Unauthorized     401  no valid key
├── Forbidden        403  the key's role may not do this
├── Missing          404  not there, or not yours
├── Conflict         409  the present state forbids it
├── Gone             410  it was deleted, as the retention rules say
├── Outdated         412  it was changed since it was read
├── TooLarge         413  more bytes than are read
├── TooMany          429  more than one client may ask for in this time
└── Unavailable      503  a server behind the coordinator does not answer
"""

from __future__ import annotations

from fedselect.errors import FedSelectError, LifecycleError


class Refusal(FedSelectError):  # noqa: N818 - the name of an answer, not of a failure
    """A deliberate refusal with an HTTP status; the text is for people, the code for programs."""

    status = 400
    title = "Bad request"
    code = "bad_request"
    retry_after: int | None = None  # seconds, where they are known; otherwise they are drawn


class Invalid(Refusal):
    """The request is understood but cannot be carried out as it stands."""

    status, title, code = 422, "Invalid request", "request_invalid"


class Unauthorized(Refusal):
    """No key, or one that is not valid (any more)."""

    status, title, code = 401, "Not authenticated", "key_missing"


class Forbidden(Refusal):
    """The key is valid but its role may not do this."""

    status, title, code = 403, "Not allowed", "scope_missing"


class Missing(Refusal):
    """There is no such thing in this project."""

    status, title, code = 404, "Not found", "not_found"


class Conflict(Refusal):
    """The present state forbids it; asking again changes nothing."""

    status, title, code = 409, "Conflict", "conflict"


class Gone(Refusal):
    """It was here, and has been deleted for good."""

    status, title, code = 410, "Gone", "object_deleted"


class Outdated(Refusal):
    """It was changed since the caller read it; nothing is done."""

    status, title, code = 412, "Precondition failed", "etag_mismatch"


class TooLarge(Refusal):
    """More bytes than the coordinator reads."""

    status, title, code = 413, "Too large", "body_too_large"


class TooMany(Refusal):
    """More than one client may ask for; ``retry_after`` seconds later there is room again."""

    status, title, code = 429, "Too many requests", "too_many"

    def __init__(self, message: str, *, code: str | None = None, retry_after: int) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Unavailable(Refusal):
    """A server behind the coordinator does not answer; try again later."""

    status, title, code = 503, "Temporarily unavailable", "unavailable"


def as_refusal(error: FedSelectError) -> Refusal:
    """The refusal that tells a caller about a library error."""
    if isinstance(error, Refusal):
        return error
    kind = Conflict if isinstance(error, LifecycleError) else Invalid
    return kind(str(error), code=error.code)
