"""Keys of people, programs and clients: issue, list, rotate, revoke.

Owns the ``keys`` rows but for what authentication notes in them. A key has at most one live
predecessor, so that a program can change over without a gap. Must not know what a scope allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Select, or_, select

from app import auth, ledger
from app.auth import ROLES, Principal
from app.db import Tx
from app.errors import Conflict, Forbidden, Invalid, Missing
from app.tables import Key, Organisation, Project
from fedselect.tenancy import KeyCreate, KeyInfo, KeyIssued, KeyRotate


def first(
    tx: Tx, pepper: bytes, place: Project | Organisation, *, role: str, name: str = ""
) -> KeyIssued:
    """A key of a project or a whole organisation, made by whoever runs the service.

    Raises:
        Invalid: no such role; client keys come from enrolment alone.
    """
    roles = sorted(set(ROLES) - {"client"})
    if role not in roles:
        raise Invalid(f"no role {role!r}; there are {', '.join(roles)}", code="role_unknown")
    row = Key(role=role, name=name)
    if isinstance(place, Project):
        row.organisation_id, row.project_id = place.organisation_id, place.id
    else:
        row.organisation_id = place.id
    return _issue(tx, pepper, row)


def for_client(
    tx: Tx, pepper: bytes, *, project: Project, client: UUID, certificate: str | None = None
) -> KeyIssued:
    """The key of a client that has just been registered, bound to the certificate it showed."""
    place = {"organisation_id": project.organisation_id, "project_id": project.id}
    row = Key(**place, client_id=client, role="client", name="", certificate=certificate)
    return _issue(tx, pepper, row)


def create(tx: Tx, principal: Principal, body: KeyCreate, *, pepper: bytes) -> KeyIssued:
    """A key for a person or a program; nobody gives away more than they have.

    Raises:
        Invalid: a scope that the role lacks.
        Forbidden: scopes beyond one's own, or a key for an organisation by one of a project.
    """
    scopes = None if body.scopes is None else sorted(set(body.scopes))
    granted = ROLES[body.role] if scopes is None else set(scopes)
    lacking = granted - ROLES[body.role]
    if lacking:
        raise Invalid(
            f"role {body.role} has no scope {_names(lacking)}; it has {_names(ROLES[body.role])}",
            code="scope_unknown",
        )
    check_gift(principal, granted)
    if body.organisation:
        principal.require_organisation()
    expires = tx.now + timedelta(seconds=body.expires_in) if body.expires_in else None
    row = Key(
        organisation_id=principal.organisation_id,
        project_id=None if body.organisation else principal.project_id,
        role=body.role,
        name=body.name,
        scopes=scopes,
        certificate=body.certificate,
        expires_at=_earlier(expires, principal.expires_at),
    )
    return _issue(tx, pepper, row)


def check_gift(principal: Principal, granted: Iterable[str]) -> None:
    """Nobody gives away a scope that they lack themselves.

    Raises:
        Forbidden: scope_beyond.
    """
    beyond = set(granted) - principal.scopes
    if beyond:
        raise Forbidden(f"you have no scope {_names(beyond)} yourself", code="scope_beyond")


def rotate(
    tx: Tx, principal: Principal, key_id: str, body: KeyRotate, *, pepper: bytes
) -> KeyIssued:
    """A key's successor with the same rights; the old one ends after the grace.

    The predecessor of the old one ends now: two live keys, never three. Who rotates the key of
    somebody else sees its successor, which is therefore no more than they could have issued.

    Raises:
        Missing: no such key.
        Forbidden: another's key has scopes beyond one's own, such as every key of a client.
        Conflict: it has ended, or has a successor already.
    """
    old = get(tx, principal, key_id, lock=True)
    own = old.id == principal.key_id
    if not own:
        check_gift(principal, ROLES[old.role] if old.scopes is None else old.scopes)
    _check_live(old, tx.now)
    if tx.session.scalar(select(Key.id).where(Key.predecessor_id == old.id)):
        raise Conflict("this key has a successor already; rotate that one", code="key_rotated")
    if old.predecessor_id is not None:
        before = tx.session.get_one(Key, old.predecessor_id, with_for_update=True)
        _end(tx, before)
    lifetime = old.expires_at - old.created_at if old.expires_at else None
    row = Key(
        organisation_id=old.organisation_id,
        project_id=old.project_id,
        client_id=old.client_id,
        role=old.role,
        name=old.name,
        scopes=old.scopes,
        certificate=old.certificate,
        predecessor_id=old.id,
        expires_at=_earlier(
            tx.now + lifetime if lifetime else None, None if own else principal.expires_at
        ),
    )
    old.expires_at = _earlier(old.expires_at, tx.now + timedelta(seconds=body.grace))
    return _issue(tx, pepper, row)


def revoke(tx: Tx, principal: Principal, key_id: str) -> KeyInfo:
    """End a key now; repeating it is harmless.

    Raises:
        Missing: no such key.
    """
    key = get(tx, principal, key_id, lock=True)
    _end(tx, key)
    return info(key)


def get(tx: Tx, principal: Principal, key_id: str, *, lock: bool = False) -> Key:
    """A key that this principal may see.

    Raises:
        Missing: there is none.
    """
    query = listed(principal).where(Key.id == key_id)
    query = query.with_for_update() if lock else query
    found = tx.session.scalars(query).first() if key_id.isprintable() else None
    if found is None:
        raise Missing(f"there is no key {key_id}")
    return found


def listed(principal: Principal) -> Select[Key]:
    """Keys of the principal's project; for one of the organisation, those of the organisation.

    A client sees its own.
    """
    query = select(Key).where(Key.organisation_id == principal.organisation_id)
    if principal.client_id is not None:
        return query.where(Key.client_id == principal.client_id)
    if principal.organisation_wide:
        project = principal.project
        return (
            query
            if project is None
            else query.where(or_(Key.project_id == project, Key.project_id.is_(None)))
        )
    return query.where(Key.project_id == principal.project_id)


def info(key: Key) -> KeyInfo:
    """The key as the interface shows it."""
    return KeyInfo.model_validate(key, from_attributes=True)


def _issue(tx: Tx, pepper: bytes, row: Key) -> KeyIssued:
    token = auth.mint(auth.KEY_PREFIX, pepper)
    row.id, row.digest, row.created_at = token.id, token.digest, tx.now
    tx.session.add(row)
    tx.session.flush()
    body = {
        "role": row.role,
        "client": str(row.client_id) if row.client_id else None,
        "scopes": row.scopes,
        "predecessor": row.predecessor_id,
        "organisation": None if row.project_id else str(row.organisation_id),
    }
    _note(tx, row, "key.issued", body)
    return KeyIssued(key=token.text, info=info(row))


def _end(tx: Tx, key: Key) -> None:
    if key.revoked_at is None:
        key.revoked_at = tx.now
        _note(tx, key, "key.revoked", {"role": key.role})


def _note(tx: Tx, key: Key, action: str, body: Mapping[str, object]) -> None:
    said = {name: value for name, value in body.items() if value is not None}
    ledger.append(tx, action, f"key:{key.id}", project=key.project_id, body=said)


def _check_live(key: Key, now: datetime) -> None:
    if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
        raise Conflict("this key has ended; issue another one", code="key_ended")


def _earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    given = [each for each in (one, other) if each is not None]
    return min(given) if given else None


def _names(scopes: Iterable[str]) -> str:
    return ", ".join(sorted(scopes))
