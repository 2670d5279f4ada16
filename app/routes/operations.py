"""What operators and load balancers call: health and metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from sqlalchemy.exc import SQLAlchemyError  # the one look at the database that is not a query

from app import auth, exposition
from app.errors import Refusal
from app.routes import problems
from app.web import Call, public
from fedselect import __version__
from fedselect.protocol import Health

router = APIRouter(tags=["operations"])


@router.get(
    "/health/live", operation_id="live", summary="Is the process alive?", dependencies=[public()]
)
def live() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok", version=__version__)


@router.get(
    "/health/ready",
    operation_id="ready",
    summary="Can it serve?",
    responses={503: {"description": "A server behind the coordinator is away."}},
)
def ready(response: Response, call: Call = public()) -> Health:
    """Asks the database (migrated?) and the object store (bucket there?)."""
    away: dict[str, str] = {}
    try:
        if call.core.db.ping() is None:
            away["database"] = "not migrated"
    except SQLAlchemyError as error:
        away["database"] = type(error).__name__
    try:
        call.core.storage.ping()
    except Refusal as error:
        away["storage"] = error.code
    response.status_code = 503 if away else 200
    return Health(status="away" if away else "ok", version=__version__, away=away)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Metrics for Prometheus",
    responses=problems(401, 403),
    include_in_schema=False,  # its form is Prometheus's, and only that is to read it
)
def metrics(
    request: Request,
    authorization: Annotated[str | None, Header()] = None,
    call: Call = public(),
) -> Response:
    """For whoever sends METRICS_TOKEN as Bearer; without that setting, for nobody."""
    token = call.core.settings.metrics_token
    auth.check_metrics_token(token.get_secret_value() if token else None, authorization)
    text = exposition.render(request.app.state.metrics)
    return Response(text, media_type=exposition.CONTENT_TYPE)
