"""The ASGI application: builds the coordinator, mounts the routes.

Owns assembly alone. Must not contain rules or SQL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.types import Lifespan

from app import description, exposition, gauges, logs, probe, tracing, wiring
from app.outermost import Outermost
from app.problems import install_problem_handlers
from app.routes import (
    admin,
    agents,
    auditing,
    estimating,
    explaining,
    hooks,
    operations,
    reporting,
    rolling,
    tenancy,
    versions,
)
from app.settings import AppSettings, read
from app.watching import Watched
from fedselect import __version__

DESCRIPTION = """
Coordinator of personalized federated learning. Sites keep their data and a small, automatically
selected part of the parameters; the rest is averaged per element over the clients that share it.

* **agents** use a client key: check in, download, upload through a signed address, complete.
* **administrators** use an owner key: models, enrolments, runs, rounds.
* **auditors** read the ledger.

Send the key as `Authorization: Bearer fsk_…`. Errors are `application/problem+json` with a stable
`code`. Every creating POST accepts an `Idempotency-Key`. Times are UTC, RFC 3339.
"""


MODULES = (
    *(agents, admin, estimating, reporting, explaining, versions, rolling),
    *(tenancy, hooks, auditing, operations),
)
DESCRIBE_MODELS = {"/v1/models", "/v1/estimates"}  # a parameter space is a long document


def interface(lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The routes and their description, without anything behind them."""
    # The page of /docs with its scripts: a site without the internet must be able to read it, and
    # nobody else may run code in the browser of an administrator.
    app = FastAPIOffline(
        title="FedSelect coordinator",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        static_url="/docs/files",
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    install_problem_handlers(app)
    for module in MODULES:
        app.include_router(module.router)
    routes = [each for module in MODULES for each in module.router.routes]
    app.state.routes = [each for each in routes if isinstance(each, APIRoute)]
    derived = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description.complete(derived(), app.state.routes)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
    return app


def serve() -> FastAPI:
    """The application of a process of its own, for ``uvicorn --factory app.main:serve``."""
    app = create_app()
    wiring.settle()
    return app


def create_app(settings: AppSettings | None = None) -> FastAPI:
    """The application."""
    settings = settings or read()
    logs.configure(settings.log_format, settings.log_level)
    tracing.configure("api")
    core = wiring.build(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        probe.at_start(settings)
        with exposition.served(settings.metrics_address, settings.metrics_port, app.state.metrics):
            yield
        core.close()
        tracing.close()

    app = interface(lifespan)
    app.state.core = core
    app.state.metrics = gauges.registry(core.db)

    def limit(path: str) -> int:
        return settings.max_model_body if path in DESCRIBE_MODELS else settings.max_body

    app.add_middleware(Outermost, limit=limit, callers=core.callers)
    app.add_middleware(Watched)
    return app
