"""One policy: what is personal, how that is chosen and trained, and what its mask may look like.

Owns the settings of a policy with their checks, the mask clock and the bounds of a mask, and how
settings are written so that earlier agents read them. Must not compute scores (``scores``), choose
(``selection``) or train (``training``).
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from fedselect.evidence import DRIFT
from fedselect.masks import Mask
from fedselect.scalars import Flag, Real, Whole
from fedselect.scores import SCORES
from fedselect.space import ParameterSpace, Role, Slot

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
    """How personal parameters are chosen and trained: schedule × score × scope × budget × gate.

    ``personal`` names where the mask comes from: ``learned`` chooses it from the data, the others
    fix it: ``none`` (FedAvg), ``all`` (local-only), ``head`` (FedPer), ``body`` (LG-FedAvg),
    ``norm`` (FedBN). Growth: every ``interval`` participations from ``start_round`` on, each
    selectable tensor turns the share ``growth`` of what it still shares personal, until ``limit``
    of the tensor is; with ``fraction`` that share turns at once. A mask that comes at once, fixed
    or chosen, serves from ``start_round`` on; before, everything is shared. docs/POLICIES.md tells
    what is behind each choice; the formulas are in ``scores``, ``selection`` and ``holdout``.
    """

    name: str = Field("fedselect", max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    personal: Literal["learned", "none", "all", "head", "body", "norm"] = "learned"
    score: str = Field(
        "delta",
        description="What ranks the elements: |θ − reference|, how far own training moves them, "
        "squared gradients, what it costs to be overwritten, or chance as the control.",
        json_schema_extra={"enum": list(SCORES)},
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
        description="Own participation, from 0, after which growth may begin; a mask that comes at "
        "once serves from it on.",
    )
    schedule: Literal["joint", "alternating"] = Field(
        "joint", description="Train both parts in one step, or personal first, then shared."
    )
    scope: Literal["tensor", "global", "row"] = later(
        "tensor",
        description="What is counted and ranked together: a tensor's elements, all elements, or "
        "all rows (along the first axis), which turn as a whole.",
    )
    elements: Literal["weights", "all"] = later(
        "weights", description="What may be chosen: selectable tensors, or shared ones, too."
    )
    fraction: Real | None = later(
        None, gt=0, le=1, description="In place of growth and limit: this share, at once."
    )
    direction: Literal["grow", "release"] = later(
        "grow",
        description="release: all that may be chosen starts personal, and the smallest scores are "
        "given back, down to the limit.",
    )
    shuffled: Flag = later(
        False, description="The control: as many elements of each tensor, drawn by chance."
    )
    window: Whole = later(
        5, ge=1, le=1000, description="Own participations that statistics are taken from, at most."
    )
    gate: Literal["none", "holdout"] = later(
        "none",
        description="holdout: a client keeps its mask only if that lowers its loss on a fifth of "
        "its training data, which it sets aside for the window; else it shares everything.",
    )
    trains: Literal["all", "body"] = later(
        "all", description="body: the head stays as it was at the start of the run."
    )
    finetune: Flag = later(
        False,
        description="Evaluate after one more budget of local training, from the last version; the "
        "result is `post`, and is neither sent nor kept.",
    )
    proximal: Real | None = later(
        None,
        gt=0,
        le=1e6,
        description="λ: a second local model of the client's own, pulled towards the shared one by "
        "λ/2 · its squared distance; each gets half of the budget.",
    )
    personal_rate: Real = later(
        1.0,
        ge=1,
        le=1000,
        description="ρ: the learning rate of elements that the mask has made personal, over that "
        "of the others.",
    )
    pooled: Real | None = later(
        None,
        gt=0,
        le=16,
        description="β: scores are multiplied by (1 − agreement)^β, so that elements at which "
        "clients pull apart come first. In simulations only: the service does not measure "
        "agreement.",
    )
    waits: Flag = later(
        False,
        description="Whether a fixed mask waits for start_round. Set by itself; agents that would "
        "not wait do not know it, and decline.",
    )

    @field_validator("score")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in SCORES:
            raise ValueError(f"there is no score {name!r}; there are {', '.join(SCORES)}")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.shuffled and self.scope == "row":
            raise ValueError("rows cannot be shuffled by elements; give scope tensor or global")
        if self.gate != "none" and not self.at_once:
            raise ValueError(
                "a gate judges one mask that comes at once: give fraction, or a fixed mask with a "
                "start_round"
            )
        if self.trains == "body" and self.personal != "head":
            raise ValueError("a head that is not trained is not sent, either: give personal head")
        if self.proximal is not None and (self.personal != "none" or self.finetune):
            raise ValueError("a second model is personal as a whole: give personal none")
        if self.personal_rate != 1 and self.personal == "none":
            raise ValueError("nothing is personal that could take larger steps: no personal_rate")
        if self.pooled is not None and (self.personal != "learned" or self.score == "random"):
            raise ValueError("agreement weighs the scores of a learned mask, other than chance")
        self.__dict__["waits"] = self.late
        return self

    @property
    def fixed(self) -> bool:
        """Whether the mask needs no data to be chosen."""
        return self.personal not in {"learned", "none"}

    @property
    def late(self) -> bool:
        """Whether this is a fixed mask that serves later than from the first participation on."""
        return self.fixed and self.start_round > 0

    @property
    def at_once(self) -> bool:
        """Whether the mask changes a single time."""
        return self.late or (self.personal == "learned" and self.fraction is not None)

    @property
    def uninformed(self) -> bool:
        """Whether the only choice comes before the client has met what its score looks at."""
        learns = self.personal == "learned" and DRIFT in SCORES[self.score].needs
        return learns and self.at_once and self.next_due(0) == 0

    @property
    def passes(self) -> int:
        """Passes over the data that an epoch of local work takes."""
        return 2 if self.schedule == "alternating" or self.proximal is not None else 1

    def next_due(self, participation: int) -> int | None:
        """The first own participation (from 0) from this one on after which the mask changes."""
        if not self.late and self.personal != "learned":
            return None
        if self.at_once:
            first = max(self.start_round, 1) - 1
            return first if participation <= first else None
        first = self.start_round or self.interval
        steps = max(0, -(-(participation - first) // self.interval))
        return first + steps * self.interval

    def due(self, participation: int) -> bool:
        """Whether the mask changes after this own participation (counted from 0)."""
        return self.next_due(participation) == participation

    def gathers(self, participation: int) -> bool:
        """Whether what happens in this own participation counts for the next choice."""
        due = self.next_due(participation)
        return due is not None and due - participation < self.window

    def first_use(self) -> int | None:
        """The first participation (from 0) that trains with a changed mask; None: there is none."""
        first = self.next_due(0)
        still = not self.at_once and (self.growth == 0 or self.limit == 0)
        return None if first is None or still else first + 1

    def bounds(self, space: ParameterSpace) -> tuple[Mask, Mask]:
        """The smallest and the largest mask this policy allows over a space.

        Raises:
            SpaceError: the model has nothing of what is to be personal.
        """
        floor = Mask.initial(space)
        most = floor | Mask.over(space, self.may_turn(space))
        return (most if self.fixed and not self.late else floor), most

    def never_travels(self, space: ParameterSpace) -> list[tuple[int, int]]:
        """Ranges [first, last) of elements that are personal in every mask, in order.

        Raises:
            SpaceError: the model has nothing of what is to be personal.
        """
        kept = set(self.may_turn(space)) if self.fixed and not self.late else set()
        found: list[tuple[int, int]] = []
        for slot in space.slots:
            if slot in kept or slot.role in {Role.PERSONAL, Role.FROZEN}:
                begins = slot.offset if not found or found[-1][1] < slot.offset else found.pop()[0]
                found.append((begins, slot.offset + slot.size))
        return found

    def may_turn(self, space: ParameterSpace) -> tuple[Slot, ...]:
        """The tensors whose elements this policy may turn personal.

        Raises:
            SpaceError: the model has nothing of what is to be personal.
        """
        if self.personal == "none":
            return ()
        if self.personal == "head":
            return space.head()
        if self.personal == "body":
            return space.body()
        if self.personal == "norm":
            return space.norms()
        every = self.personal == "all" or self.elements == "all"
        shared = (Role.SHARED,) if every else ()
        return tuple(space.with_role(Role.SELECTABLE, *shared))

    def first_mask(self, space: ParameterSpace) -> Mask:
        """The mask of a client that has not taken part yet."""
        releases = self.personal == "learned" and self.direction == "release"
        return self.bounds(space)[releases]
