"""Named places where a process can be made to die, to prove that dying there does no harm.

Owns their arming and counting. Places are named at choke points, so that new code has them without
doing anything: every transaction (``<purpose>.before_commit``, ``.after_commit``), every call of
the object store (``store.<verb>.<area>.before``, ``.after``) and the doorbell. Must not know what
happens there. Nothing is wrapped and nothing is counted unless ``FAILPOINT`` is set.

``FAILPOINT=<place>:<n>`` ends a process with status 137 at its n-th visit of the place, as
``kill -9`` would. ``FAILPOINT=/<folder>`` lets a test steer running processes: the file ``armed``
there holds such orders, one a line, each for the first process that comes to it; every visit of any
place is noted in the file ``visits``.
"""

from __future__ import annotations

import fcntl
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

ORDER = os.environ.get("FAILPOINT", "")
DIED = 137  # what a shell reports after kill -9
UNBRACKETED = ("sign", "ping", "close")  # calls that do nothing outside the process
T = TypeVar("T")
_visits = 0


def reach(place: str) -> None:
    """The process is at this place now; it may be the last thing that it does."""
    if ORDER and (_steered(Path(ORDER), place) if ORDER.startswith("/") else _counted(place)):
        os._exit(DIED)


def bracket(port: T, name: str) -> T:
    """The port itself or, when anything is armed, one with a place before and after every call."""
    return _Bracketed(port, name) if ORDER else port  # type: ignore[return-value]  # same calls


def _counted(place: str) -> bool:
    global _visits
    wanted, _, count = ORDER.rpartition(":")
    _visits += place == wanted
    return place == wanted and _visits == int(count)


def _steered(folder: Path, place: str) -> bool:
    """Note the visit, count an order for this place down; True if it is due (and gone then)."""
    with (folder / "visits").open("a") as visits:
        fcntl.flock(visits, fcntl.LOCK_EX)
        visits.write(f"{place}\n")
        armed = folder / "armed"
        orders = armed.read_text().split() if armed.exists() else []
        mine = next((order for order in orders if order.rpartition(":")[0] == place), None)
        if mine is None:
            return False
        left = int(mine.rpartition(":")[2]) - 1
        orders.remove(mine)
        armed.write_text("\n".join(orders + [f"{place}:{left}"] * bool(left)))
        return left == 0


class _Bracketed:
    """Stands before a port; what a key begins with is part of the place's name."""

    def __init__(self, port: object, name: str) -> None:
        self._port, self._name = port, name

    def __getattr__(self, verb: str) -> Any:
        found = getattr(self._port, verb)
        if not callable(found) or verb.startswith(UNBRACKETED):
            return found
        return functools.partial(self._call, found, f"{self._name}.{verb}")

    def _call(self, call: Callable[..., Any], place: str, *args: Any, **kwargs: Any) -> Any:
        place += _area(args)
        if inspect.isgeneratorfunction(call):
            return _walked(call(*args, **kwargs), place)
        reach(f"{place}.before")
        answer = call(*args, **kwargs)
        reach(f"{place}.after")
        return answer


def _walked(items: Iterator[T], place: str) -> Iterator[T]:
    reach(f"{place}.before")
    yield from items
    reach(f"{place}.after")


def _area(args: tuple[Any, ...]) -> str:
    """``.staging`` of a key (or of the first of several) below ``staging/``."""
    key = args[0] if args else ""
    if isinstance(key, list | tuple):
        key = key[0] if key else ""
    return f".{key.partition('/')[0]}" if isinstance(key, str) and "/" in key else ""
