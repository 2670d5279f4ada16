"""The rules of a pilot: whether a run is the one that its file describes, and what came of it.

Owns what is said of a pilot in words and rows. The file is ``pilotfile``, the calls are
``pilot_cli``'s. Must not connect, print or look at a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedselect.amounts import duration, size
from fedselect.comparedoc import Recommendation
from fedselect.effects import ENOUGH_CLIENTS, WORSE_POINTS
from fedselect.estimatedocs import Estimate
from fedselect.lifecycle import AssignmentState, RunState
from fedselect.pilotfile import PilotFile
from fedselect.protocol import RoundDetail, RunInfo
from fedselect.reportdoc import ClientReport, RunReport
from fedselect.rolloutdocs import Judgement, RolloutDetail, RolloutState, Verdict

OVER = frozenset({RunState.FINISHED, RunState.STOPPED, RunState.PAUSED})  # nothing moves by itself
MOST_NAMED = 5  # clients that one line names
BASELINES = {"fedavg_ft": "FedAvg with fine-tuning", "local_only": "training alone"}


# --- the same pilot or another one -------------------------------------------------------------


def differences(file: PilotFile, run: RunInfo) -> list[str]:
    """The settings in which a run of this name is not what the file says."""
    wanted = _flat(file.settings().model_dump(mode="json"))
    found = _flat(run.settings.model_dump(mode="json"))
    return sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        below = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {f"{prefix}{name}": value} if below is None else below
    return found


# --- before: what it would cost ----------------------------------------------------------------


def price(found: Estimate) -> list[str]:
    """An estimate in a few lines."""
    line, client = found.links[0], found.client
    lines = [
        f"A client sends {size(client.up)} and receives {size(client.down)} in the whole run, "
        f"{found.against.of_fedavg:.0%} of FedAvg in float32.",
        f"On {line.name} a round takes {duration(line.round_seconds)}, the run "
        f"{duration(line.run_seconds)}; of a round, {duration(found.compute.seconds)} are the "
        f"client's own work ({_basis(found.compute.basis)}).",
        f"The object store holds {size(found.storage.run)} at the end.",
    ]
    for arm in found.arms:
        text = f"{arm.name}: {arm.clients} clients, each sends {size(arm.client.up)} and receives "
        lines.append(f"{text}{size(arm.client.down)}, {arm.of_fedavg:.0%} of FedAvg.")
    return lines


def _basis(basis: str) -> str:
    return "measured" if basis == "measured" else "assumed from the size; a site can measure it"


# --- meanwhile ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round as ``watch`` shows it; ``sent`` and ``received`` are bytes of clients' files."""

    arm: str
    number: int
    attempt: int
    state: str
    assigned: int
    delivered: int
    sent: int
    received: int
    seconds: float | None
    reason: str | None


def round_row(found: RoundDetail, arm: str) -> RoundRow:
    """What a round says of itself; ``seconds`` are known once it has ended."""
    sent = [each.update_size for each in found.assignments if each.update_size is not None]
    closed = found.closed_at
    return RoundRow(
        arm=arm,
        number=found.number,
        attempt=found.attempt,
        state=found.state.value,
        assigned=len(found.assignments),
        delivered=sum(each.state is AssignmentState.ACCEPTED for each in found.assignments),
        sent=sum(sent),
        received=sum(each.download_size or 0 for each in found.assignments),
        seconds=(closed - found.opened_at).total_seconds() if closed else None,
        reason=found.reason,
    )


# --- afterwards: five lines --------------------------------------------------------------------


def summary(report: RunReport, gates: str) -> list[str]:
    """Who gained, who lost, what it cost, what was personalized, and ``gates``: a line each."""
    return [
        f"Gained: {_gained(report)}",
        f"Lost: {_lost(report)}",
        f"Cost: {_cost(report)}",
        f"Personal: {_personal(report)}",
        f"Gates: {gates}",
    ]


def baseline(report: RunReport) -> str:
    """What the clients' models are compared with first: the strongest that was measured."""
    known = {name for client in report.clients for name in client.gains}
    return next((name for name in BASELINES if name in known), "local_only")


def _gained(report: RunReport) -> str:
    against = baseline(report)
    measured = [each for each in report.clients if against in each.gains]
    if not measured:
        return "not known: no client has reported scores."
    clear = [each for each in measured if each.gains[against].sign == "gain"]
    named = _named(clear, against)
    text = (
        f"{len(clear)} of {_clients(len(measured))} clearly against {BASELINES[against]}{named}; "
    )
    found = report.effects.get(against)
    if found is None:
        return f"{text}too few clients report for a mean."
    text += f"in the mean {found.mean_points:+.1f} points"
    if found.interval is None:
        return f"{text} (what others would gain: insufficient evidence below {ENOUGH_CLIENTS})."
    return f"{text} (95 % {found.interval.low:+.1f} to {found.interval.high:+.1f})."


def _lost(report: RunReport) -> str:
    against = baseline(report)
    measured = [each for each in report.clients if against in each.gains]
    worse = [each for each in measured if each.gains[against].worse]
    harmed = [each for each in measured if each.gains[against].harmed]
    return (
        f"{len(worse)} of {_clients(len(measured))} worse by more than {WORSE_POINTS} points"
        f"{_named(worse, against)}; {len(harmed)} beyond chance{_named(harmed, against)}."
    )


def _named(clients: list[ClientReport], against: str) -> str:
    if not clients:
        return ""
    ordered = sorted(clients, key=lambda each: -abs(each.gains[against].points))
    said = [f"{each.name} {each.gains[against].points:+.1f}" for each in ordered[:MOST_NAMED]]
    more = [f"{len(clients) - MOST_NAMED} more"] if len(clients) > MOST_NAMED else []
    return f" ({', '.join(said + more)})"


def _cost(report: RunReport) -> str:
    cost = report.cost
    if not cost.clients:
        return "not known: no client has reported what it counted."
    text = f"{size(cost.sent_bytes / cost.clients)} sent and "
    text += f"{size(cost.received_bytes / cost.clients)} received by each of "
    text += _clients(cost.clients)
    if cost.of_fedavg_percent is not None:
        text += f", {cost.of_fedavg_percent:.0f} % of FedAvg in float32"
    if cost.elapsed_seconds is not None:
        text += f"; {duration(cost.elapsed_seconds)} from the first round to the last"
    return f"{text}."


def _personal(report: RunReport) -> str:
    if not report.clients:
        return "not known: no client has reported."
    mean = fmean(each.personal_percent for each in report.clients)
    tensors = sorted(report.masks.tensors, key=lambda each: -each.mean_percent)[:3]
    most = ", ".join(f"{each.name} {each.mean_percent:.0f} %" for each in tensors)
    return f"{mean:.1f} % of what could be, in the mean{f'; most in {most}' if most else ''}."


def gates_line(found: RolloutDetail | None) -> str:
    """What the gates of a rollout say, in a line."""
    if found is None:
        return "no rollout yet; `fedselect pilot promote` begins one."
    words = found.state.value.replace("_", " ")
    text = f"{words}; {stage_line(found)}"
    judged = judgement(found)
    if judged is None:
        return f"{text}, nothing is judged yet."
    return f"{text}: {judged.verdict.value}. {'; '.join(each.text for each in judged.gates)}."


def stage_line(found: RolloutDetail) -> str:
    """Where a rollout is, in words."""
    return (
        f"stage {found.stage} of {len(found.settings.stages)} ({found.stage_percent:g} %, "
        f"{_clients(found.stage_clients)}, control group {found.control_clients})"
    )


def harmed_line(found: RolloutDetail) -> str | None:
    """Whom the version has harmed, as far as its own examples can tell; None: nobody."""
    gains = [(each.client_name, each.gain) for each in found.members if each.gain]
    said = [
        f"{name} {gain.points:+.1f} points (95 % {gain.interval.low:+.1f} to "
        f"{gain.interval.high:+.1f})"
        for name, gain in sorted(gains, key=lambda each: each[1].points)
        if gain.harmed
    ]
    more = [f"{len(said) - MOST_NAMED} more"] if len(said) > MOST_NAMED else []
    return f"Harmed: {', '.join(said[:MOST_NAMED] + more)}." if said else None


def judgement(found: RolloutDetail) -> Judgement | None:
    """What was said of the present stage, or None."""
    return next((each for each in reversed(found.judgements) if each.stage == found.stage), None)


def blocked(found: RolloutDetail, *, anyway: bool) -> str | None:
    """Why a rollout is not to go on, in words; None if it may.

    Gates that fail are not passed by without being told to; where they cannot tell, a person
    decides, and asking is the decision.
    """
    if found.state is RolloutState.RUNNING:
        return f"{stage_line(found)} is being measured; look on: fedselect pilot watch"
    if found.state is RolloutState.PROMOTED:
        return "everybody has it already"
    if found.state is RolloutState.ROLLED_BACK:
        return "it was rolled back; another pilot has another name"
    judged = judgement(found)
    if judged is None or judged.verdict is not Verdict.FAIL or anyway:
        return None
    failed = [each.text for each in judged.gates if each.verdict is Verdict.FAIL]
    return (
        f"a gate says no: {'; '.join(failed)}. Roll it back (fedselect pilot rollback), or, if you "
        "know better, add --anyway"
    )


def _clients(count: int) -> str:
    return f"{count} client{'' if count == 1 else 's'}"


def advice(found: Recommendation) -> str:
    """Which policy to use, and whether the data can tell, in a line."""
    if found.policy is None:
        return "nothing can be said: " + " ".join(each.text for each in found.reasons)
    text = f"use {found.policy}"
    if found.can_tell:
        return f"{text}; it beats every other one on these data."
    if found.tied:
        others = sorted({*found.tied, found.leader or found.policy} - {found.policy})
        text += f"; the data do not tell it from {', '.join(others)}"
    if found.short:
        text += "; this was a short trial, and short trials have chosen wrongly"
    return f"{text}."
