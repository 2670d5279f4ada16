"""A large update over a link that is cut again and again, from a sender that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import numpy as np
import uvicorn

from app import cli
from app.localprocess import HOST, free_port, until
from app.localstack import LocalStack
from app.main import create_app
from app.settings import AppSettings
from fedselect import Kind, Mask, ParameterSpace, Role, RunSettings, wire
from fedselect.checkindocs import Assignment
from fedselect.client import Client
from fedselect.protocol import ModelCreate, Registration, RunCreate
from fedselect.space import FloatVector
from tests.service.cutting import CuttingProxy, cutting

from .proofs import Figures, Room, proof

PATIENCE = 1800.0  # seconds until one step must be done
MB, MIB = 1_000_000, 1024**2
SETTINGS = {
    "policy": {"personal": "none"},
    "round": {
        "goal": 1,
        "quorum": 1,
        "over_selection": 1,
        "min_contributors": 1,
        "selection_deadline": 3600,
        "report_deadline": 7200,
        "verification_timeout": 3600,
    },
}


@dataclass(frozen=True)
class Site:
    """A client with an update on its disk, and the coordinator that waits for it."""

    server: str
    key: str
    assignment: str
    file: Path

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.soak.sender"]
        return subprocess.Popen(
            [*command, self.server, self.assignment, str(self.file)],
            env=os.environ | {"FEDSELECT_KEY": self.key},
            stdout=subprocess.PIPE,
            text=True,
        )


@proof(
    promise="a large update arrives over a bad link",
    test="an update over a link that is cut after every so many MB; its sender is killed once",
    target="accepted; at most 10 % sent again (700 MB, cut every 60 MB)",
    quick={"megabytes": 180, "cut_every": 60, "kills": 1},
    full={"megabytes": 700, "cut_every": 60, "kills": 1},
    minutes=(4, 30),
)
def large_update(room: Room, *, megabytes: int, cut_every: int, kills: int) -> Figures:
    """Bring an update of so many megabytes in."""
    stack = LocalStack(room.folder / "stack", given={})
    room.cleanup.callback(stack.down)
    stack.up(prepare=lambda ready: cli.prepare(stack.root, ready))
    os.environ.update(stack.environment())
    settings = AppSettings()
    endpoint = urlsplit(settings.s3_endpoint)
    proxy = room.cleanup.enter_context(
        cutting((str(endpoint.hostname), endpoint.port or 80), every=cut_every * MB)
    )
    proxy.most = 0
    server = room.cleanup.enter_context(_served(settings, f"http://{HOST}:{proxy.port}"))
    key = cli.admin_key_file(stack.root).read_text().strip()
    owner = room.cleanup.enter_context(Client(server, key=key))
    site = _site(room, owner, elements=megabytes * MB // 4)
    proxy.most, proxy.sent = 10**9, 0
    begun = time.monotonic()
    report = _deliver(site, proxy, kills)
    seconds = time.monotonic() - begun
    state = _verdict(owner, UUID(report["upload"]))
    again, memory = proxy.sent / site.size - 1, int(report["memory"]) / MIB
    return Figures(
        met=state == "accepted" and again <= 0.10 and proxy.cuts >= site.size // (cut_every * MB),
        measured=f"{state}; {site.size / MB:.0f} MB in {seconds:.0f} s through {proxy.cuts} cuts, "
        f"sender killed {kills} times, {again:.1%} sent again, its peak {memory:.0f} MiB",
        numbers={"size": site.size, "carried": proxy.sent, "cuts": proxy.cuts, "seconds": seconds},
    )


def _deliver(site: Site, proxy: CuttingProxy, kills: int) -> dict[str, Any]:
    """Let the sender work, and kill it at equal distances on its way."""
    for number in range(1, kills + 1):
        due, sender = site.size * number // (kills + 1), site.start()
        _wait(lambda due=due: proxy.sent >= due, f"byte {due} of the update")
        assert sender.poll() is None, "it ended before it was killed"
        sender.kill()
        sender.communicate()
    output, _ = site.start().communicate(timeout=PATIENCE)
    return dict(json.loads(output))


def _verdict(owner: Client, upload: UUID) -> str:
    _wait(lambda: owner.upload(upload).state != "uploaded", "the verification")
    return owner.upload(upload).state


def _wait(condition: Callable[[], bool], what: str) -> None:
    assert until(condition, seconds=PATIENCE), f"in vain: {what}"


@contextmanager
def _served(settings: AppSettings, store: str) -> Iterator[str]:
    """An API process's twin in this one, which names clients another address of the store."""
    app = create_app(settings.model_copy(update={"s3_public_endpoint": store}))
    port = free_port(set())
    server = uvicorn.Server(uvicorn.Config(app, HOST, port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait(lambda: server.started, "the API")
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def _site(room: Room, owner: Client, *, elements: int) -> Site:
    """Register a model of this size, open a run, and make a client that has trained already."""
    space = ParameterSpace.of([("wide.weight", (elements,), Kind.WEIGHT, Role.SELECTABLE)])
    values: FloatVector = np.random.default_rng(room.seed).random(elements, dtype=np.float32)
    model = owner.create_model(ModelCreate(name="wide", space=space.to_json()))
    weights = owner.send_weights(model.id, wire.encode_version(space.digest, values))
    assert _verdict(owner, weights.id) == "accepted"
    run = RunCreate(name="wide", model_id=model.id, settings=RunSettings.model_validate(SETTINGS))
    owner.start_run(owner.create_run(run).id)
    token = owner.create_enrolments().tokens[0]
    with Client(owner.server) as nobody:
        joined = nobody.register(Registration(token=token, name="site"))
    with Client(owner.server, key=joined.key) as client:
        work = client.check_in().assignment
    assert work is not None
    file = room.folder / "update"
    mask = Mask.initial(space)
    file.write_bytes(wire.encode_update(_meta(work), values, mask=mask, send_mask=True))
    return Site(owner.server, joined.key, str(work.id), file)


def _meta(work: Assignment) -> wire.UpdateMeta:
    return wire.UpdateMeta(
        space=work.space_digest,
        run=str(work.run.id),
        round=work.round or 0,
        assignment=str(work.id),
        base_version=work.base.sha256,
        mask_version=1,
        examples=1,
    )
