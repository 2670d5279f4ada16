"""Model cards: what the rows know of a version, gathered.

Owns these queries; the words are ``fedselect.cards``. Must not write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any
from uuid import UUID

from sqlalchemy import select

from app import catalog
from app.auth import Principal
from app.db import Tx
from app.tables import Arm, EvaluationRecord, Model, Round, Run, Update, Version
from fedselect.accounting import account
from fedselect.cards import limitations, markdown
from fedselect.disclosure import at_least
from fedselect.policies import RunSettings
from fedselect.space import ParameterSpace, Role
from fedselect.versiondocs import (
    CardEvaluation,
    CardOrigin,
    CardScore,
    ParameterCounts,
    VersionCard,
)


def card(tx: Tx, principal: Principal, version_id: UUID) -> VersionCard:
    """A version's model card.

    Raises:
        Missing: there is no such version.
    """
    version = catalog.get_version(tx, principal, version_id)
    model = tx.session.get_one(Model, version.model_id)
    origin = _origin(tx, version)
    # What a version of no run is told of counts as in a run of which nothing else was said.
    least = (origin.settings if origin else RunSettings()).told.min_clients
    evaluation = _evaluation(tx, version.id, least=least)
    space = ParameterSpace.from_json(model.space)
    privacy = account(origin.settings, space, published=version.number) if origin else None
    bare = VersionCard(
        version=catalog.version_info(version),
        model_name=model.name,
        parameters=_counts(space),
        origin=origin,
        evaluation=evaluation,
        privacy=privacy,
        limitations=limitations(
            origin, evaluation, recomputable=version.recomputable, privacy=privacy
        ),
        markdown="",
    )
    return bare.model_copy(update={"markdown": markdown(bare)})


def _counts(space: ParameterSpace) -> ParameterCounts:
    return ParameterCounts(
        tensors=len(space.slots),
        elements=space.dim,
        selectable=space.count(Role.SELECTABLE),
        shared=space.count(Role.SHARED),
        personal=space.count(Role.PERSONAL),
        frozen=space.count(Role.FROZEN),
    )


def _origin(tx: Tx, version: Version) -> CardOrigin | None:
    if version.arm_id is None:
        return None
    arm = tx.session.get_one(Arm, version.arm_id)
    run = tx.session.get_one(Run, arm.run_id)
    published_by = tx.session.get(Round, version.round_id) if version.round_id else None
    averaged = select(Update.examples).where(
        Update.round_id == version.round_id, Update.withdrawn_at.is_(None)
    )
    examples = tx.session.scalars(averaged).all()
    settings = RunSettings.model_validate(run.settings).of_arm(arm.name)
    return CardOrigin(
        run_id=run.id,
        run_name=run.name,
        run_state=run.state,
        settings=settings,
        round_number=published_by.number if published_by else None,
        attempt=published_by.attempt if published_by else None,
        opened_at=published_by.opened_at if published_by else None,
        closed_at=published_by.closed_at if published_by else None,
        updates=len(examples) if published_by else None,
        examples=at_least(examples, settings.told.min_clients),
    )


def _evaluation(tx: Tx, version_id: UUID, *, least: int) -> CardEvaluation | None:
    """What clients have measured together; None unless there are at least ``least`` of them.

    They count by whole groups of ``least``, in the order in which they came: a card that is read
    before and after a client reports must not tell what that client found.
    """
    query = select(EvaluationRecord.report).where(
        EvaluationRecord.version_id == version_id, EvaluationRecord.rollout_id.is_(None)
    )
    order = (EvaluationRecord.created_at, EvaluationRecord.assignment_id)
    found = tx.session.scalars(query.order_by(*order)).all()
    least = max(1, least)
    reports = found[: len(found) // least * least]
    if not reports:
        return None
    told = Counter(name for report in reports for name in report["scores"])
    names = [name for name, clients in told.items() if clients >= least]
    return CardEvaluation(
        clients=len(reports),
        examples=sum(
            max((score["total"] for score in report["scores"].values()), default=0)
            for report in reports
        ),
        personal_share=fmean(report["personal_share"] for report in reports),
        scores={name: _score(_of(reports, name, least), least) for name in names},
    )


def _of(reports: Sequence[dict[str, Any]], name: str, least: int) -> list[tuple[int, int]]:
    """(correct, total) of everybody who has this score, by whole groups of ``least``, too."""
    found = [report["scores"][name] for report in reports if name in report["scores"]]
    whole = found[: len(found) // least * least]
    return [(score["correct"], score["total"]) for score in whole]


def _score(found: Sequence[tuple[int, int]], least: int) -> CardScore:
    each = sorted(correct / total for correct, total in found)
    hits, examples = (sum(column) for column in zip(*found, strict=True))
    return CardScore(pooled=hits / examples, mean=fmean(each), worst=fmean(each[:least]))
