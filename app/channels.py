"""Channels: which version of a model clients serve.

Owns the ``channels`` rows and which of them a client follows. A rollout under way owns the channel
that it moves. Must not know how versions come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ScalarSelect, Select, and_, case, exists, extract, func, select

from app import arms, catalog, cohorts, ledger
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Invalid, Missing
from app.tables import (
    Arm,
    Channel,
    Client,
    Cohort,
    Model,
    Rollout,
    RolloutClient,
    Run,
    Version,
)
from fedselect.checkindocs import Pinned, Serving
from fedselect.cohortdocs import ChannelInfo, ChannelMove
from fedselect.cohorts import Candidate
from fedselect.rollout import ACTIVE_ROLLOUTS

ACTIVE = sorted(state.value for state in ACTIVE_ROLLOUTS)


def of_model(tx: Tx, principal: Principal, model_id: UUID) -> Select[Channel]:
    """A model's channels.

    Raises:
        Missing: there is no such model.
    """
    model = catalog.get_model(tx, principal, model_id)
    return select(Channel).where(Channel.model_id == model.id)


def get(tx: Tx, principal: Principal, model_id: UUID, name: str) -> Channel:
    """One channel of a model.

    Raises:
        Missing: no such model, or this channel was never set.
    """
    catalog.get_model(tx, principal, model_id)
    found = tx.session.get(Channel, (model_id, name))
    if found is None:
        raise Missing(f"channel {name} of model {model_id} is not set")
    return found


def lock(tx: Tx, principal: Principal, model_id: UUID, name: str) -> Channel | None:
    """The same for a change, None if it was never set; the model's row is locked with it.

    Raises:
        Missing: there is no such model.
        Conflict: ``rollout_active``: a rollout is moving it.
    """
    catalog.get_model(tx, principal, model_id, lock=True)
    moving = select(Rollout.name).where(
        Rollout.model_id == model_id, Rollout.channel == name, Rollout.state.in_(ACTIVE)
    )
    rollout = tx.session.scalar(moving)
    if rollout is not None:
        raise Conflict(
            f"rollout {rollout} is moving this channel; promote it or roll it back first",
            code="rollout_active",
        )
    return tx.session.get(Channel, (model_id, name), populate_existing=True)


def check_version(tx: Tx, principal: Principal, model_id: UUID, version_id: UUID) -> Version:
    """A version that clients can serve.

    Raises:
        Missing: there is none in this project.
        Conflict: ``version_unfit``: it is another model's, or of no arm.
        Gone: its file was deleted.
    """
    version = catalog.get_version(tx, principal, version_id)
    if version.model_id != model_id or version.arm_id is None:
        why = "another model's" if version.model_id != model_id else "of no run"
        raise Conflict(f"version {version_id} is {why}", code="version_unfit")
    catalog.check_there(tx, version)
    return version


def move(
    tx: Tx, principal: Principal, channel: Channel | None, wanted: ChannelMove, place: Any
) -> Channel:
    """Point a channel, or a new one at ``place`` (model, name), at a version.

    Raises:
        Missing, Conflict, Gone: as :func:`check_version`; no such cohort.
        Invalid: ``channel_cohort``: pilot needs a cohort, stable has none.
    """
    model_id, name = place
    version = check_version(tx, principal, model_id, wanted.version_id)
    if (wanted.cohort_id is None) == (name == "pilot"):
        raise Invalid(
            "the channel pilot serves the members of a cohort, stable all others: give cohort_id "
            "for pilot alone",
            code="channel_cohort",
        )
    if wanted.cohort_id is not None:
        cohorts.get(tx, principal, wanted.cohort_id)
    if channel is None:
        channel = Channel(
            model_id=model_id, name=name, project_id=principal.project_id, moved_at=tx.now
        )
        tx.session.add(channel)
    elif (channel.version_id, channel.cohort_id) == (version.id, wanted.cohort_id):
        return channel
    channel.cohort_id = wanted.cohort_id
    _point(tx, channel, version.id, reason=wanted.reason)
    return channel


def roll_back(tx: Tx, channel: Channel | None, *, reason: str) -> Channel:
    """Point a channel at the version before its last move; that can be taken back once.

    Raises:
        Conflict: ``channel_without_previous``.
        Gone: that version's file was deleted.
    """
    if channel is None or channel.previous_id is None:
        raise Conflict("there is no earlier version to go back to", code="channel_without_previous")
    version = tx.session.get_one(Version, channel.previous_id)
    catalog.check_there(tx, version)
    _point(tx, channel, version.id, reason=reason)
    channel.previous_id = None  # repeating the order must not lead forward again
    return channel


def elsewhere(tx: Tx, model_id: UUID, name: str, clients: Sequence[UUID]) -> set[UUID]:
    """Of some clients, those that do not follow this channel of a model, but its pilot."""
    pilot = tx.session.get(Channel, (model_id, "pilot")) if name != "pilot" else None
    return set() if pilot is None else set(cohorts.among_members(tx, pilot.cohort_id, clients))


def promote(tx: Tx, rollout: Rollout, *, reason: str) -> None:
    """Point a rollout's channel at its candidate; the rollout's row is locked."""
    model = select(Model.id).where(Model.id == rollout.model_id)
    tx.session.execute(model.with_for_update(key_share=True))
    place = (rollout.model_id, rollout.channel)
    channel = tx.session.get_one(Channel, place, populate_existing=True)
    _point(tx, channel, rollout.version_id, reason=reason)


def _point(tx: Tx, channel: Channel, version_id: UUID, *, reason: str) -> None:
    before = channel.version_id
    if before != version_id:
        channel.previous_id, channel.version_id = before, version_id
    channel.reason, channel.moved_at = reason, tx.now
    tx.session.flush()
    ledger.append(
        tx,
        "channel.moved",
        f"model:{channel.model_id}",
        project=channel.project_id,
        body={
            "channel": channel.name,
            "from": str(before) if before else None,
            "to": str(version_id),
            "cohort": str(channel.cohort_id) if channel.cohort_id else None,
            "reason": reason,
        },
    )


def infos(tx: Tx, found: list[Channel]) -> list[ChannelInfo]:
    """Channels as the interface shows them, with one query for all of them."""
    query = select(Version).where(Version.id.in_([channel.version_id for channel in found]))
    versions = {version.id: version for version in tx.session.scalars(query)}
    return [
        ChannelInfo.model_validate(
            {
                **{name: getattr(each, name) for name in ("model_id", "name", "previous_id")},
                **{name: getattr(each, name) for name in ("cohort_id", "reason", "moved_at")},
                "version": catalog.version_info(versions[each.version_id]),
            }
        )
        for each in found
    ]


# --- what a client serves ----------------------------------------------------------------------


def pointers() -> ScalarSelect[Any]:
    """As JSON, all channels of the project of the ``Client`` in the query, each with the version
    that this client would get from it: the candidate, if a rollout has reached the client; and with
    all that it may get from it one day.
    """
    reached = (
        exists()
        .where(
            RolloutClient.rollout_id == Rollout.id,
            RolloutClient.client_id == Client.id,
            RolloutClient.stage <= Rollout.stage,
        )
        .correlate(Rollout, Client)
    )
    pointer = func.jsonb_build_object(
        *("model", Channel.model_id, "channel", Channel.name),
        *("version", case((reached, Rollout.version_id), else_=Channel.version_id)),
        *("pins", _pins()),
        *("moved", extract("epoch", Channel.moved_at)),
        *("rule", Cohort.rule, "salt", Cohort.salt),
    )
    moving = and_(
        Rollout.model_id == Channel.model_id,
        Rollout.channel == Channel.name,
        Rollout.state.in_(ACTIVE),
    )
    return (
        select(func.jsonb_agg(pointer))
        .select_from(Channel)
        .outerjoin(Cohort, Cohort.id == Channel.cohort_id)
        .outerjoin(Rollout, moving)
        .where(Channel.project_id == Client.project_id)
        .correlate(Client)
        .scalar_subquery()
    )


def _pins() -> ScalarSelect[Any]:
    """Arm and number of all versions that the ``Channel`` and ``Rollout`` of the query point at."""
    mine = Version.id.in_([Channel.version_id, Channel.previous_id, Rollout.version_id])
    found = select(func.jsonb_agg(func.jsonb_build_array(Version.arm_id, Version.number)))
    return found.where(mine).correlate(Channel, Rollout).scalar_subquery()


def serving(tx: Tx, found: list[dict[str, Any]] | None, client: Candidate) -> Serving | None:
    """What a client should serve, of what :func:`pointers` found: of the model whose channel moved
    last, the channel pilot if the client is in its cohort, else stable.
    """
    mine = [each for each in found or () if cohorts.admits(each["rule"], each["salt"], client)]
    if not mine:
        return None
    model = max(mine, key=lambda each: (each["moved"], each["model"]))["model"]
    # "pilot" stands before "stable" in the alphabet, too.
    chosen = min((e for e in mine if e["model"] == model), key=lambda each: str(each["channel"]))
    return as_served(tx, chosen["channel"], UUID(chosen["version"]))


def pinned(found: list[dict[str, Any]] | None) -> list[Pinned]:
    """Of what :func:`pointers` found, all versions that the client may be told to serve."""
    pins = {(arm, number) for each in found or () for arm, number in each["pins"]}
    return [Pinned(arm_id=UUID(arm), number=number) for arm, number in sorted(pins)]


def as_served(tx: Tx, channel: str, version_id: UUID) -> Serving:
    """A version of a channel as its clients are told of it."""
    query = (
        select(Version, Model.space_digest, Run, Arm)  # the arm for `settings_of`, which finds it
        .join(Model, Model.id == Version.model_id)
        .join(Arm, Arm.id == Version.arm_id)
        .join(Run, Run.id == Arm.run_id)
        .where(Version.id == version_id)
    )
    version, digest, run, arm = tx.session.execute(query).one()
    return Serving.model_validate(
        {
            "channel": channel,
            "arm_id": arm.id,
            "version": catalog.version_info(version),
            "space_digest": digest,
            "settings": arms.settings_of(tx, run, arm.id).model_dump(mode="json"),
        }
    )
