"""Cohorts: named sets of clients.

Owns the ``cohorts`` rows; who belongs to one is decided by ``fedselect.cohorts``, for the clients
that are there when somebody asks. Must not know runs or rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import Select, select

from app import ledger
from app.auth import Principal
from app.db import Tx, among
from app.errors import Conflict, Missing
from app.tables import Client, Cohort
from fedselect.cohortdocs import CohortCreate, CohortInfo, CohortRule
from fedselect.cohorts import Candidate, belongs


def create(tx: Tx, principal: Principal, body: CohortCreate) -> CohortInfo:
    """Make a cohort. Clients that it names are kept by id: names change, and may be forgotten.

    Raises:
        Missing: a client that its rule names is not in this project.
        Conflict: the name is taken.
    """
    every = _clients(tx, principal.project_id)
    ids = {each.name: each.candidate.id for each in every if each.active}
    unknown = set(body.rule.clients or ()) - set(ids)
    if unknown:
        raise Missing(f"there is no active client {min(unknown)} in this project")
    rule = body.rule.model_dump(mode="json", exclude_none=True)
    if body.rule.clients is not None:
        rule = {"clients": sorted({ids[name] for name in body.rule.clients})}
    cohort = Cohort(
        id=uuid4(),
        project_id=principal.project_id,
        name=body.name,
        rule=rule,
        salt=uuid4().hex,
        created_at=tx.now,
    )
    taken = Conflict(f"there is already a cohort named {body.name!r}", code="cohort_name_taken")
    tx.insert(cohort, taken=taken)
    ledger.append(
        tx,
        "cohort.created",
        f"cohort:{cohort.id}",
        project=cohort.project_id,
        # The rule as text: entries hold no floats.
        body={"name": cohort.name, "rule": json.dumps(rule), "salt": cohort.salt},
    )
    return _info(cohort, every)


def get(tx: Tx, principal: Principal, cohort_id: UUID) -> Cohort:
    """A cohort of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = select(Cohort).where(Cohort.id == cohort_id, Cohort.project_id == principal.project_id)
    cohort = tx.session.scalars(query).first()
    if cohort is None:
        raise Missing(f"there is no cohort {cohort_id} in this project")
    return cohort


def listed(principal: Principal) -> Select[Cohort]:
    """The principal's cohorts."""
    return select(Cohort).where(Cohort.project_id == principal.project_id)


def infos(tx: Tx, principal: Principal, found: list[Cohort]) -> list[CohortInfo]:
    """Cohorts as the interface shows them, with one query for all of them."""
    every = _clients(tx, principal.project_id)
    return [_info(cohort, every) for cohort in found]


def members(tx: Tx, cohort: Cohort) -> Select[Client]:
    """The active clients that belong to a cohort."""
    chosen = _chosen(cohort, _clients(tx, cohort.project_id))
    return select(Client).where(among(Client.id, [UUID(each.candidate.id) for each in chosen]))


def among_members(tx: Tx, cohort_id: UUID | None, clients: Sequence[UUID]) -> list[UUID]:
    """Those of some clients that belong to a cohort; all of them where there is none."""
    if cohort_id is None:
        return list(clients)
    cohort = tx.session.get_one(Cohort, cohort_id)
    found = _chosen(cohort, _clients(tx, cohort.project_id))
    chosen = {UUID(each.candidate.id) for each in found}
    return [client for client in clients if client in chosen]


def admits(rule: dict[str, Any] | None, salt: str | None, client: Candidate) -> bool:
    """Whether a stored rule takes a client; no rule takes everybody."""
    if rule is None or salt is None:
        return True
    return belongs(CohortRule.model_validate(rule), salt, client)


class _Known(NamedTuple):
    candidate: Candidate
    name: str
    active: bool


def _clients(tx: Tx, project_id: UUID) -> list[_Known]:
    query = select(Client.id, Client.name, Client.tags, Client.state).where(
        Client.project_id == project_id
    )
    return [
        _Known(Candidate(str(row.id), row.tags), row.name, row.state == "active")
        for row in tx.session.execute(query)
    ]


def _chosen(cohort: Cohort, every: Sequence[_Known]) -> list[_Known]:
    rule = CohortRule.model_validate(cohort.rule)
    return [each for each in every if each.active and belongs(rule, cohort.salt, each.candidate)]


def _info(cohort: Cohort, every: Sequence[_Known]) -> CohortInfo:
    rule = CohortRule.model_validate(cohort.rule)
    if rule.clients is not None:
        names = sorted(each.name for each in every if each.candidate.id in rule.clients)
        rule = CohortRule(clients=names)
    return CohortInfo(
        id=cohort.id,
        name=cohort.name,
        rule=rule,
        salt=cohort.salt,
        members=len(_chosen(cohort, every)),
        created_at=cohort.created_at,
    )
