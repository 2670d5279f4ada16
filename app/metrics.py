"""What is counted and timed, under the names that docs/SLO.md, dashboards and alerts use.

Owns every metric that a process counts itself. What lives in the database is read when somebody
asks (`app/gauges.py`), how all of it gets out is `app/exposition.py`. Labels are few and closed:
never an id, never a tenant. Processes of a worker count together (docs/OBSERVABILITY.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prometheus_client import Counter, Histogram

from app import tracing
from app.errors import Refusal

T = TypeVar("T")
_END = object()
ROUND_ENDS = ("published", "abandoned", "failed", "cancelled")
UPDATE_ENDS = ("accepted", "rejected", "expired", "late", "declined")
WALKED = ("stream", "entries", "keys", "multiparts")  # verbs of the store that give a stream
ASKING = ("put", "read", "size", "delete", "ping")  # the others that fail most often
FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)

HTTP = Histogram(
    "fedselect_http_request_duration_seconds",
    "Requests, from their headers to the last byte of the answer.",
    ["method", "route", "status"],
    buckets=FAST,
)
STORAGE = Histogram(
    "fedselect_storage_call_duration_seconds",
    "Calls of the object store; of streams, the time spent waiting for it.",
    ["verb"],
    buckets=SLOW,
)
STORAGE_ERRORS = Counter(
    "fedselect_storage_errors_total",
    "Calls of the object store that failed because it was away or misbehaved.",
    ["verb"],
)
JOBS = Histogram(
    "fedselect_job_duration_seconds",
    "Attempts at jobs: done, given_back (an error), failed (for good), lost (its lease).",
    ["kind", "outcome"],
    buckets=SLOW,
)
TURNAROUND = Histogram(
    "fedselect_job_turnaround_seconds",
    "From the moment a job was written to its end.",
    ["kind"],
    buckets=SLOW,
)
STEPS = Histogram(
    "fedselect_scheduler_step_duration_seconds",
    "Steps of the scheduler: done, away (a server), failed.",
    ["step", "outcome"],
    buckets=SLOW,
)
ROUNDS = Counter("fedselect_rounds_total", "Rounds that entered an outcome.", ["outcome"])
UPDATES = Counter("fedselect_updates_total", "Assignments that ended, by outcome.", ["outcome"])
UPLOADED = Counter(
    "fedselect_upload_bytes_total", "Bytes of uploads that clients said are complete."
)
DOWNLOADED = Counter(
    "fedselect_download_bytes_total",
    "Bytes of files for which a signed address was given out: the store serves them itself.",
)
BELL_ERRORS = Counter("fedselect_doorbell_errors_total", "Rings that Redis did not take.")


def _preset(counter: Counter, values: Iterable[str]) -> None:
    """Begin at 0: the first event is a rise only if there was something to rise from."""
    for value in values:
        counter.labels(value)


_preset(ROUNDS, ROUND_ENDS)
_preset(UPDATES, UPDATE_ENDS)
_preset(STORAGE_ERRORS, (*ASKING, *WALKED))


def moved(kind: str, state: str) -> None:
    """Count the end of a round or of an assignment; other changes do not matter here."""
    if kind == "round" and state in ROUND_ENDS:
        ROUNDS.labels(state).inc()
    elif kind == "update" and state in UPDATE_ENDS:
        UPDATES.labels(state).inc()


@contextmanager
def timed(observe: Callable[[float], None]) -> Iterator[None]:
    """Observe the seconds that the block takes, however it ends."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        observe(time.perf_counter() - begun)


# --- the object store --------------------------------------------------------------------------


def observed(storage: T) -> T:
    """The storage port itself, with every call timed, counted and traced."""
    return _Observed(storage)  # type: ignore[return-value]  # same calls


class _Observed:
    def __init__(self, storage: object) -> None:
        self._storage = storage

    def __getattr__(self, verb: str) -> Any:
        found = getattr(self._storage, verb)
        if not callable(found):
            return found
        call = _signing if verb.startswith("sign_") else _asking
        call = _walking if verb in WALKED else call
        return lambda *args, **kwargs: call(verb, found, args, kwargs)


def _signing(verb: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    answer = call(*args, **kwargs)
    if verb == "sign_get":
        DOWNLOADED.inc(answer.size)
    return answer


def _asking(verb: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    span = tracing.span(f"storage {verb}", kind="client")
    with span, _counted(verb), timed(STORAGE.labels(verb).observe):
        return call(*args, **kwargs)


def _walking(verb: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Any]:
    """Items as they come; only the time spent waiting for them is the store's."""
    items = call(*args, **kwargs)
    waited: list[float] = []
    try:
        while True:
            with _counted(verb), timed(waited.append):
                item = next(items, _END)
            if item is _END:
                return
            yield item
    finally:
        STORAGE.labels(verb).observe(sum(waited))
        tracing.past(f"storage {verb}", seconds=sum(waited), kind="client")


@contextmanager
def _counted(verb: str) -> Iterator[None]:
    try:
        yield
    except Refusal as error:
        if error.status == 503:
            STORAGE_ERRORS.labels(verb).inc()
        raise
