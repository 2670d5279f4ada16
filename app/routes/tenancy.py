"""Who may do what: the caller, projects and keys."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Response
from fastapi import Path as Segment

from app import keys, members, tenants
from app.auth import Scope
from app.db import Tx
from app.routes import problems
from app.web import Call, IfMatch, Page, Paged, check_match, each, etag, require
from fedselect.tenancy import (
    Identity,
    KeyCreate,
    KeyInfo,
    KeyIssued,
    KeyRotate,
    MemberCreate,
    MemberInfo,
    ProjectChange,
    ProjectCreate,
    ProjectInfo,
)

router = APIRouter(prefix="/v1", tags=["access"])
PROJECTS, KEYS = require(Scope.PROJECT_READ), require(Scope.KEY_ADMIN)
KeyId = Annotated[str, Segment(max_length=64, description="The middle of its text.")]


@router.get("/me", operation_id="whoAmI", summary="Who am I?", responses=problems(401, 403))
def who_am_i(call: Call = require(Scope.IDENTITY)) -> Identity:
    """Role, scopes, organisation and project of the key that asks."""
    return call.who.identity()


@router.post(
    "/me/key",
    operation_id="rotateOwnKey",
    summary="Get a successor of the key that asks",
    status_code=201,
    responses=problems(401, 403, 409, codes={409: ["key_ended", "key_rotated"]}),
)
def rotate_own_key(body: KeyRotate, call: Call = require(Scope.KEY_OWN)) -> KeyIssued:
    """Same rights; the old key works until the grace is over. The new one is shown once."""
    pepper, own = call.core.settings.pepper, call.who.key_id

    def work(tx: Tx) -> KeyIssued:
        return keys.rotate(tx, call.who, own, body, pepper=pepper)

    return call.create(body, work, KeyIssued)


@router.post(
    "/projects",
    operation_id="createProject",
    summary="Create a project",
    status_code=201,
    responses=problems(
        401, 403, 409, codes={403: ["organisation_key_needed"], 409: ["project_name_taken"]}
    ),
)
def create_project(body: ProjectCreate, call: Call = require(Scope.PROJECT_ADMIN)) -> ProjectInfo:
    """In the organisation of the key, which must be one of the whole organisation."""
    return call.create(body, lambda tx: tenants.create(tx, call.who, body), ProjectInfo)


@router.get(
    "/projects", operation_id="listProjects", summary="List projects", responses=problems(401, 403)
)
def list_projects(paging: Paged, call: Call = PROJECTS) -> Page[ProjectInfo]:
    """Oldest first: all of the organisation, or the one of the key."""
    return call.page(paging, lambda _: tenants.listed(call.who), tenants.infos)


@router.get(
    "/projects/{project_id}",
    operation_id="getProject",
    summary="Look at a project",
    responses=problems(401, 403, 404),
)
def get_project(project_id: UUID, response: Response, call: Call = PROJECTS) -> ProjectInfo:
    """One project, with its entity tag for a later change."""
    found = call.run(lambda tx: tenants.infos(tx, [tenants.get(tx, call.who, project_id)])[0])
    response.headers["ETag"] = _tag(found)
    return found


@router.patch(
    "/projects/{project_id}",
    operation_id="changeProject",
    summary="Rename a project, or limit its clients",
    responses=problems(
        401, 403, 404, 409, 412, codes={409: ["project_name_taken"], 412: ["etag_mismatch"]}
    ),
)
def change_project(
    project_id: UUID,
    body: ProjectChange,
    response: Response,
    if_match: IfMatch = None,
    call: Call = require(Scope.PROJECT_ADMIN),
) -> ProjectInfo:
    """What is left out stays."""

    def work(tx: Tx) -> ProjectInfo:
        row = tenants.get(tx, call.who, project_id, lock=True)
        check_match(if_match, _tag(tenants.infos(tx, [row])[0]))
        return tenants.change(tx, row, body)

    changed = call.run(work)
    response.headers["ETag"] = _tag(changed)
    return changed


def _tag(project: ProjectInfo) -> str:
    return etag(project.id, project.name, project.client_limit)


@router.post(
    "/members",
    operation_id="addMember",
    summary="Let a person in who signs in elsewhere",
    status_code=201,
    responses=problems(
        401,
        403,
        409,
        codes={
            403: ["scope_beyond", "organisation_key_needed"],
            409: ["no_issuer", "member_exists"],
        },
    ),
)
def add_member(body: MemberCreate, call: Call = KEYS) -> MemberInfo:
    """Their token is sent like a key; it says who they are, the membership what they may do."""
    issuer = call.core.settings.oidc_issuer
    return call.create(
        body, lambda tx: members.create(tx, call.who, body, issuer=issuer), MemberInfo
    )


@router.get(
    "/members", operation_id="listMembers", summary="List members", responses=problems(401, 403)
)
def list_members(paging: Paged, call: Call = require(Scope.KEY_READ)) -> Page[MemberInfo]:
    """Oldest first, former ones included."""
    return call.page(paging, lambda _: members.listed(call.who), each(members.info))


@router.post(
    "/members/{member_id}/end",
    operation_id="endMember",
    summary="End a membership now",
    responses=problems(401, 403, 404),
)
def end_member(member_id: UUID, call: Call = KEYS) -> MemberInfo:
    """Repeating it is harmless."""
    return call.run(lambda tx: members.end(tx, call.who, member_id))


@router.post(
    "/keys",
    operation_id="createKey",
    summary="Issue a key for a person or a program",
    status_code=201,
    responses=problems(
        401, 403, codes={403: ["scope_beyond", "organisation_key_needed"], 422: ["scope_unknown"]}
    ),
)
def create_key(body: KeyCreate, call: Call = KEYS) -> KeyIssued:
    """The key is shown this one time. Keys of clients come from their enrolment."""
    pepper = call.core.settings.pepper
    return call.create(body, lambda tx: keys.create(tx, call.who, body, pepper=pepper), KeyIssued)


@router.get("/keys", operation_id="listKeys", summary="List keys", responses=problems(401, 403))
def list_keys(paging: Paged, call: Call = require(Scope.KEY_READ)) -> Page[KeyInfo]:
    """Oldest first, ended ones included; never a secret."""
    return call.page(paging, lambda _: keys.listed(call.who), each(keys.info))


@router.get(
    "/keys/{key_id}",
    operation_id="getKey",
    summary="Look at a key",
    responses=problems(401, 403, 404),
)
def get_key(key_id: KeyId, call: Call = require(Scope.KEY_READ)) -> KeyInfo:
    """One key, without its secret."""
    return call.run(lambda tx: keys.info(keys.get(tx, call.who, key_id)))


@router.post(
    "/keys/{key_id}/rotate",
    operation_id="rotateKey",
    summary="Issue a key's successor",
    status_code=201,
    responses=problems(
        401, 403, 404, 409, codes={403: ["scope_beyond"], 409: ["key_ended", "key_rotated"]}
    ),
)
def rotate_key(key_id: KeyId, body: KeyRotate, call: Call = KEYS) -> KeyIssued:
    """Same rights; the old key works until the grace is over. A client rotates its own."""
    pepper = call.core.settings.pepper

    def work(tx: Tx) -> KeyIssued:
        return keys.rotate(tx, call.who, key_id, body, pepper=pepper)

    return call.create(body, work, KeyIssued)


@router.post(
    "/keys/{key_id}/revoke",
    operation_id="revokeKey",
    summary="End a key now",
    responses=problems(401, 403, 404),
)
def revoke_key(key_id: KeyId, call: Call = KEYS) -> KeyInfo:
    """Repeating it is harmless."""
    return call.run(lambda tx: keys.revoke(tx, call.who, key_id))
