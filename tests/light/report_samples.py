"""Measurements of a run as a report is made of them: some clients gain, one is harmed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import numpy as np

from fedselect import Kind, Mask, ParameterSpace, Role, RunSettings
from fedselect.evaluations import EvaluationReport, ScoreReport
from fedselect.lifecycle import RunState
from fedselect.overlap import History, Stage
from fedselect.reportdoc import MaskReading, RunPart, RunReport
from fedselect.reporting import Evaluated, Measured, Repeated, Stored, Work, assemble

SPACE = ParameterSpace.of(
    [
        ("body.weight", (40, 3), Kind.WEIGHT, Role.SELECTABLE),
        ("body.bias", (3,), Kind.BIAS, Role.SHARED),
        ("stem.weight", (10,), Kind.WEIGHT, Role.FROZEN),
        ("head<b>.weight", (11,), Kind.WEIGHT, Role.SELECTABLE),
    ]
)
NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
RUN = RunPart(
    id=UUID(int=7),
    name="shoulder-2026",
    model="watch-cnn",
    policy="fedselect",
    state=RunState.FINISHED,
    rounds=3,
    published=3,
    version=3,
    elements=SPACE.dim,
    seed=4,
    wire="bf16",
    budget="20 gradient steps of 20 examples",
)
WORK = Work(
    elapsed=90.5,
    collecting=70.0,
    aggregating=6.0,
    rounds_timed=3,
    unpublished=1,
    delivered=40,
    rejected=4,
    seconds={},
)


def client_id(number: int) -> UUID:
    return UUID(int=1000 + number)


def evaluated(number: int, *, post: int, alone: int, total: int = 200, **changes: Any) -> Evaluated:
    scores = {"post": post, "local_only": alone, "start": 20, "global": 90, "pre": post - 5}
    report = EvaluationReport(
        scores={
            n: ScoreReport(correct=min(c, total), total=total, loss=1) for n, c in scores.items()
        },
        participations=3,
        personal_share=0.25,
        bytes_sent=1000 + number,
        bytes_received=2000,
        control_sent=30,
        control_received=40,
        divergence=0.1 + number % 12 / 20,
        **changes,
    )
    return Evaluated(client_id(number), f"site-{number:02}", report)


def twelve() -> list[Evaluated]:
    """Eleven clients of whom most gain, and one, site-11, that is harmed."""
    found = [evaluated(n, post=150 + n, alone=140 - 4 * n) for n in range(11)]
    return [*found, evaluated(11, post=90, alone=170)]


def stored(count: int, *, seed: int = 0, read: bool = True) -> Stored:
    """Two masks of each client, the second of which holds the first."""
    rng = np.random.default_rng(seed)
    masks, histories = {}, []
    for number in range(count):
        first = Mask.initial(SPACE).to_bool() | (rng.random(SPACE.dim) < 0.1)
        pair = [first, first | (rng.random(SPACE.dim) < 0.1)]
        made = [Mask.from_bool(bits) for bits in pair]
        masks |= {mask.digest: mask for mask in made}
        stages = [Stage(n, mask.personal, mask.digest) for n, mask in enumerate(made, start=2)]
        histories.append(History(client_id(number), f"site-{number:02}", stages))
    size = len(masks) if read else 0
    reading = MaskReading(
        wanted=len(masks),
        read=size,
        missing=0,
        left_out=len(masks) - size,
        read_bytes=18 * size,
        limit_bytes=1000,
    )
    return Stored(1, count, histories, masks if read else {}, reading)


def sample(
    evaluations: list[Evaluated] | None = None,
    *,
    masks: Stored | None = None,
    run: RunPart = RUN,
    fedavg: UUID | None = None,
    rerun: Repeated | None = None,
    **report: int,
) -> RunReport:
    evaluations = twelve() if evaluations is None else evaluations
    settings = RunSettings(seed=4, report=report)
    kept = masks or stored(len(evaluations))
    measured = Measured(SPACE, evaluations, WORK, kept, fedavg, rerun)
    return assemble(run, settings, measured, made_at=NOW)
