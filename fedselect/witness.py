"""The agent as a witness of the ledger: it keeps the last head and believes no other past.

Owns what to ask when another head is shown, and the verdict. Where key, head and evidence are kept
is ``agent_state``; proofs are checked by ``audit``. Must not read a clock: a head is only *noted*
(its signature is checked) while there is nothing to do, and *proven* when work is done, or after
``PATIENCE`` seconds of waiting.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

from fedselect import audit
from fedselect.errors import LedgerError, ServiceError
from fedselect.exchange import TRANSIENT
from fedselect.ledgerdocs import Checkpoint, ConsistencyProof, LedgerKeys

PATIENCE = 300.0  # seconds


class Ledger(Protocol):
    """What a witness asks; ``Client`` is one."""

    def checkpoint(self) -> Checkpoint:
        """The newest head and the key behind it."""

    def ledger_keys(self) -> LedgerKeys:
        """The signed changes of key."""

    def prove_consistency(self, first: int, second: int) -> ConsistencyProof:
        """That one head extends the other."""


class Memory(Protocol):
    """Where a witness keeps what it knows; ``AgentFolder`` is one."""

    def pinned(self) -> str | None:
        """The verifier key that is trusted."""

    def pin(self, key: str) -> None:
        """Trust this key from now on."""

    def head(self) -> str | None:
        """The last head that was proven."""

    def keep_head(self, text: str) -> None:
        """Keep a head that was proven."""

    def keep_evidence(self, kept: str, shown: str, *, why: str) -> str:
        """Keep two heads that cannot both be true; returns where."""


class Witness:
    """Compares every head that is shown with the last one that was proven."""

    def __init__(self, ledger: Ledger, memory: Memory) -> None:
        self._ledger = ledger
        self._memory = memory
        self._noted: str | None = None
        self._waited = 0.0

    def wait(self, seconds: float) -> None:
        """Time passes until the next step."""
        self._waited += seconds

    def see(self, text: str | None, *, working: bool) -> None:
        """A head is shown with an answer; ``working``: the answer gives work or settles it.

        Raises:
            LedgerError: ``ledger_forked``, ``ledger_rolled_back`` or ``ledger_key_unknown``: the
                coordinator cannot be trusted; both heads are kept as evidence.
            ServiceError: the coordinator did not answer; the head is looked at again next time.
        """
        kept = self._memory.head()
        if text is None or text == kept:
            return
        if text != self._noted:
            shown = self._opened(text, kept)
            self._noted = text
        else:
            shown = audit.read_checkpoint(text)
        if kept is not None and not (working or self._waited >= PATIENCE):
            return
        if kept is not None:
            self._prove(audit.read_checkpoint(kept), shown, texts=(kept, text))
        self._waited = 0.0
        if kept is None or audit.read_checkpoint(kept).size < shown.size:
            self._memory.keep_head(text)

    def _opened(self, text: str, kept: str | None) -> audit.Checkpoint:
        """The head, signed by the trusted key or by one that it leads to."""
        pinned = self._memory.pinned()
        if pinned is None:
            pinned = self._ledger.checkpoint().public_key  # trusted at first use
            self._memory.pin(pinned)
        try:
            try:
                shown = audit.verify_checkpoint(text, pinned)
            except LedgerError as error:
                if error.code != "ledger_key_unknown":
                    raise
                key = audit.follow_keys(pinned, self._ledger.ledger_keys().statements)[-1]
                shown = audit.verify_checkpoint(text, key)
                self._memory.pin(key)
        except LedgerError as error:
            self._accuse(kept or "", text, code=error.code, why=str(error))
        if shown.origin != audit.read_verifier_key(pinned)[0]:
            why = f"a head of {shown.origin!r} is shown"
            self._accuse(kept or "", text, code="ledger_forked", why=why)
        return shown

    def _prove(
        self, kept: audit.Checkpoint, shown: audit.Checkpoint, *, texts: tuple[str, str]
    ) -> None:
        old, new = sorted((kept, shown), key=lambda head: head.size)
        rolled = shown.size < kept.size
        try:
            hashes: list[bytes] = []
            if old.size != new.size:
                proof = self._ledger.prove_consistency(old.size, new.size)
                hashes = [bytes.fromhex(text) for text in proof.hashes]
            audit.verify_consistency(
                hashes, old_size=old.size, old_root=old.root, size=new.size, root=new.root
            )
        except ServiceError as error:
            if error.status == 0 or error.status in TRANSIENT or error.status in {401, 403}:
                raise
            why = f"no proof is given ({error})"
        except (LedgerError, ValueError) as error:
            why = str(error)
        else:
            return
        code = "ledger_rolled_back" if rolled else "ledger_forked"
        self._accuse(*texts, code=code, why=why)

    def _accuse(self, kept: str, shown: str, *, code: str, why: str) -> NoReturn:
        place = self._memory.keep_evidence(kept, shown, why=why)
        said = {
            "ledger_rolled_back": "the coordinator's ledger is shorter than the head it has signed",
            "ledger_forked": "the coordinator's ledger is not the one it has shown before",
        }.get(code, "the coordinator shows a ledger head that its key has not signed")
        raise LedgerError(
            f"{said}: {why}. Nothing more is sent. Both heads are kept in {place}; show them to "
            "the project and to other sites (docs/LEDGER.md, When an agent stops)",
            code=code,
        )
