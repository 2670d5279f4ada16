"""Clients that others would build: plain curl, and two generated from the description alone.

Each does a complete round against the running product. The generators are installed once into a
cache, at exact versions; what they generate is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from app.localstack import LocalStack
from fedselect import ParameterSpace, RunSettings, wire
from fedselect.client import Client
from fedselect.protocol import ModelCreate, RunCreate

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"
OPENAPI = ROOT / "docs" / "openapi.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedselect-tests"
EXPECTED = {"upload": "accepted", "round": "published", "refused": "scope_missing"}
SPACE = ParameterSpace.from_json(
    {"tensors": [{"name": "bias", "shape": [6], "kind": "bias", "role": "shared"}]}
)


class Stage(NamedTuple):
    """A coordinator with a running run of one round, and an invitation for its one client."""

    url: str
    owner: Client
    run: str
    token: str


@pytest.fixture
def owner(demo_module: ModuleType, product: LocalStack):
    environment = product.environment()
    _, key = demo_module.new_project(environment)
    with Client(environment["PUBLIC_URL"], key=key) as client:
        yield client, key


@pytest.fixture
def stage(owner) -> Stage:
    client, _ = owner
    model = client.create_model(ModelCreate(name="six", space=SPACE.to_json()))
    weights = np.zeros(SPACE.dim, dtype=np.float32)
    sent = client.send_weights(model.id, wire.encode_version(SPACE.digest, weights))
    _until(lambda: client.upload(sent.id).state == "accepted")
    alone = {"goal": 1, "quorum": 1, "over_selection": 1, "min_contributors": 1, "retry_after": 1}
    settings = {"rounds": 1, "policy": {"personal": "none"}, "training": {"steps": 1}}
    wanted = RunSettings(**settings, round=alone)
    run = client.create_run(RunCreate(name="one", model_id=model.id, settings=wanted))
    client.start_run(run.id)
    (token,) = client.create_enrolments(1).tokens
    return Stage(client.server, client, run.id, token)


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        sys.modules["demo"].bell.wait(0.1)
    pytest.fail("it did not happen within a minute")


def run(*command: object, cwd: Path, **env: str) -> str:
    """What a program prints; it must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def installed(kind: str, pinned: Path, install: Callable[[Path], object]) -> Path:
    """The folder of a generator at exactly the pinned versions."""
    folder = CACHE / f"{kind}-{hashlib.sha256(pinned.read_bytes()).hexdigest()[:16]}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        install(folder)
        (folder / "ready").touch()
    return folder


def published_value(stage: Stage) -> list[float]:
    """The values of the last version, which is the one client's update."""
    last = list(stage.owner.versions(stage.run))[-1]
    assert last.number == 1
    data = stage.owner.fetch(stage.owner.download(last.id))
    return list(wire.decode_version(data, space_digest=SPACE.digest, dim=SPACE.dim))


# --- curl --------------------------------------------------------------------------------------


def test_the_steps_of_the_page_are_a_round(owner, tmp_path: Path) -> None:
    client, key = owner
    page = (ROOT / "docs" / "INTEGRATORS.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 10
    script = tmp_path / "round.sh"
    script.write_text("\n".join(["set -euo pipefail", *blocks]))
    run("bash", script, cwd=tmp_path, SERVER=client.server, OWNER_KEY=key)
    (found,) = client.runs()
    _until(lambda: client.run(found.id).state.value == "finished")
    (evaluation,) = client.evaluations(found.id)
    assert (evaluation.client_name, evaluation.version_number) == ("curl", 1)
    assert evaluation.scores["global"].correct == 17


# --- TypeScript --------------------------------------------------------------------------------


def _node() -> str:
    """Where npm is; a site without Node may skip this, continuous integration may not."""
    found = shutil.which("npm")
    if found is None:
        assert not os.environ.get("CI"), "the TypeScript client needs Node and npm, here too"
        pytest.skip("NO NODE: the generated TypeScript client was NOT tested")
    return found


def test_a_typescript_client(stage: Stage, tmp_path: Path) -> None:
    npm, source = _node(), CLIENTS / "typescript"

    def install(folder: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(source / name, folder)
        run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=folder)

    tools = installed("typescript", source / "package-lock.json", install)
    for name in ("round.ts", "tsconfig.json", "package.json"):
        shutil.copy(source / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(tools / "node_modules")
    commands = tools / "node_modules" / ".bin"
    run(commands / "openapi-typescript", OPENAPI, "-o", "api.ts", cwd=tmp_path)
    run(commands / "tsc", cwd=tmp_path)
    printed = run("node", "out/round.js", stage.url, stage.token, cwd=tmp_path)
    assert json.loads(printed) == EXPECTED
    assert published_value(stage) == [1.0] * SPACE.dim


# --- Python ------------------------------------------------------------------------------------


def test_a_generated_python_client(stage: Stage, tmp_path: Path) -> None:
    source = CLIENTS / "python"
    pinned = source / "requirements.txt"

    def install(folder: Path) -> None:
        # An environment of its own: the generator wants other versions than we do.
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "-r", pinned, cwd=folder)

    bin_folder = installed("python", pinned, install) / "venv" / "bin"
    command = [bin_folder / "openapi-python-client", "generate", "--path", OPENAPI]
    command += ["--meta", "none", "--output-path", tmp_path / "coordinator_client"]
    path = f"{bin_folder}:{os.environ['PATH']}"  # the generator formats with its own ruff
    said = run(*command, "--fail-on-warning", cwd=tmp_path, PATH=path)
    assert "warning" not in said.lower()
    printed = run(
        *(bin_folder / "python", source / "round.py", stage.url, stage.token),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    assert json.loads(printed) == EXPECTED
    assert published_value(stage) == [1.0] * SPACE.dim
