"""Organisations and projects: who owns everything else.

Owns their creation and the first keys. There are no default passwords: the first key of a project
is made on the command line of whoever runs the service.
"""

from __future__ import annotations

from uuid import UUID, uuid4

from sqlalchemy import select

from app import auth, ledger
from app.db import Tx
from app.errors import Invalid
from app.tables import Organisation, Project


def ensure_project(tx: Tx, *, organisation: str, project: str) -> UUID:
    """The project of that name, created if it is not there."""
    owner = tx.session.scalars(
        select(Organisation).where(Organisation.name == organisation)
    ).first()
    if owner is None:
        owner = Organisation(id=uuid4(), name=organisation, created_at=tx.now)
        tx.session.add(owner)
        tx.session.flush()
        body = {"name": organisation}
        ledger.append(
            tx, "organisation.created", f"organisation:{owner.id}", project=None, body=body
        )
    query = select(Project).where(Project.organisation_id == owner.id, Project.name == project)
    found = tx.session.scalars(query).first()
    if found is None:
        found = Project(id=uuid4(), organisation_id=owner.id, name=project, created_at=tx.now)
        tx.session.add(found)
        tx.session.flush()
        body = {"name": project, "organisation": str(owner.id)}
        ledger.append(tx, "project.created", f"project:{found.id}", project=found.id, body=body)
    return found.id


def issue_key(tx: Tx, pepper: bytes, *, project: UUID, role: str) -> str:
    """A key for a person of this role.

    Raises:
        Invalid: no such role; client keys come from enrolment alone.
    """
    roles = sorted(set(auth.ROLES) - {"client"})
    if role not in roles:
        raise Invalid(f"no role {role!r}; there are {', '.join(roles)}", code="role_unknown")
    return auth.issue_key(tx, pepper, project=project, role=role)
