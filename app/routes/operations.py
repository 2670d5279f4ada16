"""What operators and load balancers call: health."""

from __future__ import annotations

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError  # the one look at the database that is not a query

from app.errors import Refusal
from app.web import Call, public
from fedselect import __version__
from fedselect.protocol import Health

router = APIRouter(prefix="/health", tags=["operations"])


@router.get("/live", operation_id="live", summary="Is the process alive?", dependencies=[public()])
def live() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok", version=__version__)


@router.get(
    "/ready",
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
