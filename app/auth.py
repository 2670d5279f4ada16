"""Keys, principals and scopes: who asks, and what they may do.

Owns the form of keys and tokens, their digests and the role table. Deny unless allowed. Must not
know routes; every query elsewhere filters by the principal's project.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select, update

from app.db import Tx, among
from app.errors import Forbidden, Invalid, Missing, Refusal, Unauthorized
from app.tables import Client, Enrolment, Key, Project
from fedselect.tenancy import Identity

KEY_PREFIX = "fsk"
ENROLMENT_PREFIX = "fse"
PROJECT_HEADER = "FedSelect-Project"
USE_NOTED_EVERY = timedelta(minutes=1)
TOKEN = re.compile(r"([a-z]+)_([0-9a-f]{16})_([0-9a-f]{64})_([0-9a-f]{8})")


class Scope(StrEnum):
    """What a route may ask for."""

    IDENTITY = "identity"
    CLIENT_OWN = "client:own"
    CLIENT_ADMIN = "client:admin"
    CLIENT_ERASE = "client:erase"
    VERSION_READ = "version:read"
    UPLOAD = "upload"
    ROUND_READ = "round:read"
    ROUND_ADMIN = "round:admin"
    MASK_READ = "mask:read"
    PROJECT_READ = "project:read"
    PROJECT_ADMIN = "project:admin"
    KEY_OWN = "key:own"
    KEY_READ = "key:read"
    KEY_ADMIN = "key:admin"
    WEBHOOK_READ = "webhook:read"
    WEBHOOK_ADMIN = "webhook:admin"
    AUDIT_READ = "audit:read"
    LEDGER_WITNESS = "ledger:witness"


_LOOK = {
    Scope.IDENTITY,
    Scope.KEY_OWN,
    Scope.PROJECT_READ,
    Scope.ROUND_READ,
    Scope.LEDGER_WITNESS,
}
ROLES: dict[str, frozenset[Scope]] = {
    "owner": frozenset(Scope) - {Scope.CLIENT_OWN},
    "operator": frozenset(
        {
            *_LOOK,
            Scope.VERSION_READ,
            Scope.UPLOAD,
            Scope.ROUND_ADMIN,
            Scope.CLIENT_ADMIN,
            Scope.MASK_READ,
        }
    ),
    # Reads everything and changes nothing: not even its own key.
    "auditor": frozenset(
        {
            *_LOOK,
            Scope.VERSION_READ,
            Scope.AUDIT_READ,
            Scope.KEY_READ,
            Scope.WEBHOOK_READ,
            Scope.MASK_READ,
        }
    )
    - {Scope.KEY_OWN},
    "viewer": frozenset(_LOOK),
    "client": frozenset(
        {
            Scope.IDENTITY,
            Scope.KEY_OWN,
            Scope.CLIENT_OWN,
            Scope.VERSION_READ,
            Scope.UPLOAD,
            Scope.LEDGER_WITNESS,
        }
    ),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, for which project, and what they may do.

    ``project`` is None for a key of a whole organisation (``organisation_wide``) that names none.
    """

    key_id: str
    organisation_id: UUID
    project: UUID | None
    role: str
    scopes: frozenset[Scope]
    client_id: UUID | None = None
    member_id: UUID | None = None
    organisation_wide: bool = False
    expires_at: datetime | None = None

    @property
    def actor(self) -> str:
        """How the ledger names this principal."""
        if self.member_id is not None:
            return f"member:{self.member_id}"
        return f"client:{self.client_id}" if self.client_id else f"key:{self.key_id}"

    @property
    def project_id(self) -> UUID:
        """The project that this call is about.

        Raises:
            Invalid: project_required.
        """
        if self.project is None:
            raise Invalid(
                f"this key is for a whole organisation: name the project in {PROJECT_HEADER}",
                code="project_required",
            )
        return self.project

    def identity(self) -> Identity:
        """This principal as the interface shows it."""
        return Identity(
            kind="person" if self.member_id else "client" if self.client_id else "key",
            id=str(self.member_id or self.client_id or self.key_id),
            role=self.role,
            scopes=sorted(self.scopes),
            organisation_id=self.organisation_id,
            project_id=self.project,
            expires_at=self.expires_at,
        )

    def require(self, scope: Scope) -> None:
        """Refuse what role or key does not allow.

        Raises:
            Forbidden: scope_missing.
        """
        if scope in self.scopes:
            return
        lacks = "this key was not given" if scope in ROLES[self.role] else f"role {self.role} lacks"
        raise Forbidden(f"this needs the scope {scope.value}, which {lacks}")

    def require_organisation(self) -> None:
        """Refuse a key of one project what concerns the others.

        Raises:
            Forbidden: organisation_key_needed.
        """
        if not self.organisation_wide:
            raise Forbidden(
                "this needs a key of the whole organisation", code="organisation_key_needed"
            )

    @property
    def client(self) -> UUID:
        """The client behind a client key."""
        if self.client_id is None:
            raise Forbidden("this call is for a client's own key", code="client_key_needed")
        return self.client_id


@dataclass(frozen=True, slots=True)
class Token:
    """A fresh secret: ``text`` is shown once, ``digest`` is kept."""

    id: str
    text: str
    digest: bytes


def mint(prefix: str, pepper: bytes) -> Token:
    """A new key or enrolment token: ``<prefix>_<id>_<256 random bits>_<crc32>``."""
    public, secret = secrets.token_hex(8), secrets.token_hex(32)
    text = f"{prefix}_{public}_{secret}"
    return Token(public, f"{text}_{_checksum(text)}", _digest(secret, pepper))


def read(text: str, prefix: str) -> tuple[str, str] | None:
    """(id, secret) of a token, None if it is mistyped or of another kind."""
    parts = TOKEN.fullmatch(text)
    if parts is None or parts[1] != prefix or parts[4] != _checksum(text.rpartition("_")[0]):
        return None
    return parts[2], parts[3]


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _digest(secret: str, pepper: bytes) -> bytes:
    # A 256-bit random secret needs no slow hash; the pepper keeps a stolen table useless.
    return hmac.digest(pepper, secret.encode(), hashlib.sha256)


class Presented(NamedTuple):
    """What a caller sends: a key's id and secret, the project that it is about, a certificate."""

    key_id: str
    secret: str
    project: UUID | None
    certificate: str | None = None


def presented(
    authorization: str | None, project: UUID | None = None, certificate: str | None = None
) -> Presented:
    """The key in an ``Authorization: Bearer`` header.

    ``certificate`` is the SHA-256 (hex) of the client certificate that the proxy has checked.

    Raises:
        Unauthorized: there is none, or it is mistyped.
    """
    scheme, _, text = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not text:
        raise Unauthorized("send your key as 'Authorization: Bearer fsk_…'")
    found = read(text.strip(), KEY_PREFIX)
    if found is None:
        raise _unknown()
    return Presented(*found, project, certificate)


def authenticate(tx: Tx, calls: Sequence[Presented], *, pepper: bytes) -> list[Principal | Refusal]:
    """The principal behind each call's key, or in its place why there is none.

    - ``Unauthorized``: an unknown, expired or revoked key, or a client that is not active;
    - ``Missing``: the project is not the key's, nor of the key's organisation.
    """
    query = select(Key, Client.state).outerjoin(Client, Client.id == Key.client_id)
    rows = tx.session.execute(query.where(among(Key.id, [call.key_id for call in calls])))
    known = {key.id: (key, state) for key, state in rows}
    found: list[Principal | Refusal] = []
    for call in calls:
        try:
            key, state = known.get(call.key_id, (None, None))
            if key is None or not hmac.compare_digest(key.digest, _digest(call.secret, pepper)):
                raise _unknown()
            _check_alive(key, state, tx.now)
            _check_certificate(key, call.certificate)
            found.append(_principal(tx, key, call.project))
        except Refusal as refusal:
            found.append(refusal)
    _note_use(tx, {each.key_id for each in found if isinstance(each, Principal)}, known)
    return found


def _unknown() -> Unauthorized:
    return Unauthorized("this key is not known; check that it is complete", code="key_unknown")


def _principal(tx: Tx, key: Key, project: UUID | None) -> Principal:
    granted = ROLES.get(key.role, frozenset())
    if key.scopes is not None:
        granted &= frozenset(key.scopes)
    if project is not None and project != key.project_id:
        _check_project(tx, key, project)
    return Principal(
        key.id,
        key.organisation_id,
        key.project_id or project,
        key.role,
        granted,
        client_id=key.client_id,
        organisation_wide=key.project_id is None,
        expires_at=key.expires_at,
    )


def _check_project(tx: Tx, key: Key, project: UUID) -> None:
    query = select(Project.id).where(
        Project.id == project, Project.organisation_id == key.organisation_id
    )
    if key.project_id is not None or tx.session.scalar(query) is None:
        raise Missing(f"there is no project {project}")


def _note_use(tx: Tx, used: set[str], known: Mapping[str, tuple[Key, str | None]]) -> None:
    """Once a minute at most, and nobody waits for anybody: whoever has the row writes it."""
    before = tx.now - USE_NOTED_EVERY
    last = {key_id: known[key_id][0].last_used_at for key_id in used}
    stale = [key_id for key_id, at in last.items() if at is None or at <= before]
    if not stale:
        return
    free = select(Key.id).where(among(Key.id, stale))
    free = free.with_for_update(skip_locked=True, key_share=True)
    note = update(Key).where(Key.id.in_(free)).values(last_used_at=tx.now)
    tx.session.execute(note, execution_options={"synchronize_session": False})


def _check_alive(key: Key, client_state: str | None, now: datetime) -> None:
    if key.revoked_at is not None:
        raise Unauthorized("this key has been revoked", code="key_revoked")
    if key.expires_at is not None and key.expires_at <= now:
        raise Unauthorized("this key has expired", code="key_expired")
    if client_state is not None:
        check_client(client_state)


def _check_certificate(key: Key, shown: str | None) -> None:
    if key.certificate is None:
        return
    if shown is None or not hmac.compare_digest(key.certificate, shown.lower()):
        raise Unauthorized(
            "this key works with the client certificate alone that it is bound to",
            code="certificate_mismatch",
        )


def check_client(state: str) -> None:
    """Let an active client pass.

    Raises:
        Unauthorized: it was revoked.
        Forbidden: it is suspended.
    """
    if state == "revoked":
        raise Unauthorized("this key has been revoked", code="key_revoked")
    if state == "suspended":
        raise Forbidden("this client is suspended; ask your administrator", code="client_suspended")


def use_enrolment(tx: Tx, pepper: bytes, text: str) -> Enrolment:
    """Lock and check an enrolment token; the caller marks it used.

    Raises:
        Unauthorized: enrolment_unknown, enrolment_used or enrolment_expired.
    """
    found = read(text.strip(), ENROLMENT_PREFIX)
    row = tx.session.get(Enrolment, found[0], with_for_update=True) if found else None
    known = row and found and hmac.compare_digest(row.digest, _digest(found[1], pepper))
    if row is None or not known:
        raise Unauthorized("this enrolment token is not known", code="enrolment_unknown")
    if row.used_at is not None:
        raise Unauthorized("this enrolment token has been used", code="enrolment_used")
    if row.expires_at <= tx.now:
        raise Unauthorized("this enrolment token has expired", code="enrolment_expired")
    return row


def check_metrics_token(expected: str | None, authorization: str | None) -> None:
    """Let who sends METRICS_TOKEN read the metrics; they are of all tenants together.

    Raises:
        Forbidden: metrics_off: there is no such token.
        Unauthorized: none was sent, or another one.
    """
    if expected is None:
        raise Forbidden("set METRICS_TOKEN to have metrics here", code="metrics_off")
    scheme, _, sent = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not sent:
        raise Unauthorized("send METRICS_TOKEN as 'Authorization: Bearer …'")
    if not hmac.compare_digest(sent.strip().encode(), expected.encode()):
        raise Unauthorized("this is not METRICS_TOKEN", code="key_unknown")
