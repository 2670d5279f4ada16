"""What the whole test run shares: one set of real servers, and rooms of its own for each worker.

The servers are started by the first test that asks for them, in whatever xdist worker it runs, and
ended by the process that controls the run. A run of pure tests starts nothing.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from service.secretforms import SECRET

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
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The stack's variables, with an empty database, bucket and Redis database for us alone.

    After the last test, what all of them have left is searched for secrets.
    """
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
    yield env
    found = _in_rows(env["MIGRATION_DATABASE_URL"].replace("+psycopg", ""))
    found += _in_logs(stack.root, tmp_path_factory.getbasetemp())
    assert not found, f"secrets were written down: {found}"


def _in_rows(url: str) -> list[str]:
    """The tables whose rows hold a secret."""
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    query = psycopg.sql.SQL("SELECT count(*) FROM {} AS t WHERE t::text ~ %s")
    with psycopg.connect(url) as connection:
        names = [name for (name,) in connection.execute(tables)]
        held = {
            name: connection.execute(query.format(psycopg.sql.Identifier(name)), [SECRET])
            for name in names
        }
        return [f"{name}: {count}" for name, rows in held.items() for (count,) in rows if count]


def _in_logs(*folders: Path) -> list[str]:
    """The logs that hold a secret, with how it begins."""
    logs = [log for folder in folders for log in folder.rglob("logs/*.log")]
    texts = [(log, log.read_text(errors="replace")) for log in logs]
    return [f"{log}: {m[0][:12]}" for log, text in texts for m in re.finditer(SECRET, text)]


# Fixtures that build on `environment` come here, in this order: `migrated` (session; the schema of
# `migrations/` in our database), the application, clients, factories.
