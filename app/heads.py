"""The ledger's signed heads, kept a second time in the object store.

Owns ``checkpoints/<origin>/<size>`` and ``…/latest``. A database that was restored to an earlier
state, cut or rewritten knows less than, or something else than, what was signed and stored: then
nothing more is signed, until somebody has looked. Must not seal.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from app import ledger
from app.db import Tx
from app.errors import Missing
from app.storage import Storage
from fedselect import audit
from fedselect.errors import LedgerError

LIMIT = 16 * 1024  # bytes of a checkpoint with all the witnesses' signatures there may be


class StoredHeads:
    """The stored heads of one ledger. One process at a time writes: the one that seals."""

    def __init__(self, storage: Storage, origin: str) -> None:
        self._storage = storage
        self._folder = f"checkpoints/{re.sub('[^A-Za-z0-9._-]', '-', origin)}"
        self._kept: str | None = None  # the head that we know to be the stored one

    def latest(self, newest: str | None) -> str | None:
        """The last stored head; no question to the store if ``newest`` is known to be it.

        Raises:
            Unavailable: the object store does not answer.
        """
        if newest is not None and newest == self._kept:
            return newest
        try:
            return self._storage.read(f"{self._folder}/latest", 0, LIMIT).decode(errors="replace")
        except Missing:
            return None

    def keep(self, text: str) -> None:
        """Store a head, unless it is known to be there.

        Raises:
            Unavailable: the object store does not answer; the next call makes up for it.
        """
        if text == self._kept:
            return
        data = text.encode()
        for name in (f"{audit.read_checkpoint(text).size:020}", "latest"):
            self._storage.put(f"{self._folder}/{name}", io.BytesIO(data), len(data))
        self._kept = text

    def all(self) -> Iterator[tuple[str, str]]:
        """(key, text) of every stored head.

        Raises:
            Unavailable: the object store does not answer.
        """
        for key in self._storage.keys(f"{self._folder}/"):
            yield key, self._storage.read(key, 0, LIMIT).decode(errors="replace")


def check(tx: Tx, stored: str, *, ours: str) -> None:
    """Refuse a database that does not hold all that a stored head has signed.

    ``ours`` is the service's verifier key.

    Raises:
        LedgerError: ``ledger_rolled_back`` or ``ledger_forked``.
    """
    known = ledger.known_keys(tx, ours)
    head = None
    for key in known:
        try:
            head = audit.verify_checkpoint(stored, key)
            break
        except LedgerError:
            continue
    if head is None:
        raise LedgerError(
            "the head in the object store is signed by no key of this ledger: nothing is signed "
            "until it is known whether the database or the object is the wrong one",
            code="ledger_forked",
        )
    size = ledger.sealed_size(tx)
    if head.size > size:
        raise LedgerError(
            f"a head of {head.size} entries was signed and stored, the database has {size}: it was "
            "cut or restored to an earlier state; see docs/LEDGER.md, After a restore",
            code="ledger_rolled_back",
        )
    if ledger.root_at(tx, head.size) != head.root:
        raise LedgerError(
            f"the first {head.size} entries of the database are not those whose head was signed "
            "and stored: the ledger was rewritten",
            code="ledger_forked",
        )
