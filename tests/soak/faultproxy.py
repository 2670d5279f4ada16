"""A TCP proxy on 127.0.0.1 that does to every connection what a plan says.

The plan gets the connection's number and gives a :class:`Fault`; with a seeded plan and one
request per connection (no keep-alive) a whole test is repeatable.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

HOST = "127.0.0.1"
CHUNK = 64 * 1024


class Kind(StrEnum):
    """What can happen on the way."""

    NONE = "none"
    LATENCY = "latency"  # every piece, in both directions, waits ``seconds``
    RESET = "reset"  # RST once ``after`` bytes of the request have passed
    BLACK_HOLE = "black_hole"  # accepted, and then nothing at all
    HALF_OPEN = "half_open"  # the request arrives, the way back is dead and nobody says so
    CUT = "cut"  # closed once ``after`` bytes of the answer have passed
    DROP_RESPONSE = "drop_response"  # the service has done it and answers, the client never hears


@dataclass(frozen=True)
class Fault:
    """One connection's fate."""

    kind: Kind = Kind.NONE
    after: int = 0
    seconds: float = 0.0


Plan = Callable[[int], Fault]
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


def seeded(seed: int, *, share: float, kinds: tuple[Kind, ...] = tuple(Kind)[1:]) -> Plan:
    """A plan that spoils ``share`` of the connections, each in one of these ways."""

    def plan(number: int) -> Fault:
        rng = random.Random(f"{seed}/{number}")
        if rng.random() >= share:
            return Fault()
        return Fault(rng.choice(kinds), rng.randrange(400), rng.uniform(0.01, 0.2))

    return plan


class FaultProxy:
    """Listens on a free ``port`` while its ``with`` block runs; ``done`` counts what it did."""

    def __init__(self, port: int, plan: Plan) -> None:
        self._target = (HOST, port)
        self._plan = plan
        self._loop = asyncio.new_event_loop()
        self._numbers = iter(range(10**9))
        self.done: Counter[Kind] = Counter()
        self.port = 0

    def __enter__(self) -> Self:
        listening = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(listening,), daemon=True)
        self._thread.start()
        if not listening.wait(10):
            raise TimeoutError("the fault proxy does not listen")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _serve(self, listening: threading.Event) -> None:
        self._loop.run_until_complete(self._listen(listening))
        self._loop.close()

    async def _listen(self, listening: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        listening.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        fault = self._plan(next(self._numbers))
        self.done[fault.kind] += 1
        try:
            await self._carry(fault, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            _reset(writer)
        finally:
            writer.close()

    async def _carry(self, fault: Fault, reader: Reader, writer: Writer) -> None:
        if fault.kind is Kind.BLACK_HOLE:
            await _until_gone(reader)
            return
        back, forth = await asyncio.open_connection(*self._target)
        try:
            request = asyncio.create_task(_send(fault, reader, forth))
            answer = asyncio.create_task(_answer(fault, back, writer))
            await asyncio.wait({request, answer}, return_when=asyncio.FIRST_COMPLETED)
            if request.done() and request.result():
                await asyncio.wait({answer})
            if fault.kind is Kind.HALF_OPEN:
                await asyncio.wait({request})
            if fault.kind in {Kind.RESET, Kind.DROP_RESPONSE}:
                _reset(writer)
        finally:
            for task in (request, answer):
                task.cancel()
            await asyncio.gather(request, answer, return_exceptions=True)
            forth.close()


async def _send(fault: Fault, reader: Reader, forth: Writer) -> bool:
    """Carry the request; True when the client has said all, False when it was cut off."""
    passed = 0
    while data := await reader.read(CHUNK):
        if fault.kind is Kind.LATENCY:
            await asyncio.sleep(fault.seconds)
        if fault.kind is Kind.RESET and passed + len(data) > fault.after:
            forth.write(data[: fault.after - passed])
            await forth.drain()
            return False
        passed += len(data)
        forth.write(data)
        await forth.drain()
    with suppress(OSError):
        forth.write_eof()
    return True


async def _answer(fault: Fault, back: Reader, writer: Writer) -> None:
    """Carry the answer, or as much of it as the fault allows."""
    passed = 0
    while data := await back.read(CHUNK):
        if fault.kind in {Kind.DROP_RESPONSE, Kind.HALF_OPEN}:
            return
        if fault.kind is Kind.LATENCY:
            await asyncio.sleep(fault.seconds)
        if fault.kind is Kind.CUT and passed + len(data) > fault.after:
            writer.write(data[: fault.after - passed])
            await writer.drain()
            return
        passed += len(data)
        writer.write(data)
        await writer.drain()


async def _until_gone(reader: Reader) -> None:
    while await reader.read(CHUNK):
        pass


def _reset(writer: Writer) -> None:
    """Let the close that follows be an RST: whoever waits learns that the other side is lost."""
    endpoint = writer.get_extra_info("socket")
    with suppress(OSError):
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
