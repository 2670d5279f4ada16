"""Verification of a whole deployment: every version, mask record, manifest and ledger entry.

Owns the comparison of what lies in the store with what rows and ledger say of it. Reads everything,
changes nothing. A version is not recomputed here: that takes the kernels (``fedselect.recompute``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from app import ledgercheck, objects
from app.db import Tx
from app.errors import Missing
from app.tables import ManifestRecord, MaskRecord, Object, Update, Version
from app.wiring import Coordinator

ACTOR = "verification"
MOST = 100  # findings that are told


@dataclass(frozen=True, slots=True)
class Verification:
    """How much was compared, and what is wrong with it, in words: nothing, one hopes."""

    versions: int
    masks: int
    updates: int
    manifests: int
    entries: int
    findings: tuple[str, ...]


def verify(core: Coordinator) -> Verification:
    """Compare every file that should be there with its row's SHA-256, every manifest with its
    digest and its version, store and register (I11), and the ledger with itself and its heads.

    Raises:
        Unavailable: the object store or the database does not answer.
    """
    with core.db.transaction(ACTOR, "verification.verify") as tx:
        wanted = {table: _wanted(tx, table) for table in (Version, MaskRecord, Update)}
        manifests = tx.session.scalars(select(ManifestRecord)).all()
        query = select(Version.round_id, Version.manifest_sha256)
        recorded: dict[UUID | None, str | None] = dict(tx.session.execute(query).all())
    findings = list(_wrong_files(core, {k: s for files in wanted.values() for k, s in files}))
    for manifest in manifests:
        digest = hashlib.sha256(manifest.body.encode()).hexdigest()
        if digest != manifest.sha256 or recorded.get(manifest.round_id, digest) != digest:
            findings.append(f"the manifest of round {manifest.round_id} is not what was frozen")
    found = objects.check_objects(core)
    findings += [f"{key}: no row expects it" for key in found.strays]
    findings += [f"{key}: {why}" for key, why in found.missing]
    ledger = ledgercheck.check_ledger(core)
    findings += [f"ledger: {why}" for why in ledger.findings]
    return Verification(
        versions=len(wanted[Version]),
        masks=len(wanted[MaskRecord]),
        updates=len(wanted[Update]),
        manifests=len(manifests),
        entries=ledger.sealed,
        findings=tuple(findings[:MOST]),
    )


def _wanted(tx: Tx, table: type[Version | MaskRecord | Update]) -> list[tuple[str, str]]:
    """(key, SHA-256) of every row whose object has not been deleted."""
    query = (
        select(table.object_key, table.sha256)
        .join(Object, Object.key == table.object_key)
        .where(Object.deletion_id.is_(None))
    )
    return [(key, sha256) for key, sha256 in tx.session.execute(query)]


def _wrong_files(core: Coordinator, wanted: dict[str, str]) -> Iterator[str]:
    for key, sha256 in wanted.items():
        digest = hashlib.sha256()
        try:
            for chunk in core.storage.stream(key):
                digest.update(chunk)
        except Missing:
            continue  # told by check_objects, unless it was deleted in between
        if digest.hexdigest() != sha256:
            yield f"{key}: its SHA-256 is {digest.hexdigest()}, its row says {sha256}"
