"""Members: what people who sign in elsewhere may do here.

Owns the ``members`` rows. A membership is of one project or of a whole organisation, for a subject
of an issuer; the issuer says who somebody is, never what they may do.
"""

from __future__ import annotations

from uuid import UUID, uuid4

from sqlalchemy import Select, or_, select

from app import keys, ledger, tenants
from app.auth import ROLES, Principal
from app.db import Tx
from app.errors import Conflict, Forbidden, Invalid, Missing
from app.oidc import Person
from app.tables import Member, Project
from fedselect.tenancy import MemberCreate, MemberInfo


def create(tx: Tx, principal: Principal, body: MemberCreate, *, issuer: str | None) -> MemberInfo:
    """Let a person in; nobody gives away more than they have.

    Raises:
        Conflict: there is no issuer, or the person is a member already.
        Forbidden: a role beyond one's own, or the organisation by a key of one project.
    """
    if issuer is None:
        raise Conflict("people cannot sign in here: OIDC_ISSUER is not set", code="no_issuer")
    keys.check_gift(principal, ROLES[body.role])
    if body.organisation:
        principal.require_organisation()
    project = None if body.organisation else principal.project_id
    tenants.lock_organisation(tx, principal.organisation_id)  # nobody adds the same one beside us
    query = _live(issuer, body.subject).where(
        Member.organisation_id == principal.organisation_id,
        Member.project_id.is_(None) if project is None else Member.project_id == project,
    )
    if tx.session.scalars(query).first() is not None:
        raise Conflict("this person is a member already", code="member_exists")
    row = Member(
        id=uuid4(),
        organisation_id=principal.organisation_id,
        project_id=project,
        issuer=issuer,
        subject=body.subject,
        name=body.name,
        role=body.role,
        created_at=tx.now,
    )
    tx.session.add(row)
    tx.session.flush()
    _note(tx, row, "member.added")
    return info(row)


def end(tx: Tx, principal: Principal, member_id: UUID) -> MemberInfo:
    """End a membership now; repeating it is harmless.

    Raises:
        Missing: there is none.
    """
    query = listed(principal).where(Member.id == member_id).with_for_update()
    row = tx.session.scalars(query).first()
    if row is None:
        raise Missing(f"there is no member {member_id}")
    if row.ended_at is None:
        row.ended_at = tx.now
        _note(tx, row, "member.ended")
    return info(row)


def listed(principal: Principal) -> Select[Member]:
    """Members of the principal's project; for keys of an organisation, those of all of it."""
    query = select(Member).where(Member.organisation_id == principal.organisation_id)
    if not principal.organisation_wide:
        return query.where(Member.project_id == principal.project_id)
    if principal.project is None:
        return query
    return query.where(or_(Member.project_id == principal.project, Member.project_id.is_(None)))


def info(row: Member) -> MemberInfo:
    """The member as the interface shows it."""
    return MemberInfo.model_validate(row, from_attributes=True)


def principal_of(tx: Tx, person: Person, project: UUID | None) -> Principal:
    """What a person may do in the project that they name, or in the only one that they have.

    Raises:
        Forbidden: they are no member of anything.
        Invalid: they are a member of several and name none.
        Missing: there is no such project for them.
    """
    found = tx.session.scalars(_live(person.issuer, person.subject)).all()
    if not found:
        raise Forbidden("you are known, but no member of any project", code="member_unknown")
    if project is not None:
        owner = tx.session.scalar(select(Project.organisation_id).where(Project.id == project))
        found = [
            m
            for m in found
            if m.project_id == project or (m.project_id is None and m.organisation_id == owner)
        ]
        if not found:
            raise Missing(f"there is no project {project}")
        found.sort(key=lambda m: m.project_id is None)  # what is said of the project itself counts
    elif len(found) > 1:
        raise Invalid(
            "you are a member of several projects: name one in FedSelect-Project",
            code="project_required",
        )
    row = found[0]
    return Principal(
        "",
        row.organisation_id,
        row.project_id or project,
        row.role,
        ROLES[row.role],
        member_id=row.id,
        organisation_wide=row.project_id is None,
        expires_at=person.expires_at,
    )


def _live(issuer: str, subject: str) -> Select[Member]:
    return select(Member).where(
        Member.issuer == issuer, Member.subject == subject, Member.ended_at.is_(None)
    )


def _note(tx: Tx, row: Member, action: str) -> None:
    body = {"role": row.role, "organisation": None if row.project_id else str(row.organisation_id)}
    said = {name: value for name, value in body.items() if value is not None}
    ledger.append(tx, action, f"member:{row.id}", project=row.project_id, body=said)
