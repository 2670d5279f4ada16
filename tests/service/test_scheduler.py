"""The scheduler as a process, and what it does while others are away."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from threading import Event

import pytest
from sqlalchemy import func, select

from app import ledger
from app.errors import Unavailable
from app.settings import AppSettings
from app.storage import S3Storage
from app.tables import Entry, Seal
from workers.scheduler import READY, repeat

from .factories import Project

TRIES, PAUSE = 300, 0.1


def unsealed(project: Project) -> int:
    sealed = select(Seal.entry_id)
    query = select(func.count()).where(
        Entry.project_id == project.id, Entry.id.not_in(sealed), Entry.action == "test.waits"
    )
    with project.core.db.transaction("test", "test") as tx:
        return tx.session.scalar(query) or 0


def test_it_seals_without_workers_and_without_redis(
    project: Project, environment: dict[str, str]
) -> None:
    with project.core.db.transaction("test", "test") as tx:
        ledger.append(tx, "test.waits", "test:1", project=project.id)
    assert unsealed(project) == 1
    away = {**os.environ, **environment, "REDIS_URL": "redis://:x@127.0.0.1:1/0"}
    command = [sys.executable, "-m", "workers.scheduler"]
    with subprocess.Popen(command, env=away, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == READY
            waited = (unsealed(project) == 0 or time.sleep(PAUSE) for _ in range(TRIES))
            assert any(waited), "the entry was not sealed"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_step_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    stop, calls = Event(), []

    def step(core: object) -> None:
        calls.append(core)
        if len(calls) == 3:
            stop.set()
        raise Unavailable("the store is away") if len(calls) == 1 else ValueError("a bug")

    with caplog.at_level(logging.WARNING):
        repeat(step, None, every=0.01, stop=stop)  # type: ignore[arg-type]
    assert len(calls) == 3
    assert "step: the store is away" in caplog.text
    assert "a bug" in caplog.text


def test_a_store_that_says_nothing_is_away_before_a_lease_ends(
    environment: dict[str, str],
) -> None:
    """It takes connections and then is silent: asked twice, then given up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken: list[socket.socket] = []

        def take() -> None:
            taken.extend(server.accept()[0] for _ in range(2))

        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        settings = AppSettings(
            **{name.lower(): value for name, value in environment.items()}
            | {"s3_endpoint": f"http://127.0.0.1:{port}", "s3_timeout": 0.2}
        )
        with pytest.raises(Unavailable):
            S3Storage(settings).read("accepted/nothing")
        taker.join(30)
        assert len(taken) == 2, "once more, and no third time"
        for connection in taken:
            connection.close()


def test_the_store_gets_less_than_a_lease() -> None:
    fields = AppSettings.model_fields
    assert 2 * fields["s3_timeout"].default < fields["lease"].default
