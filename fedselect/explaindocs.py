"""The documents of explanations: what an agent measures of a mask, and what is said of it.

Owns the shapes of ablations and of ``fedselect-explanation/1``, units included as in ``reportdoc``.
Numbers only: no field can hold a value of a parameter, an element's number, a mask or its digest.
Must not compute anything.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import Field, StringConstraints, model_validator

from fedselect.evaluations import ScoreReport
from fedselect.lifecycle import AssignmentState
from fedselect.policies import Reporting, RunSettings
from fedselect.protocol import Answer, Name, Request
from fedselect.reportdoc import Accuracy, Interval, MaskReading, Sign
from fedselect.scalars import Real, Whole

MOST_ABLATED = 64  # tensors of one ablation: those with the most personal elements
LEAST_ELEMENTS = 10  # chosen elements of which numbers about their values are formed
TensorName = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Size = Annotated[Real, Field(ge=0, allow_inf_nan=False)]

# --- what an agent measures --------------------------------------------------------------------


class AblationCreate(Request):
    """Ask clients what their personal parts are worth, tensor by tensor."""

    clients: list[Name] | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="Their names. Null: all that are active and have a mask of this arm.",
        examples=[["ward-7"]],
    )
    deadline: Whole = Field(3600, ge=60, le=30 * 86_400, description="Seconds that they have.")


class TensorAblation(Request):
    """One tensor: the model without its personal part, and how its elements were chosen.

    Δ is \\|θ − r\\| when it was chosen: how far an element had moved since the growth before. Null:
    not known, or of fewer than ten elements.
    """

    name: TensorName
    score: ScoreReport | None = Field(
        None, description="With the shared values in place of the personal ones of this tensor."
    )
    threshold: Size | None = Field(None, description="The smallest Δ chosen at the last growth.")
    delta_chosen: Size | None = Field(None, description="Mean Δ of the chosen elements.")
    delta_shared: Size | None = Field(
        None, description="Mean Δ of those that stayed shared at the last growth."
    )
    distance_percent: Size | None = Field(
        None,
        description="How far its personal values are from the shared ones: the length of the "
        "difference, of the shared ones' own length.",
    )


class AblationReport(Request):
    """What a client found: ``both`` of a score counts examples that ``whole`` got right, too."""

    whole: ScoreReport | None = Field(
        description="The version with all that is the client's own. Null: too few examples."
    )
    without: ScoreReport | None = Field(
        None, description="The shared values in place of all that the policy chose."
    )
    tensors: list[TensorAblation] = Field(max_length=MOST_ABLATED)

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) < len(names):
            raise ValueError("a tensor is named twice")
        for score in (self.without, *(tensor.score for tensor in self.tensors)):
            if score is not None:
                _check_beside(score, self.whole)
        return self

    def withholding(self, least: int) -> AblationReport:
        """This report without any score if it is of fewer than ``least`` examples."""
        if self.whole is None or self.whole.total >= least:
            return self
        tensors = [tensor.model_copy(update={"score": None}) for tensor in self.tensors]
        changes = {"whole": None, "without": None, "tensors": tensors}
        return self.model_copy(update=changes)

    def disclosed(self, settings: RunSettings) -> AblationReport:
        """What of this report leaves a site, and is kept: see ``EvaluationReport.disclosed``."""
        rule, kept = settings.disclosure, self.withholding(settings.report.min_examples)
        if not rule.rounds or kept.whole is None:
            return kept
        whole = kept.whole.rounded(rule)

        def told(score: ScoreReport | None) -> ScoreReport | None:
            return score and score.rounded(rule).beside(whole, rule)

        tensors = [t.model_copy(update={"score": told(t.score)}) for t in kept.tensors]
        changes = {"whole": whole, "without": told(kept.without), "tensors": tensors}
        return kept.model_copy(update=changes)


def _check_beside(score: ScoreReport, whole: ScoreReport | None) -> None:
    if whole is None or whole.total != score.total:
        raise ValueError("all scores must be of the same examples as `whole`")
    if score.both is None:
        return
    neither = score.total - score.correct - whole.correct + score.both
    if score.both > whole.correct or neither < 0:
        raise ValueError(f"both cannot be {score.both}")


class AblationInfo(Answer):
    """One client's place in the ablation of a version."""

    id: UUID = Field(description="Of its assignment.")
    client_id: UUID
    client_name: str
    version_id: UUID
    version_number: int
    attempt: int
    state: AssignmentState = Field(description="`accepted`: its numbers are in.")
    reason: str | None
    deadline: datetime
    created_at: datetime


class AblationsAsked(Answer):
    """How many clients are asked; an agent that cannot do it is not given the work."""

    version_id: UUID
    run_id: UUID
    asked: int = Field(description="Asked now.")
    waiting: int = Field(description="Asked before, whose answer is still open.")


# --- what is said of it ------------------------------------------------------------------------


class Loss(Answer):
    """What is lost without something: accuracy with it − accuracy without it, in points."""

    points: float
    interval: Interval
    examples: int
    paired: bool
    sign: Sign = Field(description="loss: the whole interval lies above 0; gain: below 0.")


class TensorExplanation(Answer):
    """One tensor of a client's mask."""

    name: str
    kind: str
    elements: int
    chosen: int = Field(description="Elements that are the client's own.")
    percent: float
    rank: int = Field(description="1: of the model's tensors, that with the largest share chosen.")
    others_percent: float | None = Field(
        description="Of the other clients, the share that chose such an element too: the mean over "
        "this client's chosen elements. Null: too few others, or nothing chosen."
    )
    chance_percent: float | None = Field(
        description="The same if the others had chosen as many elements of this tensor blindly."
    )
    alone_percent: float | None = Field(
        description="Of its chosen elements, those that no other client chose."
    )
    threshold: float | None
    delta_chosen: float | None
    delta_shared: float | None
    distance_percent: float | None
    lost: Loss | None = Field(description="Null: not measured, or withheld.")
    text: str


class Measurement(Answer):
    """The ablation that the losses are from."""

    version: int | None = Field(description="Its number. Null: known by its file alone.")
    at: datetime
    withheld: bool = Field(description="The client has too few held-out examples.")
    whole: Accuracy | None
    lost: Loss | None = Field(description="Without all that the policy chose.")


class Explanation(Answer):
    """Why a client's model is the way it is: what of it is its own, and what that is worth."""

    format: Literal["fedselect-explanation/1"] = "fedselect-explanation/1"
    made_at: datetime
    run_id: UUID | None
    run_name: str | None
    client_id: UUID | None
    client_name: str
    model: str
    policy: str
    round: int = Field(description="Whose update carried the mask.")
    suppression: Reporting
    elements: int = Field(description="That the policy could choose from.")
    chosen: int
    percent: float
    compared: int = Field(description="Other clients whose masks were read; 0: not compared.")
    fixed: list[str] = Field(description="Tensors that are every client's own by their role.")
    measured: Measurement | None
    tensors: list[TensorExplanation] = Field(description="By rank; the largest if there are many.")
    tensors_left_out: int
    reading: MaskReading | None
    summary: list[str] = Field(description="The whole in plain sentences.")
