"""From what was measured to the report of a run.

Owns what a report says: which figures are formed, which are withheld, what FedAvg would have cost.
The statistics are ``effects`` and ``overlap``. Must not read rows, files or a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from statistics import fmean, median
from typing import get_args
from uuid import UUID

from fedselect import effects
from fedselect.disclosure import Disclosure
from fedselect.evaluations import EvaluationReport, ScoreReport
from fedselect.heterogeneity import unlike as unlike_labels
from fedselect.masks import Mask
from fedselect.overlap import History, Masks
from fedselect.policies import Reporting, RunSettings, Training
from fedselect.reportdoc import (
    Association,
    ClientAgain,
    ClientCost,
    ClientReport,
    Fact,
    Index,
    MaskReading,
    MaskReport,
    Population,
    Rerun,
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


def unlike_rerun(settings: RunSettings, other: RunSettings) -> str | None:
    """Why another run is not this one with another seed, in words; None if it is."""
    if other.seed == settings.seed:
        return f"it has the same seed, {other.seed}"
    # What a report may show changes no mask.
    same = other.model_copy(update={"seed": settings.seed, "report": settings.report})
    if same != settings:
        names = [n for n in type(same).model_fields if getattr(same, n) != getattr(settings, n)]
        return f"its {', '.join(names)} are others"
    return None


def budget(training: Training) -> str:
    """The local work of one participation, in words."""
    unit = "gradient steps" if training.steps is not None else "epochs"
    amount = training.steps if training.steps is not None else training.epochs
    return f"{amount} {unit} of {training.batch_size} examples"


@dataclass(frozen=True, slots=True)
class Repeated:
    """The same run with another seed, and the digest of each client's last mask there."""

    run: UUID
    name: str
    seed: int
    masks: Mapping[UUID, str]


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a report is made of: ``space`` is that of the model, ``fedavg`` the FedAvg run."""

    space: ParameterSpace
    evaluations: Sequence[Evaluated]
    work: Work
    stored: Stored
    fedavg: UUID | None = None
    rerun: Repeated | None = None


def assemble(
    run: RunPart, settings: RunSettings, measured: Measured, *, made_at: datetime
) -> RunReport:
    """The report; what is said of fewer than the run's ``report.min_…`` is left out."""
    rule, space, stored = settings.told, measured.space, measured.stored
    ordered = sorted(measured.evaluations, key=lambda each: each.name)
    bare = [_client(each, rule, space, measured.work) for each in ordered]
    clients = _with_label_distances(bare, ordered, rule)
    found = _populations(clients, rule, seed=settings.seed)
    cost = _cost(clients, measured.work)
    facts = _facts(run, clients, found, cost, stored)
    return RunReport(
        made_at=made_at,
        run=run,
        suppression=rule,
        clients=clients,
        effects=found,
        heterogeneity=list(_associations(clients, rule, seed=settings.seed)),
        fairness=_fairness(clients, rule),
        unmeasured={k: v for k, v in effects.UNMEASURED.items() if not measured.fedavg},
        fedavg_run=measured.fedavg,
        cost=cost,
        masks=_masks(measured, rule),
        facts=[*facts, *_rounding(settings.disclosure, clients)],
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
        divergence=report.divergence,
    )


def _with_label_distances(
    clients: Sequence[ClientReport], found: Sequence[Evaluated], rule: Reporting
) -> list[ClientReport]:
    """How far each client's labels are from those of the others, where enough have told theirs."""
    told = {each.client_id: each.report.withholding(rule.min_examples).labels for each in found}
    known = {client: labels for client, labels in told.items() if labels}
    distances = {}
    for client, labels in known.items():
        others = [theirs for other, theirs in known.items() if other != client]
        if len(others) >= rule.min_clients:
            distances[client] = unlike_labels(labels, others)
    return [
        each.model_copy(update={"label_distance": distances.get(each.client_id)})
        for each in clients
    ]


def _associations(
    clients: Sequence[ClientReport], rule: Reporting, *, seed: int
) -> Iterator[Association]:
    for index, baseline in product(get_args(Index), ("global", "local_only")):
        pairs = [
            (value, client.gains[baseline].points)
            for client in clients
            if baseline in client.gains and (value := getattr(client, index)) is not None
        ]
        if len(pairs) < max(rule.min_clients, 2):
            continue
        x, y = ([*column] for column in zip(*pairs, strict=True))
        interval = effects.correlation_interval(x, y, seed)
        yield Association(
            index=index,
            baseline=baseline,
            clients=len(pairs),
            mean_index=fmean(x),
            rank_correlation=effects.rank_correlation(x, y),
            interval=interval,
            evidence="insufficient" if interval is None else "sufficient",
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


def _masks(measured: Measured, rule: Reporting) -> MaskReport:
    space, stored = measured.space, measured.stored
    masks = Masks(space, stored.read)
    last = masks.comparable(stored.histories)
    enough = len(last) >= rule.min_clients
    tensors = masks.tensors(last) if enough else []
    names = [tensor.name for tensor in tensors]
    rounds, shares = masks.over_rounds(stored.histories, names, least=rule.min_clients)
    known = sum(1 for slot in space.slots if slot.size and slot.role is not Role.FROZEN)
    return MaskReport(
        every=stored.every,
        clients_known=stored.clients_known,
        clients=[masks.over_time(history) for history in stored.histories],
        tensors=[t.model_copy(update={"rounds_percent": shares[t.name]}) for t in tensors],
        rounds=rounds,
        rerun=_rerun(measured.rerun, masks, stored, rule) if measured.rerun else None,
        tensors_left_out=known - len(tensors),
        overlap=masks.overlap(last) if enough else None,
        reading=stored.reading,
    )


def _rerun(found: Repeated, masks: Masks, stored: Stored, rule: Reporting) -> Rerun:
    clients, shares = [], []
    for history in stored.histories:
        own = stored.read.get(history.stages[-1].digest)
        other = stored.read.get(found.masks.get(history.client_id, ""))
        if own is None or other is None:
            continue
        share = masks.again(own, other)
        again, chance = share if share is not None else (None, None)
        shares += [share] if share is not None else []
        clients.append(
            ClientAgain(
                client_id=history.client_id,
                name=history.name,
                again_percent=again,
                chance_percent=chance,
            )
        )
    enough = len(shares) >= max(rule.min_clients, 1)
    return Rerun(
        run=found.run,
        name=found.name,
        seed=found.seed,
        clients=clients,
        mean_again_percent=fmean(again for again, _ in shares) if enough else None,
        mean_chance_percent=fmean(chance for _, chance in shares) if enough else None,
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


def _rounding(rule: Disclosure, clients: Sequence[ClientReport]) -> Iterator[Fact]:
    if rule.rounds:
        yield _fact("rounded", rule.words(), rule.round_scores, "step", len(clients))


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
