"""Clients: enrolment, registration, suspension and revocation.

Owns the ``clients`` and ``enrolments`` rows. Must not know rounds.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import Select, select, update

from app import auth, ledger
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Missing
from app.tables import Client, Enrolment, Key
from fedselect.protocol import (
    ClientInfo,
    EnrolmentCreate,
    Enrolments,
    Registered,
    Registration,
)

_CHANGES = {"suspend": "suspended", "activate": "active", "revoke": "revoked"}


def enrol(tx: Tx, principal: Principal, body: EnrolmentCreate, *, pepper: bytes) -> Enrolments:
    """Make single-use tokens for new clients of the principal's project."""
    expires = tx.now + timedelta(seconds=body.expires_in)
    tokens = [auth.mint(auth.ENROLMENT_PREFIX, pepper) for _ in range(body.count)]
    for token in tokens:
        tx.session.add(
            Enrolment(
                id=token.id,
                project_id=principal.project_id,
                digest=token.digest,
                created_at=tx.now,
                expires_at=expires,
            )
        )
    ledger.append(
        tx,
        "enrolment.created",
        f"project:{principal.project_id}",
        project=principal.project_id,
        body={"tokens": [t.id for t in tokens], "expires_in": body.expires_in},
    )
    return Enrolments(tokens=[t.text for t in tokens], expires_at=expires)


def applicant(body: Registration) -> str:
    """Who asks to be registered: whoever holds this enrolment token, whatever else they send."""
    found = auth.read(body.token.strip(), auth.ENROLMENT_PREFIX)
    return f"enrolment:{found[0]}" if found else "public"


def register(tx: Tx, body: Registration, *, pepper: bytes, ledger_key: str) -> Registered:
    """Admit the holder of an enrolment token as a new client; it is told the ledger's key to keep.

    Raises:
        Unauthorized: the token is unknown, used or expired.
        Conflict: the project has a client of that name.
    """
    enrolment = auth.use_enrolment(tx, pepper, body.token)
    project = enrolment.project_id
    client = Client(
        id=uuid4(),
        project_id=project,
        name=body.name,
        tags=body.tags,
        state="active",
        created_at=tx.now,
    )
    taken = Conflict(
        f"there is already a client named {body.name!r}; choose another name, your token stays "
        "valid",
        code="client_name_taken",
    )
    tx.insert(client, taken=taken)
    enrolment.used_at, enrolment.client_id = tx.now, client.id
    ledger.append(
        tx,
        "client.registered",
        f"client:{client.id}",
        project=project,
        body={"enrolment": enrolment.id},  # no name: it must be possible to forget it
    )
    key = auth.issue_key(tx, pepper, project=project, role="client", client=client.id)
    return Registered(client=info(client), key=key, ledger_key=ledger_key)


def change(tx: Tx, principal: Principal, client_id: UUID, *, command: str) -> ClientInfo:
    """Suspend, activate or revoke a client; revoking is final and ends its keys.

    Raises:
        Missing: no such client in this project.
        Conflict: the client is revoked.
    """
    client = get(tx, principal, client_id, lock=True)
    state = _CHANGES[command]
    if client.state == "revoked" and state != "revoked":
        raise Conflict("a revoked client stays revoked; enrol it anew", code="client_revoked")
    if client.state == state:
        return info(client)
    _enter(tx, client, state)
    return info(client)


def revoke(tx: Tx, client: Client) -> None:
    """Shut a client out for good and end its keys; its row must be locked."""
    if client.state != "revoked":
        _enter(tx, client, "revoked")


def _enter(tx: Tx, client: Client, state: str) -> None:
    body = {"from": client.state, "to": state}
    client.state = state
    if state == "revoked":
        live = (Key.client_id == client.id) & Key.revoked_at.is_(None)
        tx.session.execute(update(Key).where(live).values(revoked_at=tx.now))
    ledger.append(
        tx, f"client.{state}", f"client:{client.id}", project=client.project_id, body=body
    )


def get(tx: Tx, principal: Principal, client_id: UUID, *, lock: bool = False) -> Client:
    """A client of the principal's project.

    Raises:
        Missing: there is none.
    """
    return of_project(tx, principal.project_id, client_id, lock=lock)


def of_project(tx: Tx, project_id: UUID, client_id: UUID, *, lock: bool = False) -> Client:
    """A client of a project.

    Raises:
        Missing: there is none.
    """
    query = select(Client).where(Client.id == client_id, Client.project_id == project_id)
    client = tx.session.scalars(query.with_for_update() if lock else query).first()
    if client is None:
        raise Missing(f"there is no client {client_id} in this project")
    return client


def admit(tx: Tx, principal: Principal) -> Client | None:
    """The client behind a principal, locked until the transaction ends; None for other keys.

    Whoever was shut out since the key was checked is refused here, and nobody is shut out while
    this transaction lasts. It is the first lock: client, then run, then assignment.

    Raises:
        Unauthorized: the client was revoked.
        Forbidden: the client was suspended.
    """
    if principal.client_id is None:
        return None
    query = select(Client).where(Client.id == principal.client_id)
    locked = query.with_for_update(key_share=True)
    client = tx.session.scalars(locked, execution_options={"populate_existing": True}).one()
    auth.check_client(client)
    return client


def listed(principal: Principal) -> Select[Client]:
    """The principal's clients."""
    return select(Client).where(Client.project_id == principal.project_id)


def info(client: Client) -> ClientInfo:
    """The client as the interface shows it."""
    return ClientInfo.model_validate(client, from_attributes=True)
