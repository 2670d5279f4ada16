"""Sending a file: what to announce of it, and the conversation that carries it to the store.

Owns the source of a file's bytes, one part of it at a time, and how sending goes on after a cut
connection or an expired address. Must not open connections, sleep, read a clock or open files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from uuid import UUID

from fedselect import exchange
from fedselect.errors import ServiceError
from fedselect.exchange import Ask, Flow, Reply, Retries
from fedselect.protocol import in_parts, part_sizes
from fedselect.uploads import MissingParts, PartAddress, UploadReserve, UploadTicket

CHUNK = 1024**2


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file's bytes come from: ``read(start, length)`` gives exactly ``length`` of them.

    Only one part is asked for at a time, so that a large file need not be in memory.
    """

    size: int
    read: Callable[[int, int], bytes]

    def chunks(self, start: int, length: int) -> Iterator[bytes]:
        """The bytes [start, start + length) in small pieces."""
        for at in range(start, start + length, CHUNK):
            yield self.read(at, min(CHUNK, start + length - at))


def source(data: bytes | Source) -> Source:
    """A source of bytes that are in memory; a source is one already."""
    if isinstance(data, Source):
        return data
    view = memoryview(data)
    return Source(len(data), lambda start, length: bytes(view[start : start + length]))


def announce(data: bytes | Source) -> UploadReserve:
    """What to tell the coordinator of a file before it is sent; reads it once."""
    file = source(data)
    whole, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    sizes = part_sizes(file.size)
    parts = []
    for start, stop in pairwise(accumulate(sizes, initial=0)):
        part = hashlib.md5(usedforsecurity=False)
        for chunk in file.chunks(start, stop - start):
            for digest in (whole, sha256, part):
                digest.update(chunk)
        parts.append(part.hexdigest())
    cut = in_parts(file.size)
    return UploadReserve(
        size=file.size,
        sha256=sha256.hexdigest(),
        md5=whole.hexdigest(),
        part_size=sizes[0] if cut else None,
        parts=parts if cut else [],
    )


def put_file(ticket: UploadTicket, data: bytes | Source, *, retries: Retries) -> Flow[int]:
    """Send a file to its signed address or addresses, with exactly the headers that were signed.

    Returns the bytes that were handed to the connection, repeated parts again.

    Raises:
        ServiceError: code ``store_refused`` if the object store does not take it, or what the
            coordinator refuses.
    """
    file = source(data)
    if ticket.url is None:
        return (yield from _put_parts(ticket.id, file, retries))
    content = file.read(0, file.size)
    ask = Ask(ticket.method, ticket.url, ticket.headers, content, signed=True)
    yield from exchange.succeed(ask, retries)
    return file.size


def _put_parts(upload_id: UUID, file: Source, retries: Retries) -> Flow[int]:
    """Put what is missing until nothing is; gives up after ``tries`` refusals without progress.

    After any refusal the coordinator is asked again: it knows which parts the store has, and signs
    fresh addresses for the others.
    """
    sent, failures, wait = 0, 0, 0.0
    fewest: int | None = None
    refused: tuple[Ask, Reply] | None = None
    while True:
        path = f"/v1/uploads/{upload_id}/parts"
        todo = yield from exchange.post(path, MissingParts, retries=retries, after=wait)
        if todo.missing == 0:
            return sent
        # A store that forgot its parts starts from the beginning: that alone is no progress.
        if fewest is None or todo.missing < fewest:
            fewest, failures = todo.missing, 0
        elif failures >= retries.tries:
            raise _given_up(refused, failures)
        failures, refused = failures + 1, None
        for part in todo.parts:
            ask = _put(part, file)
            reply = yield ask
            sent += part.size
            if not 200 <= reply.status < 300:
                refused = ask, reply
                break
        wait = retries.delay(failures, refused[1]) if refused else 0.0


def _put(part: PartAddress, file: Source) -> Ask:
    content = file.read(part.start, part.size)
    return Ask("PUT", part.url, part.headers, content, signed=True)


def _given_up(refused: tuple[Ask, Reply] | None, failures: int) -> ServiceError:
    if refused is not None:
        return exchange.refusal(*refused)
    text = f"the object store took the same parts {failures} times and has none of them"
    return ServiceError(text, code=exchange.STORE_REFUSED)
