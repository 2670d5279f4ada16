"""From what was measured to the report of a run, and from the report to a table of its clients.

Owns what a report says: which figures are formed, which are withheld, what FedAvg would have cost.
The statistics are ``effects`` and ``overlap``. Must not read rows, files or a clock.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from uuid import UUID

from fedselect import effects
from fedselect.evaluations import EvaluationReport, ScoreReport
from fedselect.masks import Mask
from fedselect.overlap import History, Masks
from fedselect.policies import Reporting, RunSettings, Training
from fedselect.reportdoc import (
    ClientCost,
    ClientReport,
    Fact,
    MaskReading,
    MaskReport,
    Population,
    RunCost,
    RunPart,
    RunReport,
    Share,
)
from fedselect.space import ParameterSpace, Role

FLOAT = 4  # bytes of a float32
MODELS = (
    "start",
    "local_only",
    "fedavg_ft",
    "global",
    "pre",
    "post",
)  # in the order of tables and plots
AGAINST = {"local_only": "training alone", "fedavg_ft": "FedAvg with fine-tuning"}
CHANCE = (1 - effects.LEVEL) / 2  # of clients whose interval lies on one side without any effect


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One client's evaluation, as it was reported; ``tuned`` is its one of a FedAvg run."""

    client_id: UUID
    name: str
    report: EvaluationReport
    tuned: EvaluationReport | None = None

    def scores(self, least: int) -> dict[str, ScoreReport]:
        """The scores of at least so many examples, with that of FedAvg at equal gradient steps."""
        found = {str(k): v for k, v in self.report.withholding(least).scores.items()}
        tuned = self.tuned
        if tuned is not None and tuned.participations == self.report.participations:
            post = tuned.withholding(least).scores.get("post")
            # Which examples both runs got right is not known.
            found |= {"fedavg_ft": post.model_copy(update={"both": None})} if post else {}
        return found


@dataclass(frozen=True, slots=True)
class Work:
    """What the coordinator noted of a run's rounds; times in seconds, ``seconds`` by client."""

    elapsed: float | None
    collecting: float
    aggregating: float
    rounds_timed: int
    unpublished: int
    delivered: int
    rejected: int
    seconds: Mapping[UUID, float]


@dataclass(frozen=True, slots=True)
class Stored:
    """The masks of a run: whose and when, those that were read, and how much that is."""

    every: int
    clients_known: int
    histories: Sequence[History]
    read: Mapping[str, Mask]
    reading: MaskReading


def unlike(settings: RunSettings, fedavg: RunSettings) -> str | None:
    """Why another run is not FedAvg at equal gradient steps, in words; None if it is."""
    if fedavg.policy.personal != "none" or fedavg.policy.proximal is not None:
        return f"its policy {fedavg.policy.name} makes elements personal"
    if fedavg.rounds != settings.rounds:
        return f"it has {fedavg.rounds} rounds, not {settings.rounds}"
    if fedavg.policy.finetune != settings.policy.finetune:
        return "only one of them is fine-tuned at the end"
    # An epoch of an alternating schedule is two passes; a number of steps is what it says.
    by_epochs = settings.training.epochs is not None
    other_passes = by_epochs and fedavg.policy.passes != settings.policy.passes
    if fedavg.training != settings.training or other_passes:
        return f"its local work is {budget(fedavg.training)}, or done otherwise"
    return None


def budget(training: Training) -> str:
    """The local work of one participation, in words."""
    unit = "gradient steps" if training.steps is not None else "epochs"
    amount = training.steps if training.steps is not None else training.epochs
    return f"{amount} {unit} of {training.batch_size} examples"


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a report is made of: ``space`` is that of the model, ``fedavg`` the FedAvg run."""

    space: ParameterSpace
    evaluations: Sequence[Evaluated]
    work: Work
    stored: Stored
    fedavg: UUID | None = None


def assemble(
    run: RunPart, settings: RunSettings, measured: Measured, *, made_at: datetime
) -> RunReport:
    """The report; what is said of fewer than the run's ``report.min_…`` is left out."""
    rule, space, stored = settings.report, measured.space, measured.stored
    ordered = sorted(measured.evaluations, key=lambda each: each.name)
    clients = [_client(each, rule, space, measured.work) for each in ordered]
    found = _populations(clients, rule, seed=settings.seed)
    cost = _cost(clients, measured.work)
    return RunReport(
        made_at=made_at,
        run=run,
        suppression=rule,
        clients=clients,
        effects=found,
        fairness=_fairness(clients, rule),
        unmeasured={k: v for k, v in effects.UNMEASURED.items() if not measured.fedavg},
        fedavg_run=measured.fedavg,
        cost=cost,
        masks=_masks(space, stored, rule),
        facts=list(_facts(run, clients, found, cost, stored)),
    )


def _client(found: Evaluated, rule: Reporting, space: ParameterSpace, work: Work) -> ClientReport:
    report, scores = found.report, found.scores(rule.min_examples)
    exchanged = FLOAT * (space.dim - space.count(Role.FROZEN))
    return ClientReport(
        client_id=found.client_id,
        name=found.name,
        withheld="post" not in scores,
        participations=report.participations,
        personal_percent=100 * report.personal_share,
        gated=report.gated,
        accuracy=effects.accuracies(scores),
        gains=effects.gains(scores),
        cost=ClientCost(
            sent_bytes=report.bytes_sent,
            received_bytes=report.bytes_received,
            control_sent_bytes=report.control_sent,
            control_received_bytes=report.control_received,
            fedavg_sent_bytes=exchanged * report.participations,
            # A version before each participation, and the one that is evaluated.
            fedavg_received_bytes=exchanged * (report.participations + 1),
            seconds=work.seconds.get(found.client_id),
        ),
    )


def _populations(
    clients: Sequence[ClientReport], rule: Reporting, *, seed: int
) -> dict[str, Population]:
    found = {}
    for baseline in effects.BASELINES:
        gains = {each.name: each.gains[baseline] for each in clients if baseline in each.gains}
        if len(gains) >= rule.min_clients:
            found[baseline] = effects.population(gains, seed=seed)
    return found


def _fairness(clients: Sequence[ClientReport], rule: Reporting) -> dict[str, float]:
    found = {}
    for model in MODELS:
        values = [each.accuracy[model].percent for each in clients if model in each.accuracy]
        index = effects.jain(values) if len(values) >= rule.min_clients else None
        if index is not None:
            found[model] = index
    return found


def _cost(clients: Sequence[ClientReport], work: Work) -> RunCost:
    costs = [each.cost for each in clients]
    sent, received = sum(c.sent_bytes for c in costs), sum(c.received_bytes for c in costs)
    dense_sent = sum(c.fedavg_sent_bytes for c in costs)
    dense_received = sum(c.fedavg_received_bytes for c in costs)
    dense = dense_sent + dense_received
    seconds = [c.seconds for c in costs if c.seconds is not None]
    return RunCost(
        clients=len(costs),
        sent_bytes=sent,
        received_bytes=received,
        control_bytes=sum(c.control_sent_bytes + c.control_received_bytes for c in costs),
        fedavg_sent_bytes=dense_sent,
        fedavg_received_bytes=dense_received,
        of_fedavg_percent=100 * (sent + received) / dense if dense else None,
        client_seconds=median(seconds) if seconds else None,
        client_seconds_known=len(seconds),
        elapsed_seconds=work.elapsed,
        collecting_seconds=work.collecting,
        aggregating_seconds=work.aggregating,
        rounds_timed=work.rounds_timed,
        rejected=_share(work.rejected, work.delivered),
        unpublished_rounds=work.unpublished,
    )


def _share(count: int, of: int) -> Share:
    return Share(percent=100 * count / of if of else 0.0, count=count, of=of)


def _masks(space: ParameterSpace, stored: Stored, rule: Reporting) -> MaskReport:
    masks = Masks(space, stored.read)
    last = masks.comparable(stored.histories)
    enough = len(last) >= rule.min_clients
    tensors = masks.tensors(last) if enough else []
    known = sum(1 for slot in space.slots if slot.size and slot.role is not Role.FROZEN)
    return MaskReport(
        every=stored.every,
        clients_known=stored.clients_known,
        clients=[masks.over_time(history) for history in stored.histories],
        tensors=tensors,
        tensors_left_out=known - len(tensors),
        overlap=masks.overlap(last) if enough else None,
        reading=stored.reading,
    )


# --- facts -------------------------------------------------------------------------------------


def _facts(
    run: RunPart,
    clients: Sequence[ClientReport],
    found: Mapping[str, Population],
    cost: RunCost,
    stored: Stored,
) -> Iterator[Fact]:
    n = len(clients)
    text = f"The run is {run.state.value}: {run.published} of {run.rounds} rounds are published."
    yield _fact("published", text, run.published, "rounds", run.rounds)
    known = max(stored.clients_known, n)
    version = "no version" if run.version is None else f"version {run.version}"
    text = f"{n} of {known} clients that took part have evaluated {version}."
    yield _fact("evaluated", text, n, "clients", known)
    for baseline, words in AGAINST.items():
        if baseline in found:
            yield from _effect_facts(baseline, words, found[baseline])
            continue
        text = f"Against {words} nothing can be said: too few clients have such scores."
        yield _fact(f"no_effect_{baseline}", text, None, "points", n)
    if cost.of_fedavg_percent is not None:
        text = f"Files took {cost.of_fedavg_percent:.1f} % of the bytes of FedAvg in float32."
        yield _fact("bytes", text, cost.of_fedavg_percent, "percent", cost.clients)
    judged = [each for each in clients if each.gated is not None]
    if judged:
        gated = sum(bool(each.gated) for each in judged)
        text = (
            f"The gate turned the masks of {gated} of {len(judged)} clients down: they share all."
        )
        yield _fact("gated", text, gated, "clients", len(judged))
    share = cost.rejected
    text = f"{share.count} of {share.of} delivered updates were refused ({share.percent:.1f} %)."
    yield _fact("rejected", text, share.percent, "percent", share.of)
    text = f"{cost.unpublished_rounds} rounds ended without a version."
    yield _fact("unpublished", text, cost.unpublished_rounds, "rounds", run.published)


def _effect_facts(baseline: str, words: str, found: Population) -> Iterator[Fact]:
    n, interval = found.clients, found.interval
    text = f"Against {words} the mean gain is {found.mean_points:+.1f} points, {n} clients; "
    if interval is None:
        text += f"insufficient evidence: an interval needs {effects.ENOUGH_CLIENTS} clients."
    else:
        text += f"95 % interval {interval.low:+.1f} to {interval.high:+.1f}."
    yield _fact(f"mean_gain_{baseline}", text, found.mean_points, "points", n)
    text = f"Against {words} {len(found.gained)} of {n} clients gained: their whole interval lies "
    yield _fact(f"gained_{baseline}", f"{text}above 0.", len(found.gained), "clients", n)
    worse, harmed = len(found.worse or ()), len(found.harmed or ())
    text = f"{worse} of {n} clients are worse: more than 2 points below {words}."
    yield _fact(f"worse_{baseline}", text, worse, "clients", n)
    text = (
        f"{harmed} of {n} clients are harmed: their whole interval against {words} lies below 0. "
        f"Without any effect, chance alone would show about {CHANCE * n:.1f}."
    )
    yield _fact(f"harmed_{baseline}", text, harmed, "clients", n)
    text = f"Against {words} the tenth that gains least ({len(found.worst_decile)} of {n} clients) "
    text += f"gains {found.worst_decile_points:+.1f} points in the mean."
    yield _fact(f"worst_decile_{baseline}", text, found.worst_decile_points, "points", n)


def _fact(code: str, text: str, value: float | None, unit: str, n: int) -> Fact:
    return Fact(code=code, text=text, value=value, unit=unit, n=n)


# --- one line per client -----------------------------------------------------------------------


def table(report: RunReport) -> str:
    """The clients as CSV (RFC 4180), one line each; empty where something is not known."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(_row(each) for each in report.clients)
    return out.getvalue()


_FIRST = ("client_id", "name", "withheld", "participations", "personal_percent", "gated")
COLUMNS = (
    *_FIRST,
    *(f"{m}_{part}" for m in MODELS for part in ("examples", "percent", "low", "high")),
    *(f"gain_{b}_{part}" for b in effects.BASELINES for part in ("points", "low", "high")),
    *(f"{word}_{b}" for b in effects.JUDGED for word in ("worse", "harmed")),
    *ClientCost.model_fields,
)


def _row(client: ClientReport) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(client, name) for name in _FIRST}
    for model, score in client.accuracy.items():
        row |= {f"{model}_examples": score.examples, f"{model}_percent": score.percent}
        row |= {f"{model}_low": score.interval.low, f"{model}_high": score.interval.high}
    for baseline, gain in client.gains.items():
        row[f"gain_{baseline}_points"] = gain.points
        row[f"gain_{baseline}_low"] = gain.interval.low
        row[f"gain_{baseline}_high"] = gain.interval.high
        if baseline in effects.JUDGED:
            row |= {f"worse_{baseline}": gain.worse, f"harmed_{baseline}": gain.harmed}
    return row | client.cost.model_dump()
