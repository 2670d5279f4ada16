"""Who gets which version: cohorts, channels and rollouts."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Response

from app import channels, clients, cohorts, rollouts, rolloutviews
from app.auth import Scope
from app.db import Tx
from app.routes import ROLLOUT_STATE, problems
from app.tables import Channel
from app.web import Call, IfMatch, Page, Paged, check_match, each, etag, require
from fedselect.cohortdocs import (
    ChannelInfo,
    ChannelMove,
    ChannelName,
    CohortCreate,
    CohortInfo,
    Justified,
)
from fedselect.protocol import ClientInfo
from fedselect.rollout import RolloutEvent
from fedselect.rolloutdocs import RolloutCreate, RolloutDetail, RolloutInfo

router = APIRouter(prefix="/v1", tags=["rollouts"])
READ, WRITE = require(Scope.ROUND_READ), require(Scope.ROUND_ADMIN)
MOVING = ["rollout_active", "version_unfit"]


# --- cohorts -----------------------------------------------------------------------------------


@router.post(
    "/cohorts",
    operation_id="createCohort",
    summary="Name a set of clients",
    status_code=201,
    responses=problems(401, 403, 404, 409, codes={409: ["cohort_name_taken"]}),
)
def create_cohort(body: CohortCreate, call: Call = WRITE) -> CohortInfo:
    """By name, by tag, or a share of all by a stable hash: a larger share keeps the smaller."""
    return call.create(body, lambda tx: cohorts.create(tx, call.who, body), CohortInfo)


@router.get(
    "/cohorts", operation_id="listCohorts", summary="List cohorts", responses=problems(401, 403)
)
def list_cohorts(paging: Paged, call: Call = READ) -> Page[CohortInfo]:
    """Oldest first."""
    return call.page(
        paging,
        lambda _: cohorts.listed(call.who),
        lambda tx, rows: cohorts.infos(tx, call.who, rows),
    )


@router.get(
    "/cohorts/{cohort_id}",
    operation_id="getCohort",
    summary="Look at a cohort",
    responses=problems(401, 403, 404),
)
def get_cohort(cohort_id: UUID, call: Call = READ) -> CohortInfo:
    """Its rule, and how many clients that is now."""

    def work(tx: Tx) -> CohortInfo:
        return cohorts.infos(tx, call.who, [cohorts.get(tx, call.who, cohort_id)])[0]

    return call.run(work)


@router.get(
    "/cohorts/{cohort_id}/clients",
    operation_id="listCohortClients",
    summary="List the clients of a cohort",
    responses=problems(401, 403, 404),
)
def list_cohort_clients(cohort_id: UUID, paging: Paged, call: Call = READ) -> Page[ClientInfo]:
    """The active ones that its rule meets now, oldest first."""
    return call.page(
        paging,
        lambda tx: cohorts.members(tx, cohorts.get(tx, call.who, cohort_id)),
        each(clients.info),
    )


# --- channels ----------------------------------------------------------------------------------


@router.get(
    "/models/{model_id}/channels",
    operation_id="listChannels",
    summary="List a model's channels",
    responses=problems(401, 403, 404),
)
def list_channels(model_id: UUID, paging: Paged, call: Call = READ) -> Page[ChannelInfo]:
    """Those that were set; the one that moved last comes last."""
    return call.page(
        paging,
        lambda tx: channels.of_model(tx, call.who, model_id),
        channels.infos,
        order=(Channel.moved_at, Channel.name),
    )


@router.get(
    "/models/{model_id}/channels/{name}",
    operation_id="getChannel",
    summary="Look at a channel",
    responses=problems(401, 403, 404),
)
def get_channel(
    model_id: UUID, name: ChannelName, response: Response, call: Call = READ
) -> ChannelInfo:
    """The version that its clients serve, with an entity tag for a later change."""
    found = call.run(lambda tx: channels.infos(tx, [channels.get(tx, call.who, model_id, name)])[0])
    response.headers["ETag"] = _tag(found)
    return found


def _tag(channel: ChannelInfo | None) -> str:
    return etag(channel and (channel.version.id, channel.cohort_id))


@router.put(
    "/models/{model_id}/channels/{name}",
    operation_id="moveChannel",
    summary="Point a channel at a version",
    responses=problems(
        401,
        403,
        404,
        409,
        codes={
            409: MOVING,
            410: ["version_deleted"],
            412: ["etag_mismatch"],
            422: ["channel_cohort"],
        },
    ),
)
def move_channel(
    model_id: UUID,
    name: ChannelName,
    body: ChannelMove,
    response: Response,
    if_match: IfMatch = None,
    call: Call = WRITE,
) -> ChannelInfo:
    """At once, for all its clients; a rollout does it stage by stage."""

    def work(tx: Tx) -> ChannelInfo:
        found = channels.lock(tx, call.who, model_id, name)
        check_match(if_match, _tag(channels.infos(tx, [found])[0] if found else None))
        moved = channels.move(tx, call.who, found, body, (model_id, name))
        return channels.infos(tx, [moved])[0]

    moved = call.run(work)
    response.headers["ETag"] = _tag(moved)
    return moved


@router.post(
    "/models/{model_id}/channels/{name}/roll-back",
    operation_id="rollChannelBack",
    summary="Take a channel's last move back",
    responses=problems(
        401,
        403,
        404,
        409,
        412,
        codes={
            409: ["rollout_active", "channel_without_previous"],
            410: ["version_deleted"],
            412: ["etag_mismatch"],
        },
    ),
)
def roll_channel_back(
    model_id: UUID,
    name: ChannelName,
    body: Justified,
    response: Response,
    if_match: IfMatch = None,
    call: Call = WRITE,
) -> ChannelInfo:
    """Clients go back to the version before, with the personal part that they kept for it."""

    def work(tx: Tx) -> ChannelInfo:
        found = channels.lock(tx, call.who, model_id, name)
        check_match(if_match, _tag(channels.infos(tx, [found])[0] if found else None))
        return channels.infos(tx, [channels.roll_back(tx, found, reason=body.reason)])[0]

    moved = call.run(work)
    response.headers["ETag"] = _tag(moved)
    return moved


# --- rollouts ----------------------------------------------------------------------------------


@router.post(
    "/rollouts",
    operation_id="startRollout",
    summary="Bring a version to everybody, stage by stage",
    status_code=201,
    responses=problems(
        401,
        403,
        404,
        409,
        codes={
            409: [*MOVING, "channel_unset", "rollout_name_taken"],
            410: ["version_deleted"],
            422: ["rollout_too_small"],
        },
    ),
)
def start_rollout(body: RolloutCreate, call: Call = WRITE) -> RolloutInfo:
    """The first stage opens at once: its clients serve the candidate and evaluate it."""
    return call.create(body, lambda tx: rollouts.start(tx, call.who, body), RolloutInfo)


@router.get(
    "/rollouts", operation_id="listRollouts", summary="List rollouts", responses=problems(401, 403)
)
def list_rollouts(paging: Paged, call: Call = READ) -> Page[RolloutInfo]:
    """Oldest first."""
    return call.page(paging, lambda _: rolloutviews.listed(call.who), rolloutviews.infos)


@router.get(
    "/rollouts/{rollout_id}",
    operation_id="getRollout",
    summary="Look at a rollout, its groups and its gates",
    responses=problems(401, 403, 404),
)
def get_rollout(rollout_id: UUID, response: Response, call: Call = READ) -> RolloutDetail:
    """Every gate's verdict with its numbers, and everything that was decided; an entity tag."""
    found = call.run(lambda tx: rolloutviews.detail(tx, rolloutviews.get(tx, call.who, rollout_id)))
    response.headers["ETag"] = _rollout_tag(found)
    return found


def _rollout_tag(rollout: RolloutInfo) -> str:
    return etag(rollout.id, rollout.state.value, rollout.stage)


@router.post(
    "/rollouts/{rollout_id}/{command:rollout_command}",
    operation_id="commandRollout",
    summary="Promote, hold or roll back a rollout",
    responses=problems(401, 403, 404, 409, 412, codes={409: ROLLOUT_STATE, 412: ["etag_mismatch"]}),
)
def command_rollout(
    rollout_id: UUID,
    command: Literal["promote", "hold", "roll-back"],
    body: Justified,
    response: Response,
    if_match: IfMatch = None,
    call: Call = WRITE,
) -> RolloutDetail:
    """Promote: to the next stage, or the channel itself. Roll back: everybody serves the old.

    With `If-Match` two people who promote what both have read go one stage further, not two.
    """
    event = RolloutEvent(command.replace("-", "_"))

    def work(tx: Tx) -> RolloutDetail:
        rollout = rollouts.get_locked(tx, call.who, rollout_id)
        check_match(if_match, _rollout_tag(rolloutviews.infos(tx, [rollout])[0]))
        return rollouts.command(tx, rollout, event, reason=body.reason)

    changed = call.run(work)
    response.headers["ETag"] = _rollout_tag(changed)
    return changed
