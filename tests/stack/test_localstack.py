"""The local stack, with real servers: what is promised about processes, data and errors."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from minio.error import S3Error

from app.localprocess import alive, spawn
from app.localservers import object_client
from app.localstack import LocalStack, ServiceState, StackError

SERVERS = ["postgres", "redis", "s3"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    stack = LocalStack(tmp_path_factory.mktemp("stack"), given={})
    try:
        stack.up(product=False)
        yield stack
    finally:
        stack.down()
        assert processes_of(stack) == []


@pytest.fixture
def stack(shared: LocalStack) -> LocalStack:
    """Three running servers, whatever the test before has done to them."""
    shared.up(product=False)
    return shared


def sql(env: Mapping[str, str], query: str) -> list[tuple[object, ...]]:
    url = env["MIGRATION_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(query)
        return cursor.fetchall() if cursor.description else []


def remember(env: Mapping[str, str], word: str) -> None:
    """Store a word in every server."""
    sql(env, "CREATE TABLE IF NOT EXISTS words (word text)")
    sql(env, f"INSERT INTO words VALUES ('{word}')")
    with redis.Redis.from_url(env["REDIS_URL"]) as client:
        client.set(word, "1")
    with object_client(env) as store:
        store.put_object(env["S3_BUCKET"], f"words/{word}", io.BytesIO(b"1"), 1)


def remembered(env: Mapping[str, str], word: str) -> list[bool]:
    """Whether Postgres, Redis and S3 know the word."""
    rows = sql(env, f"SELECT 1 FROM words WHERE word = '{word}'")
    with redis.Redis.from_url(env["REDIS_URL"]) as client:
        key = client.get(word)
    with object_client(env) as store:
        names = [o.object_name for o in store.list_objects(env["S3_BUCKET"], prefix="words/")]
    return [rows == [(1,)], key == b"1", f"words/{word}" in names]


def states(stack: LocalStack) -> dict[str, ServiceState]:
    return {service.name: service.state for service in stack.status()}


def pids(stack: LocalStack) -> dict[str, int]:
    return {service.name: service.pid for service in stack.status() if service.pid}


def processes_of(stack: LocalStack) -> list[str]:
    """Command lines of all living processes that were started for this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = str(stack.root) in f"{process.cmdline()}{process.environ()}{process.cwd()}"
            if mine and alive(process):
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.02)


# --- starting ------------------------------------------------------------------------------------


def test_servers_run_and_the_product_does_not(stack: LocalStack) -> None:
    expected = dict.fromkeys(SERVERS, ServiceState.RUNNING)
    expected |= dict.fromkeys(["coordinator", "worker", "scheduler"], ServiceState.NOT_STARTED)
    assert states(stack) == expected
    for service in stack.status()[:3]:
        assert psutil.pid_exists(service.pid or 0)
        assert service.port is not None
        assert service.log.is_file()


def test_every_server_answers_through_the_environment(stack: LocalStack) -> None:
    env = stack.environment()
    remember(env, "hello")
    assert remembered(env, "hello") == [True, True, True]
    assert sql(env, "SELECT current_database()") == [("fedselect",)]
    assert env["PUBLIC_URL"].startswith("http://127.0.0.1:")
    assert len(bytes.fromhex(env["KEY_PEPPER"])) == 32
    assert len(base64.b64decode(env["LEDGER_KEY"])) == 32


def test_servers_refuse_strangers(stack: LocalStack) -> None:
    env = stack.environment()
    secrets = json.loads((stack.root / "secrets.json").read_text())
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_KEY"):
        env = {key: value.replace(secrets[name], "wrongwrong") for key, value in env.items()}
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        sql(env, "SELECT 1")
    with redis.Redis.from_url(env["REDIS_URL"]) as it, pytest.raises(redis.AuthenticationError):
        it.ping()
    with object_client(env) as store, pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        store.list_buckets()


def test_servers_listen_on_this_machine_only(stack: LocalStack) -> None:
    addresses = {
        connection.laddr.ip
        for pid in pids(stack).values()
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_secrets_are_private(stack: LocalStack) -> None:
    path = stack.root / "secrets.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secrets = json.loads(path.read_text()).values()
    commands = (stack.root / "state.json").read_text() + str(
        [psutil.Process(pid).cmdline() for pid in pids(stack).values()]
    )
    assert not [secret for secret in secrets if secret in commands]


def test_up_again_changes_nothing(stack: LocalStack) -> None:
    before = pids(stack)
    LocalStack(stack.root, given={}).up(product=False)
    assert pids(stack) == before


def test_prepare_gets_the_environment(stack: LocalStack) -> None:
    seen: list[dict[str, str]] = []
    stack.up(product=False, prepare=seen.append)
    assert seen == [stack.environment()]


def test_nothing_is_known_before_the_first_start(tmp_path: Path) -> None:
    fresh = LocalStack(tmp_path / "fresh", given={})
    fresh.down()
    assert set(states(fresh).values()) == {ServiceState.NOT_STARTED}
    with pytest.raises(StackError, match="nothing was started"):
        fresh.environment()
    with pytest.raises(StackError, match="no service 'mysql'; there are postgres, redis"):
        fresh.start("mysql")
    assert not fresh.root.exists()


# --- stopping, dying and coming back -------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("name", SERVERS)
def test_a_restarted_server_keeps_its_data(stack: LocalStack, name: str, kill: bool) -> None:
    before = stack.environment()
    word = f"{name}-{kill}"
    remember(before, word)
    stack.stop(name, kill=kill)
    assert states(stack)[name] is ServiceState.NOT_STARTED
    stack.start(name)
    assert stack.environment() == before
    assert remembered(before, word) == [True, True, True]


@pytest.mark.parametrize("name", SERVERS)
def test_a_dead_server_is_seen_and_brought_back(stack: LocalStack, name: str) -> None:
    before = pids(stack)
    os.kill(before[name], signal.SIGKILL)
    until(lambda: states(stack)[name] is ServiceState.DEAD)
    stack.up(product=False)
    after = pids(stack)
    assert after.pop(name) != before.pop(name)
    assert after == before


def test_postgres_comes_back_although_a_backend_is_still_busy(stack: LocalStack) -> None:
    env = stack.environment()

    def work() -> None:
        with pytest.raises(psycopg.OperationalError):
            sql(env, "SELECT count(*) FROM generate_series(1, 100000000)")

    backend = threading.Thread(target=work)
    backend.start()
    busy = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '% generate_series%' AND pid <> "
    until(lambda: sql(env, busy + "pg_backend_pid()") == [(1,)])
    os.kill(pids(stack)["postgres"], signal.SIGKILL)
    until(lambda: states(stack)["postgres"] is ServiceState.DEAD)
    stack.up(product=False)
    assert sql(env, "SELECT 1") == [(1,)]
    backend.join(30)
    assert not backend.is_alive()


def test_down_leaves_no_process_and_up_finds_the_data(stack: LocalStack) -> None:
    before = stack.environment()
    remember(before, "down")
    stack.down()
    assert processes_of(stack) == []
    assert set(states(stack).values()) == {ServiceState.NOT_STARTED}
    stack.down()
    race = [
        threading.Thread(target=LocalStack(stack.root, given={}).up, kwargs={"product": False})
        for _ in range(2)
    ]
    for racer in race:
        racer.start()
    for racer in race:
        racer.join()
    assert stack.environment() == before
    assert remembered(before, "down") == [True, True, True]


def test_what_a_dead_service_left_behind_is_ended(stack: LocalStack, tmp_path: Path) -> None:
    env = {**os.environ, "FEDSELECT_LOCAL_SERVICE": str(stack.root / "data" / "redis")}
    child = spawn(["sleep", "60"], env=env, folder=tmp_path, log=tmp_path / "log")
    stack.stop("redis")
    assert not alive(child)


def test_a_stale_state_file_never_costs_a_stranger(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    gone = subprocess.Popen(["true"])
    gone.wait()
    records = {
        "redis": {"port": 1, "pid": stranger.pid, "created": 1e9, "command": []},
        "s3": {"port": 2, "pid": gone.pid, "created": time.time(), "command": []},
    }
    (tmp_path / "state.json").write_text(json.dumps(records))
    stack = LocalStack(tmp_path, given={})
    try:
        assert states(stack)["redis"] is ServiceState.DEAD
        assert states(stack)["s3"] is ServiceState.DEAD
        stack.start("redis")
        stack.down()
        assert stranger.poll() is None
        assert set(states(stack).values()) == {ServiceState.NOT_STARTED}
    finally:
        stack.down()
        stranger.kill()
        stranger.wait()


# --- errors and other people's servers -----------------------------------------------------------


def test_an_error_shows_the_log(stack: LocalStack) -> None:
    stack.stop("redis")
    log = stack.root / "data" / "redis" / "appendonly.aof"
    good = log.read_bytes()
    log.write_bytes(b"not an append-only file")
    try:
        with pytest.raises(StackError, match=r"(?s)redis ended while it started.*Bad file format"):
            stack.up(product=False)
        assert states(stack)["redis"] is ServiceState.DEAD
    finally:
        log.write_bytes(good)


def test_given_servers_are_used(stack: LocalStack, tmp_path: Path) -> None:
    given = stack.environment()
    guest = LocalStack(tmp_path, given=given)
    guest.up(product=False)
    assert guest.environment() == given
    assert {states(guest)[name] for name in SERVERS} == {ServiceState.GIVEN}
    assert processes_of(guest) == []
    with pytest.raises(StackError, match="DATABASE_URL is set"):
        guest.start("postgres")


@pytest.mark.parametrize("variable", ["DATABASE_URL", "REDIS_URL", "S3_ENDPOINT"])
def test_a_given_server_that_does_not_answer(
    stack: LocalStack, tmp_path: Path, variable: str
) -> None:
    given = stack.environment()
    port = next(s.port for s in stack.status() if s.name == "coordinator")
    scheme, _, rest = given[variable].rpartition("127.0.0.1:")
    given[variable] = f"{scheme}127.0.0.1:{port}{rest.lstrip('0123456789')}"
    with pytest.raises(StackError, match=f"the server in {variable} cannot be used"):
        LocalStack(tmp_path, given=given).up(product=False)


# --- the product's processes, played by two small modules ----------------------------------------

MAIN = """
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": os.environ["PUBLIC_URL"].encode()})
def serve():
    return app
"""
CELERY = """
import os
from celery import Celery
from celery import signals
celery_app = Celery("workers", broker=os.environ["REDIS_URL"])

@signals.worker_ready.connect(weak=False)
def announce(**_):
    print("worker ready", flush=True)
"""
SCHEDULER = """
import signal
print("scheduler ready", flush=True)
signal.sigwait({signal.SIGTERM})
"""


@pytest.fixture
def site(
    stack: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalStack]:
    """A stack on the shared servers whose product is `MAIN`, `CELERY` and `SCHEDULER`."""
    supervise = (Path(__file__).parents[2] / "workers" / "supervise.py").read_text()
    parts = {
        "app/main.py": MAIN,
        "workers/celery_app.py": CELERY,
        "workers/scheduler.py": SCHEDULER,
    }
    for module, text in {**parts, "workers/supervise.py": supervise}.items():
        path = tmp_path / "product" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "product"))
    shared = stack.environment()
    del shared["PUBLIC_URL"]
    site = LocalStack(tmp_path / "site", given=shared)
    try:
        yield site
    finally:
        site.down()
        assert processes_of(site) == []


def test_the_product_starts_dies_and_comes_back(site: LocalStack) -> None:
    site.up()
    product = ["coordinator", "worker", "scheduler"]
    assert {states(site)[name] for name in product} == {ServiceState.RUNNING}
    worker = psutil.Process(pids(site)["worker"])
    pool = worker.children(recursive=True)
    assert pool
    worker.kill()
    until(lambda: states(site)["worker"] is ServiceState.DEAD)
    site.up()
    assert not [child for child in pool if alive(child)]
    assert worker.pid != pids(site)["worker"]


@pytest.mark.parametrize("name", ["worker", "scheduler"])
def test_a_program_that_dies_is_started_again(site: LocalStack, name: str) -> None:
    """Only its supervisor is asked to stop; whatever of the dead one is left is ended."""
    site.up()
    supervisor = psutil.Process(pids(site)[name])
    (program,) = supervisor.children()
    pool = program.children(recursive=True)
    program.kill()
    until(lambda: supervisor.children() not in ([], [program]))
    assert not [child for child in pool if alive(child)]
    assert states(site)[name] is ServiceState.RUNNING
    site.stop(name)
    assert states(site)[name] is ServiceState.NOT_STARTED


def test_a_coordinator_that_cannot_start(site: LocalStack, tmp_path: Path) -> None:
    main = tmp_path / "product" / "app" / "main.py"
    main.write_text("raise RuntimeError('KEY_PEPPER has only 3 characters')")
    with pytest.raises(
        StackError, match=r"(?s)coordinator ended.*KEY_PEPPER has only 3 characters"
    ):
        site.up()


def test_a_port_of_another_program(site: LocalStack, stack: LocalStack) -> None:
    taken = next(service.port for service in stack.status() if service.name == "redis")
    with pytest.raises(StackError, match=f"port {taken} is used by another program"):
        LocalStack(site.root, port=taken, given={}).up()
