"""One HTTP call as a conversation without sockets: what to ask, when to ask again, what it means.

Owns retries, the reading of answers and how a refusal becomes a ``ServiceError``. A flow yields
an :class:`Ask` and is sent the :class:`Reply`, as httpx does it in ``_auth``; the drivers of
``client`` do the rest. Must not open connections, sleep, read a clock or see the client's key.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urlencode
from uuid import uuid4

from pydantic import BaseModel, TypeAdapter, ValidationError

from fedselect.encryption import DecryptionError
from fedselect.errors import ServiceError
from fedselect.protocol import Download, Problem

ANSWER_LIMIT = 64 * 1024**2  # bytes of a JSON answer; a space of 20,000 tensors needs 4 MiB
# 0 stands for "no answer came"; the others say that the same call may succeed later.
TRANSIENT = frozenset({0, 408, 425, 429, 500, 502, 503, 504})
STORE_REFUSED = "store_refused"
DOWNLOAD_MISMATCH = "download_mismatch"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to send, ``after`` seconds of waiting.

    ``url`` is a path of the coordinator or, if ``signed``, a whole address of the object store,
    which must get neither our key nor a header that was not signed. At most ``limit`` bytes of the
    answer are read.
    """

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = field(default=None, repr=False)
    signed: bool = False
    limit: int = ANSWER_LIMIT
    after: float = 0.0

    @property
    def what(self) -> str:
        """The call in words that may be shown: a signed address is a secret."""
        place = "a file of the object store" if self.signed else self.url.partition("?")[0]
        return f"{self.method} {place}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. Status 0: nothing did, for ``reason``. ``cut``: the body broke the limit."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    reason: str = ""
    cut: bool = False


Flow = Generator[Ask, Reply, T]


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a call is repeated; all times in seconds."""

    rng: random.Random
    tries: int = 5
    first: float = 0.5
    longest: float = 8.0
    obeyed: float = 60.0  # a longer Retry-After is cut to this

    def backoff(self, failures: int) -> float:
        """The wait after so many failures in a row: exponential, with jitter, never too long."""
        ceiling: float = min(self.longest, self.first * 2 ** min(failures - 1, 30))
        return ceiling * self.rng.uniform(0.5, 1.0)

    def delay(self, failures: int, reply: Reply) -> float:
        """The wait before the next try: what the service asks for, else the backoff."""
        asked = _retry_after(reply.headers)
        return self.backoff(failures) if asked is None else min(asked, self.obeyed)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        # Against the answer's own date: it needs no clock, and no two clocks have to agree.
        until = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, until.total_seconds())


# --- flows -------------------------------------------------------------------------------------


def attempt(ask: Ask, retries: Retries) -> Flow[Reply]:
    """Ask until there is a final answer or the tries are used up."""
    reply = yield ask
    for failures in range(1, retries.tries):
        if not _may_pass(reply):
            break
        reply = yield replace(ask, after=retries.delay(failures, reply))
    return reply


def _may_pass(reply: Reply) -> bool:
    if reply.status in TRANSIENT:
        return True
    # Our own first try is still at work, its answer was lost on the way.
    problem = _problem(reply) if reply.status == 409 else None
    return problem is not None and problem.code == "idempotency_in_flight"


def succeed(ask: Ask, retries: Retries) -> Flow[Reply]:
    """Ask for an answer in the 200s.

    Raises:
        ServiceError: any other answer, or none.
    """
    reply = yield from attempt(ask, retries)
    if not 200 <= reply.status < 300:
        raise refusal(ask, reply)
    return reply


def get(
    path: str, answer: type[T], *, retries: Retries, query: Mapping[str, str] | None = None
) -> Flow[T]:
    """Read a document.

    Raises:
        ServiceError: refused, out of reach, or not such a document.
    """
    ask = Ask("GET", f"{path}?{urlencode(query)}" if query else path)
    reply = yield from succeed(ask, retries)
    return parse(ask, reply, answer=answer)


def post(
    path: str,
    answer: type[T],
    *,
    retries: Retries,
    body: BaseModel | None = None,
    idempotency_key: str | None = None,
    after: float = 0.0,
) -> Flow[T]:
    """Send a document; all tries carry one Idempotency-Key, so that they have one effect.

    The first of them waits ``after`` seconds.

    Raises:
        ServiceError: refused, out of reach, or not such an answer.
    """
    headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
    content = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        content = body.model_dump_json().encode()
    ask = Ask("POST", path, headers, content, after=after)
    reply = yield from succeed(ask, retries)
    return parse(ask, reply, answer=answer)


def patch(path: str, answer: type[T], *, retries: Retries, body: BaseModel) -> Flow[T]:
    """Change what is set in a document; the rest stays. Repeating it changes nothing more.

    Raises:
        ServiceError: refused, out of reach, or not such an answer.
    """
    return (yield from _change("PATCH", path, answer, retries, body))


def put(path: str, answer: type[T], *, retries: Retries, body: BaseModel) -> Flow[T]:
    """Make what is at ``path`` say this. Repeating it changes nothing more.

    Raises:
        ServiceError: refused, out of reach, or not such an answer.
    """
    return (yield from _change("PUT", path, answer, retries, body))


def _change(method: str, path: str, answer: type[T], retries: Retries, body: BaseModel) -> Flow[T]:
    content = body.model_dump_json(exclude_unset=True).encode()
    ask = Ask(method, path, {"Content-Type": "application/json"}, content)
    reply = yield from succeed(ask, retries)
    return parse(ask, reply, answer=answer)


def fetch(download: Download, *, retries: Retries) -> Flow[bytes]:
    """Get a file, decrypted if it is an encrypted one, and check its length and digest.

    Raises:
        ServiceError: code ``download_mismatch`` if it is not the file that was promised.
    """
    plain = {"Accept-Encoding": "identity"}
    ask = Ask("GET", download.url, plain, signed=True, limit=download.size)
    reply = yield from succeed(ask, retries)
    if reply.cut or len(reply.body) != download.size:
        found = f"more than {download.size}" if reply.cut else str(len(reply.body))
        raise ServiceError(
            f"{ask.what}: got {found} bytes, {download.size} were promised",
            code=DOWNLOAD_MISMATCH,
            status=reply.status,
        )
    try:
        data = download.opened(reply.body)
    except DecryptionError as error:
        text = f"{ask.what}: {error}"
        raise ServiceError(text, code=DOWNLOAD_MISMATCH, status=reply.status) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != download.sha256:
        raise ServiceError(
            f"{ask.what}: SHA-256 is {digest[:12]}…, {download.sha256[:12]}… was promised",
            code=DOWNLOAD_MISMATCH,
            status=reply.status,
        )
    return data


# --- answers -----------------------------------------------------------------------------------


def parse(ask: Ask, reply: Reply, *, answer: type[T]) -> T:
    """Read an answer's JSON.

    Raises:
        ServiceError: code ``answer_invalid``; the text never repeats a value, it may be a secret.
    """
    try:
        return TypeAdapter(answer).validate_json(reply.body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        where = "; ".join(f"{_location(f['loc'])}{f['type']}" for f in faults[:3])
    # Raised out here, so that no exception drags the answer along as its context.
    raise ServiceError(
        f"{ask.what}: the answer is not the expected document ({where}); does this address belong "
        "to a FedSelect coordinator of this version?",
        code="answer_invalid",
        status=reply.status,
    )


def _location(path: tuple[int | str, ...]) -> str:
    return "".join(f"{part}." for part in path)[:-1] + ": " if path else ""


def refusal(ask: Ask, reply: Reply) -> ServiceError:
    """The error that an answer outside the 200s is, or no answer at all."""
    if reply.status == 0:
        text = f"{ask.what}: no answer ({reply.reason}); is the server up and the address right?"
        return ServiceError(text, code="unreachable")
    if ask.signed:
        detail = f"the object store answered {reply.status}{_store_code(reply.body)}"
        return ServiceError(f"{ask.what}: {detail}", code=STORE_REFUSED, status=reply.status)
    problem = _problem(reply)
    if problem is None:
        text = f"{ask.what}: answer {reply.status} without a problem document"
        return ServiceError(text, code=f"http_{reply.status}", status=reply.status)
    text = f"{ask.what}: {problem.detail}"
    if problem.request_id:
        text += f" (request {problem.request_id})"
    return ServiceError(text, code=problem.code, status=reply.status)


def _problem(reply: Reply) -> Problem | None:
    try:
        return Problem.model_validate_json(reply.body)
    except ValidationError:
        return None


def _store_code(body: bytes) -> str:
    # Of the whole XML only the code: the rest of it may repeat the signed request.
    found = re.search(rb"<Code>([A-Za-z.]{1,64})</Code>", body[:4096])
    return f" ({found[1].decode()})" if found else ""
