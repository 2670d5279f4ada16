"""Light sites take the version of their run as a rollout gives it out, and tell what it is worth.

Whatever is cut off on the way is looked at again and gone on with, as an administrator would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fedselect.cohortdocs import ChannelMove, Justified
from fedselect.errors import ServiceError
from fedselect.explaindocs import AblationCreate
from fedselect.protocol import VersionInfo
from fedselect.rolloutdocs import Gates, RolloutCreate, RolloutState

from .fleet import Campaign

WHY = "it was trained for that"
GATES = Gates(mean_gain=None, worst_decile_drop=None)  # nine sites tell nothing of a mean
Step = Callable[[Campaign, list[VersionInfo]], Awaitable[bool]]


async def roll_out(campaign: Campaign) -> None:
    """From the run's first version to its last, for everybody, then what each site adds to it."""
    versions = [each async for each in campaign.admin.versions(campaign.run.id)]
    versions.sort(key=lambda each: each.number)
    for step in (_point, _give_out, _ablate):
        while True:
            with suppress(ServiceError):
                if await step(campaign, versions):
                    break
            await asyncio.sleep(0.1)


async def _point(campaign: Campaign, versions: list[VersionInfo]) -> bool:
    move = ChannelMove(version_id=versions[0].id, reason=WHY)
    await campaign.admin.move_channel(campaign.run.model_id, "stable", move)
    return True


async def _give_out(campaign: Campaign, versions: list[VersionInfo]) -> bool:
    """One look, and one step further."""
    admin, run = campaign.admin, campaign.run
    found = [each async for each in admin.rollouts() if each.name == run.name]
    if not found:
        body = RolloutCreate(
            name=run.name,
            model_id=run.model_id,
            version_id=versions[-1].id,
            stages=[50, 100],
            minimum=2,
            gates=GATES,
        )
        await admin.start_rollout(body)
        return False
    (rollout,) = found
    if rollout.state is RolloutState.RUNNING:
        await _everybody(campaign)
    elif rollout.state is not RolloutState.PROMOTED:
        assert rollout.state is RolloutState.PASSED, rollout.reason
        await admin.promote_rollout(rollout.id, Justified(reason=WHY))
    return rollout.state is RolloutState.PROMOTED


async def _ablate(campaign: Campaign, versions: list[VersionInfo]) -> bool:
    admin, version = campaign.admin, versions[-1].id
    found = [each async for each in admin.ablations(version)]
    if not found:
        await admin.ask_ablations(version, AblationCreate())
    elif any(each.state.value == "assigned" for each in found):
        await _everybody(campaign)
    return bool(found) and {each.state.value for each in found} == {"accepted"}


async def _everybody(campaign: Campaign) -> None:
    steps = (site.take_part(lambda: False, insist=False) for site in campaign.sites)
    await asyncio.gather(*steps)
