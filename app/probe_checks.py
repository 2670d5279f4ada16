"""The questions of the self-probe: forged and honest calls with signed addresses, one by one.

Owns what is tried and what each answer means. Every check has objects of its own and talks to the
store as a client does; must not know how a report is made of it (`app/probe.py` does).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import NamedTuple

import urllib3

from app.errors import Missing
from app.signing import Signer, pinned
from app.storage import S3Storage

LIFE = timedelta(minutes=5)  # of the addresses
THERE = b"what was there before".ljust(1024, b".")
SENT = b"what the address admits".ljust(1024, b".")
FORGED = b"what the address does not admit".ljust(1024, b".")
LONG, SHORT = FORGED * 8, FORGED[:-1]


class Verdict(StrEnum):
    """What an answer means for us."""

    ENFORCED = "enforced"  # the store refuses it
    WORKS = "works"  # the store can do it
    HARMLESS = "harmless"  # not so, and nothing of ours depends on it
    ATTENTION = "attention"  # an operator should know


class Answer(NamedTuple):
    """Whether the store did what one hopes for, and what it did."""

    good: bool
    text: str


class Request(NamedTuple):
    """A call with a signed address, honest or forged."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes


TRIES, STUMBLES = 3, frozenset({500, 502, 503, 504})


@dataclass(slots=True)
class Lab:
    """A place in the bucket for one check, and the means to sign and send."""

    storage: S3Storage
    signer: Signer
    http: urllib3.PoolManager
    key: str
    uploads: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, suffix: str = "") -> str:
        """A multipart upload, forgotten when the check is over."""
        key = self.key + suffix
        upload = self.storage.create_multipart(key)
        self.uploads.append((key, upload))
        return upload

    def forget(self) -> None:
        """Abort what was begun."""
        for key, upload in self.uploads:
            self.storage.abort_multipart(key, upload)

    def honest(self, upload: str | None, *, hours_ago: int = 0, **more: str) -> Request:
        """A PUT of ``SENT``, as an object or as the first part, with more headers if given."""
        since = datetime.now(UTC) - timedelta(hours=hours_ago)
        md5 = hashlib.md5(SENT, usedforsecurity=False).hexdigest()
        headers = pinned(len(SENT), md5) | {k.replace("_", "-"): v for k, v in more.items()}
        query = {} if upload is None else {"partNumber": "1", "uploadId": upload}
        url = self.signer.sign(
            "PUT", self.key, since=since, until=since + LIFE, headers=headers, query=query
        )
        return Request("PUT", url, headers, SENT)

    def send(self, request: Request) -> int:
        """The status of the answer; 0 if there was none.

        A store that stumbles (rclone may, over a folder that two calls make at once) says nothing
        about what it enforces: it is asked again.
        """
        status = self._send_once(request)
        for _ in range(TRIES - 1):
            if status not in STUMBLES:
                break
            status = self._send_once(request)
        return status

    def _send_once(self, request: Request) -> int:
        chunked = request.method == "PUT" and "content-length" not in request.headers
        body = iter([request.body]) if chunked else request.body
        with suppress(urllib3.exceptions.HTTPError):
            return self.http.request(
                request.method, request.url, headers=request.headers, body=body, chunked=chunked
            ).status
        return 0

    def write(self, data: bytes) -> None:
        """What the service itself would write."""
        self.storage.put(self.key, io.BytesIO(data), len(data))

    def objects(self) -> dict[str, bytes]:
        """Everything in this place."""
        return {e.key: self.storage.read(e.key) for e in list(self.storage.entries(self.key))}

    def parts(self) -> list[dict[int, int] | None]:
        """The sizes of the parts of all uploads; None for one that the store has forgotten."""
        found: list[dict[int, int] | None] = []
        for key, upload in self.uploads:
            try:
                arrived = self.storage.list_parts(key, upload)
            except Missing:
                found.append(None)
            else:
                found.append({number: part.size for number, part in arrived.items()})
        return found


Try = Callable[[Lab], Answer]


@dataclass(frozen=True, slots=True)
class Check:
    """One question; ``otherwise`` and ``meaning`` belong to the answer one does not hope for."""

    name: str
    tried: str
    make: Try
    otherwise: Verdict
    meaning: str
    essential: bool = False
    good: Verdict = Verdict.ENFORCED


# --- forged calls ------------------------------------------------------------------------------

Forge = Callable[[Lab, str | None], Request]


def _changed(change: Callable[[str], str]) -> Forge:
    """The same call to a changed address."""

    def forge(lab: Lab, upload: str | None) -> Request:
        honest = lab.honest(upload)
        return honest._replace(url=change(honest.url))

    return forge


def _method(method: str) -> Forge:
    return lambda lab, upload: lab.honest(upload)._replace(method=method)


def _body(body: bytes, *without: str) -> Forge:
    """Another body, with its true length, and without some of the pinned headers."""

    def forge(lab: Lab, upload: str | None) -> Request:
        honest = lab.honest(upload)
        headers = honest.headers | {"content-length": str(len(body))}
        kept = {name: value for name, value in headers.items() if name not in without}
        return honest._replace(headers=kept, body=body)

    return forge


def _unsigned(url: str) -> str:
    address, _, query = url.partition("?")
    kept = [pair for pair in query.split("&") if not pair.startswith("X-Amz-")]
    return f"{address}?{'&'.join(kept)}"


def _flipped(url: str) -> str:
    return url[:-1] + ("0" if url[-1] != "0" else "1")


def _longer_life(url: str) -> str:
    return url.replace("X-Amz-Expires=", "X-Amz-Expires=9")


def _other_key(url: str) -> str:
    return url.replace("?", "-other?", 1)


def _other_number(url: str) -> str:
    return url.replace("partNumber=1", "partNumber=2")


def _expired(lab: Lab, upload: str | None) -> Request:
    return lab.honest(upload, hours_ago=1)


def _into_another_upload(lab: Lab, upload: str | None) -> Request:
    """The part goes to an upload of another key, with that upload's key and id."""
    honest, other = lab.honest(upload), lab.uploads[1][1]
    url = honest.url.replace(f"{lab.key}?", f"{lab.key}-other?").replace(str(upload), other)
    return honest._replace(url=url)


def _at_an_object(forge: Forge) -> Try:
    def make(lab: Lab) -> Answer:
        lab.write(THERE)
        status = lab.send(forge(lab, None))
        return _judge(status, touched=lab.objects() != {lab.key: THERE})

    return make


def _at_a_part(forge: Forge) -> Try:
    def make(lab: Lab) -> Answer:
        upload = lab.begin()
        lab.begin("-other")
        status = lab.send(forge(lab, upload))
        parts = lab.parts()
        answer = _judge(status, touched=any(parts) or bool(lab.objects()))
        lost = ", and the upload is gone" if None in parts else ""
        return Answer(answer.good, answer.text + lost)

    return make


def _judge(status: int, *, touched: bool) -> Answer:
    refused = status == 0 or 400 <= status < 500  # 500 and above: not now, which proves nothing
    word = "refused" if refused else "accepted" if status < 400 else "failed"
    change = ", but something changed" if refused and touched else ""
    return Answer(refused and not touched, f"{word} ({status or 'no answer'}){change}")


# --- what a store can do -----------------------------------------------------------------------


def _honest_object(lab: Lab) -> Answer:
    status = lab.send(lab.honest(None))
    return Answer(lab.objects() == {lab.key: SENT}, f"status {status}")


def _honest_part(lab: Lab) -> Answer:
    status = lab.send(lab.honest(lab.begin()))
    return Answer(lab.parts() == [{1: len(SENT)}], f"status {status}, {lab.parts()[0]} listed")


def _replayed(lab: Lab) -> Answer:
    request = lab.honest(None)
    lab.send(request)
    return _judge(lab.send(request), touched=False)


def _replayed_after_delete(lab: Lab) -> Answer:
    request = lab.honest(None)
    lab.send(request)
    lab.storage.delete([lab.key])
    return _judge(lab.send(request), touched=bool(lab.objects()))


def _part_after_complete(lab: Lab) -> Answer:
    upload = lab.begin()
    etag = lab.storage.put_part(lab.key, upload, 1, THERE)
    lab.storage.complete_multipart(lab.key, upload, [(1, etag)])
    status = lab.send(lab.honest(upload))
    return _judge(status, touched=lab.objects() != {lab.key: THERE})


def _part_after_abort(lab: Lab) -> Answer:
    upload = lab.begin()
    lab.send(lab.honest(upload))
    lab.forget()
    status = lab.send(lab.honest(upload))
    return _judge(status, touched=lab.parts() != [None] or bool(lab.objects()))


def _list_after_refusal(lab: Lab) -> Answer:
    upload = lab.begin()
    status = lab.send(_body(FORGED)(lab, upload))
    known = lab.parts() != [None]
    return Answer(known, f"part {status}, {'still listed' if known else 'NoSuchUpload'}")


def _found_for_sweeping(lab: Lab) -> Answer:
    lab.begin()
    found = [(each.key, each.upload_id) for each in lab.storage.multiparts(lab.key)]
    return Answer(found == lab.uploads, f"{len(found)} of 1 listed")


def _range_bytes(lab: Lab) -> Answer:
    lab.write(THERE)
    right = lab.storage.read(lab.key, 9, 5) == THERE[9:14]
    return Answer(right, "the right bytes" if right else "other bytes")


def _range_status(lab: Lab) -> Answer:
    lab.write(THERE)
    url = lab.signer.sign("GET", lab.key, until=datetime.now(UTC) + LIFE)
    status = lab.send(Request("GET", url, {"range": "bytes=9-13"}, b""))
    return Answer(status == 206, f"status {status}")


def _only_if_absent(lab: Lab) -> Answer:
    lab.write(THERE)
    status = lab.send(lab.honest(None, if_none_match="*"))
    return _judge(status, touched=lab.objects() != {lab.key: THERE})


def _checksum(lab: Lab) -> Answer:
    lab.write(THERE)
    status = lab.send(lab.honest(None, x_amz_checksum_sha256="A" * 43 + "="))
    return _judge(status, touched=lab.objects() != {lab.key: THERE})


def _many_deleted(lab: Lab) -> Answer:
    keys = [f"{lab.key}-{n}" for n in range(3)]
    for key in keys:
        lab.storage.put(key, io.BytesIO(THERE), len(THERE))
    lab.storage.delete([*keys, f"{lab.key}-never-was"])
    return Answer(not lab.objects(), f"{len(lab.objects())} of 3 left")


# --- the table ---------------------------------------------------------------------------------


class Forgery(NamedTuple):
    """A call that must not go through, whether it is for an object or for a part of one."""

    name: str
    tried: str
    forge: Forge
    otherwise: Verdict = Verdict.ATTENTION
    meaning: str = "whoever gets an address can do more with it than it was given for"
    essential: bool = True


_FULL = (Verdict.ATTENTION, "a client can fill the bucket; verification refuses the file", False)
_CAUGHT = (Verdict.HARMLESS, "verification refuses the file: sha256 and size are announced", False)

FORGERIES = (
    Forgery("signature changed", "the last digit of the signature", _changed(_flipped)),
    Forgery("signature left out", "the bare address", _changed(_unsigned)),
    Forgery("longer life", "X-Amz-Expires raised", _changed(_longer_life)),
    Forgery("other key", "the signature of another key", _changed(_other_key)),
    Forgery("method GET", "GET with an address for PUT", _method("GET")),
    Forgery("method DELETE", "DELETE with an address for PUT", _method("DELETE")),
    Forgery("expired", "an address for five minutes, an hour later", _expired),
    Forgery("longer body", "8 times the pinned length", _body(LONG), *_FULL),
    Forgery("no length", "the same, chunked", _body(LONG, "content-length"), *_FULL),
    Forgery("shorter body", "a byte less than the pinned length", _body(SHORT), *_CAUGHT),
    Forgery("other body", "other bytes than the pinned md5", _body(FORGED), *_CAUGHT),
    Forgery("no md5", "the same, content-md5 left out", _body(FORGED, "content-md5"), *_CAUGHT),
)
PART_FORGERIES = (
    Forgery("other number", "the signature of another part", _changed(_other_number)),
    Forgery("other upload", "the signature of another upload", _into_another_upload),
)


def _checks(place: str, at: Callable[[Forge], Try], forgeries: Sequence[Forgery]) -> list[Check]:
    return [
        Check(f"{place}: {f.name}", f.tried, at(f.forge), f.otherwise, f.meaning, f.essential)
        for f in forgeries
    ]


_ability = partial(Check, good=Verdict.WORKS)


_KEPT = "verification keeps the bytes that it has read, whatever is in staging later"
_SWEPT = "what lies in staging too long is swept"
_LEFT = "parts of abandoned uploads stay in the store"
_AGAIN = "the upload is forgotten: the agent sends that file again from its beginning"
_KNOWN = "the sweep aborts only the uploads that the database knows"
_RANGES = "aggregation reads ranges: nothing can be summed"
_STATUS = "the status is not looked at, the bytes are"
_DIGESTS = "nothing relies on it: md5 is pinned, verification computes the sha256"
BAD, FINE = Verdict.ATTENTION, Verdict.HARMLESS

CHECKS = (
    _ability("object: honest", "PUT as announced", _honest_object, BAD, "no uploads at all", True),
    *_checks("object", _at_an_object, FORGERIES),
    Check("object: again", "the same PUT once more", _replayed, FINE, _KEPT),
    Check("object: after delete", "the same PUT later", _replayed_after_delete, FINE, _SWEPT),
    _ability("part: honest", "PUT as announced, listed", _honest_part, BAD, "no large uploads"),
    *_checks("part", _at_a_part, (*FORGERIES, *PART_FORGERIES)),
    Check("part: after complete", "PUT when all is done", _part_after_complete, FINE, _KEPT),
    Check("part: after abort", "PUT when it is aborted", _part_after_abort, BAD, _LEFT),
    _ability("resumable", "ListParts when one was refused", _list_after_refusal, FINE, _AGAIN),
    _ability("incomplete listed", "ListMultipartUploads", _found_for_sweeping, BAD, _KNOWN),
    _ability("range", "five bytes from the middle", _range_bytes, BAD, _RANGES),
    _ability("range status", "its status is 206", _range_status, FINE, _STATUS),
    _ability("deleting many", "keys there and not there", _many_deleted, BAD, "no sweeping"),
    Check("conditional put", "If-None-Match: *", _only_if_absent, FINE, "nothing relies on it"),
    Check("checksum", "x-amz-checksum-sha256 of another body", _checksum, FINE, _DIGESTS),
)
