"""Policies and run settings: what is personal, how it is trained, how a round is run.

Owns the settings models with their checks, the presets, the mask clock and the bounds that a
client's mask must keep. Must not compute scores (``selection``) or train (``training``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fedselect.deltas import Encoding
from fedselect.errors import SettingsError
from fedselect.masks import Mask
from fedselect.scalars import Flag, Real, Whole
from fedselect.space import ParameterSpace, Role, Slot

FIXED = frozenset({"all", "head"})  # masks that need no data to be chosen

_LATER = "x-left-out-at-default"


def later(default: Any, **facts: Any) -> Any:
    """A field of settings that agents of an earlier release do not know.

    At its default it is left out of every document, so that only a run that uses it needs newer
    agents. The default must be what those agents do, and can never change.
    """
    return Field(default, json_schema_extra={_LATER: True}, **facts)


class Settings(BaseModel):
    """Immutable settings in which an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Not annotated: pydantic then describes the fields in OpenAPI, and not what this returns.
    @model_serializer(mode="wrap")
    def _as_earlier_agents_know_it(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        document: dict[str, Any] = handler(self)
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            added = isinstance(extra, dict) and _LATER in extra
            if added and getattr(self, name) == field.get_default(call_default_factory=True):
                document.pop(name, None)
        return document


class Policy(Settings):
    """How personal parameters are chosen and trained (ALGORITHM §1, §6).

    ``personal`` names where the mask comes from: ``learned`` grows it from the data, the others fix
    it (``none`` = FedAvg, ``all`` = local-only, ``head`` = FedPer). Growth: every ``interval``
    participations from ``start_round`` on, each selectable tensor turns the share ``growth`` of
    what it still shares personal, until ``limit`` of the tensor is. A fixed mask serves from
    ``start_round`` on; before, everything is shared.
    """

    name: str = Field("fedselect", max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    personal: Literal["learned", "none", "all", "head"] = "learned"
    score: Literal["delta", "random"] = Field(
        "delta", description="What ranks the elements: |θ − reference|, or chance as the control."
    )
    growth: Real = Field(0.05, ge=0, le=1, description="p: share of the still shared elements.")
    limit: Real = Field(0.3, ge=0, le=1, description="α: largest personal share of a tensor.")
    limit_mode: Literal["cap", "official"] = Field(
        "cap", description="cap: never above the limit; official: tested before growing only."
    )
    interval: Whole = Field(1, ge=1, description="L: participations between two growth steps.")
    start_round: Whole = Field(
        0,
        ge=0,
        description="Own participation, from 0, after which growth may begin; a fixed mask serves "
        "from it on.",
    )
    schedule: Literal["joint", "alternating"] = Field(
        "joint", description="Train both parts in one step, or personal first, then shared."
    )
    waits: Flag = later(
        False,
        description="Whether a fixed mask waits for start_round. Set by itself; agents that would "
        "not wait do not know it, and decline.",
    )

    @model_validator(mode="after")
    def _waiting_is_said(self) -> Self:
        self.__dict__["waits"] = self.late
        return self

    @property
    def late(self) -> bool:
        """Whether this is a fixed mask that serves later than from the first participation on."""
        return self.personal in FIXED and self.start_round > 0

    def due(self, participation: int) -> bool:
        """Whether the mask changes after this own participation (counted from 0)."""
        if self.late:
            return participation == self.start_round - 1
        return (
            self.personal == "learned"
            and participation >= max(self.start_round, 1)
            and (participation - self.start_round) % self.interval == 0
        )

    def first_use(self) -> int | None:
        """The first participation (from 0) that trains with a changed mask; None: there is none."""
        if self.late:
            return self.start_round
        if self.personal != "learned" or self.growth == 0 or self.limit == 0:
            return None
        start = self.start_round if self.start_round >= 1 else self.interval
        return start + 1

    def bounds(self, space: ParameterSpace) -> tuple[Mask, Mask]:
        """The smallest and the largest mask this policy allows over a space.

        Raises:
            SpaceError: the model has nothing of what is to be personal.
        """
        floor = Mask.initial(space)
        most = floor | Mask.over(space, self.may_turn(space))
        return (most if self.personal in FIXED and not self.late else floor), most

    def may_turn(self, space: ParameterSpace) -> tuple[Slot, ...]:
        """The tensors whose elements this policy may turn personal.

        Raises:
            SpaceError: the model has nothing of what is to be personal.
        """
        if self.personal == "head":
            return space.head()
        if self.personal == "all":
            return tuple(space.with_role(Role.SELECTABLE, Role.SHARED))
        return tuple(space.with_role(Role.SELECTABLE)) if self.personal == "learned" else ()

    def first_mask(self, space: ParameterSpace) -> Mask:
        """The mask of a client that has not taken part yet."""
        return self.bounds(space)[0]


class Training(Settings):
    """The local budget of one assignment: plain SGD, ``steps`` or ``epochs`` (exactly one)."""

    steps: Whole | None = Field(None, ge=1, le=1_000_000, examples=[20])
    epochs: Whole | None = Field(None, ge=1, le=10_000)
    batch_size: Whole = Field(20, ge=1, le=65_536)
    learning_rate: Real = Field(0.05, gt=0, le=100)
    clip_norm: Real | None = Field(None, gt=0, description="L2 bound on the whole gradient.")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.steps and training.epochs")
        return self


class RoundPolicy(Settings):
    """How a round is run. Times in seconds; ``goal`` and ``quorum`` count clients."""

    goal: Whole = Field(10, ge=1, le=100_000)
    over_selection: Real = Field(1.3, ge=1, le=10)
    quorum: Whole = Field(2, ge=1, le=100_000)
    selection_deadline: Real = Field(600, gt=0, le=7 * 86_400)
    report_deadline: Real = Field(3600, gt=0, le=30 * 86_400)
    verification_timeout: Real = Field(600, gt=0, le=86_400)
    min_contributors: Whole = Field(
        2, ge=1, le=1000, description="k: fewer sharers freeze an element"
    )
    weighting: Literal["uniform", "examples"] = "uniform"
    late: Literal["reject"] = "reject"
    client_attempts: Whole = Field(
        2, ge=1, le=10, description="Tries of one client in a round, should its update be rejected."
    )
    max_attempts: Whole = Field(
        5, ge=1, le=100, description="Tries of a round before the run pauses."
    )
    retry_after: Real = Field(30, gt=0, le=86_400, description="Mean of the check-in window.")

    @model_validator(mode="after")
    def _quorum_fits(self) -> Self:
        if self.quorum > self.goal:
            raise ValueError(f"quorum {self.quorum} is above goal {self.goal}")
        if self.min_contributors > self.goal:
            raise ValueError(
                f"min_contributors {self.min_contributors} is above goal {self.goal}: "
                "every element would stay frozen"
            )
        return self


class Limits(Settings):
    """What one update may hold, against updates that would drown all others.

    The defaults are far beyond the weights of any network that learns (their magnitudes stay below
    1,000, their norm below √D times that); raise them if a task shares raw statistics, such as
    running variances of inputs that were not normalized. Where deltas travel, they are what counts.
    """

    max_abs: Real = Field(1e6, gt=0, description="Largest magnitude of a value that is sent.")
    max_norm: Real = Field(1e7, gt=0, description="Largest L2 norm of all values that are sent.")


class Wire(Settings):
    """How values travel (docs/WIRE.md).

    ``f32``: the trained values as they are. ``bf16`` and ``int8``: deltas against the version that
    training started from, rounded, entropy-coded and with error feedback; the published version
    is then the base and a rounded mean delta.
    """

    encoding: Encoding = "f32"


class Reporting(Settings):
    """Which numbers a report may show: small groups say too much of those in them.

    Fixed with the run, so that nobody who reads a report can lower them.
    """

    min_examples: Whole = Field(
        10,
        ge=1,
        le=1_000_000,
        description="Held-out examples without which a client's scores stay where they are.",
    )
    min_clients: Whole = Field(
        3, ge=1, le=100_000, description="Clients without which no figure is formed over them."
    )


MOST_ARMS = 16
ARM_CLIENTS = 20  # that a randomized arm has at least
PARALLEL_BELOW = 50  # clients, unless a mode is given


class Arms(Settings):
    """Several policies in one run, each with a line of versions of its own, to be compared.

    ``parallel``: every client does every arm, with a state for each, so that differences are within
    clients. ``randomized``: every client does one arm, by a stable hash, at least 20 an arm.
    """

    mode: Literal["parallel", "randomized"] | None = Field(
        None,
        description="Null: chosen when the run is created; parallel below 50 active clients, or "
        "if an arm would have fewer than 20.",
    )
    policies: tuple[Policy, ...] = Field(min_length=1, max_length=MOST_ARMS)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"arms need names that differ, not {', '.join(names)}")
        return self

    def settled(self, clients: int) -> Arms:
        """The same with a mode, for so many clients."""
        if self.mode is not None:
            return self
        few = clients < max(PARALLEL_BELOW, ARM_CLIENTS * len(self.policies))
        return self.model_copy(update={"mode": "parallel" if few else "randomized"})

    def of_client(self, client: str, *, seed: int) -> tuple[Policy, ...]:
        """The arms that a client does; equal ids and seeds are always split alike."""
        if self.mode != "randomized":
            return self.policies
        digest = hashlib.sha256(f"fedselect-arms/{seed}/{client}".encode()).digest()
        return (self.policies[int.from_bytes(digest[:8], "big") % len(self.policies)],)

    def check_split(self, clients: Mapping[str, int]) -> None:
        """Refuse a randomized split into such groups, by name of the arm, if one is too small.

        Raises:
            SettingsError: ``arm_too_small``.
        """
        sizes = {policy.name: clients.get(policy.name, 0) for policy in self.policies}
        if self.mode != "randomized" or min(sizes.values()) >= ARM_CLIENTS:
            return
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise SettingsError(
            f"randomized arms need at least {ARM_CLIENTS} clients each, but the split is {shown}; "
            "enrol more clients, name fewer arms, or run the arms in mode parallel",
            code="arm_too_small",
        )


class RunSettings(Settings):
    """Everything that decides a run's result, besides its data and its starting weights.

    In a run with ``arms``, ``policy`` is that of the first one.
    """

    rounds: Whole = Field(60, ge=1, le=100_000)
    seed: Whole = Field(0, ge=0, lt=2**63)
    policy: Policy = Policy()
    training: Training = Training(steps=20)
    round: RoundPolicy = RoundPolicy()
    limits: Limits = Limits()
    wire: Wire = Wire()
    report: Reporting = Reporting()
    arms: Arms | None = later(None)

    @model_validator(mode="after")
    def _policy_is_the_first_arms(self) -> Self:
        if self.arms is not None:
            first = self.arms.policies[0]
            if self.policy not in (Policy(), first):
                raise ValueError("give policy or arms, not both")
            self.__dict__["policy"] = first  # it is frozen for everybody else
        return self

    @model_validator(mode="after")
    def _mask_is_used(self) -> Self:
        for policy in self.policies:
            first = policy.first_use()
            if first is not None and self.rounds <= first:
                raise ValueError(
                    f"no mask of {policy.name} would ever be used: the first one serves "
                    f"participation {first + 1}, but the run has {self.rounds} rounds; raise "
                    "rounds, or lower policy.start_round or policy.interval"
                )
        return self

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Those of all arms; one in a run that does not speak of arms."""
        return (self.policy,) if self.arms is None else self.arms.policies

    @property
    def parallel(self) -> int:
        """How many arms a client does."""
        return len(self.policies) if self.arms and self.arms.mode != "randomized" else 1

    def of_arm(self, name: str) -> RunSettings:
        """The settings of one arm: its policy, and nothing of other arms.

        Raises:
            SettingsError: ``arm_unknown``.
        """
        if self.arms is None:
            return self
        for policy in self.arms.policies:
            if policy.name == name:
                return self.model_copy(update={"policy": policy, "arms": None})
        known = ", ".join(policy.name for policy in self.arms.policies)
        raise SettingsError(f"there is no arm {name!r}; there are {known}", code="arm_unknown")

    def arms_of(self, client: str) -> tuple[str, ...]:
        """Names of the arms that a client (by its id) does."""
        if self.arms is None:
            return (self.policy.name,)
        return tuple(each.name for each in self.arms.of_client(client, seed=self.seed))

    def warnings(self) -> list[str]:
        """Settings that are allowed but rarely meant."""
        found = []
        if self.round.goal < 2 * self.round.min_contributors:
            found.append(
                f"goal {self.round.goal} is below 2 × min_contributors "
                f"{self.round.min_contributors}: many elements will stay frozen"
            )
        return found


PRESETS: dict[str, dict[str, Any]] = {
    "fedselect": {"personal": "learned"},
    "fedselect-official": {
        "personal": "learned",
        "growth": 0.25,
        "limit": 0.8,
        "limit_mode": "official",
        "interval": 3,
        "schedule": "alternating",
    },
    "random": {"personal": "learned", "score": "random"},
    "fedavg": {"personal": "none"},
    "local": {"personal": "all"},
    "fedper": {"personal": "head"},
    "fedper-late": {"personal": "head"},
    "share-then-local": {"personal": "all"},
}
LATE = frozenset({"fedselect", "random", "fedper-late", "share-then-local"})  # share first


def preset(name: str, *, rounds: int | None = None, **changes: Any) -> Policy:
    """A named policy, with single settings changed.

    In a run of so many ``rounds``, those of ``LATE`` share first and personalize from the middle
    on; without them they do not wait.

    Raises:
        SettingsError: no such preset.
    """
    if name not in PRESETS:
        raise SettingsError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    start = {"start_round": rounds // 2} if rounds is not None and name in LATE else {}
    return Policy(**{"name": name, **PRESETS[name], **start, **changes})


def preset_run(name: str, *, rounds: int, **changes: Any) -> RunSettings:
    """Run settings of a preset; ``fedselect-official`` keeps the authors' budget and a contributor
    threshold of 1.

    Raises:
        SettingsError: no such preset.
    """
    settings: dict[str, Any] = {"rounds": rounds, "policy": preset(name, rounds=rounds)}
    if name == "fedselect-official":
        settings["training"] = Training(epochs=15, batch_size=32, learning_rate=0.05)
        settings["round"] = RoundPolicy(min_contributors=1)
    return RunSettings(**{**settings, **changes})
