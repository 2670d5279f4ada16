"""What the ledger signs: verifier keys, checkpoints and the change from one key to the next.

Owns the C2SP signed note and what stands in ours. Must not know entries, files or clocks.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedselect.errors import LedgerError

MAX_SIGNATURES = 64
_ED25519 = b"\x01"  # signature type of C2SP signed-note


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A head of the ledger as it was signed: ``size`` entries under ``root`` (32 bytes)."""

    origin: str
    size: int
    root: bytes


def checkpoint_body(origin: str, size: int, root: bytes) -> str:
    """The text that is signed: origin, size and root, a line each (C2SP tlog-checkpoint).

    Raises:
        LedgerError: an origin that does not fit on a line, a negative size, a root that is none.
    """
    if not origin or not origin.isprintable() or size < 0 or len(root) != 32:
        raise LedgerError(f"no checkpoint can say origin {origin!r}, size {size}, root {root!r}")
    return f"{origin}\n{size}\n{_base64(root)}\n"


def sign_checkpoint(body: str, key: Ed25519PrivateKey, name: str) -> str:
    """The body with its signature line (C2SP signed-note); ``name`` should be the log's origin.

    Raises:
        LedgerError: not a key name.
    """
    signature = _key_id(key.public_key(), name) + key.sign(body.encode())
    return f"{body}\n— {name} {_base64(signature)}\n"


def verifier_key(public_key: Ed25519PublicKey, name: str) -> str:
    """A public key as text: ``name+keyhash+base64`` (C2SP signed-note).

    Raises:
        LedgerError: not a key name.
    """
    encoded = _base64(_ED25519 + public_key.public_bytes_raw())
    return f"{name}+{_key_id(public_key, name).hex()}+{encoded}"


def read_verifier_key(text: str) -> tuple[str, Ed25519PublicKey]:
    """Name and key of what :func:`verifier_key` wrote.

    Raises:
        LedgerError: not such a text, or its parts do not belong together.
    """
    name, _, rest = text.partition("+")
    encoded = _unbase64(rest.partition("+")[2])
    if len(encoded) != 33 or encoded[:1] != _ED25519:
        raise LedgerError(f"{text[:200]!r} is not an Ed25519 verifier key (name+hash+base64)")
    key = Ed25519PublicKey.from_public_bytes(encoded[1:])
    if verifier_key(key, name) != text:
        raise LedgerError(f"the key hash in {text[:200]!r} does not fit its name and key")
    return name, key


def verify_checkpoint(text: str, public_key: str) -> Checkpoint:
    """Read a signed checkpoint; ``public_key`` is the verifier key of the log that is trusted.

    Signatures of other keys (witnesses) are ignored, as the format demands.

    Raises:
        LedgerError: not a signed note, not signed by this key, or not a checkpoint.
    """
    return _read_body(open_note(text, public_key))


def read_checkpoint(text: str) -> Checkpoint:
    """What a checkpoint says, whoever signed it: believe nothing of it before it is verified.

    Raises:
        LedgerError: not a checkpoint.
    """
    return _read_body(text.rpartition("\n\n")[0] + "\n")


def open_note(text: str, public_key: str) -> str:
    """The text of a note that this verifier key has signed (C2SP signed-note).

    Raises:
        LedgerError: not a signed note, or not signed by this key (code ``ledger_key_unknown`` if
            this key has made no signature of it at all).
    """
    name, key = read_verifier_key(public_key)
    head, blank, tail = text.rpartition("\n\n")
    if not blank or not tail.endswith("\n") or tail.count("\n") > MAX_SIGNATURES:
        raise LedgerError("this is not a signed note")
    body = head + "\n"
    mine = [_signature(line, name, _key_id(key, name)) for line in tail[:-1].split("\n")]
    found = [signature for signature in mine if signature is not None]
    if not found:
        raise LedgerError(
            f"the note bears no signature of {public_key!r}", code="ledger_key_unknown"
        )
    try:
        for signature in found:
            key.verify(signature, body.encode())
    except (InvalidSignature, UnicodeEncodeError) as error:
        raise LedgerError(f"the signature of {name!r} does not fit the note") from error
    return body


def _signature(line: str, name: str, key_id: bytes) -> bytes | None:
    """The signature on a line, None if another key made it."""
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] != "—":
        raise LedgerError(f"{line[:200]!r} is not a signature line")
    raw = _unbase64(parts[2])
    return raw[4:] if (parts[1], raw[:4]) == (name, key_id) else None


def _read_body(body: str) -> Checkpoint:
    lines = body.split("\n")[:-1]
    if len(lines) < 3 or not all(line and line.isprintable() for line in lines):
        raise LedgerError("a checkpoint needs an origin, a size and a root, a line each")
    origin, size, root = lines[0], lines[1], _unbase64(lines[2])
    if not (size.isascii() and size.isdigit() and len(size) < 20 and str(int(size)) == size):
        raise LedgerError(f"{size[:40]!r} is not a tree size")
    if len(root) != 32:
        raise LedgerError("the root of a checkpoint must be a SHA-256")
    return Checkpoint(origin, int(size), root)


# --- rotation of keys --------------------------------------------------------------------------

_ROTATION = "ledger-key-rotation"  # no number, so that no statement can pass for a checkpoint


def rotation_statement(old: Ed25519PrivateKey, new: Ed25519PublicKey, origin: str) -> str:
    """The old key's word that from now on another one signs for this ledger.

    Raises:
        LedgerError: not an origin.
    """
    return sign_checkpoint(f"{origin}\n{_ROTATION}\n{verifier_key(new, origin)}\n", old, origin)


def follow_keys(trusted: str, statements: Iterable[str]) -> list[str]:
    """The verifier keys that a trusted one leads to, itself first.

    ``statements`` are those of the whole ledger in its order; what the last key found so far has
    not signed is of another time, and skipped.

    Raises:
        LedgerError: a statement that a key of the chain signed, but that names no key.
    """
    keys = [trusted]
    origin = read_verifier_key(trusted)[0]
    for statement in statements:
        try:
            body = open_note(statement, keys[-1])
        except LedgerError:
            continue
        said = body.split("\n")
        if said[:2] != [origin, _ROTATION] or len(said) != 4 or said[3]:
            raise LedgerError(f"{body[:200]!r} is signed, but it does not name the next key")
        if read_verifier_key(said[2])[0] != origin:
            raise LedgerError(f"{said[2]!r} is a key of another ledger")
        keys.append(said[2])
    return keys


# --- parts -------------------------------------------------------------------------------------


def _key_id(public_key: Ed25519PublicKey, name: str) -> bytes:
    if not name or not name.isprintable() or " " in name or "+" in name:
        raise LedgerError(f"{name[:200]!r} is not a key name: no spaces, no plus signs, not empty")
    text = name.encode() + b"\n" + _ED25519 + public_key.public_bytes_raw()
    return hashlib.sha256(text).digest()[:4]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unbase64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise LedgerError(f"{text[:200]!r} is not base64") from error
    # Otherwise two texts would stand for the same signature.
    if _base64(data) != text:
        raise LedgerError(f"{text[:200]!r} is not canonical base64")
    return data
