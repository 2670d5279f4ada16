"""How many calls a key may make: a token bucket for each, in this process and over all of them.

Owns the arithmetic (GCRA, ITU-T I.371), where buckets are kept, and whose turn it is. A flood ends
at the bucket of the process that it reaches, before anything else is done for it; the one in Redis
holds over many processes. While Redis is away the process's own buckets go on holding. A key that
nobody knows has no bucket worth counting: it uses up that of the address it comes from. What a
bucket lets pass at once takes turns: the calls of others do not queue behind it. Must not know what
is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Lock

import redis

from app.errors import TooMany

REMEMBERED = 20_000  # buckets of a process; the one that was used longest ago is forgotten first
REST = 5.0  # seconds without asking a Redis that did not answer
log = logging.getLogger(__name__)
# The same as `spend`, in one step and by Redis's own clock: processes need not agree on the time.
SPEND = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now)
local wait = full - now - interval * (burst - 1)
if wait > 0 then return tostring(wait) end
local text = string.format('%.6f', full + interval)
redis.call('SET', KEYS[1], text, 'PX', math.ceil((full + interval - now) * 1000) + 1000)
return '0'
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """``per_second`` calls in the long run, ``burst`` of them at once."""

    per_second: float
    burst: int


def spend(full: float, now: float, rate: Rate) -> tuple[float, float]:
    """Take one call from a bucket that would be full again at ``full``.

    Returns that time afterwards, and the seconds to wait: 0 if the call may be made.
    """
    interval = 1 / rate.per_second
    full = max(full, now)
    wait = full - now - interval * (rate.burst - 1)
    return (full, wait) if wait > 0 else (full + interval, 0.0)


class OwnBuckets:
    """The buckets of this process; thread-safe."""

    def __init__(self, rate: Rate, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._buckets: OrderedDict[bytes, float] = OrderedDict()
        self._lock = Lock()

    def wait(self, who: bytes, *, count: bool = True) -> float:
        """Seconds until this caller may call; 0: now, and the call is counted, if it is to be."""
        with self._lock:
            before = self._buckets.pop(who, 0.0)
            full, wait = spend(before, self._clock(), self._rate)
            self._buckets[who] = full if count else before
            if len(self._buckets) > REMEMBERED:
                self._buckets.popitem(last=False)
        return wait


class SharedBuckets:
    """The buckets of all processes together, in Redis."""

    def __init__(
        self, url: str, rate: Rate, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # Quick to give up: a limit is no reason to let anybody wait.
        self._redis = redis.Redis.from_url(url, socket_timeout=0.25, socket_connect_timeout=0.25)
        self._spend = self._redis.register_script(SPEND)
        self._arguments = [1 / rate.per_second, rate.burst]
        self._clock = clock
        self._rest_until = 0.0

    def wait(self, who: bytes) -> float:
        """Seconds until this caller may call; 0: now, or nobody can tell."""
        if self._clock() < self._rest_until:
            return 0.0
        try:
            return float(self._spend(keys=[b"fedselect:calls:" + who], args=self._arguments))
        except redis.RedisError as error:
            self._rest_until = self._clock() + REST
            log.warning("limits hold in each process alone: %s", type(error).__name__)
            return 0.0


class Turns:
    """At most ``at_once`` calls of one caller are served at a time; its others wait in line."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lines: dict[bytes, tuple[asyncio.Semaphore, int]] = {}

    @asynccontextmanager
    async def of(self, who: bytes) -> AsyncIterator[None]:
        """Wait for this caller's turn, and hold it."""
        line, callers = self._lines.get(who) or (asyncio.Semaphore(self._at_once), 0)
        self._lines[who] = (line, callers + 1)
        try:
            async with line:
                yield
        finally:
            callers = self._lines[who][1] - 1
            self._lines[who] = (line, callers)
            if not callers:
                del self._lines[who]


class Callers:
    """The limits of a process: who calls, and whether they may."""

    def __init__(self, url: str, rate: Rate, *, at_once: int) -> None:
        self._own, self._shared = OwnBuckets(rate), SharedBuckets(url, rate)
        self._in_vain = OwnBuckets(rate)  # of addresses: what came from there with no known key
        self._admitted: OrderedDict[bytes, None] = OrderedDict()
        self.turns = Turns(at_once)

    def check_own(self, authorization: str, peer: str) -> bytes:
        """Count a call where it arrives; without a key it is that of a network address.

        Returns the caller, whose turn the call is to wait for.

        Raises:
            TooMany: rate_limited.
        """
        who = _who(authorization) if authorization else peer.encode()
        if authorization and who not in self._admitted:
            _refuse(self._in_vain.wait(peer.encode(), count=False))
        _refuse(self._own.wait(who))
        return who

    def check_shared(self, authorization: str) -> None:
        """Count the call of a valid key with those that arrived at other processes.

        Raises:
            TooMany: rate_limited.
        """
        who = _who(authorization)
        self._admitted[who] = None
        if len(self._admitted) > REMEMBERED:
            self._admitted.popitem(last=False)
        _refuse(self._shared.wait(who))

    def came_in_vain(self, peer: str) -> None:
        """Count a call whose key is not valid: every guess would have a bucket of its own."""
        self._in_vain.wait(peer.encode())


def _who(authorization: str) -> bytes:
    # All of the key: who knows its public part alone must not use up its calls. And nothing but the
    # key: however the header is written, it is the same caller.
    scheme, _, text = authorization.partition(" ")
    same = f"{scheme.lower()} {text.strip()}".encode(errors="surrogatepass")
    return hashlib.blake2b(same, digest_size=16).hexdigest().encode()


def _refuse(wait: float) -> None:
    if wait > 0:
        raise TooMany(
            "more calls than one key may make; wait as long as Retry-After says",
            code="rate_limited",
            retry_after=max(1, round(wait + 0.5)),
        )
