"""What people ask of versions: where they come from, what changed, their cards."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response

from app import cards, catalog, differences, lineage, media
from app.auth import Scope
from app.routes import problems
from app.web import Call, require
from fedselect.versiondocs import Lineage, SpaceDocument, VersionCard, VersionDifference

router = APIRouter(prefix="/v1", tags=["versions"])
READ = require(Scope.ROUND_READ)
Most = Annotated[int, Query(ge=1, le=200, description="Versions of the line.")]
Tensors = Annotated[int, Query(ge=1, le=1000, description="Tensors that are told.")]
FORMS = {"application/json": "json", "text/markdown": "markdown"}
TEXT: dict[str, Any] = {"schema": {"type": "string"}}
Form = Annotated[
    Literal["json", "markdown"] | None,
    Query(alias="format", description="Else what `Accept` prefers; JSON if it does not say."),
]
Base = Annotated[UUID | None, Query(description="Compared with; by default the parent.")]


@router.get(
    "/models/{model_id}/space",
    operation_id="getSpace",
    summary="Get a model's parameter space",
    responses=problems(401, 403, 404),
)
def get_space(model_id: UUID, call: Call = READ) -> SpaceDocument:
    """What gives the elements of a version their names and shapes."""
    return call.run(lambda tx: catalog.space_document(tx, call.who, model_id))


@router.get(
    "/versions/{version_id}/lineage",
    operation_id="getLineage",
    summary="Get a version's ancestors and children",
    responses=problems(401, 403, 404),
)
def get_lineage(version_id: UUID, limit: Most = 50, call: Call = READ) -> Lineage:
    """The version first, then its parent, and so on; `next_id` says where the line goes on."""
    return call.run(lambda tx: lineage.lineage(tx, call.who, version_id, limit=limit))


@router.get(
    "/versions/{version_id}/diff",
    operation_id="getDifference",
    summary="Compare a version with its parent or another one",
    responses=problems(
        401,
        403,
        404,
        codes={
            404: ["object_missing"],
            409: ["version_without_parent", "versions_incomparable"],
            410: ["version_deleted"],
            413: ["difference_too_large"],
            503: ["difference_busy", "storage_unavailable"],
        },
    ),
)
def get_difference(
    version_id: UUID, base: Base = None, limit: Tensors = 200, call: Call = READ
) -> VersionDifference:
    """By tensor: how far it moved, its largest change, and the angle; the furthest first."""
    found = call.run(lambda tx: differences.pair(tx, call.who, version_id, base))
    return differences.difference(call.core.storage, found, limit=limit)


@router.get(
    "/versions/{version_id}/card",
    operation_id="getCard",
    summary="Get a version's model card",
    response_model=VersionCard,
    responses={**problems(401, 403, 404), 200: {"content": {"text/markdown": TEXT}}},
)
def get_card(
    version_id: UUID,
    form: Form = None,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
    call: Call = READ,
) -> VersionCard | Response:
    """What it is, why it exists, how good it is, and what it is not; as JSON or Markdown."""
    found = call.run(lambda tx: cards.card(tx, call.who, version_id))
    if (form or FORMS[media.preferred(accept, list(FORMS))]) == "markdown":
        return Response(found.markdown, media_type="text/markdown")
    return found
