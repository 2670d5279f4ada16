"""The tamper-evident ledger: canonical entries, and the check of an export.

Owns an entry's leaf hash and the verification of an exported ledger; the tree is ``merkle``, what
is signed ``notes``, whose names are offered here too. Must not know rows, files or clocks. What
holds: a leaf hash depends on what an entry says, not on how its JSON is spaced or ordered; a root
is believed only behind a signature; it is the reader who verifies, not the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

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
from fedselect.notes import (
    Checkpoint,
    checkpoint_body,
    follow_keys,
    read_checkpoint,
    read_verifier_key,
    rotation_statement,
    sign_checkpoint,
    verifier_key,
    verify_checkpoint,
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
    "follow_keys",
    "inclusion_proof",
    "read_checkpoint",
    "read_verifier_key",
    "rotation_statement",
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


# --- an exported ledger ------------------------------------------------------------------------

KEY_ROTATED = "ledger.key_rotated"  # the entry whose body names the next key: old, new, statement


@dataclass(frozen=True, slots=True)
class ExportReport:
    """An export that verified: its signed head and the key behind it.

    ``pinned`` says that the caller named the key; without it, an export only vouches for itself.
    Of ``withheld`` entries only the leaf hash is there; ``heads`` kept elsewhere are prefixes.
    """

    entries: int
    withheld: int
    checkpoint: Checkpoint
    public_key: str
    pinned: bool
    heads: int


_LINE, _HEAD = {"seq", "leaf", "entry"}, {"checkpoint", "public_key"}
_Entry = dict[str, Any]


def export_line(seq: int, leaf: bytes, entry: Mapping[str, Any] | None) -> str:
    """One line of an export, without its line break, in the form that verifies fastest.

    ``entry`` is None where only the leaf hash may be shown.

    Raises:
        LedgerError: the entry has no canonical JSON.
    """
    line = {"entry": entry if entry is None else dict(entry), "leaf": leaf.hex(), "seq": seq}
    return canonical_json(line).decode()


def verify_export(
    lines: Iterable[str],
    *,
    public_key: str | None = None,
    heads: Sequence[str] = (),
    partial: bool = False,
) -> ExportReport:
    """Check an exported ledger line by line, in memory that does not grow with it.

    Lines are ``{"seq", "leaf", "entry"}`` from 0 without a gap, then ``{"checkpoint",
    "public_key"}``. Every leaf hash must follow from its entry and all of them must give the
    signed root. ``public_key`` pins the verifier key (an earlier one, too: the export tells how
    one followed the other); otherwise the export's own is taken. ``heads`` are checkpoints that
    somebody kept elsewhere: the export must be the same ledger, grown or not. Only a ``partial``
    export may withhold entries, as that of one project does with those of the others.

    Raises:
        LedgerError: something was edited, dropped, moved, cut off or not signed by this key; the
            text names the first bad entry, where that can be told.
    """
    export = _Export({read_checkpoint(head).size for head in heads}, partial=partial)
    for line in lines:
        export.take(line)
    head, tree = export.end(), export.tree
    every = follow_keys(export.first_key or head["public_key"], export.statements)
    keys = every if public_key is None else follow_keys(public_key, export.statements)
    if head["public_key"] not in keys:
        raise LedgerError(f"signed by {head['public_key'][:200]!r}, not by {keys[-1]!r}")
    checkpoint = verify_checkpoint(head["checkpoint"], head["public_key"])
    _check_head(tree, checkpoint)
    for text in heads:  # they may be older than the key that is trusted now
        _check_kept(_verified(text, every if keys[0] in every else keys), export)
    return ExportReport(
        entries=tree.size,
        withheld=export.withheld,
        checkpoint=checkpoint,
        public_key=head["public_key"],
        pinned=public_key is not None,
        heads=len(heads),
    )


class _Export:
    """What has been read of an export: its tree, and what is needed at the end of it."""

    def __init__(self, sizes: set[int], *, partial: bool) -> None:
        self.tree = Frontier()
        self.roots = {0: self.tree.root()}  # at the sizes that are asked for
        self.withheld = 0
        self.first_key: str | None = None
        self.statements: list[str] = []
        self._sizes, self._partial = sizes, partial
        self._head: dict[str, Any] | None = None

    def take(self, line: str) -> None:
        tree = self.tree
        if self._head is not None:
            raise LedgerError(f"something follows the checkpoint, behind entry {tree.size - 1}")
        leaf, entry = _written_leaf(line, tree.size) or self._read(line)
        if self._head is not None:
            return
        tree.append(leaf)
        if tree.size in self._sizes:
            self.roots[tree.size] = tree.root()
        if entry is None:
            self._withhold()
        elif entry.get("action") == KEY_ROTATED:
            self._rotate(entry.get("body"))

    def end(self) -> dict[str, Any]:
        if self._head is None:
            raise LedgerError(
                f"entry {self.tree.size}: the export is cut off before its checkpoint"
            )
        if not all(isinstance(value, str) for value in self._head.values()):
            raise LedgerError("checkpoint and public_key must be strings")
        return self._head

    def _withhold(self) -> None:
        if not self._partial:
            raise LedgerError(
                f"entry {self.tree.size - 1}: withheld, only its leaf hash is there, as in the "
                "export of one project; say that you expect a partial one"
            )
        self.withheld += 1

    def _read(self, line: str) -> tuple[bytes, _Entry | None]:
        document = _read_line(line, self.tree.size)
        if document.keys() != _HEAD:
            return _checked_leaf(document, self.tree.size)
        self._head = document
        return b"", None

    def _rotate(self, body: Any) -> None:
        try:
            old, statement = str(body["old"]), str(body["statement"])
        except (TypeError, KeyError) as error:
            text = f"entry {self.tree.size - 1}: a change of key that names none"
            raise LedgerError(text) from error
        self.first_key = self.first_key or old
        self.statements.append(statement)


def _verified(text: str, keys: list[str]) -> Checkpoint:
    for key in keys[:-1]:
        try:
            return verify_checkpoint(text, key)
        except LedgerError:
            continue
    return verify_checkpoint(text, keys[-1])


def _check_kept(kept: Checkpoint, export: _Export) -> None:
    size = export.tree.size
    if kept.size > size:
        raise LedgerError(
            f"entry {size}: the export has {size} entries, but a head of {kept.size} was signed: "
            "it is cut off, or of an earlier state",
            code="ledger_rolled_back",
        )
    if export.roots[kept.size] != kept.root:
        raise LedgerError(
            f"among the first {kept.size} entries is one that was changed after their head was "
            "signed: this is another ledger than the one that the kept checkpoint is of",
            code="ledger_forked",
        )


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


def _written_leaf(line: str, seq: int) -> tuple[bytes, _Entry] | None:
    """Leaf and entry of a line just as :func:`export_line` writes it; None: look closer.

    There the entry's own bytes are what was hashed, so that nothing has to be encoded again.
    """
    if not line.startswith('{"entry":{'):
        return None
    end = f'","seq":{seq}}}'
    line = line.rstrip("\n")
    text, middle, _ = line[9 : -len(end)].rpartition(',"leaf":"')
    try:
        leaf = leaf_hash(text.encode())
        if line != f'{{"entry":{text}{middle}{leaf.hex()}{end}':
            return None
        entry = _READER.decode(text)
        found = entry["seq"]
    except (ValueError, KeyError, TypeError, RecursionError, LedgerError):
        return None
    return (leaf, entry) if type(found) is int and found == seq else None


def _checked_leaf(document: dict[str, Any], seq: int) -> tuple[bytes, _Entry | None]:
    entry = document.get("entry")
    if document.keys() != _LINE or not isinstance(entry, dict | None):
        raise LedgerError(f"entry {seq}: the line is not made of seq, leaf and entry")
    found = document["seq"]
    if type(found) is not int or found != seq:
        raise LedgerError(f"entry {seq}: in its place stands {str(found)[:40]!r}")
    if entry is None:
        return _withheld_leaf(document["leaf"], seq), None
    if type(entry.get("seq")) is not int or entry["seq"] != seq:
        raise LedgerError(f"entry {seq}: the entry says it is {str(entry.get('seq'))[:40]!r}")
    try:
        leaf = leaf_hash(_write(entry))
    except (LedgerError, RecursionError) as error:
        raise LedgerError(f"entry {seq}: {error}") from error
    if leaf.hex() != document["leaf"]:
        raise LedgerError(f"entry {seq}: the entry does not match its leaf hash")
    return leaf, entry


def _withheld_leaf(text: Any, seq: int) -> bytes:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise LedgerError(f"entry {seq}: {str(text)[:80]!r} is not a leaf hash")
    return bytes.fromhex(text)


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
