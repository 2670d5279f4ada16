"""A minute of the schema fuzzer: every role, all checks, against a coordinator that listens.

The proof ``schema_fuzz`` (``make soak``) is the long form.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from service.conftest import api, clock, core, session_clock  # noqa: F401 - fixtures
from service.factories import TestClient, drain, make_project

from app.main import create_app
from app.wiring import Coordinator

from .fuzz import ROLES, fuzz, prepare

SECONDS = (11, 22, 44, 88)  # for each role: more where the machine is too busy for enough calls


@pytest.fixture(scope="module")
def url(core: Coordinator) -> Iterator[str]:  # noqa: F811
    """The same coordinator, on a port."""
    app = create_app(core.settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("role", ROLES)
def test_no_call_breaks_what_is_described(
    url: str,
    core: Coordinator,  # noqa: F811
    api: TestClient,  # noqa: F811
    role: str,
    tmp_path: Path,
) -> None:
    project = make_project(core, api)
    world = prepare(project, role, partial(drain, project))
    for seconds in SECONDS:
        options = ["--max-time", str(seconds)]
        found = fuzz(url, world, tmp_path / f"{role}-{seconds}", role=role, seed=7, options=options)
        if found.failures or (found.calls > 100 and found.with_status("2") > 10):
            break
    assert not found.failures, "\n".join(found.failures)
    assert found.with_status("5") == 0
    assert found.calls > 100
    assert found.with_status("2") > 10
    assert found.with_status("401") < found.calls / 2
