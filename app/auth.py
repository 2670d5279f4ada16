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
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import select

from app import ledger
from app.db import Tx
from app.errors import Forbidden, Unauthorized
from app.tables import Client, Enrolment, Key

KEY_PREFIX = "fsk"
ENROLMENT_PREFIX = "fse"
TOKEN = re.compile(r"([a-z]+)_([0-9a-f]{16})_([0-9a-f]{64})_([0-9a-f]{8})")


class Scope(StrEnum):
    """What a route may ask for."""

    CLIENT_OWN = "client:own"
    VERSION_READ = "version:read"
    UPLOAD = "upload"
    ROUND_READ = "round:read"
    ROUND_ADMIN = "round:admin"
    KEY_ADMIN = "key:admin"
    AUDIT_READ = "audit:read"
    LEDGER_WITNESS = "ledger:witness"


ROLES: dict[str, frozenset[Scope]] = {
    "owner": frozenset(Scope) - {Scope.CLIENT_OWN},
    "auditor": frozenset(
        {Scope.ROUND_READ, Scope.VERSION_READ, Scope.AUDIT_READ, Scope.LEDGER_WITNESS}
    ),
    "client": frozenset({Scope.CLIENT_OWN, Scope.VERSION_READ, Scope.UPLOAD, Scope.LEDGER_WITNESS}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a key of a project, for a client its client."""

    key_id: str
    project_id: UUID
    role: str
    client_id: UUID | None

    @property
    def actor(self) -> str:
        """How the ledger names this principal."""
        return f"client:{self.client_id}" if self.client_id else f"key:{self.key_id}"

    def require(self, scope: Scope) -> None:
        """Refuse what the role does not allow.

        Raises:
            Forbidden: scope_missing.
        """
        if scope not in ROLES.get(self.role, frozenset()):
            raise Forbidden(f"this needs the scope {scope.value}, which role {self.role} lacks")

    @property
    def client(self) -> UUID:
        """The client behind a client key."""
        if self.client_id is None:
            raise Forbidden("this call is for a client's own key")
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


def issue_key(
    tx: Tx, pepper: bytes, *, project: UUID, role: str, client: UUID | None = None
) -> str:
    """Write a new key and return its text, the only time that it is seen."""
    token = mint(KEY_PREFIX, pepper)
    tx.session.add(
        Key(
            id=token.id,
            project_id=project,
            client_id=client,
            role=role,
            digest=token.digest,
            created_at=tx.now,
        )
    )
    body = {"role": role, "client": str(client) if client else None}
    ledger.append(tx, "key.issued", f"key:{token.id}", project=project, body=body)
    return token.text


def authenticate(tx: Tx, pepper: bytes, authorization: str | None) -> Principal:
    """The principal behind an ``Authorization: Bearer`` header.

    Raises:
        Unauthorized: no key, an unknown, expired or revoked one, or a client that is not active.
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
    return Principal(key.id, key.project_id, key.role, key.client_id)


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
