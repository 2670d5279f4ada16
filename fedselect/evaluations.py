"""The documents of evaluations: what a client says of a version, in numbers alone.

Owns their shape and limits, for the coordinator and the client SDK alike. Must not hold anything
that could carry data: scores, counts and bytes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from fedselect.disclosure import Disclosure
from fedselect.policies import RunSettings
from fedselect.protocol import Answer, Request
from fedselect.scalars import Count, Flag, Real

Label = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class ScoreReport(Request):
    """One model's result on the client's own held-out examples."""

    correct: Count
    total: Count = Field(ge=1)
    loss: Real = Field(ge=0, allow_inf_nan=False)
    both: Count | None = Field(
        None,
        description="Of `correct`, the examples that `post` got right, too; makes the interval of "
        "their difference narrower. Null: not known.",
    )

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Self:
        if self.correct > self.total:
            raise ValueError(f"{self.correct} correct of {self.total} examples")
        if self.both is not None and self.both > self.correct:
            raise ValueError(f"both: {self.both} of {self.correct} correct examples")
        return self

    def rounded(self, rule: Disclosure) -> ScoreReport:
        """These numbers as they may be told; ``both`` is then for :func:`beside`."""
        if not rule.rounds:
            return self
        total = rule.count(self.total)

        def share(count: int) -> int:
            return rule.part(count / self.total, total)

        return ScoreReport(
            correct=share(self.correct),
            total=total,
            loss=rule.number(self.loss),
            both=None if self.both is None else min(share(self.both), share(self.correct)),
        )

    def beside(self, whole: ScoreReport | None, rule: Disclosure) -> ScoreReport:
        """These numbers with ``both`` as rounded counts of ``whole``, beside them, allow."""
        if self.both is None or whole is None:
            return self
        both, least = self.both, self.correct + whole.correct - self.total
        if both < least:
            both = rule.part_from(least, self.total)
        return self.model_copy(update={"both": min(self.correct, whole.correct, both)})


class EvaluationReport(Request):
    """Numbers only: scores by what was evaluated, and what the client spent."""

    scores: dict[Literal["local_only", "start", "global", "pre", "post", "before"], ScoreReport]
    participations: Count
    personal_share: Real = Field(ge=0, le=1, allow_inf_nan=False)
    bytes_sent: Count = Field(description="Update files, as sent.")
    bytes_received: Count = Field(description="Version and delta files, as received.")
    delta_bytes_received: Count = Field(0, description="The delta files among them.")
    control_sent: Count = Field(0, description="Headers of all calls and the JSON of requests.")
    control_received: Count = Field(0, description="Headers and the JSON of answers.")
    gated: Flag | None = Field(
        None,
        description="Whether the policy's gate has turned the client's mask down, so that it "
        "shares everything. Null: no gate has judged. Left out then: earlier releases refuse it.",
    )
    divergence: Real | None = Field(
        None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="1 − cosine of the client's last step on what it shares and the step of all "
        "since then. Null: the version that it started from is no longer there.",
    )
    labels: dict[Label, Count] | None = Field(
        None,
        max_length=1000,
        description="Training examples by label; only of a client that has agreed to tell them. "
        "No report shows them, only how far they are from those of others.",
    )

    # Not annotated: pydantic then describes the fields in OpenAPI, and not what this returns.
    @model_serializer(mode="wrap")
    def _as_earlier_releases_know_it(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        document: dict[str, Any] = handler(self)
        for name in ("gated", "divergence", "labels"):
            if document[name] is None:
                del document[name]
        return document

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        post = self.scores.get("post")
        for name, score in self.scores.items():
            if score.both is None:
                continue
            if post is None or post.total != score.total:
                raise ValueError(f"{name}.both needs a post of as many examples")
            neither = score.total - score.correct - post.correct + score.both
            if score.both > post.correct or neither < 0:
                raise ValueError(f"{name}.both cannot be {score.both}")
        return self

    def withholding(self, least: int) -> EvaluationReport:
        """This report without the scores of fewer than ``least`` examples, and labels of fewer:
        too few to hide in.
        """
        kept = {name: s for name, s in self.scores.items() if s.total >= least}
        labels = self.labels and {n: count for n, count in self.labels.items() if count >= least}
        return self.model_copy(update={"scores": kept, "labels": labels})

    def disclosed(self, settings: RunSettings) -> EvaluationReport:
        """What of this report leaves a site, and is kept: nothing of too few, all else rounded as
        the run says.
        """
        rule, kept = settings.disclosure, self.withholding(settings.report.min_examples)
        if not rule.rounds:
            return kept
        scores = {name: score.rounded(rule) for name, score in kept.scores.items()}
        post = scores.get("post")
        changes = {
            "scores": {name: score.beside(post, rule) for name, score in scores.items()},
            "personal_share": rule.number(kept.personal_share, 1),
            "divergence": None if kept.divergence is None else rule.number(kept.divergence, 2),
            "labels": kept.labels and {n: rule.count(c) for n, c in kept.labels.items()},
        }
        return kept.model_copy(update=changes)


class Evaluation(Answer):
    """A client's evaluation of a version, as the coordinator keeps it."""

    client_id: UUID
    client_name: str
    version_id: UUID
    version_number: int
    arm_id: UUID | None = None
    arm: str | None = None
    scores: dict[str, ScoreReport]
    participations: int
    personal_share: float
    bytes_sent: int
    bytes_received: int
    delta_bytes_received: int = 0
    control_sent: int = 0
    control_received: int = 0
    gated: bool | None = None
    created_at: datetime
