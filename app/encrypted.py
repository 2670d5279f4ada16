"""The object store with some of its objects encrypted: those whose keys end in ``.enc``.

Owns which objects that are, and the way of their bytes through ``fedselect.encryption``; all that
is above it sees plain bytes and plain sizes under the same keys. Must not know what the objects
mean. ``stored`` is the store as it is, for who copies objects without reading them.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, TypeVar, cast

from app.errors import Missing, Unavailable
from app.storage import S3Storage, Storage, StoredObject
from fedselect import encryption
from fedselect.encryption import DecryptionError, Encryptor, Frames, Head

SUFFIX = ".enc"
CHUNK = 1024 * 1024
PREFIXES = ("accepted/", "masks/", "partials/", "quarantine/")  # where such objects lie
HEADS = 4096  # that a process keeps: 48 bytes each
S = TypeVar("S", bound=Storage)


def either(key: str) -> tuple[str, str]:
    """The names that an object may have, before and since there is a key."""
    return key, f"{key}{SUFFIX}"


class KeyRing:
    """The keys of the settings: the current one writes, all of them read."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._current = keys[0] if keys else None
        self._keys = {encryption.key_id(key): key for key in keys}
        self.file_key = lru_cache(HEADS)(self._file_key)

    @property
    def ids(self) -> list[str]:
        """Ids of all keys, the current one first."""
        return list(self._keys)

    @property
    def current(self) -> bytes:
        """The key that writes.

        Raises:
            Unavailable: there is none (``encryption_key_missing``).
        """
        if self._current is None:
            raise Unavailable("ENCRYPTION_KEY is not set", code="encryption_key_missing")
        return self._current

    def named(self, key: str) -> str:
        """The name that a new object gets which may be read by the service alone."""
        return key if self._current is None else f"{key}{SUFFIX}"

    def blinded(self, text: str) -> str | None:
        """A name (hex) that is always the same for a text, and says nothing of it to who has no
        key; None without a key.
        """
        if self._current is None:
            return None
        key = encryption.file_key(self._current, "names")
        return hmac.digest(key, text.encode(), hashlib.sha256).hex()

    def file_keys(self, name: str) -> dict[str, str]:
        """What opens one object and no other: file keys (hex) by the id of the key above them."""
        return {each: self.file_key(each, name).hex() for each in self._keys}

    def _file_key(self, key_id: str, name: str) -> bytes:
        if key_id not in self._keys:
            raise Unavailable(
                f"{name} is encrypted with key {key_id}, which is neither ENCRYPTION_KEY nor "
                "ENCRYPTION_KEY_PREVIOUS",
                code="encryption_key_missing",
            )
        return encryption.file_key(self._keys[key_id], name)


def encrypted(stored: S, ring: KeyRing) -> S:
    """The storage port itself, for which objects whose keys end in ``.enc`` are encrypted."""
    return _Encrypted(stored, ring)  # type: ignore[return-value]  # same calls


class _Encrypted:
    """The verbs that differ; all others are the store's own."""

    def __init__(self, stored: Storage, ring: KeyRing) -> None:
        self.stored = stored
        self._ring = ring
        self._heads: dict[str, Head] = {}

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.stored, verb)

    def put(self, key: str, stream: BinaryIO, size: int) -> None:
        """Write an object of exactly ``size`` plain bytes."""
        encryptor = self.encryptor(key)
        if encryptor is not None:
            stream = cast(BinaryIO, _Encrypting(stream, encryptor))
            size = encryption.encrypted_size(size)
        self.stored.put(key, stream, size)

    def encryptor(self, key: str) -> Encryptor | None:
        """What makes the stored bytes of an object, if they are not the plain ones."""
        if not is_one(key):
            return None
        return Encryptor(self._ring.current, secrets.token_bytes(encryption.SALT), key)

    def read(self, key: str, start: int = 0, length: int = 0) -> bytes:
        """Read a range, cut off at the end; ``length`` 0 means all that follows."""
        if not is_one(key):
            return self.stored.read(key, start, length)
        with suppress(DecryptionError):
            return self._read(key, start, length)
        self._heads.pop(key, None)  # encrypted anew since its head was read?
        with _told(key):
            return self._read(key, start, length)

    def _read(self, key: str, start: int, length: int) -> bytes:
        where = encryption.span(start, length or 1)
        wanted = where.length if length else 0
        if where.first == 0:
            data = self.stored.read(key, 0, encryption.HEAD + wanted if length else 0)
            head, found = self._note(key, data), data[encryption.HEAD :]
        else:
            head = self._heads.get(key) or self._note(
                key, self.stored.read(key, 0, encryption.HEAD)
            )
            found = self.stored.read(key, where.start, wanted)
            if not found:
                return b""
        frames = self._frames(key, head, where.first)
        plain = b"".join(frames.open(found, ends=not length or len(found) < wanted))
        return plain[where.skip : where.skip + length if length else None]

    def _frames(self, key: str, head: Head, first: int = 0) -> Frames:
        return Frames(self._ring.file_key(head.key_id, key), head, first)

    def _note(self, key: str, data: bytes) -> Head:
        head = encryption.read_head(data)
        if len(self._heads) >= HEADS:
            self._heads.clear()
        self._heads[key] = head
        return head

    def stream(self, key: str) -> Iterator[bytes]:
        """Read an object piece by piece."""
        if not is_one(key):
            yield from self.stored.stream(key)
            return
        with _told(key):
            yield from self._opened(key)

    def _opened(self, key: str) -> Iterator[bytes]:
        waiting, frames = bytearray(), None
        for chunk in self.stored.stream(key):
            waiting += chunk
            if frames is None and len(waiting) >= encryption.HEAD:
                frames = self._frames(key, encryption.read_head(bytes(waiting)))
                del waiting[: encryption.HEAD]
            # A frame stays until it is known whether it is the last.
            whole = (len(waiting) - 1) // encryption.SEALED * encryption.SEALED
            if frames is not None and whole > 0:
                yield from frames.open(bytes(waiting[:whole]), ends=False)
                del waiting[:whole]
        if frames is None:
            raise DecryptionError("the file was cut")
        yield from frames.open(bytes(waiting), ends=True)

    def size(self, key: str) -> int | None:
        """Plain bytes of an object; None if it is not there."""
        found = self.stored.size(key)
        return found if found is None else _plain(key, found)

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        """The objects below a prefix, with their plain sizes."""
        for entry in self.stored.entries(prefix):
            yield replace(entry, size=_plain(entry.key, entry.size))


class _Encrypting(io.RawIOBase):
    """The stored bytes of what a stream gives."""

    def __init__(self, source: BinaryIO, encryptor: Encryptor) -> None:
        self._source, self._encryptor = source, encryptor
        self._ready = bytearray()
        self._over = False

    def readable(self) -> bool:
        """It is there to be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as many as are asked for unless the end is near."""
        while not self._over and (size < 0 or len(self._ready) < size):
            data = self._source.read(CHUNK)
            self._over = not data
            self._ready += self._encryptor.update(data) if data else self._encryptor.finish()
        given = bytes(self._ready if size < 0 else self._ready[:size])
        del self._ready[: len(given)]
        return given


@contextmanager
def _told(key: str) -> Iterator[None]:
    try:
        yield
    except DecryptionError as error:
        raise Unavailable(f"{key}: {error}", code=error.code) from error


def is_one(key: str) -> bool:
    """Whether the object of this key is encrypted."""
    return key.endswith(SUFFIX)


def stored_size(key: str, size: int) -> int:
    """Bytes in the store of an object of ``size`` plain bytes."""
    return encryption.encrypted_size(size) if is_one(key) else size


def _plain(key: str, size: int) -> int:
    return encryption.plain_size(size) if is_one(key) else size


def re_encrypt(storage: S3Storage, ring: KeyRing) -> int:
    """Write all encrypted objects that another key has written anew with the current one; returns
    how many. Nothing may be deleted meanwhile (``retention.alone``).

    Raises:
        Unavailable: a key is missing (``encryption_key_missing``), an object is damaged
            (``object_damaged``), or the store is away; what was done is done.
    """
    current, done = encryption.key_id(ring.current), 0
    for key in chain.from_iterable(storage.keys(prefix) for prefix in PREFIXES):
        if not is_one(key):
            continue
        try:
            head = encryption.read_head(storage.stored.read(key, 0, encryption.HEAD))
            if head.key_id == current:
                continue
            with SpooledTemporaryFile(max_size=8 * CHUNK) as spool:  # of encrypted bytes
                encryptor = Encryptor(ring.current, secrets.token_bytes(encryption.SALT), key)
                spool.writelines(map(encryptor.update, storage.stream(key)))
                spool.write(encryptor.finish())
                size = spool.tell()
                spool.seek(0)
                storage.stored.put(key, cast(BinaryIO, spool), size)
        except Missing:  # a partial sum whose round has ended
            continue
        done += 1
    return done
