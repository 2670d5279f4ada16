"""The schema fuzzer against a running coordinator, once as every role.

Schemathesis runs in a process of its own, with all of its checks and ours (``fuzz_hooks``), in all
of its phases, the stateful one along the links of the description. Each role asks in a project of
its own, in which there is something behind every id.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from service.factories import (
    Caller,
    Project,
    announce,
    complete,
    make_client,
    make_space,
    ok,
    settings,
    upload,
)

from fedselect import wire

Json = dict[str, Any]
ROLES = ("owner", "operator", "auditor", "viewer", "client")
TESTS = Path(__file__).parents[1]
# Something well-formed may be refused for what it means, or for the state of things: a cursor of
# another list, settings that contradict each other, an entity tag of yesterday.
SETTINGS = """
[auth.openapi]
key = { bearer = "${FUZZ_KEY}" }

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "410", "412", "413", "422", "429", "503"]
"""


@dataclass(frozen=True)
class Fuzzed:
    """What one role's calls were answered, and what was wrong with the answers."""

    role: str
    answers: Counter[str]  # by operation, status and code
    failures: list[str]

    @property
    def calls(self) -> int:
        return self.answers.total()

    def with_status(self, first: str) -> int:
        """How many answers had a status that begins like this."""
        return sum(n for answer, n in self.answers.items() if answer.split()[1].startswith(first))


@dataclass(frozen=True)
class World:
    """A caller, and something real behind every id."""

    caller: Caller
    subjects: dict[str, str]


def prepare(project: Project, role: str, work: Callable[[], object]) -> World:
    """Fill a project; ``work`` lets the coordinator's own work go on."""
    owner, space = project.owner, make_space()
    model = ok(owner.post("/v1/models", {"name": "fuzzed", "space": space.to_json()}), 201)
    weights = wire.encode_version(space.digest, np.zeros(space.dim, dtype=np.float32))
    ticket = upload(owner, f"/v1/models/{model['id']}/uploads", weights)
    complete(owner, ticket)
    while ok(owner.get(f"/v1/uploads/{ticket['id']}"))["state"] != "accepted":
        work()
    body = {"name": "fuzzed", "model_id": model["id"], "settings": settings(rounds=5)}
    run = ok(owner.post("/v1/runs", body), 201)
    ok(owner.post(f"/v1/runs/{run['id']}/start"))
    client = make_client(project)
    assignment = client.assignment()
    path = f"/v1/assignments/{assignment['id']}/uploads"
    own = ok(client.post(path, announce(b"x" * 600)), 201)
    subjects = {
        "assignment_id": assignment["id"],
        "client_id": client.id,
        "job_id": ok(owner.get("/v1/jobs"))["items"][0]["id"],
        "model_id": model["id"],
        "project_id": str(project.id),
        "round_id": ok(owner.get(f"/v1/runs/{run['id']}/rounds"))["items"][0]["id"],
        "run_id": run["id"],
        "upload_id": own["id"],
        "version_id": ok(owner.get(f"/v1/runs/{run['id']}/versions"))["items"][0]["id"],
        "key_id": ok(owner.post("/v1/keys", {"role": "viewer"}), 201)["info"]["id"],
    }
    return World(client if role == "client" else project.caller(role), subjects)


def fuzz(
    url: str, world: World, folder: Path, *, role: str, seed: int, options: list[str]
) -> Fuzzed:
    """Run the fuzzer as one role; ``options`` are its own, such as ``--max-time``."""
    folder.mkdir(parents=True)
    config, notes = folder / "schemathesis.toml", folder / "notes"
    config.write_text(SETTINGS)
    notes.touch()
    key = str(world.caller.key)
    told = {"subjects": world.subjects}
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", config]
    command += ["run", f"{url}/openapi.json"]
    command += ["--checks", "all", "--mode", "all", "--continue-on-failure", "--no-color"]
    command += ["--generation-database", "none", "--seed", str(seed), "--warnings", "off"]
    done = subprocess.run(
        [*map(str, command), *options],
        cwd=folder,
        env={
            **os.environ,
            "FUZZ_KEY": key,
            "FUZZ_WORLD": json.dumps(told),
            "FUZZ_NOTES": str(notes),
            "FUZZ_SEED": str(seed),
            "SCHEMATHESIS_HOOKS": "contract.fuzz_hooks",
            "PYTHONPATH": str(TESTS),
        },
        capture_output=True,
        text=True,
    )
    (folder / "said").write_text(done.stdout + done.stderr)
    answers = Counter(line.rstrip() for line in notes.read_text().splitlines())
    failures = _failures(done.stdout)
    if done.returncode and not failures:
        failures = [f"{role}: the fuzzer ended with {done.returncode}: {done.stdout[-1000:]}"]
    return Fuzzed(role, answers, failures)


def _failures(said: str) -> list[str]:
    """What was wrong, with the operation under whose heading it stands."""
    found, operation = [], ""
    for heading, failure in re.findall(r"^_{3,} (.+?) _{3,}$|^- (.+)", said, re.MULTILINE):
        operation = heading or operation
        if failure:
            found.append(f"{operation}: {failure}")
    return found
