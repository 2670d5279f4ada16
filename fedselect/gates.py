"""The gates of a rollout: whether what a stage measured lets a version go on.

Owns the five rules and their words; the statistics are those of ``effects``. A figure exactly at
its limit passes. What is said of all clients (means, deciles) needs ten in either group: below, the
evidence is insufficient and an administrator decides. What is counted in the stage itself does not.
The effect is the difference between the stage and a control group that stayed on the old version at
the same time, not a before and after. Must not know rows or who rolls out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedselect import effects
from fedselect.evaluations import ScoreReport
from fedselect.reportdoc import Gain, Interval
from fedselect.rolloutdocs import GateName, Gates, GateVerdict, GroupFigure, Verdict

NINE_OF_TEN = 0.9
DIGITS = 9  # behind the point that count: a limit met exactly is not missed by rounding errors


@dataclass(frozen=True, slots=True)
class Observation:
    """What one client said of its group's version: scores (None: nothing) after so many seconds."""

    client: str
    scores: effects.Scores | None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that a stage's gates look at; ``seed`` is of the bootstrap."""

    stage: Sequence[Observation]
    control: Sequence[Observation]
    seed: int


def judge(gates: Gates, seen: Observed) -> list[GateVerdict]:
    """The verdicts of all gates that are switched on."""
    groups = _gains(seen.stage, gates.baseline), _gains(seen.control, gates.baseline)
    found = [
        _Gate("mean_gain", gates.mean_gain, "at least", lambda: _mean(*groups, seen.seed)),
        _Gate("harmed_share", gates.harmed_share, "at most", lambda: _harmed(*groups)),
        _Gate("worst_decile_drop", gates.worst_decile_drop, "at most", lambda: _decile(*groups)),
        _Gate("rejection_rate", gates.rejection_rate, "at most", lambda: _silent(seen)),
        _Gate("latency", gates.latency, "at most", lambda: _slow(seen)),
    ]
    return [_verdict(gate, gate.limit) for gate in found if gate.limit is not None]


def cannot_tell(gates: Gates, stages: Sequence[int], control: int) -> list[str]:
    """What is known before anything is measured: gates that groups of these sizes leave open."""
    limits = {"mean_gain": gates.mean_gain, "worst_decile_drop": gates.worst_decile_drop}
    names = [name for name, limit in limits.items() if limit is not None]
    least = effects.ENOUGH_CLIENTS
    small = [k for k, size in enumerate(stages, start=1) if min(size, control) < least]
    if not names or not small:
        return []
    every = "in no stage" if len(small) == len(stages) else f"not in stage {_listed(small)}"
    sizes = _listed([stages[k - 1] for k in small])
    return [
        f"{' and '.join(names)} can tell {every}: {least} clients are needed in the stage and in "
        f"the control group, there are {sizes} and {control}. There the rollout is held, and an "
        "administrator decides, whatever else is measured. A larger minimum or control makes the "
        "groups larger; null switches a gate off."
    ]


def _listed(numbers: Sequence[int]) -> str:
    *first, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last


# --- what a gate looks at ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measured:
    unit: str
    figure: float | None
    stage: GroupFigure
    control: GroupFigure | None
    interval: Interval | None = None
    why_not: str = ""  # the figure does not tell enough


@dataclass(frozen=True, slots=True)
class _Gate:
    name: GateName
    limit: float | None
    keeps: Literal["at least", "at most"]
    measure: Callable[[], _Measured]


def gain_of(scores: effects.Scores, baseline: str) -> Gain | None:
    """A client's gain with its group's version merged in, over its own baseline; None if it has not
    scored both.

    Scored together with ``before``, what the version gives is ``post``, and the overlap is known.
    """
    paired = baseline == "before"
    version, base = scores.get("post" if paired else "pre"), scores.get(baseline)
    if version is None or base is None:
        return None
    return effects.gain(version, base if paired else _alone(base), judged=True)


def _gains(group: Sequence[Observation], baseline: str) -> dict[str, Gain]:
    found = {each.client: gain_of(each.scores or {}, baseline) for each in group}
    return {client: gain for client, gain in found.items() if gain is not None}


def _alone(score: ScoreReport) -> ScoreReport:
    # What is told of ``both`` is the overlap with ``post``, not with the merged version.
    return score.model_copy(update={"both": None})


def _points(group: dict[str, Gain]) -> list[float]:
    return [each.points for each in group.values()]


def _few(stage: dict[str, Gain], control: dict[str, Gain]) -> str:
    least = min(len(stage), len(control))
    if least >= effects.ENOUGH_CLIENTS:
        return ""
    return (
        f"{len(stage)} clients of the stage and {len(control)} of the control group were measured, "
        f"{effects.ENOUGH_CLIENTS} of each are needed"
    )


def _mean(stage: dict[str, Gain], control: dict[str, Gain], seed: int) -> _Measured:
    points = _points(stage), _points(control)
    one, other = (
        GroupFigure(
            clients=len(group),
            value=math.fsum(group) / len(group) if group else None,
            interval=effects.mean_interval(group, seed),
        )
        for group in points
    )
    return _Measured(
        "points: mean gain over clients, stage minus control group",
        _less(one.value, other.value),
        one,
        other,
        interval=effects.mean_difference(*points, seed),
        why_not=_few(stage, control),
    )


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _harmed(stage: dict[str, Gain], control: dict[str, Gain]) -> _Measured:
    """Each client's verdict rests on its own held-out examples, so few clients are enough."""
    one, other = (
        GroupFigure(
            clients=len(group),
            value=sum(bool(each.harmed) for each in group.values()) / len(group) if group else None,
        )
        for group in (stage, control)
    )
    nobody = "" if stage else "no client of the stage was measured"
    unit = "share of the stage's clients, each judged by its held-out examples"
    return _Measured(unit, one.value, one, other, why_not=nobody)


def _decile(stage: dict[str, Gain], control: dict[str, Gain]) -> _Measured:
    one, other = (
        GroupFigure(
            clients=len(group),
            value=effects.worst_decile(_points(group)) if group else None,
        )
        for group in (stage, control)
    )
    return _Measured(
        "points: mean gain of the worst tenth of clients, control group minus stage",
        _less(other.value, one.value),
        one,
        other,
        why_not=_few(stage, control),
    )


def _silent(seen: Observed) -> _Measured:
    one, other = (
        GroupFigure(
            clients=len(group),
            value=sum(each.scores is None for each in group) / len(group) if group else None,
        )
        for group in (seen.stage, seen.control)
    )
    unit = "share of the stage's clients without an evaluation"
    return _Measured(unit, one.value, one, other, why_not="" if seen.stage else "nobody was asked")


def _slow(seen: Observed) -> _Measured:
    one, other = (_ninth(group) for group in (seen.stage, seen.control))
    nobody = "" if one.clients else "no client of the stage has answered"
    unit = "seconds from asked to answered that nine of ten of the stage's clients keep"
    return _Measured(unit, one.value, one, other, why_not=nobody)


def _ninth(group: Sequence[Observation]) -> GroupFigure:
    """The nearest-rank quantile: a time that a client has really taken."""
    times = sorted(each.seconds for each in group if each.seconds is not None)
    at = max(0, math.ceil(NINE_OF_TEN * len(times)) - 1)
    return GroupFigure(clients=len(times), value=times[at] if times else None)


# --- what it says ------------------------------------------------------------------------------


def _verdict(gate: _Gate, limit: float) -> GateVerdict:
    seen = gate.measure()
    figure = None if seen.figure is None else round(seen.figure, DIGITS)
    if seen.why_not or figure is None:
        verdict = Verdict.INSUFFICIENT
    else:
        kept = figure >= limit if gate.keeps == "at least" else figure <= limit
        verdict = Verdict.PASS if kept else Verdict.FAIL
    return GateVerdict(
        gate=gate.name,
        verdict=verdict,
        unit=seen.unit,
        figure=figure,
        interval=seen.interval,
        keeps=gate.keeps,
        limit=limit,
        stage=seen.stage,
        control=seen.control,
        text=_sentence(gate, limit, seen, verdict),
    )


def _sentence(gate: _Gate, limit: float, seen: _Measured, verdict: Verdict) -> str:
    figure = "not measured" if seen.figure is None else f"{seen.figure:.4g}"
    text = f"{gate.name} is {figure}, {gate.keeps} {limit:.4g} is asked"
    if verdict is Verdict.INSUFFICIENT and seen.why_not:
        return f"{text}; insufficient evidence: {seen.why_not}; admin decides"
    if seen.interval is None:
        return text
    low, high = seen.interval.low, seen.interval.high
    text += f" (95 % interval {low:.4g} to {high:.4g}"
    return f"{text}, which leaves both open)" if low < limit < high else f"{text})"
