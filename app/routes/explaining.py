"""What of a client's model is its own and what that is worth: asking, answering, explaining."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response

from app import ablations, catalog, explanations, media
from app.auth import Scope
from app.routes import ASSIGNMENT_STATE, problems
from app.routes.reporting import BUSY, PAGE, TEXT
from app.web import Call, Page, Paged, require
from fedselect import explainpage
from fedselect.explaindocs import (
    AblationCreate,
    AblationInfo,
    AblationReport,
    AblationsAsked,
    Explanation,
)

router = APIRouter(prefix="/v1", tags=["explanations"])
READ, WRITE = require(Scope.ROUND_READ), require(Scope.ROUND_ADMIN)
FORMS = {"application/json": "json", "text/html": "html"}


@router.post(
    "/versions/{version_id}/ablations",
    operation_id="askAblations",
    summary="Ask clients what their personal parts are worth",
    status_code=201,
    responses=problems(
        401,
        403,
        404,
        409,
        410,
        codes={409: ["ablation_unfit"], 410: ["version_deleted"]},
    ),
)
def ask_ablations(version_id: UUID, body: AblationCreate, call: Call = WRITE) -> AblationsAsked:
    """Each scores the version with its own part, and with each tensor's part taken away.

    Agents of an earlier release are not given the work. Who still has it is not asked twice.
    """
    return call.create(
        body, lambda tx: ablations.ask(tx, call.who, version_id, body), AblationsAsked
    )


@router.get(
    "/versions/{version_id}/ablations",
    operation_id="listAblations",
    summary="List who was asked for an ablation",
    responses=problems(401, 403, 404),
)
def list_ablations(version_id: UUID, paging: Paged, call: Call = READ) -> Page[AblationInfo]:
    """Oldest first; what they found is in their explanations."""
    return call.page(
        paging,
        lambda tx: ablations.listed(catalog.get_version(tx, call.who, version_id).id),
        ablations.infos,
    )


@router.post(
    "/assignments/{assignment_id}/ablation",
    operation_id="reportAblation",
    summary="Report what the client's personal part is worth",
    status_code=201,
    responses=problems(
        401,
        403,
        404,
        409,
        codes={409: ["assignment_kind", *ASSIGNMENT_STATE], 422: ["tensor_unknown"]},
    ),
)
def report_ablation(
    assignment_id: UUID, body: AblationReport, call: Call = require(Scope.CLIENT_OWN)
) -> AblationInfo:
    """Numbers only; repeating it changes nothing."""
    return call.create(
        body, lambda tx: ablations.report(tx, call.who, assignment_id, body), AblationInfo
    )


@router.get(
    "/runs/{run_id}/clients/{client_id}/explanation",
    operation_id="getExplanation",
    summary="Explain what of a client's model is its own",
    response_model=Explanation,
    responses={
        **problems(
            401,
            403,
            404,
            410,
            503,
            codes={410: ["object_deleted"], 422: ["arm_unknown"], 503: BUSY},
        ),
        200: {"content": {"text/html": TEXT}},
    },
)
def get_explanation(
    run_id: UUID,
    client_id: UUID,
    form: Annotated[
        Literal["json", "html"] | None,
        Query(alias="format", description="Else what `Accept` prefers; JSON if it does not say."),
    ] = None,
    arm: Annotated[
        str | None, Query(max_length=64, description="Name of an arm; else the run's first.")
    ] = None,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
    call: Call = require(Scope.MASK_READ),
) -> Explanation | Response:
    """By tensor: how much, how it was chosen, whether others chose the same, and its worth.

    It follows from the mask of a single client, and needs the scope `mask:read`.
    """
    found = call.run(lambda tx: explanations.find(tx, call.who, run_id, client_id, arm=arm))
    made = explanations.explanation(call.core, found)
    if (form or FORMS[media.preferred(accept, list(FORMS))]) == "html":
        return Response(explainpage.page(made), headers=PAGE, media_type="text/html")
    return made
