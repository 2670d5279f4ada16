"""The register of objects: which keys the service may write, keeps, or is about to delete.

Owns the ``objects`` rows and the one rule about sharing: a key is claimed before its bytes are
written and kept in the transaction of the row that names it, so a deletion (``app.retention``) and
a writer of the same content exclude each other. Must not decide what may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import CompoundSelect, select, union
from sqlalchemy.dialects.postgresql import insert

from app.db import Tx, among
from app.errors import Unavailable
from app.tables import MaskRecord, Object, Update, Version
from app.wiring import Coordinator

PREFIXES = ("accepted/", "masks/", "versions/")  # what is registered; the rest is transient
NAMED_IN = (Update.object_key, MaskRecord.object_key, Version.object_key, Version.delta_key)
ACTOR = "check"


def claim(tx: Tx, key: str, *, project: UUID, size: int) -> None:
    """Say that this key is about to be written; commit before the first byte goes out.

    Raises:
        Unavailable: it is being deleted at this moment (``object_doomed``); try again.
    """
    fresh = {"claimed_at": tx.now, "size": size, "deletion_id": None, "deleted_at": None}
    values = {"key": key, "project_id": project, **fresh}
    usable = Object.deletion_id.is_(None) | Object.deleted_at.is_not(None)
    query = insert(Object).values(values)
    query = query.on_conflict_do_update(index_elements=["key"], set_=fresh, where=usable)
    if tx.session.scalar(query.returning(Object.key)) is None:
        raise Unavailable(f"{key} is being deleted; try again", code="object_doomed")


def keep(tx: Tx, *keys: str) -> None:
    """Before rows name keys: make sure that nobody deletes them until this transaction ends.

    Raises:
        Unavailable: one was not claimed, or has been deleted since (``object_doomed``).
    """
    query = select(Object).where(among(Object.key, keys)).order_by(Object.key)
    query = query.with_for_update(read=True, key_share=True)
    found = tx.session.scalars(query, execution_options={"populate_existing": True})
    lost = set(keys) - {row.key for row in found if row.deletion_id is None}
    if lost:
        raise Unavailable(f"{min(lost)} is being deleted; write it again", code="object_doomed")


def named_among(tx: Tx, keys: Sequence[str]) -> set[str]:
    """Those of the keys that any row names."""
    queries = (select(column).where(column.in_(keys)) for column in NAMED_IN)
    return set(tx.session.scalars(union(*queries)))


def named_keys() -> CompoundSelect[str]:
    """The keys that any row names, as a query."""
    return union(*(select(column).where(column.is_not(None)) for column in NAMED_IN))


# --- the check ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectCheck:
    """What invariant I11 says of the store: no object without a row, no row without its object.

    ``strays`` lie in the store and no row expects them, ``missing`` are expected (the key, and why)
    and not there. ``unfinished`` deletions were begun and not ended: the next sweep ends them.
    """

    objects: int
    strays: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]
    unfinished: int

    @property
    def ok(self) -> bool:
        """Whether the invariant holds."""
        return not (self.strays or self.missing)


def check_objects(core: Coordinator) -> ObjectCheck:
    """Compare the store with the rows (I11); safe while the service works.

    Whatever looks wrong at first is looked at once more, key by key: between the two readings
    something may just have been written or deleted.
    """
    found = {e.key: e.size for prefix in PREFIXES for e in core.storage.entries(prefix)}
    with core.db.transaction(ACTOR, "objects.check_objects") as tx:
        register = {o.key: o for o in tx.session.scalars(select(Object))}
        expected = _expected(tx, register)
        unfinished = {o.deletion_id for o in register.values() if _doomed(o)}
    strays = [key for key in found if key not in register or register[key].deleted_at]
    missing = [key for key, size in expected.items() if found.get(key) != size]
    return ObjectCheck(
        objects=len(found),
        strays=tuple(key for key in strays if _is_stray(core, key)),
        missing=tuple((key, why) for key in missing if (why := _why_missing(core, key))),
        unfinished=len(unfinished),
    )


def _expected(tx: Tx, register: dict[str, Object]) -> dict[str, int]:
    """Keys that a row names and nobody has begun to delete, with their sizes."""
    keys = tx.session.scalars(named_keys())
    return {key: register[key].size for key in keys if register[key].deletion_id is None}


def _doomed(row: Object) -> bool:
    return row.deletion_id is not None and row.deleted_at is None


def _is_stray(core: Coordinator, key: str) -> bool:
    with core.db.transaction(ACTOR, "objects.is_stray") as tx:
        row = tx.session.get(Object, key)
    known = row is not None and row.deleted_at is None
    return not known and core.storage.size(key) is not None


def _why_missing(core: Coordinator, key: str) -> str | None:
    """None if the object is as its row says, or need not be there (any more)."""
    with core.db.transaction(ACTOR, "objects.why_missing") as tx:
        row = tx.session.get(Object, key)
        wanted = named_among(tx, [key])
    if row is None or row.deletion_id is not None or not wanted:
        return None
    size = core.storage.size(key)
    if size is None:
        return "not in the store"
    return None if size == row.size else f"{size} bytes, its row says {row.size}"
