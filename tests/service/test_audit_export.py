"""An auditor's way: `audit export` from a running API, `audit verify` offline, against a head."""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner, Result

from app import keys, ledger, tenants
from app.main import create_app
from app.wiring import Coordinator
from fedselect.cli import build
from fedselect.errors import FedSelectError
from workers import sweep

from .test_ledger import as_owner, newest
from .test_ledger import own as own  # a fixture
from .test_ledger import template as template  # a fixture

MINE = 20  # entries of the auditor's project, behind 200 of others


@dataclass
class Audit:
    """A running API, an auditor's key for it, and the head that the auditor has kept."""

    core: Coordinator
    server: str
    key: str
    project: UUID
    folder: Path

    @property
    def export(self) -> Path:
        return self.folder / "ledger.jsonl"

    def grow(self) -> None:
        with self.core.db.transaction("test", "test") as tx:
            for number in range(MINE):
                body = {"n": number}
                ledger.append(tx, "test.done", f"test:{number}", project=self.project, body=body)
        sweep.seal(self.core)

    def run(self, *words: object, key: str | None = None) -> Result:
        environment = {"FEDSELECT_KEY": key or self.key}
        return CliRunner().invoke(build("audit"), list(map(str, words)), env=environment)

    def fetch(self) -> None:
        done = self.run("audit", "export", self.export, "--server", self.server, "--json")
        assert done.exit_code == 0, (done.output, done.exception)
        assert json.loads(done.stdout)["file"] == str(self.export)

    def verify(self, *words: object) -> Result:
        key = ("--public-key", self.core.sealer.public_key)
        return self.run("audit", "verify", self.export, "--partial", "--json", *key, *words)

    def keep(self) -> Path:
        file = self.folder / "checkpoint.txt"
        file.write_text(newest(self.core))
        return file


@pytest.fixture
def audit(own: Coordinator, tmp_path: Path) -> Iterator[Audit]:
    with own.db.transaction("test", "test") as tx:
        project = tenants.ensure_project(tx, organisation="x", project=secrets.token_hex(4))
        key = keys.first(tx, own.settings.pepper, project, role="auditor").key
    server = uvicorn.Server(uvicorn.Config(create_app(own.settings), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as door:  # whoever knocks early waits in its queue
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        found = Audit(own, f"http://127.0.0.1:{door.getsockname()[1]}", key, project.id, tmp_path)
        try:
            httpx.get(f"{found.server}/health/live").raise_for_status()
            found.grow()
            yield found
        finally:
            server.should_exit = True
            thread.join()


def test_an_export_verifies_and_extends_the_head_that_was_kept(audit: Audit) -> None:
    head = audit.keep()
    audit.grow()
    audit.fetch()
    report = json.loads(audit.verify("--checkpoint", head).output)
    lines = [json.loads(line) for line in audit.export.read_text().splitlines()]
    shown = [line["entry"] for line in lines[:-1] if line["entry"]]
    assert (report["entries"], report["heads"], report["pinned"]) == (len(lines) - 1, 1, True)
    assert report["withheld"] == len(lines) - 1 - len(shown) >= 200
    assert {entry["project"] for entry in shown} == {str(audit.project)}
    assert sum(entry["action"] == "test.done" for entry in shown) == 2 * MINE
    assert set(audit.folder.iterdir()) == {head, audit.export}


IN_THE_ROWS = {
    "an entry is edited": ("UPDATE ledger_entries SET body = '{\"n\": 1}' WHERE id = {id}",),
    "an entry is another's": ("UPDATE ledger_entries SET actor = 'x' WHERE id = {id}",),
    "an entry and its leaf are edited": (
        "UPDATE ledger_entries SET actor = 'x' WHERE id = {id}",
        "UPDATE ledger_seals SET leaf = sha256('x') WHERE entry_id = {id}",
    ),
    "two entries are exchanged": (
        "ALTER TABLE ledger_seals DROP CONSTRAINT fk_ledger_seals_entry_id",
        "UPDATE ledger_seals SET entry_id = -1 WHERE entry_id = {id}",
        "UPDATE ledger_seals SET entry_id = {id} WHERE entry_id = {id} + 1",
        "UPDATE ledger_seals SET entry_id = {id} + 1 WHERE entry_id = -1",
    ),
    "an entry is gone": (
        "DELETE FROM ledger_seals WHERE entry_id = {id}",
        "DELETE FROM ledger_entries WHERE id = {id}",
    ),
    "the end is gone": ("DELETE FROM ledger_seals WHERE entry_id >= {id}",),
}
SIGNED_ANEW = {
    "the past is rewritten": "UPDATE ledger_entries SET actor = 'x' WHERE id = {id}",
    "an entry never was": "DELETE FROM ledger_entries WHERE id = {id}",
    "the end never was": "DELETE FROM ledger_entries WHERE id >= {id}",
}


def some_entry(audit: Audit) -> int:
    with audit.core.db.transaction("test", "test") as tx:
        rows = list(ledger.sealed_entries(tx, start=0, limit=1000))
    return next(e.id for _, e in rows if e.project_id and e.subject == f"test:{MINE // 2}")


@pytest.mark.parametrize("what", IN_THE_ROWS)
def test_rows_that_were_tampered_with_do_not_verify(audit: Audit, what: str) -> None:
    head, place = audit.keep(), some_entry(audit)
    as_owner(*(statement.replace("{id}", str(place)) for statement in IN_THE_ROWS[what]))
    audit.fetch()
    for words in ((), ("--checkpoint", head)):
        done = audit.verify(*words)
        assert isinstance(done.exception, FedSelectError), done.output


@pytest.mark.parametrize("what", SIGNED_ANEW)
def test_what_was_signed_anew_is_not_what_was_kept(audit: Audit, what: str) -> None:
    """The forger has the database, the bucket and the key: only a head kept elsewhere tells."""
    head, place = audit.keep(), some_entry(audit)
    as_owner("DELETE FROM ledger_seals", "DELETE FROM ledger_checkpoints")
    as_owner(SIGNED_ANEW[what].replace("{id}", str(place)))
    audit.core.storage.delete([key for key, _ in audit.core.heads.all()])
    sweep.seal(audit.core)
    audit.fetch()
    assert audit.verify().exit_code == 0
    error = audit.verify("--checkpoint", head).exception
    assert isinstance(error, FedSelectError)
    assert error.code in {"ledger_forked", "ledger_rolled_back"}


def test_an_export_that_fails_leaves_nothing_and_spoils_nothing(audit: Audit) -> None:
    audit.export.write_text("the one before")
    done = audit.run("audit", "export", audit.export, "--server", audit.server, key="fsk_unknown")
    assert isinstance(done.exception, FedSelectError)
    assert done.exception.code == "key_unknown"
    assert [file.read_text() for file in audit.folder.iterdir()] == ["the one before"]
