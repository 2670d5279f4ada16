"""Network faults: whatever happens to a call on the way, it has one effect and one answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
import numpy as np
from pydantic import BaseModel

from fedselect import Mask, exchange, wire
from fedselect.client import Client, Retries, announce
from fedselect.evaluations import Evaluation
from fedselect.protocol import (
    EnrolmentCreate,
    Enrolments,
    ModelCreate,
    ModelInfo,
    Registered,
    Registration,
    RunCreate,
    RunInfo,
)
from fedselect.uploads import UploadStatus, UploadTicket

from . import invariants
from .faultproxy import HOST, FaultProxy, Kind, seeded
from .fleet import REPORT, encode, flat_space, plain_settings, settle
from .proofs import Figures, Room, proof
from .stack import Stack

SITES = 8
SHARE = 0.5  # of all connections are spoilt
Shape = TypeVar("Shape", bound=BaseModel)


@proof(
    promise="network faults change nothing",
    test="calls through a fault proxy: latency, reset, black hole, half-open, cut after n bytes, "
    "response dropped after commit",
    target="1,000 retried operations: 1 effect, same answer",
    quick={"runs": 3, "least": 70},
    full={"runs": 42, "least": 1000},
    minutes=(4, 45),
)
def network(room: Room, *, runs: int, least: int) -> Figures:
    tally = Tally()
    with Stack(room.folder / "stack") as stack:
        invariants.arm(stack)
        _, key = stack.project("network")
        port = int(stack.url.rpartition(":")[2])
        with FaultProxy(port, seeded(room.seed, share=SHARE)) as proxy:
            _campaign(stack, proxy, tally, key, runs)
            spoilt = proxy.done.total() - proxy.done["none"]
        settle(stack)
        repeated = [f"{name}: {row}" for name, query in TWICE.items() for row in stack.rows(query)]
        counts = stack.rows(
            "SELECT (SELECT count(*) FROM clients), (SELECT count(*) FROM enrolments),"
            " (SELECT count(*) FROM runs), (SELECT count(*) FROM models)"
        )[0]
        broken = invariants.broken(stack)
    if counts != (SITES, SITES, runs, 1):
        repeated.append(f"clients, enrolments, runs, models: {counts}")
    text = (
        f"{tally.calls.total()} operations over {proxy.done.total()} connections, {spoilt} spoilt: "
        f"{len(repeated)} with a second effect, {len(tally.differ)} with another answer"
    )
    numbers = {
        "operations": dict(tally.calls),
        "faults": dict(proxy.done),
        "repeated": repeated[:20],
        "differ": tally.differ[:20],
        "broken": broken[:20],
    }
    enough = tally.calls.total() >= least and all(proxy.done[kind] for kind in Kind)
    return Figures(enough and not (repeated or tally.differ or broken), text, numbers)


TWICE = {
    "a transition": "SELECT subject_id, to_state, count(*) FROM transitions "
    "GROUP BY 1, 2 HAVING count(*) > 1",
    "a reservation": "SELECT subject, count(*) FROM ledger_entries "
    "WHERE action = 'upload.reserved' GROUP BY 1 HAVING count(*) > 1",
}


@dataclass
class Tally:
    """What was called, and which repetitions were answered differently."""

    calls: Counter[str] = field(default_factory=Counter)
    differ: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Caller:
    """Calls through the proxy, then repeats the call directly with the same Idempotency-Key."""

    def __init__(self, stack: Stack, proxy: FaultProxy, tally: Tally, key: str | None) -> None:
        # A connection for every request, so that every request meets a fate of its own.
        transport = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
        self._retries = Retries(Random(), tries=60, first=0.05, longest=0.3)
        self.faulty = Client(
            f"http://{HOST}:{proxy.port}", key=key, retries=self._retries, transport=transport
        )
        self.faulty._http.timeout = httpx.Timeout(1.0)
        self.direct = stack.client(key)
        self._tally = tally

    def call(
        self,
        name: str,
        path: str,
        shape: type[Shape],
        body: BaseModel | None = None,
        *,
        part: Callable[[Any], Any] = lambda answer: answer,
    ) -> Shape:
        """``part`` is what must be the same in both answers."""
        key = uuid4().hex
        first, again = (
            client.drive(
                exchange.post(path, shape, retries=self._retries, body=body, idempotency_key=key)
            )
            for client in (self.faulty, self.direct)
        )
        with self._tally.lock:
            self._tally.calls[name] += 1
            if part(first) != part(again):
                self._tally.differ.append(f"{name}: {part(first)} / {part(again)}")
        return first

    def close(self) -> None:
        self.faulty.close()
        self.direct.close()


def _campaign(stack: Stack, proxy: FaultProxy, tally: Tally, key: str, runs: int) -> None:
    space = flat_space(SITES)
    owner, nobody = (Caller(stack, proxy, tally, k) for k in (key, None))
    wanted = ModelCreate(name="network", space=space.to_json())
    model = owner.call("create model", "/v1/models", ModelInfo, wanted)
    weights = wire.encode_version(space.digest, np.zeros(SITES, dtype=np.float32))
    sent = owner.direct.send_weights(model.id, weights)
    _until(lambda: owner.direct.upload(sent.id).state == "accepted")
    ask = EnrolmentCreate(count=SITES)
    tokens = owner.call("enrol", "/v1/enrolments", Enrolments, ask).tokens
    bodies = [Registration(token=token, name=f"site-{n}") for n, token in enumerate(tokens)]
    with ThreadPoolExecutor(SITES) as pool:
        joined = pool.map(lambda b: nobody.call("register", "/v1/clients", Registered, b), bodies)
        sites = [Caller(stack, proxy, tally, each.key) for each in joined]
        for number in range(runs):
            settings = plain_settings(1, SITES)
            body = RunCreate(name=f"run-{number}", model_id=model.id, settings=settings)
            run = owner.call("create run", "/v1/runs", RunInfo, body)
            owner.direct.start_run(run.id)
            list(pool.map(_update, sites, range(SITES)))
            _until_run(owner.direct, run.id, "evaluating")
            list(pool.map(_evaluate, sites))
            _until_run(owner.direct, run.id, "finished")
    for caller in (owner, nobody, *sites):
        caller.close()


def _update(site: Caller, index: int) -> None:
    work = site.direct.check_in().assignment
    assert work is not None
    theta = np.zeros(SITES, dtype=np.float32)
    theta[index] = 1
    data = encode(work, theta, Mask.empty(SITES))
    path = f"/v1/assignments/{work.id}/uploads"
    ticket = site.call("reserve", path, UploadTicket, announce(data))
    site.direct.put_file(ticket, data)
    path = f"/v1/uploads/{ticket.id}/complete"
    # By the second answer the file may have been verified.
    site.call(
        "complete", path, UploadStatus, part=lambda a: (a.id, a.state in {"uploaded", "accepted"})
    )


def _evaluate(site: Caller) -> None:
    work = site.direct.check_in().assignment
    assert work is not None
    site.call("evaluate", f"/v1/assignments/{work.id}/evaluations", Evaluation, REPORT)


def _until_run(client: Client, run_id: UUID, state: str) -> None:
    _until(lambda: client.run(run_id).state == state)


def _until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.05)
