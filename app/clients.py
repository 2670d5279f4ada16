"""Clients: enrolment, registration, suspension and revocation.

Owns the ``clients`` and ``enrolments`` rows. Must not know rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import Select, select, update

from app import auth, keys, ledger, tenants
from app.auth import Principal
from app.db import Tx, among
from app.errors import Conflict, Missing, Refusal
from app.settings import AppSettings
from app.tables import Client, Enrolment, Key
from fedselect.protocol import ClientInfo, EnrolmentCreate, Enrolments, Registered, Registration
from fedselect.tenancy import ClientChange

_CHANGES = {"suspend": "suspended", "activate": "active", "revoke": "revoked"}


def enrol(
    tx: Tx, principal: Principal, body: EnrolmentCreate, *, settings: AppSettings
) -> Enrolments:
    """Make single-use tokens for new clients of the principal's project.

    Raises:
        Conflict: more than the project or its organisation may have.
    """
    most = settings.clients_per_organisation
    tenants.check_room(tx, principal.project_id, more=body.count, most=most, tokens=True)
    expires = tx.now + timedelta(seconds=body.expires_in)
    tokens = [auth.mint(auth.ENROLMENT_PREFIX, settings.pepper) for _ in range(body.count)]
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


def register(
    tx: Tx,
    body: Registration,
    certificate: str | None,
    *,
    settings: AppSettings,
    ledger_key: str,
) -> Registered:
    """Admit the holder of an enrolment token as a new client; it is told the ledger's key to keep.

    Raises:
        Unauthorized: the token is unknown, used or expired.
        Conflict: the project has a client of that name, or all the clients that it may have.
    """
    enrolment = auth.use_enrolment(tx, settings.pepper, body.token)
    most = settings.clients_per_organisation
    project = tenants.check_room(tx, enrolment.project_id, more=1, most=most, tokens=False)
    client = Client(
        id=uuid4(),
        project_id=project.id,
        name=body.name,
        tags=body.tags,
        state="active",
        created_at=tx.now,
    )
    tx.insert(client, taken=_taken(body.name))
    enrolment.used_at, enrolment.client_id = tx.now, client.id
    ledger.append(
        tx,
        "client.registered",
        f"client:{client.id}",
        project=project.id,
        body={"enrolment": enrolment.id},  # no name: it must be possible to forget it
    )
    issued = keys.for_client(
        tx, settings.pepper, project=project, client=client.id, certificate=certificate
    )
    return Registered(client=info(client), key=issued.key, ledger_key=ledger_key)


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
    if state == "active":
        client.forgiven_at = tx.now
    return info(client)


def suspend(tx: Tx, client: Client, *, cause: str) -> None:
    """Suspend an active client for a cause that the ledger keeps; its row must be locked."""
    if client.state == "active":
        _enter(tx, client, "suspended", cause=cause)


def edit(tx: Tx, client: Client, body: ClientChange) -> ClientInfo:
    """Give a client another name or other tags; its row must be locked.

    Raises:
        Conflict: the project has a client of that name, or this one was erased.
    """
    if client.erased_at is not None:
        raise Conflict("this client was erased", code="client_revoked")
    if body.name is not None and body.name != client.name:
        client.name = body.name
        tx.insert(client, taken=_taken(body.name))
        ledger.append(tx, "client.renamed", f"client:{client.id}", project=client.project_id)
    if body.tags is not None and body.tags != client.tags:
        client.tags = body.tags
        what = {"tags": len(body.tags)}  # no more: it must be possible to forget them
        subject = f"client:{client.id}"
        ledger.append(tx, "client.tagged", subject, project=client.project_id, body=what)
    return info(client)


def _taken(name: str) -> Conflict:
    return Conflict(
        f"there is already a client named {name!r}; choose another name, your token stays valid",
        code="client_name_taken",
    )


def revoke(tx: Tx, client: Client) -> None:
    """Shut a client out for good and end its keys; its row must be locked."""
    if client.state != "revoked":
        _enter(tx, client, "revoked")


def _enter(tx: Tx, client: Client, state: str, **why: str) -> None:
    body = {"from": client.state, "to": state, **why}
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
    auth.check_client(client.state)
    return client


def admit_all(tx: Tx, principals: Iterable[Principal]) -> dict[UUID, Refusal]:
    """:func:`admit` for many, in the order of their ids; the refusals of those shut out."""
    ids = sorted({who.client_id for who in principals if who.client_id is not None})
    query = select(Client.id, Client.state).where(among(Client.id, ids)).order_by(Client.id)
    refused: dict[UUID, Refusal] = {}
    for client_id, state in tx.session.execute(query.with_for_update(key_share=True)):
        try:
            auth.check_client(state)
        except Refusal as refusal:
            refused[client_id] = refusal
    return refused


def listed(principal: Principal) -> Select[Client]:
    """The principal's clients."""
    return select(Client).where(Client.project_id == principal.project_id)


def info(client: Client) -> ClientInfo:
    """The client as the interface shows it."""
    return ClientInfo.model_validate(client, from_attributes=True)
