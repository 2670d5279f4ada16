"""Real agents for the benchmarks that measure a whole run: a process each, as sites start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from app.localprocess import end
from fedselect.client import Client

FEDSELECT = str(Path(sys.executable).with_name("fedselect"))
Sites = Mapping[str, tuple[str, dict[str, Any]]]  # by name, a task's specification and arguments


@contextmanager
def agents(owner: Client, folder: Path, sites: Sites) -> Iterator[None]:
    """Enrol and run an agent for each site, with its state and log in ``folder``."""
    tokens = owner.create_enrolments(len(sites)).tokens
    started: list[subprocess.Popen[bytes]] = []
    try:
        for (name, (spec, own)), token in zip(sites.items(), tokens, strict=True):
            command = [FEDSELECT, "agent", "--server", owner.server, "--task", spec]
            command += [f"--task-arg={key}={json.dumps(value)}" for key, value in own.items()]
            command += ["--name", name, "--state", str(folder / f"agent-{name}")]
            with (folder / f"agent-{name}.log").open("wb") as log:
                environment = os.environ | {"FEDSELECT_TOKEN": token}
                child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            started.append(child)
        yield
    finally:
        for child in started:
            end(psutil.Process(child.pid))
            child.wait()
