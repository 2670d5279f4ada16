"""The ``fedselect admin cohorts``, ``channels`` and ``rollouts`` commands: who gets which version.

Owns the groups and their commands; each is one call. Must not print (``remote`` does) or contain
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from fedselect.client import Client
from fedselect.cohortdocs import (
    ChannelInfo,
    ChannelMove,
    ChannelName,
    CohortCreate,
    CohortInfo,
    CohortRule,
    Justified,
)
from fedselect.protocol import ClientInfo
from fedselect.remote import command, given, group, read_json, valid
from fedselect.rolloutdocs import RolloutCreate, RolloutDetail, RolloutInfo

cohorts = group("Named sets of clients.")
channels = group("Which version of a model clients serve.")
rollouts = group("Bringing a version to everybody, stage by stage.")

Id = Annotated[UUID, typer.Argument(metavar="ID")]
ModelId = Annotated[UUID, typer.Argument(metavar="MODEL", help="Id of the model.")]
VersionId = Annotated[UUID, typer.Argument(metavar="VERSION", help="Id of the version.")]
Channel = Annotated[ChannelName, typer.Argument(metavar="CHANNEL", help="stable or pilot")]
Why = Annotated[str, typer.Option("--reason", help="Kept in the ledger.")]


# --- cohorts -----------------------------------------------------------------------------------


@command(cohorts, "list", columns=("id", "name", "rule", "members"))
def list_cohorts(client: Client) -> Iterator[CohortInfo]:
    """List cohorts, oldest first."""
    return client.cohorts()


@command(cohorts, "show")
def show_cohort(client: Client, cohort_id: Id) -> CohortInfo:
    """Show one cohort."""
    return client.cohort(cohort_id)


@command(cohorts, "create")
def create_cohort(
    client: Client,
    name: str,
    member: Annotated[list[str] | None, typer.Option("--client", help="Name; repeat.")] = None,
    tag: Annotated[str | None, typer.Option(help="All clients with this tag.")] = None,
    percent: Annotated[float | None, typer.Option(help="Of all clients, by a hash.")] = None,
) -> CohortInfo:
    """Name a set of clients: give one of --client, --tag and --percent."""
    rule = valid(CohortRule, **given(clients=member or None, tag=tag, percent=percent))
    return client.create_cohort(valid(CohortCreate, name=name, rule=rule))


@command(cohorts, "clients", columns=("id", "name", "state", "tags"))
def list_members(client: Client, cohort_id: Id) -> Iterator[ClientInfo]:
    """List the active clients that belong to a cohort now."""
    return client.cohort_clients(cohort_id)


# --- channels ----------------------------------------------------------------------------------


@command(channels, "list", columns=("name", "version.id", "version.number", "moved_at", "reason"))
def list_channels(client: Client, model_id: ModelId) -> Iterator[ChannelInfo]:
    """List a model's channels."""
    return client.channels(model_id)


@command(channels, "show")
def show_channel(client: Client, model_id: ModelId, channel: Channel) -> ChannelInfo:
    """Show one channel."""
    return client.channel(model_id, channel)


@command(channels, "set")
def set_channel(
    client: Client,
    model_id: ModelId,
    channel: Channel,
    version_id: VersionId,
    reason: Why,
    cohort: Annotated[UUID | None, typer.Option(help="Id, for the channel pilot.")] = None,
) -> ChannelInfo:
    """Point a channel at a version, at once and for all its clients."""
    move = valid(ChannelMove, version_id=version_id, reason=reason, cohort_id=cohort)
    return client.move_channel(model_id, channel, move)


@command(channels, "roll-back")
def roll_channel_back(
    client: Client, model_id: ModelId, channel: Channel, reason: Why
) -> ChannelInfo:
    """Take a channel's last move back."""
    return client.roll_channel_back(model_id, channel, valid(Justified, reason=reason))


# --- rollouts ----------------------------------------------------------------------------------


@command(rollouts, "list", columns=("id", "name", "state", "stage", "stage_percent", "reason"))
def list_rollouts(client: Client) -> Iterator[RolloutInfo]:
    """List rollouts, oldest first."""
    return client.rollouts()


@command(rollouts, "show")
def show_rollout(client: Client, rollout_id: Id) -> RolloutDetail:
    """Show one rollout: its groups, its gates and what was decided."""
    return client.rollout(rollout_id)


@command(rollouts, "start")
def start_rollout(
    client: Client,
    name: str,
    model_id: ModelId,
    version_id: VersionId,
    settings: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSON: stages, minimum, control, gates, automatic …"
        ),
    ] = None,
) -> RolloutInfo:
    """Bring a version to everybody, stage by stage."""
    more = read_json(settings) if settings else {}
    asked = {"name": name, "model_id": model_id, "version_id": version_id}
    return client.start_rollout(valid(RolloutCreate, **{**more, **asked}))


@command(rollouts, "promote")
def promote_rollout(client: Client, rollout_id: Id, reason: Why) -> RolloutDetail:
    """Let a rollout that passed or is held go on to its next stage, the last one to everybody."""
    return client.promote_rollout(rollout_id, valid(Justified, reason=reason))


@command(rollouts, "hold")
def hold_rollout(client: Client, rollout_id: Id, reason: Why) -> RolloutDetail:
    """Stop a rollout where it is."""
    return client.hold_rollout(rollout_id, valid(Justified, reason=reason))


@command(rollouts, "roll-back")
def roll_rollout_back(client: Client, rollout_id: Id, reason: Why) -> RolloutDetail:
    """End a rollout: everybody serves the old version again."""
    return client.roll_rollout_back(rollout_id, valid(Justified, reason=reason))
