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
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from sqlalchemy import select

from app.db import Tx
from app.errors import Forbidden, Invalid, Missing, Unauthorized
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
        {*_LOOK, Scope.VERSION_READ, Scope.UPLOAD, Scope.ROUND_ADMIN, Scope.CLIENT_ADMIN}
    ),
    # Reads everything and changes nothing: not even its own key.
    "auditor": frozenset(
        {*_LOOK, Scope.VERSION_READ, Scope.AUDIT_READ, Scope.KEY_READ, Scope.WEBHOOK_READ}
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
    organisation_wide: bool = False
    expires_at: datetime | None = None

    @property
    def actor(self) -> str:
        """How the ledger names this principal."""
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
            kind="client" if self.client_id else "key",
            id=str(self.client_id or self.key_id),
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


def authenticate(
    tx: Tx, pepper: bytes, authorization: str | None, project: UUID | None = None
) -> Principal:
    """The principal behind an ``Authorization: Bearer`` header, for the project it names.

    Raises:
        Unauthorized: no key, an unknown, expired or revoked one, or a client that is not active.
        Missing: the project is not the key's, nor of the key's organisation.
    """
    scheme, _, text = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not text:
        raise Unauthorized("send your key as 'Authorization: Bearer fsk_…'")
    found = read(text.strip(), KEY_PREFIX)
    row = _key_row(tx, found[0]) if found else None
    if not found or row is None:
        raise Unauthorized("this key is not known; check that it is complete", code="key_unknown")
    key, client = row
    if not hmac.compare_digest(key.digest, _digest(found[1], pepper)):
        raise Unauthorized("this key is not known; check that it is complete", code="key_unknown")
    _check_alive(key, client, tx.now)
    _note_use(tx, key)
    return _principal(tx, key, project)


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


def _note_use(tx: Tx, key: Key) -> None:
    """Once a minute at most, and nobody waits for anybody: whoever has the row writes it."""
    if key.last_used_at is not None and tx.now - key.last_used_at < USE_NOTED_EVERY:
        return
    query = select(Key).where(Key.id == key.id).with_for_update(skip_locked=True, key_share=True)
    for row in tx.session.scalars(query):
        row.last_used_at = tx.now


def _key_row(tx: Tx, key_id: str) -> tuple[Key, Client | None] | None:
    query = (
        select(Key, Client).outerjoin(Client, Client.id == Key.client_id).where(Key.id == key_id)
    )
    row = tx.session.execute(query).first()
    return (row[0], row[1]) if row else None


def _check_alive(key: Key, client: Client | None, now: datetime) -> None:
    if key.revoked_at is not None:
        raise Unauthorized("this key has been revoked", code="key_revoked")
    if key.expires_at is not None and key.expires_at <= now:
        raise Unauthorized("this key has expired", code="key_expired")
    if client is not None:
        check_client(client)


def check_client(client: Client) -> None:
    """Let an active client pass.

    Raises:
        Unauthorized: it was revoked.
        Forbidden: it is suspended.
    """
    if client.state == "revoked":
        raise Unauthorized("this key has been revoked", code="key_revoked")
    if client.state == "suspended":
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
