"""Calls that are done together: whoever arrives while one is under way shares the next one.

Owns the queue and who leads. A caller alone is served at once; under load the cost of a
transaction is shared by all that wait for it, as in a database's group commit. Must not know what
is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event, Lock
from typing import Generic, TypeVar

MOST = 64  # calls that are done together
Q = TypeVar("Q")
A = TypeVar("A")


class _Call(Generic[Q, A]):
    def __init__(self, asked: Q) -> None:
        self.asked = asked
        self.turn = Event()  # it is answered, or it leads the next ones
        self.answer: A | Exception | None = None

    def result(self) -> A:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            raise RuntimeError("a call was left without an answer")
        return self.answer


class Batcher(Generic[Q, A]):
    """Serves calls from many threads with ``work``, which answers each call or names its error.

    ``work`` gets at least one call, and at most ``most``. An exception that it raises instead is
    that of all its calls.
    """

    def __init__(
        self, work: Callable[[Sequence[Q]], Sequence[A | Exception]], *, most: int = MOST
    ) -> None:
        self._work = work
        self._most = most
        self._lock = Lock()
        self._waiting: list[_Call[Q, A]] = []
        self._led = False

    def ask(self, asked: Q) -> A:
        """The answer to one call; blocks until it is there."""
        call: _Call[Q, A] = _Call(asked)
        with self._lock:
            self._waiting.append(call)
            leads, self._led = not self._led, True
        if not leads:
            call.turn.wait()
        if call.answer is None:
            self._lead()
        return call.result()

    def _lead(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        answers: Sequence[A | Exception] = [RuntimeError("the work was cut off")] * len(batch)
        try:
            answers = self._work([call.asked for call in batch])
        except Exception as error:
            answers = [error] * len(batch)
        finally:
            for call, answer in zip(batch, answers, strict=True):
                call.answer = answer
            with self._lock:
                following, self._led = self._waiting[:1], bool(self._waiting)
            for call in [*batch, *following]:
                call.turn.set()
