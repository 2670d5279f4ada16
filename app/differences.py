"""What changed between two versions: their files, read by range, side by side.

Owns the reading and its limits; the sums are ``fedselect.comparing``. Must not write. Of each file
one piece is held at a time; two comparisons at once are enough for a process that has others to
serve.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from app import catalog
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Gone, TooLarge, Unavailable
from app.storage import Storage
from app.tables import Model, Object, Version
from fedselect.comparing import Comparison
from fedselect.space import ParameterSpace
from fedselect.versiondocs import VersionDifference
from fedselect.wire import version_head

MOST_ELEMENTS = 2**25  # 256 MiB to read: a call must not take long
PIECE = 2**20  # elements of a range
_places = threading.BoundedSemaphore(2)


@dataclass(frozen=True)
class Pair:
    """Two version files of one space."""

    version_id: UUID
    base_id: UUID
    version_key: str
    base_key: str
    space: ParameterSpace


def pair(tx: Tx, principal: Principal, version_id: UUID, base_id: UUID | None) -> Pair:
    """The files to compare; without a base it is the version's parent.

    Raises:
        Missing: no such version.
        Conflict: version_without_parent, or versions_incomparable.
        TooLarge: difference_too_large.
        Gone: one of the files was deleted.
    """
    version = catalog.get_version(tx, principal, version_id)
    wanted = base_id or version.parent_id
    if wanted is None:
        raise Conflict(
            "this version has no parent; name another one as base", code="version_without_parent"
        )
    base = catalog.get_version(tx, principal, wanted)
    model = tx.session.get_one(Model, version.model_id)
    if tx.session.get_one(Model, base.model_id).space_digest != model.space_digest:
        raise Conflict("these versions are of different models", code="versions_incomparable")
    if model.elements > MOST_ELEMENTS:
        raise TooLarge(
            f"versions of more than {MOST_ELEMENTS:,} elements are not compared here; "
            "download both",
            code="difference_too_large",
        )
    for each in (version, base):
        _check_there(tx, each)
    space = ParameterSpace.from_json(model.space)
    return Pair(version.id, base.id, version.object_key, base.object_key, space)


def _check_there(tx: Tx, version: Version) -> None:
    if tx.session.get_one(Object, version.object_key).deletion_id is not None:
        raise Gone(f"the file of version {version.number} was deleted", code="version_deleted")


def difference(storage: Storage, found: Pair, *, limit: int) -> VersionDifference:
    """How far every tensor moved, at most ``limit`` of them told.

    Raises:
        Unavailable: the store does not answer, or two comparisons are under way (``busy``).
        Missing: a file is not in the store.
    """
    comparison = Comparison(found.space)
    with _place():
        for start, size in _ranges(found.space):
            base, version = (
                storage.read(key, start, size) for key in (found.base_key, found.version_key)
            )
            comparison.add(base, version)
    tensors = comparison.tensors()
    return VersionDifference(
        version_id=found.version_id,
        base_id=found.base_id,
        total=comparison.total(),
        tensors=tensors[:limit],
        omitted=max(0, len(tensors) - limit),
    )


def _ranges(space: ParameterSpace) -> Iterator[tuple[int, int]]:
    """Bytes (start, length) of one piece after the other; a version file has one form."""
    head = len(version_head(space.digest, space.dim))
    for first in range(0, space.dim, PIECE):
        yield head + 4 * first, 4 * min(PIECE, space.dim - first)


@contextmanager
def _place() -> Iterator[None]:
    if not _places.acquire(blocking=False):
        raise Unavailable("two comparisons are under way; ask again", code="difference_busy")
    try:
        yield
    finally:
        _places.release()
