"""Where versions come from: a version's ancestors, and what was made from it.

Owns these queries. Must not write.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Select, func, literal, select
from sqlalchemy.orm import aliased

from app import catalog
from app.auth import Principal
from app.db import Tx
from app.tables import Arm, Round, Run, Update, Version
from fedselect.versiondocs import Lineage, LineageStep

MOST_CHILDREN = 100


def lineage(tx: Tx, principal: Principal, version_id: UUID, *, limit: int) -> Lineage:
    """A version and at most ``limit`` − 1 of its ancestors, the nearest first.

    Raises:
        Missing: there is no such version.
    """
    version = catalog.get_version(tx, principal, version_id)
    steps = [_step(*row) for row in tx.session.execute(_line(version.id, limit))]
    children = (
        select(Version.id)
        .where(Version.parent_id == version.id)
        .order_by(Version.created_at, Version.id)
        .limit(MOST_CHILDREN)
    )
    return Lineage(
        version_id=version.id,
        steps=steps,
        next_id=steps[-1].parent_id,
        children=list(tx.session.scalars(children)),
    )


def _line(version_id: UUID, limit: int) -> Select[Any]:
    """The line of parents, with what each one's round and run say."""
    begin = select(Version.id, Version.parent_id, literal(1).label("place"))
    line = begin.where(Version.id == version_id).cte("line", recursive=True)
    parent = aliased(Version)
    further = select(parent.id, parent.parent_id, line.c.place + 1)
    line = line.union_all(
        further.join(line, parent.id == line.c.parent_id).where(line.c.place < limit)
    )
    averaged = (
        select(func.count())
        .where(Update.round_id == Version.round_id, Update.withdrawn_at.is_(None))
        .scalar_subquery()
    )
    return (
        select(Version, Round, Run, averaged)
        .join(line, line.c.id == Version.id)
        .outerjoin(Round, Round.id == Version.round_id)
        .outerjoin(Arm, Arm.id == Version.arm_id)
        .outerjoin(Run, Run.id == Arm.run_id)
        .order_by(line.c.place)
    )


def _step(
    version: Version, published_by: Round | None, run: Run | None, updates: int
) -> LineageStep:
    own = {n: getattr(version, n) for n in LineageStep.model_fields if hasattr(version, n)}
    return LineageStep.model_validate(
        {
            **own,
            "run_id": run and run.id,
            "run_name": run and run.name,
            "round_number": published_by and published_by.number,
            "attempt": published_by and published_by.attempt,
            "updates": updates if published_by else None,
        }
    )
