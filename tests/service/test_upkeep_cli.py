"""The commands of whoever keeps a deployment in order, as they are typed."""

from __future__ import annotations

import io
import json

import pytest
from typer.testing import CliRunner

from app import settings, wiring
from app.localstack import LocalStack
from fedselect.cli import build

from .campaign import Campaign
from .factories import ok


@pytest.fixture
def run(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def call(*words, code=0):
        result = CliRunner().invoke(build(words[0]), [str(word) for word in words])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    return call


def test_gc_shows_and_does_and_checks(run, project, monkeypatch):
    campaign = Campaign(project, rounds=3, published=2)
    monkeypatch.setenv("RECOMPUTE_WINDOW", "0")
    monkeypatch.setenv("RETAIN_ORPHANS", "0.05")
    # As old as the window asks, as a database that has been running for a day has them.
    project.sql("UPDATE objects SET claimed_at = claimed_at - interval '1 day'")
    shown = json.loads(run("gc", "--dry-run", "--json"))
    assert shown["dry_run"]
    counts = {kind["kind"]: kind["count"] for kind in shown["kinds"]}
    assert counts["recomputability"] >= 1
    assert counts["accepted"] >= 2
    assert campaign.recomputable()[1]
    assert "would go" in run("gc", "--dry-run")
    assert "deleted" in run("gc")
    assert campaign.recomputable() == {0: True, 1: False, 2: True}
    assert "nothing is old enough" in run("gc", "--dry-run")


def test_gc_check_says_what_is_wrong_by_its_exit_code(run, project):
    key = f"accepted/{project.id}/stray"
    project.core.storage.put(key, io.BytesIO(b"abc"), 3)
    found = json.loads(run("gc", "--check", "--json", code=1))
    assert key in found["strays"]
    assert key in run("gc", "--check", code=1).replace("\n", "")
    project.core.storage.delete([key])


def test_erase_client_tells_what_remains(run, project):
    campaign = Campaign(project, rounds=2, published=1)
    client = campaign.clients[0]
    found = json.loads(run("admin", "erase-client", client.id, "--json"))
    assert [v["number"] for v in found["versions"]] == [1]
    text = run("admin", "erase-client", client.id)
    assert f"erased-{client.id}" in text.replace("\n", "")
    assert "Sums cannot be undone" in text
    assert ok(project.owner.get(f"/v1/clients/{client.id}"))["state"] == "revoked"


def test_an_unknown_client_is_an_error(run):
    from fedselect.errors import FedSelectError

    with pytest.raises((FedSelectError, AssertionError)) as error:
        run("admin", "erase-client", "00000000-0000-4000-8000-000000000000")
    assert "there is no client" in str(error.value)


def test_without_an_environment_commands_take_the_local_stack(run, core, environment, monkeypatch):
    for name in environment:
        monkeypatch.delenv(name)
    monkeypatch.setattr(LocalStack, "environment", lambda _: environment)
    assert json.loads(run("admin", "check-ledger", "--root", "x", "--json"))["findings"] == []
    assert run("admin", "create-key", "--root", "x").startswith("fsk_")
    issued = json.loads(run("admin", "create-key", "--root", "x", "--role", "viewer", "--json"))
    assert (issued["key"][:4], issued["info"]["role"]) == ("fsk_", "viewer")
    monkeypatch.setenv("LEDGER_KEY_PREVIOUS", environment["LEDGER_KEY"])  # nothing to change
    key = run("admin", "rotate-ledger-key", "--root", "x").strip()
    assert key == wiring.build(settings.read(environment)).sealer.public_key
    again = json.loads(run("admin", "rotate-ledger-key", "--root", "x", "--json"))
    assert again == {"ledger_key": key}


def test_without_either_an_error_says_so(run, environment, monkeypatch, tmp_path):
    for name in environment:
        monkeypatch.delenv(name)
    with pytest.raises(AssertionError, match=r"nothing was started in .*DATABASE_URL"):
        run("admin", "check-ledger", "--root", tmp_path)


def test_settings_that_are_missing_are_named(run, monkeypatch):
    monkeypatch.delenv("KEY_PEPPER")
    monkeypatch.setenv("LEDGER_KEY", "")
    with pytest.raises(AssertionError, match=r"KEY_PEPPER: .*; LEDGER_KEY: .*32 bytes"):
        run("gc", "--dry-run")
