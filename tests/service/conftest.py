"""The coordinator under test: real database, real object store, a clock that a test may move."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx
import pytest
from typer.testing import CliRunner

from app import gauges, wiring
from app.cli import migrate
from app.main import create_app
from app.wiring import Coordinator
from fedselect import remote
from fedselect.cli import build
from fedselect.client import Client

from .factories import Project, TestClient, make_project


class MovableClock:
    """The wall clock plus what a test has added to it; held, it moves a little with each look."""

    def __init__(self) -> None:
        self.offset = timedelta(0)
        self.held: datetime | None = None

    def __call__(self) -> datetime:
        if self.held is None:
            return datetime.now(UTC) + self.offset
        self.held += timedelta(milliseconds=1)  # so that rows keep their order
        return self.held + self.offset

    def hold(self) -> None:
        """However long the test takes from now on, no deadline passes by itself."""
        self.held = datetime.now(UTC)

    def advance(self, seconds: float) -> None:
        self.offset += timedelta(seconds=seconds)


@pytest.fixture(scope="session")
def session_clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def clock(session_clock: MovableClock) -> Iterator[MovableClock]:
    """The coordinator's clock; it goes right again after the test."""
    yield session_clock
    session_clock.offset, session_clock.held = timedelta(0), None


@pytest.fixture(scope="session")
def core(environment: dict[str, str], session_clock: MovableClock) -> Iterator[Coordinator]:
    """All parts of the coordinator on a database that the migrations have made."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        migrate()
        core = wiring.build(clock=session_clock)
        yield core
        core.close()


@pytest.fixture(scope="session")
def api(core: Coordinator) -> Iterator[TestClient]:
    """The HTTP interface; a bug is an answer with status 500, as for everybody else."""
    app = create_app(core.settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        app.state.core.close()
        app.state.core = core
        app.state.metrics = gauges.registry(core.db)
        yield client


@pytest.fixture
def project(core: Coordinator, api: TestClient) -> Project:
    """A tenant of its own: what other tests leave behind cannot be seen from here."""
    return make_project(core, api)


@pytest.fixture
def other(core: Coordinator, api: TestClient) -> Project:
    """Another tenant."""
    return make_project(core, api)


# --- the command line --------------------------------------------------------------------------


@pytest.fixture
def asked():
    """Where to and with which headers the command line sent each request."""
    return []


@pytest.fixture
def terminal(project, asked, monkeypatch, tmp_path):
    """Run ``fedselect …`` with the owner's key; what it prints, read if it is to be JSON."""

    def ask(request: httpx.Request) -> httpx.Response:
        asked.append((str(request.url.copy_with(path="", query=None)), dict(request.headers)))
        if request.url.host not in {"coordinator", "elsewhere"}:  # the store
            with httpx.Client(trust_env=False) as store:
                found = store.send(request)
        else:
            found = project.api.request(
                request.method,
                request.url.raw_path.decode(),
                headers=dict(request.headers),
                content=request.content,
            )
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    monkeypatch.setattr(remote, "Client", partial(Client, transport=httpx.MockTransport(ask)))
    monkeypatch.setenv("FEDSELECT_SERVER", "http://coordinator")
    monkeypatch.setenv("FEDSELECT_KEY", project.owner.key or "")
    monkeypatch.setenv("FEDSELECT_PROFILES", str(tmp_path / "profiles.toml"))

    def run(*words: object, code: int = 0, text: str | None = None):
        found = CliRunner().invoke(build(str(words[0])), [*map(str, words)], input=text)
        assert found.exit_code == code, (found.output, found.exception)
        if code:
            return found
        return json.loads(found.stdout) if "--json" in words else found.stdout

    return run
