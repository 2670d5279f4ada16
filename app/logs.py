"""What the service writes down of its work: lines of text or of JSON, with the ids they are about.

Owns the format of logs, the ids of the present request or job, and the last look for secrets. Must
not import the rest of the service: the supervisor logs before anything else is loaded.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

FIELDS = ("request", "job", "project", "run", "round", "client", "key")  # ids, in this order
REMOVED = "[removed]"
# Keys and tokens of ours, signatures and credentials of signed addresses, passwords in addresses.
# Nothing logs them; this is for the line that somebody adds one day, or a library does.
SECRETS = re.compile(
    r"(fs[a-z]_[0-9a-f]{16}_)[0-9a-f]{64}_[0-9a-f]{8}"
    r"|(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+"
    r"|(://[^\s:/@\"']*:)(?!\*+@)[^\s@\"']+(?=@)"
    r"|((?i:bearer )\s*)[\w.~+/=-]{16,}"
)
# On DEBUG these write down signatures, addresses and headers, whatever they are about.
TALKATIVE = ("botocore", "urllib3", "httpcore", "httpx", "kombu", "amqp", "hpack")
_ids: ContextVar[dict[str, str]] = ContextVar("ids")


@contextmanager
def about(**ids: object) -> Iterator[None]:
    """All lines of this block, also from threads that it waits for, carry these ids."""
    token = _ids.set({**_ids.get({}), **_known(ids)})
    try:
        yield
    finally:
        _ids.reset(token)


def note(**ids: object) -> None:
    """Add ids to the block that is under way; they are dropped at its end."""
    _ids.get({}).update(_known(ids))


def current() -> dict[str, str]:
    """The ids of what is under way."""
    found = _ids.get({})
    return {name: found[name] for name in FIELDS if name in found}


def _known(ids: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in ids.items() if value is not None}


def censor(text: str) -> str:
    """The text without keys, tokens, signatures and passwords."""
    return SECRETS.sub(lambda m: next((g for g in m.groups() if g), "") + REMOVED, text)


class Lines(logging.Formatter):
    """One line a record for people; a traceback follows below."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record, the ids behind it, nothing secret."""
        return censor(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The first line; the ids belong to it and not behind a traceback."""
        facts = {**current(), **getattr(record, "facts", {})}
        ids = " ".join(f"{name}={value}" for name, value in facts.items())
        return super().formatMessage(record) + (f" [{ids}]" if ids else "")


class JsonLines(logging.Formatter):
    """One JSON object a record, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its ids and facts; ``error`` holds a traceback."""
        document: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **current(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        return censor(json.dumps(document, ensure_ascii=False, default=str))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at that moment; a test may have replaced it since."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def configure(form: str, level: str) -> None:
    """Send everything of this process to stderr in one format; libraries' own handlers go.

    ``form`` is ``json`` or ``text``. A handler of somebody else on the root logger stays.
    """
    handler = _Stderr()
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    handler.set_name("fedselect")
    root = logging.getLogger()
    for present in [h for h in root.handlers if h.get_name() == "fedselect"]:
        root.removeHandler(present)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "celery"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(root.level, logging.INFO))
    access = logging.getLogger("uvicorn.access")  # ours says more, and never a whole address
    access.handlers.clear()
    access.propagate = False
