"""The tamper-evident ledger: canonical entries, signed checkpoints, the check of an export.

Owns an entry's leaf hash, the C2SP checkpoint and the verification of an exported ledger; the tree
itself is ``merkle``, whose names are offered here too. Must not know rows, files or clocks. What
holds: a leaf hash depends on what an entry says, not on how its JSON is spaced or ordered; a root
is believed only behind a signature; it is the reader who verifies, not the server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedselect.errors import LedgerError
from fedselect.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)

__all__ = [
    "Checkpoint",
    "ExportReport",
    "Frontier",
    "canonical_json",
    "checkpoint_body",
    "consistency_proof",
    "entry_leaf",
    "export_line",
    "inclusion_proof",
    "read_verifier_key",
    "sign_checkpoint",
    "tree_root",
    "verifier_key",
    "verify_checkpoint",
    "verify_consistency",
    "verify_export",
    "verify_inclusion",
]

MAX_INTEGER = 2**53 - 1  # RFC 7493: what every JSON reader keeps exactly
MAX_NESTING = 32
MAX_SIGNATURES = 64
_ED25519 = b"\x01"  # signature type of C2SP signed-note
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_WRITER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)
_UNSORTED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


# --- canonical JSON ----------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """RFC 8785 for what the ledger uses: str, int, bool, None, lists and dicts with str keys.

    Raises:
        LedgerError: a float, an integer beyond ±(2^53 - 1), a lone surrogate, any other type.
    """
    _check_value(value, MAX_NESTING)
    return _write(value)


def entry_leaf(entry: Mapping[str, Any]) -> bytes:
    """SHA-256(0x00 || canonical JSON), the leaf hash of an entry (RFC 6962 §2.1).

    Raises:
        LedgerError: the entry has no canonical JSON.
    """
    return leaf_hash(canonical_json(dict(entry)))


def _check_value(value: Any, depth: int) -> None:
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int):
        _check_integer(value)
    elif not depth:
        raise LedgerError(f"values nest deeper than {MAX_NESTING} levels")
    elif isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise LedgerError("every key of an object must be a string")
        for item in value.values():
            _check_value(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, depth - 1)
    else:
        raise LedgerError(f"a {type(value).__name__} has no place in the ledger")


def _check_integer(value: int) -> int:
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise LedgerError("an integer lies beyond ±(2^53 - 1)")
    return value


def _write(value: Any) -> bytes:
    text = _WRITER.encode(value)
    # RFC 8785 §3.2.3 sorts by UTF-16 code units: not as by code points once these are above U+FFFF.
    if not text.isascii() and _ASTRAL.search(text):
        text = _UNSORTED.encode(_utf16_ordered(value))
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise LedgerError("a string holds a lone surrogate, so it is not Unicode text") from error


def _utf16_ordered(value: Any) -> Any:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: str(key).encode("utf-16-be", "surrogatepass"))
        return {key: _utf16_ordered(value[key]) for key in keys}
    return [_utf16_ordered(item) for item in value] if isinstance(value, list) else value


# --- checkpoints -------------------------------------------------------------------------------


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
    name, key = read_verifier_key(public_key)
    head, blank, tail = text.rpartition("\n\n")
    if not blank or not tail.endswith("\n") or tail.count("\n") > MAX_SIGNATURES:
        raise LedgerError("the checkpoint is not a signed note")
    body = head + "\n"
    mine = [_signature(line, name, _key_id(key, name)) for line in tail[:-1].split("\n")]
    found = [signature for signature in mine if signature is not None]
    if not found:
        raise LedgerError(f"the checkpoint bears no signature of {name!r}")
    try:
        for signature in found:
            key.verify(signature, body.encode())
    except (InvalidSignature, UnicodeEncodeError) as error:
        raise LedgerError(f"the signature of {name!r} does not fit the checkpoint") from error
    return _read_body(body)


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


# --- an exported ledger ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportReport:
    """An export that verified: its signed head and the key behind it.

    ``pinned`` says that the caller named the key; without it, an export only vouches for itself.
    """

    entries: int
    checkpoint: Checkpoint
    public_key: str
    pinned: bool


_LINE, _HEAD = {"seq", "leaf", "entry"}, {"checkpoint", "public_key"}


def export_line(entry: Mapping[str, Any], leaf: bytes) -> str:
    """One line of an export, without its line break, in the form that verifies fastest.

    Raises:
        LedgerError: the entry has no canonical JSON.
    """
    line = {"entry": dict(entry), "leaf": leaf.hex(), "seq": entry["seq"]}
    return canonical_json(line).decode()


def verify_export(lines: Iterable[str], *, public_key: str | None = None) -> ExportReport:
    """Check an exported ledger line by line, in memory that does not grow with it.

    Lines are ``{"seq", "leaf", "entry"}`` from 0 without a gap, then ``{"checkpoint",
    "public_key"}``. Every leaf hash must follow from its entry and all of them must give the
    signed root. ``public_key`` pins the verifier key; otherwise the export's own is taken.

    Raises:
        LedgerError: something was edited, dropped, moved, cut off or not signed by this key; the
            text names the first bad entry, where that can be told.
    """
    tree, head = Frontier(), None
    for line in lines:
        if head is not None:
            raise LedgerError(f"something follows the checkpoint, behind entry {tree.size - 1}")
        leaf = _written_leaf(line, tree.size)
        if leaf is not None:
            tree.append(leaf)
            continue
        document = _read_line(line, tree.size)
        if document.keys() == _HEAD:
            head = document
        else:
            tree.append(_checked_leaf(document, tree.size))
    if head is None:
        raise LedgerError(f"entry {tree.size}: the export is cut off before its checkpoint")
    if not all(isinstance(value, str) for value in head.values()):
        raise LedgerError("checkpoint and public_key must be strings")
    if public_key is not None and head["public_key"] != public_key:
        raise LedgerError(f"signed by {head['public_key'][:200]!r}, not by {public_key!r}")
    checkpoint = verify_checkpoint(head["checkpoint"], head["public_key"])
    _check_head(tree, checkpoint)
    return ExportReport(tree.size, checkpoint, head["public_key"], public_key is not None)


def _check_head(tree: Frontier, checkpoint: Checkpoint) -> None:
    if tree.size != checkpoint.size:
        raise LedgerError(
            f"entry {min(tree.size, checkpoint.size)}: the export has {tree.size} entries, "
            f"{checkpoint.size} were signed"
        )
    if tree.root() != checkpoint.root:
        raise LedgerError(
            f"the {tree.size} entries do not give the signed root: an entry was changed together "
            "with its leaf hash"
        )


def _written_leaf(line: str, seq: int) -> bytes | None:
    """The leaf of a line just as :func:`export_line` writes it; None: it needs a closer look.

    There the entry's own bytes are what was hashed, so that nothing has to be encoded again.
    """
    if not line.startswith('{"entry":'):
        return None
    end = f'","seq":{seq}}}'
    line = line.rstrip("\n")
    entry, middle, _ = line[9 : -len(end)].rpartition(',"leaf":"')
    try:
        leaf = leaf_hash(entry.encode())
        if line != f'{{"entry":{entry}{middle}{leaf.hex()}{end}':
            return None
        found = _READER.decode(entry)["seq"]
    except (ValueError, KeyError, TypeError, RecursionError, LedgerError):
        return None
    return leaf if type(found) is int and found == seq else None


def _checked_leaf(document: dict[str, Any], seq: int) -> bytes:
    entry = document.get("entry")
    if document.keys() != _LINE or not isinstance(entry, dict):
        raise LedgerError(f"entry {seq}: the line is not made of seq, leaf and entry")
    found = document["seq"]
    if type(found) is not int or found != seq:
        raise LedgerError(f"entry {seq}: in its place stands {str(found)[:40]!r}")
    if type(entry.get("seq")) is not int or entry["seq"] != seq:
        raise LedgerError(f"entry {seq}: the entry says it is {str(entry.get('seq'))[:40]!r}")
    try:
        leaf = leaf_hash(_write(entry))
    except (LedgerError, RecursionError) as error:
        raise LedgerError(f"entry {seq}: {error}") from error
    if leaf.hex() != document["leaf"]:
        raise LedgerError(f"entry {seq}: the entry does not match its leaf hash")
    return leaf


def _read_line(line: str, seq: int) -> dict[str, Any]:
    try:
        document = _READER.decode(line)
    except (ValueError, RecursionError, LedgerError) as error:
        raise LedgerError(f"entry {seq}: not a line of the ledger: {str(error)[:120]}") from error
    if not isinstance(document, dict):
        raise LedgerError(f"entry {seq}: not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise LedgerError("a key stands twice")
    return found


def _whole_number(text: str) -> int:
    return int(text) if len(text) < 16 else _check_integer(int(text))


def _refuse_number(text: str) -> NoReturn:
    raise LedgerError(f"{text[:40]} is not a whole number")


# Admits only what canonical_json would, so that nothing has to be checked twice.
_READER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_whole_number,
    parse_float=_refuse_number,
    parse_constant=_refuse_number,
)
