"""The documents of rollouts: what is asked for, how far it is, and what its gates say.

Owns their shape and limits, for the coordinator and the client SDK alike. Units are part of the
names: ``percent``, ``points`` (of 100) and ``seconds``; shares are from 0 to 1. Must not compute.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, field_validator

from fedselect.cohortdocs import Why
from fedselect.protocol import Answer, Name, Request
from fedselect.reportdoc import Gain, Interval
from fedselect.scalars import Flag, Real, Whole

Percent = Annotated[Real, Field(gt=0, le=100)]
GateName = Literal["mean_gain", "harmed_share", "worst_decile_drop", "rejection_rate", "latency"]


class Verdict(StrEnum):
    """What a gate, or all of them together, say."""

    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    INSUFFICIENT = "insufficient"  # evidence: an administrator decides


class RolloutState(StrEnum):
    """Where a rollout stands."""

    RUNNING = "running"  # the clients of a stage evaluate
    PASSED = "passed"  # all gates passed; an administrator goes on
    HELD = "held"  # a gate failed, could not tell, or an administrator stopped it
    PROMOTED = "promoted"  # the channel points at the candidate
    ROLLED_BACK = "rolled_back"  # everybody is back on the old version


class Gates(Request):
    """What a stage must keep; null switches a gate off."""

    baseline: Literal["before", "local_only", "start"] = Field(
        "before",
        description="A client's gain is its accuracy with its group's version merged in, less that "
        "of this model. `before`: the channel's version, as this client serves it, scored together "
        "with the other on the same examples. The others are trained under the settings of the "
        "version's own run, so that a run with bad settings has bad baselines, too.",
    )
    mean_gain: Real | None = Field(
        0.0, ge=-100, le=100, description="Points: stage minus control group, at least."
    )
    harmed_share: Real | None = Field(
        0.1, ge=0, le=1, description="Harmed clients among those of the stage, at most."
    )
    worst_decile_drop: Real | None = Field(
        2.0, ge=0, le=200, description="Points: control group minus stage, at most."
    )
    rejection_rate: Real | None = Field(
        0.2, ge=0, le=1, description="Clients of the stage without an evaluation, at most."
    )
    latency: Real | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from asked to answered that nine of ten keep, at most.",
    )


class RolloutCreate(Request):
    """Bring a version to everybody, stage by stage."""

    name: Name = Field(examples=["may-2026"])
    model_id: UUID
    version_id: UUID = Field(description="The candidate.")
    channel: Literal["stable"] = "stable"
    stages: list[Percent] = Field(
        [5, 25, 100],
        min_length=1,
        max_length=20,
        description="Percent of all clients, rising; the last is 100.",
    )
    minimum: Whole = Field(3, ge=1, description="Clients that a stage and the control group have.")
    control: Real = Field(
        10, gt=0, le=50, description="Percent of all clients that stay on the old version."
    )
    gates: Gates = Gates()
    automatic: Flag = Field(
        False, description="A stage that passes leads to the next one, without waiting for anybody."
    )
    roll_back_on_harm: Flag = Field(
        False, description="If harmed_share fails, roll back at once instead of holding."
    )
    stage_seconds: Whole = Field(
        3600, ge=1, le=90 * 86_400, description="How long a stage waits for evaluations."
    )

    reason: Why = Field("started by an administrator", description="Kept in the ledger.")

    @field_validator("stages")
    @classmethod
    def _rise_to_all(cls, stages: list[float]) -> list[float]:
        if stages[-1] != 100 or any(b <= a for a, b in pairwise(stages)):
            raise ValueError("stages must rise, and end with 100")
        return stages


class GroupFigure(Answer):
    """A gate's figure in one group."""

    clients: int = Field(description="n: clients whose evaluations count.")
    value: float | None
    interval: Interval | None = None


class GateVerdict(Answer):
    """What one gate says, with its numbers."""

    gate: GateName
    verdict: Verdict
    unit: str = Field(description="Of the figure, and what it is taken over.")
    figure: float | None
    interval: Interval | None = Field(description="Of the figure, where it has one.")
    keeps: Literal["at least", "at most"]
    limit: float
    stage: GroupFigure
    control: GroupFigure | None = Field(description="Null: the gate looks at the stage alone.")
    text: str = Field(description="The same in a sentence.")


class Judgement(Answer):
    """What the gates said of one stage, on which evaluations."""

    stage: int = Field(description="Counted from 1.")
    verdict: Verdict
    gates: list[GateVerdict]
    judged_at: datetime


class GroupMember(Answer):
    """A client of a rollout and its evaluation in the present stage."""

    client_id: UUID
    client_name: str
    evaluation: str = Field(description="State of its assignment; `accepted`: it is in.")
    gain: Gain | None = Field(
        None, description="With its group's version over `gates.baseline`; null: not measured."
    )


class RolloutDecision(Answer):
    """One change of a rollout: what, why, by whom."""

    from_state: RolloutState | None
    to_state: RolloutState
    reason: str
    actor: str
    at: datetime


class RolloutInfo(Answer):
    """A rollout and how far it is."""

    id: UUID
    name: str
    model_id: UUID
    channel: str
    version_id: UUID = Field(description="The candidate.")
    old_version_id: UUID = Field(description="What the channel pointed at when it began.")
    settings: RolloutCreate
    state: RolloutState
    reason: str
    stage: int = Field(description="Counted from 1.")
    stage_percent: float
    stage_clients: int
    control_clients: int
    stage_ends: datetime
    created_at: datetime
    ended_at: datetime | None
    notes: list[str] = Field(
        [], description="What its settings lead to with as many clients, in words."
    )


class RolloutDetail(RolloutInfo):
    """A rollout with its groups, the verdicts of its gates, and everything decided."""

    members: list[GroupMember] = Field(description="Of the present stage, by name.")
    control: list[GroupMember] = Field(description="By name.")
    judgements: list[Judgement] = Field(description="Of each stage that was judged.")
    decisions: list[RolloutDecision] = Field(description="Oldest first.")
