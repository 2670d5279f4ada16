"""What cannot be run without a Docker engine is parsed, and compared with the code it names."""

from __future__ import annotations

import io
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from dotenv import dotenv_values
from typer.main import get_command

from app.settings import AppSettings
from fedselect.cli import build

ROOT = Path(__file__).parents[2]
FIELDS = {name.upper() for name in AppSettings.model_fields}
OURS = ("migrate", "api", "worker", "scheduler")


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def generated() -> dict[str, str | None]:
    command = ["sh", str(ROOT / "deploy" / "make-env")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dotenv_values(stream=io.StringIO(text))


def test_the_images_do_not_run_as_root_and_the_server_has_no_torch():
    dockerfile = DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes()))
    stages: dict[str, list[dict]] = {}
    for step in dockerfile.structure:
        if step["instruction"] == "FROM":
            name = re.split(r"\s+AS\s+", step["value"], flags=re.IGNORECASE)[-1]
            stages[name] = []
        elif stages:
            stages[name].append(step)
    assert {"server", "agent"} <= set(stages)
    assert "torch" not in " ".join(s["value"] for s in stages["server-environment"])
    text = (ROOT / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users
    assert all(user.split(":")[0] not in {"0", "root"} for user in users)


def test_every_service_of_ours_has_settings_that_exist(compose):
    for name in OURS:
        environment = set(compose["services"][name].get("environment", {}))
        ours = {n for n in environment if n in FIELDS}
        required = {n.upper() for n, f in AppSettings.model_fields.items() if f.is_required()}
        assert required <= ours, name


def test_the_commands_that_compose_names_exist(compose):
    admin = get_command(build()).commands["admin"].commands
    command = " ".join(compose["services"]["migrate"]["command"])
    named = re.findall(r"fedselect admin ([a-z-]+)", command)
    assert named
    assert set(named) <= set(admin)
    worker = " ".join(compose["services"]["worker"]["command"])
    scheduler = " ".join(compose["services"]["scheduler"]["command"])
    assert "workers.supervise worker" in worker
    assert "workers.supervise schedule" in scheduler


def test_every_long_running_service_has_a_health_check(compose):
    without = [
        name
        for name, service in compose["services"].items()
        if name != "migrate" and "healthcheck" not in service
    ]
    assert not without


def test_the_generated_settings_are_complete_and_valid(generated):
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{([A-Z0-9_]+):?\?", text))
    assert required
    assert not {name for name in required if not generated.get(name)}
    AppSettings(
        database_url="postgresql+psycopg://a:b@c/d",
        redis_url="redis://:a@b/0",
        s3_endpoint="http://s3:9000",
        s3_access_key=generated["S3_ACCESS_KEY"],
        s3_secret_key=generated["S3_SECRET_KEY"],
        key_pepper=generated["KEY_PEPPER"],
        ledger_key=generated["LEDGER_KEY"],
        encryption_key=generated["ENCRYPTION_KEY"],
    )


def test_two_deployments_share_no_secret(generated):
    command = ["sh", str(ROOT / "deploy" / "make-env")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    other = dotenv_values(stream=io.StringIO(text))
    for name in (
        "POSTGRES_PASSWORD",
        "POSTGRES_SERVICE_PASSWORD",
        "REDIS_PASSWORD",
        "S3_SECRET_KEY",
        "KEY_PEPPER",
        "ENCRYPTION_KEY",
    ):
        assert generated[name] != other[name]


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "DEPLOY.md").read_text()
    documented = re.findall(r"^\| `([A-Z0-9_]+)`", text, re.MULTILINE)
    assert documented == [name.upper() for name in AppSettings.model_fields]


def test_the_wheel_holds_the_migrations(tmp_path):
    python = ROOT / ".venv" / "bin" / "python"
    command = [str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in (
        "app/main.py",
        "workers/celery_app.py",
        "migrations/env.py",
        "migrations/script.py.mako",
        "migrations/versions/0001_first_tables.py",
        "fedselect/py.typed",
    ):
        assert wanted in names
