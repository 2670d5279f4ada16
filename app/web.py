"""HTTP manners: who calls, paging, idempotency, preconditions.

Owns what every route shares. Must not know what any route does.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from sqlalchemy import Select, text, tuple_
from sqlalchemy.orm import InstrumentedAttribute

from app import auth, logs, members, parameters
from app.auth import PROJECT_HEADER, Principal, Scope
from app.db import Tx
from app.errors import Conflict, Invalid, Outdated, Unauthorized
from app.settings import AppSettings
from app.tables import IdempotentAnswer
from app.wiring import Coordinator
from fedselect.protocol import Answer

log = logging.getLogger(__name__)
Shape = TypeVar("Shape", bound=BaseModel)
Item = TypeVar("Item")
Row = TypeVar("Row")
Q = TypeVar("Q")
Order = tuple[InstrumentedAttribute[datetime], InstrumentedAttribute[Any]]
# Tells the description how to send a key; ``auth`` reads the header itself and says what is wrong.
BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="A key, `fsk_…`, or a person's token of the identity provider.",
)
PROJECT = "Which project, for a key of a whole organisation; others need none."
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
LONGEST_ONCE_KEY = 255  # characters


class Page(Answer, Generic[Item]):
    """One page of a list; ``next`` is the cursor of the following one, null at the end."""

    items: list[Item]
    next: str | None = None


# --- one call ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request: who asks, and how to open its transaction."""

    core: Coordinator
    route: str
    principal: Principal | None
    idempotency_key: str | None
    purpose: str  # the name of the route's function
    anonymous: str = "public"  # who asks on a route that needs no key
    certificate: str | None = None  # that the proxy has checked; for the registration

    @property
    def who(self) -> Principal:
        """The principal; only public routes have none."""
        if self.principal is None:
            raise RuntimeError("a public route asked for its principal")
        return self.principal

    @property
    def actor(self) -> str:
        """How the ledger names who asks."""
        return self.principal.actor if self.principal else self.anonymous

    def run(self, work: Callable[[Tx], Item]) -> Item:
        """Do the work in one transaction."""
        with self.core.db.transaction(self.actor, self.purpose) as tx:
            return work(tx)

    def page(
        self,
        paging: Paging,
        query: Callable[[Tx], Select[Row]],
        shown: Callable[[Tx, list[Row]], list[Item]],
        *,
        order: Order | None = None,
    ) -> Page[Item]:
        """One page of a list, oldest first; ``shown`` gives the items of all its rows at once.

        ``order`` is a time and an id, by default when a row was created and its id.
        """

        def work(tx: Tx) -> Page[Item]:
            rows, cursor = _page(tx, query(tx), order=order, paging=paging)
            return Page(items=shown(tx, rows), next=cursor)

        return self.run(work)

    def together(
        self, work: Callable[[Tx, Sequence[Q]], Sequence[Item | Exception]], asked: Q
    ) -> Item:
        """Do the work for one call in one transaction with all calls of this route that wait."""
        return self.core.db.together(self.purpose, work, asked)

    def create(self, body: BaseModel, work: Callable[[Tx], Shape], shape: type[Shape]) -> Shape:
        """Do creating work once per ``Idempotency-Key``, in the transaction of its effect.

        Raises:
            Invalid: the key was used with another body, or is too long.
            Conflict: the same call is under way.
        """
        if self.idempotency_key is None:
            return self.run(work)
        if len(self.idempotency_key) > LONGEST_ONCE_KEY:
            raise Invalid(f"an Idempotency-Key has at most {LONGEST_ONCE_KEY} characters")
        with self.core.db.transaction(self.actor, self.purpose) as tx:
            return _once(tx, self, body.model_dump_json().encode(), work, shape)


def require(scope: Scope) -> Any:
    """A dependency that gives the :class:`Call` of a principal with this scope."""

    def authenticated(
        request: Request,
        _: Annotated[object, Security(BEARER)],
        authorization: Annotated[str | None, Header(include_in_schema=False)] = None,
        project: Annotated[UUID | None, Header(alias=PROJECT_HEADER, description=PROJECT)] = None,
    ) -> Call:
        core: Coordinator = request.app.state.core
        try:
            principal = _principal(core, request, authorization, project)
        except Unauthorized:
            core.callers.came_in_vain(_peer(request))
            raise
        core.callers.check_shared(authorization or "")
        logs.note(
            project=principal.project,
            client=principal.client_id,
            key=principal.key_id,
            **_ids(request),
        )
        principal.require(scope)
        parameters.refuse_unknown(request)
        return Call(core, _route(request), principal, _once_key(request), _purpose(request))

    authenticated.scope = scope  # type: ignore[attr-defined]  # read by the route walk of the tests
    return Depends(authenticated)


def _principal(
    core: Coordinator, request: Request, authorization: str | None, project: UUID | None
) -> Principal:
    person = core.issuer.person(authorization) if core.issuer else None
    if person is not None:
        with core.db.transaction("auth", "authenticate_person") as tx:
            return members.principal_of(tx, person, project)
    check = partial(auth.authenticate, pepper=core.settings.pepper)
    key = auth.presented(authorization, project, certificate(core.settings, request))
    return core.db.together("authenticate", check, key)


def certificate(settings: AppSettings, request: Request) -> str | None:
    """The SHA-256 (hex) of the client certificate, as the proxy in front says (MTLS_HEADER)."""
    if settings.mtls_header is None:
        return None
    said = request.headers.get(settings.mtls_header, "").replace(":", "").strip().lower()
    return said if FINGERPRINT.fullmatch(said) else None


def public() -> Any:
    """A dependency that gives the :class:`Call` of a route without a key."""

    def unauthenticated(request: Request) -> Call:
        core: Coordinator = request.app.state.core
        if "authorization" in request.headers and not request.url.path.startswith("/health/"):
            core.callers.check_own("", _peer(request))  # a key that nobody looks at changes nothing
        shown = certificate(core.settings, request)
        place = (core, _route(request), None, _once_key(request), _purpose(request))
        return Call(*place, certificate=shown)

    unauthenticated.scope = None  # type: ignore[attr-defined]
    return Depends(unauthenticated)


def _peer(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _ids(request: Request) -> dict[str, str]:
    """The run and the round that a path names."""
    found = request.path_params
    return {name: found[f"{name}_id"] for name in ("run", "round") if f"{name}_id" in found}


def _route(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def _once_key(request: Request) -> str | None:
    """The ``Idempotency-Key``; only creating calls look at it (and only they describe it)."""
    return request.headers.get("Idempotency-Key")


def _purpose(request: Request) -> str:
    return str(request.scope["route"].name)


# --- idempotency -------------------------------------------------------------------------------


def _once(
    tx: Tx, call: Call, body: bytes, work: Callable[[Tx], Shape], shape: type[Shape]
) -> Shape:
    place = (_caller(call), call.route, call.idempotency_key or "")
    pepper = call.core.settings.pepper
    digest = hmac.digest(pepper, b"body\0" + body, hashlib.sha256)
    # The answer may hold a new key. What opens it is derived from the request, which is not kept.
    seal = hmac.digest(pepper, b"answer\0" + place[2].encode() + b"\0" + body, hashlib.sha256)
    number = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "big", signed=True)
    if not tx.session.scalar(text("SELECT pg_try_advisory_xact_lock(:n)"), {"n": number}):
        raise Conflict("the same call is under way; ask again", code="idempotency_in_flight")
    found = tx.session.get(IdempotentAnswer, place)
    if found is None:
        answer = work(tx)
        nonce = uuid4().bytes[:12]
        sealed = nonce + AESGCM(seal).encrypt(nonce, answer.model_dump_json().encode(), None)
        names = ("caller", "route", "key")
        row = IdempotentAnswer(
            **dict(zip(names, place, strict=True)),
            body_digest=digest,
            answer=sealed,
            created_at=tx.now,
        )
        tx.session.add(row)
        return answer
    if not hmac.compare_digest(found.body_digest, digest):
        raise Invalid(
            "this Idempotency-Key was used with another body; use a new key",
            code="idempotency_key_reused",
        )
    return shape.model_validate_json(
        AESGCM(seal).decrypt(found.answer[:12], found.answer[12:], None)
    )


def _caller(call: Call) -> str:
    """Who asks, and where: the same key of an organisation asks for the same in many projects."""
    who = call.principal
    wide = who is not None and who.organisation_wide and who.project is not None
    return f"{call.actor} in {call.who.project}" if wide else call.actor


# --- paging ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paging:
    """How much of a list, and from where."""

    limit: int
    cursor: str | None

    def position(self, parse: Callable[[str], Any]) -> tuple[datetime, Any] | None:
        """Where the page begins: behind this (time, id); ``parse`` reads the id.

        Raises:
            Invalid: cursor_invalid.
        """
        if self.cursor is None:
            return None
        try:
            at, row = json.loads(base64.urlsafe_b64decode(self.cursor.encode()))
            found = datetime.fromisoformat(at), parse(row)
        except (ValueError, TypeError, AttributeError, binascii.Error) as error:
            raise _no_cursor() from error
        if not str(found[1]).isprintable():  # the database could not even compare it
            raise _no_cursor()
        return found


def _no_cursor() -> Invalid:
    return Invalid("this cursor is not one of ours; start without it", code="cursor_invalid")


def paging(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Paging:
    """The dependency of every list."""
    core: Coordinator = request.app.state.core
    return Paging(min(limit, core.settings.page_limit), cursor)


Paged = Annotated[Paging, Depends(paging)]


def each(shown: Callable[[Row], Item]) -> Callable[[Tx, list[Row]], list[Item]]:
    """For :meth:`Call.page`: rows that are shown one by one."""
    return lambda _, rows: [shown(row) for row in rows]


def _page(
    tx: Tx, query: Select[Row], *, order: Order | None, paging: Paging
) -> tuple[list[Row], str | None]:
    """One page of rows, oldest first, and the cursor of the next."""
    if order is None:
        entity = query.column_descriptions[0]["entity"]
        order = (entity.created_at, entity.id)
    position = paging.position(order[1].type.python_type)
    if position is not None:
        query = query.where(tuple_(*order) > position)
    rows = list(tx.session.scalars(query.order_by(*order).limit(paging.limit + 1)))
    if len(rows) <= paging.limit:
        return rows, None
    last = rows[paging.limit - 1]
    at, row = (getattr(last, column.key) for column in order)
    cursor = base64.urlsafe_b64encode(json.dumps([at.isoformat(), str(row)]).encode()).decode()
    return rows[: paging.limit], cursor


# --- preconditions ------------------------------------------------------------------------------


def etag(*parts: object) -> str:
    """The entity tag (RFC 9110 §8.8.3) of what may be changed in a thing."""
    return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'


def check_match(wanted: str | None, present: str) -> None:
    """Refuse a change that was made from another state; without ``If-Match`` any state will do.

    Raises:
        Outdated: etag_mismatch.
    """
    if wanted is None or wanted.strip() == "*":
        return
    if present not in (tag.strip() for tag in wanted.split(",")):
        raise Outdated("it was changed since you read it; read it again, then change it")


IfMatch = Annotated[
    str | None, Header(max_length=500, description="ETag of what was read: else 412, unchanged.")
]
