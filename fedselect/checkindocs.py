"""The documents of check-ins: what an agent can do, the work that it is given, what became of it.

Owns their shape and limits, for the coordinator and the client SDK alike, and how an agent reads
work of a later release. Must not know HTTP, rows or storage.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self
from uuid import UUID

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, ValidationError, model_validator

from fedselect.lifecycle import AssignmentState, RoundState, RunState
from fedselect.policies import MOST_ARMS, RunSettings
from fedselect.protocol import (
    MOST_HELD,
    Answer,
    Download,
    Name,
    Reason,
    Request,
    Sha256,
    VersionInfo,
)


class CheckIn(Request):
    """An agent asks what to do; ``pending`` is the assignment whose outcome it waits for."""

    pending: UUID | None = None
    waiting: list[UUID] | None = Field(
        None,
        max_length=MOST_ARMS,
        description="Other assignments whose outcomes it waits for. An agent that sends this, if "
        "only an empty list, gets the work of a run's other arms while it waits.",
    )
    agent_version: str = Field("", max_length=64)
    encodings: list[Name] = Field(
        ["f32"],
        max_length=16,
        description="What this agent can write and read; it gets no other run's work.",
        examples=[["f32", "bf16", "int8"]],
    )
    versions: list[Sha256] = Field(
        [],
        max_length=MOST_HELD,
        description="Digests of the version files that it holds, so that it need not fetch all.",
    )
    kinds: list[Name] | None = Field(
        None,
        max_length=16,
        description="Kinds of assignments that this agent can do; it gets no other. Null: `train` "
        "and `evaluate`.",
        examples=[["train", "evaluate", "ablate"]],
    )


class MaskInfo(Answer):
    """The mask the coordinator holds of this client; leave it out of the update if unchanged."""

    version: int
    sha256: str


class RunBrief(Answer):
    """The run an assignment belongs to."""

    id: UUID
    name: str
    settings: RunSettings


class DeltaDownload(Answer):
    """A delta file: applied to the version file ``base`` it gives the one of digest ``result``."""

    base: Sha256
    result: Sha256
    download: Download


Kind = Literal["train", "evaluate", "ablate"]


class Serving(Answer):
    """The version that a client should serve now, because a channel or a rollout says so."""

    channel: str = Field(description="`stable` or `pilot`; later releases may have others.")
    arm_id: UUID = Field(description="Whose personal part goes with it.")
    version: VersionInfo
    space_digest: str
    # Not ``RunSettings``: those of a later release must not make the whole answer unreadable.
    settings: dict[str, Any] = Field(
        {},
        description="Settings of that arm: a client without a personal part in it trains one "
        "participation with them before it serves, and sends nothing of that.",
    )


class Pinned(Answer):
    """A version that this client may be told to serve, so that it keeps its own part of then."""

    arm_id: UUID
    number: int


class Assignment(Answer):
    """Work for one client: train in a round, evaluate a version, or score it without its own part.

    A kind that is not of a check-in's ``kinds`` is never given.
    """

    id: UUID
    kind: Kind
    run: RunBrief
    arm_id: UUID
    round: int | None
    attempt: int
    state: AssignmentState
    space_digest: str
    base: VersionInfo
    deltas: list[DeltaDownload] | None = Field(
        None,
        description="The smallest way to `base` from a version that the client holds: delta files, "
        "to be applied in this order; none if it holds `base`. Null: fetch the whole file.",
    )
    origin: VersionInfo = Field(description="The arm's version 0.")
    mask: MaskInfo | None
    deadline: datetime
    against: Serving | None = Field(
        None,
        description="In a rollout: score `base` as it is served as `post`, and this version, the "
        "channel's, as it is served as `before`, on the same examples.",
    )


class Outcome(Answer):
    """What became of an assignment and of its round."""

    assignment_id: UUID
    state: AssignmentState
    round_state: RoundState | None
    reason: str | None = None


class CheckInAnswer(Answer):
    """Work if there is any, the outcome asked for, and when to come again."""

    assignment: Assignment | None
    pending: Outcome | None
    outcomes: list[Outcome] = Field([], description="Of `waiting`, those that are this client's.")
    retry_after_min: float = Field(description="Seconds.")
    retry_after_max: float = Field(description="Seconds.")
    checkpoint: str | None = Field(None, description="The newest signed ledger checkpoint.")
    run_state: RunState | None = Field(None, description="State of the client's newest run.")
    unable: str | None = Field(
        None, description="Why this agent gets no work of that run, in words, if it cannot do any."
    )
    serving: Serving | None = Field(
        None, description="What the client should serve now; null: no channel is set for it."
    )
    pinned: list[Pinned] = Field(
        [],
        description="Versions that channels point at or can go back to, and those of rollouts.",
    )
    _unreadable: UUID | None = PrivateAttr(None)

    @property
    def unreadable(self) -> UUID | None:
        """The assignment that was given in settings of a later release; ``unable`` says which."""
        return self._unreadable

    @model_validator(mode="wrap")
    @classmethod
    def _of_a_later_release(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            places = [fault["loc"] for fault in error.errors(include_url=False)]
        settings = ("assignment", "run", "settings")
        if not all(place[:3] == settings for place in places):
            return handler(data)
        names = sorted({".".join(map(str, place[3:])) for place in places})
        found = handler({**data, "assignment": None, "unable": _outdated(data, names)})
        found._unreadable = UUID(data["assignment"]["id"])
        return found


def _outdated(answer: dict[str, Any], names: list[str]) -> str:
    run = answer["assignment"]["run"]["name"]
    return (
        f"run {run!r} uses settings that this agent does not know ({', '.join(names)}); "
        "install a newer fedselect at the client"
    )


class Decline(Request):
    """The client cannot do this assignment."""

    reason: Reason = ""
