"""The state machine is right: hypothesis against the public interface and a small model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .proofs import Figures, Room, proof

ROOT = Path(__file__).parents[2]


@proof(
    promise="the service does what a 150-line model does",
    test="hypothesis rules over the public interface: clients, jobs that fail, repeat or lose a "
    "lease, time, an administrator; compared after every step",
    target="0 differences",
    quick={"examples": 20},
    full={"examples": 500},
    minutes=(6, 90),
)
def model_and_service(room: Room, *, examples: int) -> Figures:
    """Run ``tests/service/test_stateful.py`` with more examples, drawn from the room's seed."""
    name = "tests/service/test_stateful.py::test_the_service_does_what_the_model_does"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--no-header", name]
    command.append(f"--hypothesis-seed={room.seed}")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "STATEFUL_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
    )
    (room.folder / "pytest.log").write_text(done.stdout + done.stderr)
    differences = 0 if done.returncode == 0 else 1
    measured = f"{differences} differences in {examples} examples of up to 24 steps"
    return Figures(done.returncode == 0, measured, {"examples": examples})
