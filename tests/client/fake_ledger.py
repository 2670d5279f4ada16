"""A coordinator's ledger in memory, honest or not: real heads, real signatures, real proofs."""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedselect import audit, merkle

ORIGIN = "coordinator.test/ledger"


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


@dataclass
class Ledger:
    """``forked`` is the number of the first entry that is another than everybody else saw."""

    number: int = 1
    forked: int | None = None
    statements: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    sealed: int = 1_000
    refuse: httpx.Response | None = None

    @property
    def key(self) -> str:
        return audit.verifier_key(key_of(self.number).public_key(), ORIGIN)

    def leaves(self, size: int) -> list[bytes]:
        fork = size if self.forked is None else self.forked
        return [merkle.leaf_hash(f"{i} {i >= fork}".encode()) for i in range(size)]

    def head(self, size: int) -> str:
        body = audit.checkpoint_body(ORIGIN, size, merkle.tree_root(self.leaves(size)))
        return audit.sign_checkpoint(body, key_of(self.number), ORIGIN)

    def rotate(self) -> None:
        old, new = key_of(self.number), key_of(self.number + 1)
        self.statements.append(audit.rotation_statement(old, new.public_key(), ORIGIN))
        self.number += 1

    def answer(self, words: list[str], query: httpx.QueryParams) -> httpx.Response:
        self.asked.append("/".join(words))
        if self.refuse is not None:
            return self.refuse
        if words == ["checkpoint"]:
            return httpx.Response(200, json={"text": self.head(1), "public_key": self.key})
        if words == ["keys"]:
            return httpx.Response(200, json={"public_key": self.key, "statements": self.statements})
        first, second = int(query["first"]), int(query["second"])
        if second > self.sealed:
            problem = {"type": "x", "title": "x", "status": 404, "detail": "shorter"}
            return httpx.Response(404, json=problem | {"code": "ledger_shorter"})
        proof = audit.consistency_proof(self.leaves(second), first)
        found = {"first": first, "second": second, "hashes": [h.hex() for h in proof]}
        return httpx.Response(200, json=found)
