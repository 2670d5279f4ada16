"""The supervisor of worker and scheduler: restarts, the watchdog's verdict, stopping."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from workers.supervise import Supervisor
verdicts = iter([False, True])
command = ["sh", "-c", "echo started; exec sleep 60"]
Supervisor(command, stalled=lambda alive: next(verdicts, False), every=0.2).run()
"""


def test_a_stalled_child_is_replaced_and_the_supervisor_stops_when_told(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as supervisor:
        assert supervisor.stdout is not None
        try:
            assert supervisor.stdout.readline() == "started\n"
            assert supervisor.stdout.readline() == "started\n", "a second child"
            supervisor.send_signal(signal.SIGTERM)
            assert supervisor.wait(20) == 0
            assert supervisor.stdout.read() == "", "it has not started a third one"
        finally:
            supervisor.kill()


def test_a_watchdog_that_cannot_look_does_no_harm(tmp_path: Path) -> None:
    """Without settings or servers nothing is known, so nothing is ended."""
    script = "from workers.supervise import Watchdog; print(Watchdog()(1e9))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={},
        timeout=60,
        check=True,
    )
    assert done.stdout == "False\n"
