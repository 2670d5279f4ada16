"""What a run would cost, and what it did cost."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from app import estimates
from app.auth import Scope
from app.routes import problems
from app.web import Call, require
from fedselect.armestimate import estimate_run
from fedselect.estimatedocs import Estimate, EstimateCreate, Measured, RunEstimate

router = APIRouter(prefix="/v1", tags=["estimates"])
READ = require(Scope.ROUND_READ)
Seconds = Annotated[float | None, Query(gt=0, le=1e6, description="Of a gradient step.")]
Bytes = Annotated[float | None, Query(gt=0, le=8, description="Measured by a dry run.")]
Link = Annotated[
    str, Query(pattern=r"^[a-z0-9][a-z0-9./]*$", max_length=40, description="See POST estimates.")
]


@router.post(
    "/estimates",
    operation_id="makeEstimate",
    summary="Estimate what a run would cost",
    responses=problems(
        401,
        403,
        404,
        413,
        codes={422: ["settings_invalid", "space_invalid", "link_unknown"]},
    ),
)
def make_estimate(body: EstimateCreate, call: Call = READ) -> Estimate:
    """A question, not a thing: nothing is created, asking again changes nothing."""
    space = call.run(lambda tx: estimates.space_of(tx, call.who, body))
    return estimate_run(body, space)


@router.get(
    "/runs/{run_id}/estimate",
    operation_id="getRunEstimate",
    summary="Compare a run's estimate with what it has cost",
    responses=problems(401, 403, 404, codes={422: ["link_unknown"]}),
)
def get_run_estimate(
    run_id: UUID,
    link: Link = "100mbit",
    step_seconds: Seconds = None,
    value_bytes_up: Bytes = None,
    value_bytes_down: Bytes = None,
    call: Call = READ,
) -> RunEstimate:
    """For the rounds that are published and the clients that took part, with the error stated."""
    measured = Measured(
        step_seconds=step_seconds,
        value_bytes_up=value_bytes_up,
        value_bytes_down=value_bytes_down,
    )
    return call.run(lambda tx: estimates.of_run(tx, call.who, run_id, link=link, measured=measured))
