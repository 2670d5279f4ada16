"""Simulated agents: many connections in one process, which only asks and notes how long it took.

``python -m bench.load PLAN`` reads a plan (JSON), does what it says and writes raw samples beside
it. HTTP is spoken by hand, because a real client costs more than the server that is measured. Its
own processor time is in the result: a generator near 100 % of a core would measure itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bench.harness import Json
from fedselect import Mask, sending, wire
from fedselect.space import FloatVector

HOST = "127.0.0.1"
KEPT = 5  # seconds after which a server closes a silent connection: whoever comes later opens anew


class Connection:
    """One kept-alive HTTP/1.1 connection, to 127.0.0.1 only."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect afresh: an idle connection may have been closed by the other side."""
        self.close()
        self._reader, self._writer = await asyncio.open_connection(HOST, self._port)

    async def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        """Send a request, read the whole answer."""
        if self._reader is None or self._writer is None:
            await self.open()
        assert self._reader is not None
        assert self._writer is not None
        lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
        if "Host" not in headers:
            lines.append(f"Host: {HOST}:{self._port}")
        if not any(name.lower() == "content-length" for name in headers):
            lines.append(f"Content-Length: {len(body)}")
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = head.partition("content-length:")[2].partition("\r\n")[0].strip()
            found = await self._reader.readexactly(int(length or 0))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.close()
            return Reply(0, b"")
        if "connection: close" in head:
            self.close()
        return Reply(int(head.split(" ", 2)[1]), found)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    def json(self) -> Json:
        return dict(json.loads(self.body))


@dataclass
class Load:
    """What is being done: the plan, and the samples so far as (kind, begin, seconds, status)."""

    plan: Json
    samples: list[tuple[str, float, float, int]] = field(default_factory=list)
    theta: FloatVector = field(init=False)

    def __post_init__(self) -> None:
        self.theta = np.random.default_rng(0).standard_normal((int(self.plan["dim"]),), np.float32)

    async def call(
        self,
        line: Connection,
        kind: str,
        path: str,
        key: str,
        body: Json | None = None,
        due: float | None = None,
    ) -> Reply:
        """One measured POST of a client; its time counts from when it was ``due``."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = b"" if body is None else json.dumps(body).encode()
        begin = time.perf_counter() if due is None else due
        reply = await line.ask("POST", path, data, headers)
        self.samples.append((kind, begin, time.perf_counter() - begin, reply.status))
        return reply

    async def stage(self, line: Connection, store: Connection, key: str) -> str | None:
        """Check in, reserve, PUT: a client's update is in the store; the id of its upload."""
        answer = (await self.call(line, "join", "/v1/check-ins", key, {})).json()
        if answer.get("assignment") is None:
            return None
        data = self._update(answer["assignment"])
        announced = sending.announce(data).model_dump(exclude_defaults=True)
        path = f"/v1/assignments/{answer['assignment']['id']}/uploads"
        ticket = (await self.call(line, "reserve", path, key, announced)).json()
        url = urlsplit(ticket["url"])
        headers = {**ticket["headers"], "Host": url.netloc}
        put = await store.ask("PUT", f"{url.path}?{url.query}", data, headers)
        assert put.status == 200, put.body
        return str(ticket["id"])

    async def complete(
        self, line: Connection, key: str, upload: str, due: float | None = None
    ) -> None:
        """Say that it is there."""
        await self.call(line, "complete", f"/v1/uploads/{upload}/complete", key, due=due)

    def _update(self, assignment: Json) -> bytes:
        meta = wire.UpdateMeta(
            space=assignment["space_digest"],
            run=assignment["run"]["id"],
            round=assignment["round"],
            assignment=assignment["id"],
            base_version=assignment["base"]["sha256"],
            mask_version=(assignment["mask"] or {"version": 0})["version"] + 1,
            examples=10,
        )
        mask = Mask.empty(self.theta.size)
        return wire.encode_update(meta, self.theta, mask=mask, send_mask=True)


# --- what a plan may ask for ---------------------------------------------------------------------


async def stage_then_complete(load: Load) -> None:
    """Every connection stages the updates of its clients; after a line of input all complete: each
    connection as soon as it has its last answer, or, with a ``rate``, all of them so many a second,
    whether answers come or not.
    """
    plan = load.plan
    lines = [Connection(plan["port"]) for _ in plan["lines"]]
    staged: list[list[tuple[str, str]]] = [[] for _ in lines]

    async def stage(number: int) -> None:
        store = Connection(plan["store_port"])
        for key in plan["lines"][number]:
            upload = await load.stage(lines[number], store, key)
            if upload is not None:
                staged[number].append((key, upload))
        store.close()

    async def complete(number: int) -> None:
        for turn, (key, upload) in enumerate(staged[number]):
            due = None
            if plan.get("rate"):
                due = begin + (turn * len(lines) + number) / plan["rate"]
                await asyncio.sleep(due - time.perf_counter())
            await load.complete(lines[number], key, upload, due)

    some = asyncio.Semaphore(plan["staging"])  # connections at a time: this is only set-up

    async def stage_some(number: int) -> None:
        async with some:
            await stage(number)

    await asyncio.gather(*(stage_some(n) for n in range(len(lines))))
    await _signal("staged")
    for line in lines:
        await line.open()
    begin = time.perf_counter()
    await asyncio.gather(*(complete(n) for n in range(len(lines))))


async def poll(load: Load) -> None:
    """Every client checks in once per ``every`` seconds, spread evenly, for ``seconds``."""
    plan = load.plan
    keys = [key for line in plan["lines"] for key in line]
    every, seconds = plan["every"], plan["seconds"]
    begin = asyncio.get_running_loop().time()

    async def client(number: int, key: str) -> None:
        line = Connection(plan["port"])
        due = begin + every * number / len(keys)
        while due < begin + seconds:
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            await load.call(line, "check-in", "/v1/check-ins", key, {})
            if every > KEPT:
                line.close()
            due += every
        line.close()

    await asyncio.gather(*(client(n, key) for n, key in enumerate(keys)))


async def flood(load: Load) -> None:
    """Every connection asks again as soon as it has its answer, for ``seconds``."""
    plan = load.plan
    end = asyncio.get_running_loop().time() + plan["seconds"]

    async def connection(key: str) -> None:
        line = Connection(plan["port"])
        while asyncio.get_running_loop().time() < end:
            await load.call(line, "flood", "/v1/check-ins", key, {})
        line.close()

    await asyncio.gather(*(connection(key) for line in plan["lines"] for key in line))


async def take_part(load: Load) -> None:
    """Whole participations: check in, reserve, PUT, complete, wait for the round, again."""
    plan = load.plan
    end = asyncio.get_running_loop().time() + plan["seconds"]

    async def client(key: str) -> None:
        line, store = Connection(plan["port"]), Connection(plan["store_port"])
        while asyncio.get_running_loop().time() < end:
            upload = await load.stage(line, store, key)
            if upload is not None:
                await load.complete(line, key, upload)
            await asyncio.sleep(plan["every"])

    await asyncio.gather(*(client(key) for line in plan["lines"] for key in line))


WORK: dict[str, Callable[[Load], Coroutine[Any, Any, None]]] = {
    each.__name__: each for each in (stage_then_complete, poll, flood, take_part)
}


async def _signal(word: str) -> None:
    """Say where we are, and wait until we may go on."""
    print(word, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def main() -> None:
    file = Path(sys.argv[1])
    load = Load(json.loads(file.read_text()))
    asyncio.run(WORK[load.plan["work"]](load))
    found = {"samples": load.samples, "cpu": time.process_time()}
    file.with_suffix(".out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
