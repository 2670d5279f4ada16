"""The bytes of a file on their way to its final key, while it is still being judged.

Owns how they get there: a small file waits in memory and is put in one piece, a large one is
written in parts while it is read, one part on its way while the next is gathered, and becomes an
object only if it is kept.
"""

from __future__ import annotations

import io
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Self

from app.errors import Unavailable
from app.storage import Storage
from fedselect.protocol import MULTIPART_FROM, part_sizes


class Copy:
    """One file of ``size`` bytes for the object ``key``; leaving the context forgets it if it was
    not kept by then. A large one that is stored encrypted is so before its first part goes out.
    """

    def __init__(self, storage: Storage, key: str, size: int) -> None:
        self._storage, self._key = storage, key
        self._part = part_sizes(size)[0] if size >= MULTIPART_FROM else None
        self._encryptor = None if self._part is None else storage.encryptor(key)
        self._upload_id: str | None = None
        self._etags: list[str] = []
        self._waiting = bytearray()
        self._writer = ThreadPoolExecutor(1)
        self._under_way: Future[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()  # a part that arrives after its upload was aborted would stay
        if self._upload_id is not None:
            with suppress(Unavailable):  # what cannot be reached now is swept later
                self._storage.abort_multipart(self._key, self._upload_id)

    @property
    def held(self) -> bytes | None:
        """All bytes so far, if the file is small enough to be held in memory."""
        return bytes(self._waiting) if self._part is None else None

    def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            Unavailable: the store does not answer.
        """
        self._waiting += data if self._encryptor is None else self._encryptor.update(data)
        while self._part is not None and len(self._waiting) >= self._part:
            self._put_part(self._part)

    def keep(self) -> None:
        """Make the object of exactly the bytes that were written.

        Raises:
            Unavailable: the store does not answer.
        """
        if self._part is None:
            self._storage.put(self._key, io.BytesIO(self._waiting), len(self._waiting))
            return
        if self._encryptor is not None:
            self._waiting += self._encryptor.finish()
        if self._waiting:
            self._put_part(len(self._waiting))
        self._arrive()
        parts = list(enumerate(self._etags, start=1))
        self._storage.complete_multipart(self._key, self._upload_id or "", parts)
        self._upload_id = None

    def _put_part(self, size: int) -> None:
        if self._upload_id is None:
            self._upload_id = self._storage.create_multipart(self._key)
        data = bytes(self._waiting[:size])
        del self._waiting[:size]
        self._arrive()
        number, put = len(self._etags) + 1, self._storage.put_part
        self._under_way = self._writer.submit(put, self._key, self._upload_id, number, data)

    def _arrive(self) -> None:
        if self._under_way is not None:
            self._etags.append(self._under_way.result())
            self._under_way = None
