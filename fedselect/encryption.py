"""Encryption at rest: the format ``fedselect-encrypted/1`` of stored files.

Owns keys, frames and sizes. A file is a head of 48 bytes (magic, id of the key, salt) and frames of
65,536 bytes, each sealed with AES-256-GCM, the last one shorter or marked: the STREAM construction
(Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015), so that any range can be read alone and a
file that was cut, reordered or stored under another name is not taken for whole. Must not read
settings or know a store.

    file key = HKDF-SHA256(key, no salt, "fedselect-encrypted/1" ‖ 0 ‖ name)
    frame key = HKDF-SHA256(file key, salt, "fedselect-encrypted/1 frames")
    nonce of frame i = i (11 bytes, big-endian) ‖ 1 for the last frame, else 0

Whoever holds a file key can read that file, whatever its salt, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedselect.errors import FedSelectError

MAGIC = b"FSENC1\r\n"
FORMAT = b"fedselect-encrypted/1"
ID, SALT = 8, 32  # bytes
HEAD = len(MAGIC) + ID + SALT
FRAME, TAG = 65_536, 16
SEALED = FRAME + TAG
KEY = 32


class DecryptionError(FedSelectError):
    """A file is not what was encrypted under this name and key."""

    code = "object_damaged"


class Head(NamedTuple):
    """What stands before the frames."""

    key_id: str  # hex
    salt: bytes


def key_id(key: bytes) -> str:
    """A key's name (hex) in heads and backups; it says nothing of the key."""
    return hashlib.sha256(FORMAT + b" key id\0" + key).digest()[:ID].hex()


def file_key(key: bytes, name: str) -> bytes:
    """The key, 32 bytes, of all that is stored under one name."""
    return HKDF(SHA256(), KEY, None, FORMAT + b"\0" + name.encode()).derive(key)


def _cipher(file_key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), KEY, salt, FORMAT + b" frames").derive(file_key))


def write_head(key: bytes, salt: bytes) -> bytes:
    """The first 48 bytes of a file; ``salt`` are 32 random bytes, never used twice."""
    if len(salt) != SALT:
        raise ValueError(f"a salt of {len(salt)} bytes")
    return MAGIC + bytes.fromhex(key_id(key)) + salt


def read_head(data: bytes) -> Head:
    """Undo :func:`write_head`.

    Raises:
        DecryptionError: the file does not begin like an encrypted one.
    """
    if len(data) < HEAD or not data.startswith(MAGIC):
        raise DecryptionError("the file does not begin like an encrypted one")
    return Head(data[len(MAGIC) : HEAD - SALT].hex(), data[HEAD - SALT : HEAD])


def encrypted_size(size: int) -> int:
    """Bytes of the stored file that holds ``size`` bytes."""
    return HEAD + size + TAG * max(1, -(-size // FRAME))


def plain_size(size: int) -> int:
    """Undo :func:`encrypted_size`; 0 for what no encrypted file can have."""
    body = size - HEAD
    return max(0, body - TAG * -(-body // SEALED))


class Encryptor:
    """A stored file, made while its bytes arrive; ``salt``: see :func:`write_head`."""

    def __init__(self, key: bytes, salt: bytes, name: str) -> None:
        self._cipher = _cipher(file_key(key, name), salt)
        self._head = write_head(key, salt)
        self._waiting = bytearray()
        self._number = 0

    def update(self, data: bytes) -> bytes:
        """Take the next bytes; returns what is complete, maybe nothing."""
        self._waiting += data
        done, self._head = bytearray(self._head), b""
        while len(self._waiting) > FRAME:  # a full one may still turn out to be the last
            done += self._seal(bytes(self._waiting[:FRAME]), last=False)
            del self._waiting[:FRAME]
        return bytes(done)

    def finish(self) -> bytes:
        """The rest of the file."""
        return self._head + self._seal(bytes(self._waiting), last=True)

    def _seal(self, data: bytes, *, last: bool) -> bytes:
        sealed = self._cipher.encrypt(_nonce(self._number, last), data, None)
        self._number += 1
        return sealed


def encrypt(data: bytes, *, key: bytes, salt: bytes, name: str) -> bytes:
    """The stored file of some bytes."""
    encryptor = Encryptor(key, salt, name)
    return encryptor.update(data) + encryptor.finish()


def decrypt(file: bytes, keys: Mapping[str, bytes]) -> bytes:
    """The bytes of a whole stored file; ``keys`` are file keys by the id of the key above them.

    Raises:
        DecryptionError: it was changed or cut, or none of the keys is its own.
    """
    head = read_head(file)
    if head.key_id not in keys:
        raise DecryptionError(f"the file needs the file key below key {head.key_id}")
    return b"".join(Frames(keys[head.key_id], head, 0).open(file[HEAD:], ends=True))


@dataclass(frozen=True, slots=True)
class Span:
    """Where plain bytes [start, stop) of a file lie: the stored bytes to read, with the number of
    their first frame, and how much of what comes out is to be dropped in front.
    """

    first: int
    start: int
    length: int
    skip: int


def span(start: int, length: int) -> Span:
    """What to read of a stored file for ``length`` (at least 1) plain bytes from ``start`` on."""
    first, last = start // FRAME, (start + length - 1) // FRAME
    return Span(first, HEAD + first * SEALED, (last - first + 1) * SEALED, start - first * FRAME)


class Frames:
    """Opens frames in their order, from frame ``first`` on."""

    def __init__(self, file_key: bytes, head: Head, first: int) -> None:
        self._cipher = _cipher(file_key, head.salt)
        self._number = first

    def open(self, data: bytes, *, ends: bool) -> Iterator[bytes]:
        """The plain bytes of frames that lie end to end, one piece for each.

        ``ends``: the file ends with them, so that the last must be marked as such.

        Raises:
            DecryptionError: see :func:`decrypt`.
        """
        if ends and not data:
            raise DecryptionError("the file was cut")
        for start in range(0, len(data), SEALED):
            frame = data[start : start + SEALED]
            at_end = start + SEALED >= len(data)
            # Of a range that stops inside the file nobody knows whether its last frame is the last.
            marks = (True,) if at_end and ends else (False, True) if at_end else (False,)
            yield self._open(frame, marks)
            self._number += 1

    def _open(self, frame: bytes, marks: tuple[bool, ...]) -> bytes:
        for last in marks:
            try:
                return self._cipher.decrypt(_nonce(self._number, last), frame, None)
            except InvalidTag:
                continue
        raise DecryptionError(
            f"frame {self._number} is not what was written: the file was changed or cut, or it was "
            "encrypted with another key or under another name"
        )


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
