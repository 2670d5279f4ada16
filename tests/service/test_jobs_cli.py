"""The ``fedselect jobs`` commands against a real coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from typer.testing import CliRunner, Result

from app import jobs
from app.tables import Job
from app.wiring import Coordinator
from fedselect import remote
from fedselect.cli import build
from fedselect.client import Client
from fedselect.errors import FedSelectError

from .factories import Project, contribute, make_clients, make_model, make_run

Command = Callable[..., Result]


@pytest.fixture
def command(project: Project, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run ``fedselect jobs …`` with the owner's key."""

    def ask(request: httpx.Request) -> httpx.Response:
        found = project.api.request(
            request.method,
            request.url.path + ("?" + request.url.query.decode() if request.url.query else ""),
            headers=dict(request.headers),
            content=request.content,
        )
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    connected = partial(Client, transport=httpx.MockTransport(ask))
    monkeypatch.setattr(remote, "Client", connected)
    monkeypatch.setenv("FEDSELECT_SERVER", "http://coordinator")
    monkeypatch.setenv("FEDSELECT_KEY", project.owner.key or "")
    return lambda *words: CliRunner().invoke(build("jobs"), ["jobs", *words])


@pytest.fixture
def job(project: Project) -> str:
    """A verification that is due."""
    model = make_model(project)
    make_run(project, model)
    contribute(make_clients(project, 1)[0], model)
    (found,) = project.sql("SELECT id FROM jobs WHERE project_id = :project AND state = 'due'")
    return str(found.id)


def test_list_show_and_retry(command: Command, job: str) -> None:
    listed = json.loads(command("list", "--state", "due", "--json").stdout)
    assert [found["id"] for found in listed] == [job]
    assert len(json.loads(command("list", "--json").stdout)) == 2
    shown = command("show", job)
    assert shown.exit_code == 0
    assert "verify" in shown.stdout
    assert json.loads(command("show", job, "--json").stdout) == listed[0]
    assert json.loads(command("retry", job, "--json").stdout)["state"] == "due"
    assert command("list").exit_code == 0


def test_refusals_are_errors_of_the_command(command: Command, job: str) -> None:
    nobody = command("show", "00000000-0000-4000-8000-000000000000")
    assert (nobody.exit_code, getattr(nobody.exception, "code", None)) == (1, "not_found")
    assert command("show", "seven").exit_code == 2


def test_a_missing_key_is_explained(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDSELECT_KEY")
    monkeypatch.setenv("FEDSELECT_PROFILES", str(tmp_path / "none.toml"))
    found = command("list").exception
    assert isinstance(found, FedSelectError)
    assert "FEDSELECT_KEY" in str(found)


def test_watch(
    command: Command, core: Coordinator, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verdict is the exit code; what a stall is, is tested where it is decided."""
    assert command("watch", "--seconds", "1e9").exit_code == 0
    with core.db.transaction("test", "test") as tx:
        due = tx.session.get_one(Job, UUID(job))
    monkeypatch.setattr(jobs, "stalled", lambda tx, seconds: due)
    found = command("watch")
    assert found.exit_code == 1
    assert "restart the workers" in found.stderr
