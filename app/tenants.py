"""Organisations and projects: who owns everything else.

Owns their rows and how many clients they may have. There are no default passwords: the first key
is made on the command line of whoever runs the service.
"""

from __future__ import annotations

from uuid import UUID, uuid4

from sqlalchemy import Select, func, select

from app import ledger
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Missing
from app.tables import Client, Enrolment, Organisation, Project
from fedselect.tenancy import ProjectChange, ProjectCreate, ProjectInfo


def ensure_organisation(tx: Tx, name: str) -> Organisation:
    """The organisation of that name, created if it is not there."""
    found = tx.session.scalars(select(Organisation).where(Organisation.name == name)).first()
    if found is None:
        found = Organisation(id=uuid4(), name=name, created_at=tx.now)
        tx.session.add(found)
        tx.session.flush()
        subject = f"organisation:{found.id}"
        ledger.append(tx, "organisation.created", subject, project=None, body={"name": name})
    return found


def lock_organisation(tx: Tx, organisation_id: UUID) -> Organisation:
    """The organisation's row, locked."""
    return tx.session.get_one(Organisation, organisation_id, with_for_update=True)


def ensure_project(tx: Tx, *, organisation: str, project: str) -> Project:
    """The project of that name, created with its organisation if it is not there."""
    owner = ensure_organisation(tx, organisation)
    query = select(Project).where(Project.organisation_id == owner.id, Project.name == project)
    found = tx.session.scalars(query).first()
    return found or _add(tx, owner.id, project, client_limit=None)


def _add(tx: Tx, organisation: UUID, name: str, *, client_limit: int | None) -> Project:
    row = Project(
        id=uuid4(),
        organisation_id=organisation,
        name=name,
        client_limit=client_limit,
        created_at=tx.now,
    )
    tx.insert(row, taken=_taken(name))
    body = {"name": name, "organisation": str(organisation), "client_limit": client_limit}
    ledger.append(tx, "project.created", f"project:{row.id}", project=row.id, body=body)
    return row


def create(tx: Tx, principal: Principal, body: ProjectCreate) -> ProjectInfo:
    """A new project of the principal's organisation.

    Raises:
        Forbidden: a key of one project cannot make another.
        Conflict: the organisation has a project of that name.
    """
    principal.require_organisation()
    limit = body.client_limit
    row = _add(tx, principal.organisation_id, body.name, client_limit=limit)
    return infos(tx, [row])[0]


def change(tx: Tx, row: Project, body: ProjectChange) -> ProjectInfo:
    """Change a project, whose row must be locked.

    Raises:
        Conflict: the organisation has a project of that name.
    """
    given = body.model_dump(exclude_unset=True)
    if given.get("name", "") is None:
        del given["name"]
    changed = {name: value for name, value in given.items() if getattr(row, name) != value}
    if changed:
        for name, value in changed.items():
            setattr(row, name, value)
        tx.insert(row, taken=_taken(row.name))
        ledger.append(tx, "project.changed", f"project:{row.id}", project=row.id, body=changed)
    return infos(tx, [row])[0]


def get(tx: Tx, principal: Principal, project_id: UUID, *, lock: bool = False) -> Project:
    """A project that this principal may see.

    Raises:
        Missing: there is none.
    """
    query = listed(principal).where(Project.id == project_id)
    found = tx.session.scalars(query.with_for_update() if lock else query).first()
    if found is None:
        raise Missing(f"there is no project {project_id}")
    return found


def listed(principal: Principal) -> Select[Project]:
    """All projects of the organisation for its own keys, otherwise the one of the key."""
    query = select(Project).where(Project.organisation_id == principal.organisation_id)
    return query if principal.organisation_wide else query.where(Project.id == principal.project)


def infos(tx: Tx, rows: list[Project]) -> list[ProjectInfo]:
    """Projects as the interface shows them."""
    ids = [row.id for row in rows]
    counts = (
        select(Client.project_id, func.count())
        .where(Client.project_id.in_(ids), Client.state != "revoked")
        .group_by(Client.project_id)
    )
    clients: dict[UUID, int] = dict(tx.session.execute(counts).all())
    owners = select(Organisation.id, Organisation.name).where(
        Organisation.id.in_({row.organisation_id for row in rows})
    )
    names: dict[UUID, str] = dict(tx.session.execute(owners).all())
    return [
        ProjectInfo(
            id=row.id,
            organisation_id=row.organisation_id,
            organisation=names[row.organisation_id],
            name=row.name,
            client_limit=row.client_limit,
            clients=clients.get(row.id, 0),
            created_at=row.created_at,
        )
        for row in rows
    ]


def check_room(tx: Tx, project_id: UUID, *, more: int, most: int, tokens: bool) -> Project:
    """Whether a project and its organisation may have so many more clients; locks both.

    ``most`` counts for an organisation without a limit of its own; with ``tokens``, those given out
    and not used yet count as well.

    Raises:
        Conflict: client_limit.
    """
    project = tx.session.get_one(Project, project_id, with_for_update=True)
    owner = lock_organisation(tx, project.organisation_id)
    own = select(Project.id).where(Project.organisation_id == owner.id)
    limit = owner.client_limit if owner.client_limit is not None else most
    scopes: list[tuple[str, int, list[UUID]]] = [
        (f"organisation {owner.name}", limit, list(tx.session.scalars(own)))
    ]
    if project.client_limit is not None:
        scopes.append((f"project {project.name}", project.client_limit, [project.id]))
    for name, limit, projects in scopes:
        taken = _places(tx, projects, tokens=tokens)
        if taken + more > limit:
            raise Conflict(
                f"{name} may have {limit} clients and has {taken}"
                f"{' with the tokens given out' if tokens else ''}; revoke some, or raise it",
                code="client_limit",
            )
    return project


def _places(tx: Tx, projects: list[UUID], *, tokens: bool) -> int:
    live = select(func.count()).where(Client.project_id.in_(projects), Client.state != "revoked")
    waiting = select(func.count()).where(
        Enrolment.project_id.in_(projects),
        Enrolment.used_at.is_(None),
        Enrolment.expires_at > tx.now,
    )
    return (tx.session.scalar(live) or 0) + (tx.session.scalar(waiting) or 0 if tokens else 0)


def _taken(name: str) -> Conflict:
    return Conflict(f"there is already a project named {name!r}", code="project_name_taken")
