"""What a run has done, for those who decide: the report, as a document, a page or a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Response

from app import comparisons, media, runreports
from app.auth import Scope
from app.routes import problems
from app.web import Call, require
from fedselect import comparison, comparisonpage, pages, reportpage, reporttable
from fedselect.comparedoc import Comparison
from fedselect.reportdoc import RunReport

router = APIRouter(prefix="/v1", tags=["reports"])
READ = require(Scope.ROUND_READ)
FORMS = {"application/json": "json", "text/html": "html", "text/csv": "csv"}
# A page may use the one stylesheet that it carries, and nothing else.
PAGE = {"Content-Security-Policy": f"{pages.CSP}; frame-ancestors 'none'"}


def wanted_form(
    form: Annotated[
        Literal["json", "html", "csv"] | None,
        Query(alias="format", description="Else what `Accept` prefers; JSON if it does not say."),
    ] = None,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> str:
    """The form that the caller wants of a document."""
    return form or FORMS[media.preferred(accept, list(FORMS))]


Form = Annotated[str, Depends(wanted_form)]
COMPARED: dict[str, Callable[[Comparison], Response]] = {
    "html": lambda found: Response(
        comparisonpage.page(found), headers=PAGE, media_type="text/html"
    ),
    "csv": lambda found: Response(comparison.table(found), media_type="text/csv"),
}
WRITTEN: dict[str, Callable[[RunReport], Response]] = {
    "html": lambda report: Response(reportpage.page(report), headers=PAGE, media_type="text/html"),
    "csv": lambda report: Response(reporttable.table(report), media_type="text/csv"),
}
BUSY = ["storage_unavailable", "report_busy"]
TEXT: dict[str, Any] = {"schema": {"type": "string"}}


@router.get(
    "/runs/{run_id}/report",
    operation_id="getRunReport",
    summary="Who gained, who lost, what it cost, what was personalized",
    response_model=RunReport,
    responses={
        **problems(
            401,
            403,
            404,
            503,
            codes={422: ["arm_unknown", "baseline_unfit", "rerun_unfit"], 503: BUSY},
        ),
        200: {"content": {"text/html": TEXT, "text/csv": TEXT}},
    },
)
def get_run_report(
    run_id: UUID,
    form: Form,
    arm: Annotated[
        str | None, Query(max_length=64, description="Name of the arm; by default the first.")
    ] = None,
    fedavg: Annotated[
        UUID | None,
        Query(
            description="A run of the policy `fedavg` on the same model with the same rounds and "
            "training: its clients' own models are then the baseline `fedavg_ft`. By default the "
            "run's own FedAvg arm, if its arms are parallel and it has one."
        ),
    ] = None,
    rerun: Annotated[
        UUID | None,
        Query(description="The same run with another seed: how much of the choice comes again."),
    ] = None,
    call: Call = READ,
) -> RunReport | Response:
    """The last evaluation of each client, with intervals; as JSON, a page, or a line per client."""
    others = runreports.Others(fedavg, rerun)
    found = call.run(lambda tx: runreports.find(tx, call.who, run_id, arm=arm, others=others))
    report = runreports.report(call.core, found)
    if Scope.MASK_READ not in call.who.scopes:
        report = report.model_copy(update={"masks": report.masks.without_single_clients()})
    return WRITTEN[form](report) if form in WRITTEN else report


@router.get(
    "/runs/{run_id}/comparison",
    operation_id="getRunComparison",
    summary="Which of a run's arms this federation should use, and whether the data can tell",
    response_model=Comparison,
    responses={
        **problems(401, 403, 404),
        200: {"content": {"text/html": TEXT, "text/csv": TEXT}},
    },
)
def get_run_comparison(
    run_id: UUID,
    form: Form,
    call: Call = READ,
) -> Comparison | Response:
    """Arms side by side, with intervals; as JSON, a page, or a line per client and arm."""
    found = call.run(lambda tx: comparisons.find(tx, call.who, run_id)).comparison()
    return COMPARED[form](found) if form in COMPARED else found
