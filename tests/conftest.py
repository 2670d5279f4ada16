"""What the whole test run shares: one set of real servers, and rooms of its own for each worker.

The servers are started by the first test that asks for them, in whatever xdist worker it runs, and
ended by the process that controls the run. A run of pure tests starts nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.localprocess import end, search
from app.localservers import object_client
from app.localservice import MARK
from app.localstack import LocalStack

FOLDER = "FEDSELECT_TEST_STACK"  # names the run's folder; xdist workers inherit it


def pytest_configure(config: pytest.Config) -> None:
    """Choose the folder, and clear away what killed runs left behind."""
    if hasattr(config, "workerinput"):
        return
    # A run that is told to stop (a CI time-out) must end its servers as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = Path(tempfile.gettempdir()) / f"fedselect-tests-{os.getuid()}"
    runs.mkdir(mode=0o700, exist_ok=True)
    for run in runs.glob("[0-9]*"):
        if not psutil.pid_exists(int(run.name)):
            _clear_away(run)
    os.environ[FOLDER] = str(runs / str(os.getpid()))


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the servers."""
    if not hasattr(config, "workerinput"):
        _clear_away(Path(os.environ[FOLDER]))


def _clear_away(run: Path) -> None:
    LocalStack(run, given={}).down()
    for process in search(lambda process: process.environ().get(MARK, "").startswith(f"{run}/")):
        end(process)  # a server that a test started for itself, in a run that was killed
    shutil.rmtree(run, ignore_errors=True)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The stack's variables, with an empty database, bucket and Redis database for us alone."""
    stack = LocalStack(Path(os.environ[FOLDER]), durable=False, given={})
    stack.up(product=False)
    env = stack.environment()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    name = f"test_{worker}_{secrets.token_hex(4)}"
    owner = env["MIGRATION_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(owner, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    for role in ("DATABASE_URL", "MIGRATION_DATABASE_URL"):
        env[role] = f"{env[role].rpartition('/')[0]}/{name}"
    env["REDIS_URL"] = f"{env['REDIS_URL'].rpartition('/')[0]}/{1 + int(worker[2:]) % 63}"
    with redis.Redis.from_url(env["REDIS_URL"]) as client:
        client.flushdb()
    env["CALLS_PER_SECOND"] = env["CALLS_BURST"] = "100000"  # one key does a whole test's work
    env["S3_BUCKET"] = name.replace("_", "-")
    with object_client(env) as store:
        store.make_bucket(env["S3_BUCKET"])
    return env


# Fixtures that build on `environment` come here, in this order: `migrated` (session; the schema of
# `migrations/` in our database), the application, clients, factories.
