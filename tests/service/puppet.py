"""A worker whose processes freeze themselves (SIGSTOP) at a chosen point of a job.

Reads lines ``<job id> <point>`` and forks a worker for each, which counts the boundaries that it
crosses: before, inside and after every transaction, before and after every call of the store. At
the wanted one it stops itself. Answers ``frozen <where>``; after the next line it goes on; the last
answer is ``ended <status>``.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from app import wiring
from fedselect.aggregate import Accumulator
from workers import running

VERBS = ("read", "put", "delete", "stream", "keys", "put_part", "create_multipart")


def serve() -> None:
    """One worker after the other."""
    warm_up()
    while line := sys.stdin.readline().split():
        where, back = os.pipe()
        pid = os.fork()
        if pid == 0:
            work(UUID(line[0]), int(line[1]), back)
        os.close(back)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            say(f"frozen {os.read(where, 200).decode()}")
            sys.stdin.readline()
            os.kill(pid, signal.SIGCONT)
            _, status = os.waitpid(pid, 0)
        os.close(where)
        say(f"ended {status}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def warm_up() -> None:
    """Compile what every fork would compile again."""
    one = Accumulator(8)
    one.add(np.zeros(1, np.uint8), np.ones(8, "<f4"), 1)
    one.finish(np.zeros(8, "<f4"), 1)


def work(job: UUID, point: int, tell: int) -> None:
    """What a worker does with a rung job, with ourselves at every boundary."""
    status = 1
    try:
        crossed = 0

        def cross(where: str) -> None:
            nonlocal crossed
            crossed += 1
            if crossed == point:
                os.write(tell, where.encode())
                os.kill(os.getpid(), signal.SIGSTOP)

        core = wiring.build()
        core.db.transaction = _transaction(core.db.transaction, cross)  # type: ignore[method-assign]
        for verb in VERBS:
            setattr(core.storage, verb, _call(getattr(core.storage, verb), verb, cross))
        running.run_job(core, job)
        status = 0
    except SQLAlchemyError:  # the server ended the transaction in which we froze
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _transaction(begin: Callable[[str], Any], cross: Callable[[str], None]) -> Callable[..., Any]:
    @contextmanager
    def transaction(*args: Any) -> Iterator[Any]:
        cross("before a transaction")
        with begin(*args) as tx:
            yield tx
            cross("before a commit")
        cross("after a commit")

    return transaction


def _call(call: Callable[..., Any], verb: str, cross: Callable[[str], None]) -> Callable[..., Any]:
    def crossed(*args: Any, **kwargs: Any) -> Any:
        cross(f"before {verb}")
        answer = call(*args, **kwargs)
        cross(f"after {verb}")
        return answer

    return crossed


if __name__ == "__main__":
    serve()
