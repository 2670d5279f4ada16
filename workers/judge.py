"""The judge: a process that parses what strangers have sent, and can do nothing else.

``python -m workers.judge`` is started by ``workers.court`` and judges one file after the other:
it reads an order, masks and the file as frames from its standard input and answers there. It has
no environment, opens no file, starts nothing, and dies of too much memory or time. Must not import
anything that knows a server or a secret.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import sys
import time
from struct import Struct
from typing import Any, BinaryIO, NoReturn

from fedselect import wire
from fedselect.errors import WireError
from fedselect.inspection import UpdateInspection, VersionInspection
from fedselect.masks import Mask, packed_size

LENGTH = Struct(">I")  # before each frame
MEMORY = 512 * 1024**2  # bytes of address space
NO_MEMORY = 71  # exit status of a judge that its own limit has ended
MASKS = 12  # bitmaps at a time that come on top of it: bounds, the known and the new one, diffs
LIMITS = (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_NPROC, 0),
    (resource.RLIMIT_NOFILE, 3),  # the three it has
)
Json = dict[str, Any]


def main() -> None:
    """Judge files until the input ends."""
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    os.chdir("/")
    for limit, most in LIMITS:
        resource.setrlimit(limit, (most, most))
    _limit(resource.RLIMIT_AS, MEMORY)
    mmap.mmap(-1, MEMORY // 2).close()  # where there is not even that, no file is to blame
    while order := _frame(source):
        try:
            verdict = judge(json.loads(order), source)
        except MemoryError:
            give_up()
        for answer in verdict:
            answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


def give_up() -> NoReturn:
    """End because there is no memory: by the file's fault where the host has enough of it."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        mmap.mmap(-1, MEMORY).close()
    except OSError:
        os._exit(1)
    os._exit(NO_MEMORY)


def judge(order: Json, source: BinaryIO) -> tuple[bytes, bytes]:
    """The verdict on one file as JSON, and the mask if a good update brought one."""
    _renew(order["seconds"], order["dim"])
    inspection = _inspection(order, source)
    chunks = iter(lambda: _frame(source), b"")
    try:
        for chunk in chunks:
            inspection.feed(chunk)
        facts = inspection.finish()
    except WireError as error:
        for _ in chunks:  # whoever sends them still wants their digest
            pass
        return json.dumps({"code": error.code, "detail": str(error)[:500]}).encode(), b""
    if facts is None:
        return b"{}", b""
    mask = facts.mask.to_bytes() if facts.mask_sent else b""
    return json.dumps({"examples": facts.examples}).encode(), mask


def _inspection(order: Json, source: BinaryIO) -> UpdateInspection | VersionInspection:
    dim, size = order["dim"], order["size"]
    if order["plan"] is None:
        return VersionInspection(space_digest=order["space"], dim=dim, size=size)
    lower, upper, known = (_frame(source) for _ in range(3))
    plan = wire.UpdatePlan(
        **order["plan"],
        lower=Mask.from_bytes(dim, lower),
        upper=Mask.from_bytes(dim, upper),
        known_mask=Mask.from_bytes(dim, known) if known else None,
    )
    return UpdateInspection(plan, size)


def _renew(seconds: float, dim: int) -> None:
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
    _limit(resource.RLIMIT_AS, MEMORY + MASKS * packed_size(dim))


def _limit(which: int, soft: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _frame(source: BinaryIO) -> bytes:
    """The next frame; empty at the end of a file, and of all."""
    (length,) = LENGTH.unpack(source.read(LENGTH.size) or bytes(LENGTH.size))
    return source.read(length)


if __name__ == "__main__":
    main()
