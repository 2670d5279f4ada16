"""The demo's manners: it ends what it started, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from app.localprocess import until
from app.localstack import LocalStack

pytestmark = pytest.mark.e2e
DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_a_stack_that_ran_before_is_left_running(demo_module, product, monkeypatch) -> None:
    for name, value in product.environment().items():
        monkeypatch.setenv(name, value)
    before = product.status()
    with demo_module.local_stack(product.root, keep=False):
        pass
    assert product.status() == before


def test_a_demo_that_is_told_to_stop_leaves_nothing_behind(environment, tmp_path) -> None:
    servers = {name: value for name, value in environment.items() if name != "PUBLIC_URL"}
    # Another test of this process may have put an address there at which no coordinator listens.
    bare = {name: value for name, value in os.environ.items() if name != "PUBLIC_URL"}
    command = [sys.executable, str(DEMO), "--task", "digits", "--root", str(tmp_path)]
    with (tmp_path / "out").open("wb") as out:
        demo = subprocess.Popen(
            command, env={**bare, **servers}, stdout=out, stderr=out, start_new_session=True
        )
        one = psutil.Process(demo.pid)
        started = until(lambda: len(one.children()) > 10, seconds=120)  # ten agents, one baseline
        family = one.children(recursive=True)
        services = LocalStack(tmp_path, given=servers).status()
        family += [psutil.Process(service.pid) for service in services if service.pid]
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(120) == 130
    assert started
    text = (tmp_path / "out").read_text()
    assert "interrupted" in text
    assert "Traceback" not in text
    assert not [process for process in family if process.is_running()]
    assert not any(s.pid for s in LocalStack(tmp_path, given=servers).status())
