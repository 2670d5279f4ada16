"""What a run has done, for those who decide: the report, as a document, a page or a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response

from app import media, runreports
from app.auth import Scope
from app.routes import problems
from app.web import Call, require
from fedselect import reporting, reportpage
from fedselect.reportdoc import RunReport

router = APIRouter(prefix="/v1", tags=["reports"])
READ = require(Scope.ROUND_READ)
FORMS = {"application/json": "json", "text/html": "html", "text/csv": "csv"}
# A page may use the one stylesheet that it carries, and nothing else.
PAGE = {"Content-Security-Policy": f"{reportpage.CSP}; frame-ancestors 'none'"}
WRITTEN: dict[str, Callable[[RunReport], Response]] = {
    "html": lambda report: Response(reportpage.page(report), headers=PAGE, media_type="text/html"),
    "csv": lambda report: Response(reporting.table(report), media_type="text/csv"),
}
BUSY = ["storage_unavailable", "report_busy"]
TEXT: dict[str, Any] = {"schema": {"type": "string"}}


@router.get(
    "/runs/{run_id}/report",
    operation_id="getRunReport",
    summary="Who gained, who lost, what it cost, what was personalized",
    response_model=RunReport,
    responses={
        **problems(401, 403, 404, 503, codes={422: ["baseline_unfit"], 503: BUSY}),
        200: {"content": {"text/html": TEXT, "text/csv": TEXT}},
    },
)
def get_run_report(
    run_id: UUID,
    form: Annotated[
        Literal["json", "html", "csv"] | None,
        Query(alias="format", description="Else what `Accept` prefers; JSON if it does not say."),
    ] = None,
    fedavg: Annotated[
        UUID | None,
        Query(
            description="A run of the policy `fedavg` on the same model with the same rounds and "
            "training: its clients' own models are then the baseline `fedavg_ft`."
        ),
    ] = None,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
    call: Call = READ,
) -> RunReport | Response:
    """The last evaluation of each client, with intervals; as JSON, a page, or a line per client."""
    found = call.run(lambda tx: runreports.find(tx, call.who, run_id, fedavg=fedavg))
    report = runreports.report(call.core, found)
    wanted = form or FORMS[media.preferred(accept, list(FORMS))]
    return WRITTEN[wanted](report) if wanted in WRITTEN else report
