"""The report of a run as one HTML page: five questions, answered in plain words, tables and plots.

Owns wording and layout; the frame and its pieces are ``pages``. Must not compute figures: they are
in the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedselect import effects, plots
from fedselect.maskpage import personalized
from fedselect.pages import frame, heading, megabytes, note, paragraph, table
from fedselect.reportdoc import Association, ClientReport, Population, RunCost, RunReport
from fedselect.reporting import AGAINST as JUDGED
from fedselect.reporting import MODELS

INDICES = {
    "divergence": "distance of its update from that of all",
    "label_distance": "distance of its labels from those of others",
}
MOST_SHOWN = 60  # clients in a plot: the ends, where those are that matter
NAMES = {
    "start": "starting model",
    "local_only": "trained alone",
    "fedavg_ft": "FedAvg, fine-tuned",
    "global": "shared model",
    "pre": "merged model",
    "post": "personal model",
}
AGAINST = {
    **JUDGED,
    "start": "the starting model",
    "global": "the shared model",
    "pre": "the merged model",
}


def page(report: RunReport) -> str:
    """The whole page."""
    run = report.run
    title = f"Run {run.name}: what it did"
    version = "none yet" if run.version is None else f"version {run.version}"
    subtitle = (
        f"Model {run.model} ({run.elements:,} elements), policy {run.policy}, {run.wire} on the "
        f"wire; state {run.state.value}, {run.published} of {run.rounds} rounds published; "
        f"evaluated: {version}; report made {report.made_at:%Y-%m-%d %H:%M} UTC."
    )
    sections = (_rollout, _gained, _lost, _cost, personalized, _method)
    return frame(title, subtitle, (section(report) for section in sections))


# --- who gained, who lost ----------------------------------------------------------------------


def _gained(report: RunReport) -> Iterable[str]:
    yield heading("Who gained?")
    yield from _too_few(report)
    for baseline, found in _judged(report):
        yield paragraph(_mean(AGAINST[baseline], found))
        yield paragraph(
            f"{_of(found.gained, found.clients)} gained clearly: the whole 95 % interval lies "
            f"above 0. {_listed(found.gained)}"
        )
    for baseline in JUDGED:
        if any(baseline in client.gains for client in report.clients):
            yield heading(f"Gain of each client against {AGAINST[baseline]}", 3)
            yield _forest(report, baseline)
    if any(client.gains for client in report.clients):
        yield note(
            "Dot: accuracy of the personal model minus that of the other one, trained for as many "
            "steps, on the client's own held-out examples, in percentage points. Line: 95 % "
            "interval. Green: all above 0; red: all below 0; grey: so many examples cannot tell. "
            "Dashed: −2 points."
        )
    if report.effects:
        yield heading("Gain against every baseline, all clients", 3)
        rows = {f"against {AGAINST[name]}": _points(report, name) for name in report.effects}
        title = "Gain of every client against each baseline"
        yield plots.strips(title, rows, unit="gain in percentage points (bar: median client)")
        yield _populations(report)
    yield from _against_heterogeneity(report)
    if report.clients:
        yield heading("Accuracy of every client", 3)
        yield _accuracy_table(report)


def _against_heterogeneity(report: RunReport) -> Iterable[str]:
    if report.heterogeneity:
        yield heading("Do clients that differ more gain more?", 3)
    for found in report.heterogeneity:
        points = [
            (value, client.gains[found.baseline].points, client.gains[found.baseline].sign)
            for client in report.clients
            if found.baseline in client.gains
            and (value := getattr(client, found.index)) is not None
        ]
        against = f"gain against {AGAINST[found.baseline]}, points"
        title = f"Gain against {AGAINST[found.baseline]} by {INDICES[found.index]}"
        yield plots.scatter(title, points, x=INDICES[found.index], y=against)
        yield paragraph(_association(found))
    if report.heterogeneity:
        yield note(
            "Distance of updates: 1 − cosine of a client's last step on what it shares and the "
            "step of all since (0: as all do; 1: at right angles; n clients with nothing in common "
            "are at 1 − 1/√n). Distance of labels: total variation to the mean of the others that "
            "agreed to tell theirs. Not a prediction of another run."
        )


def _association(found: Association) -> str:
    if found.rank_correlation is None:
        return f"All {found.clients} clients are the same in one of the two: nothing can be said."
    text = f"Rank correlation {found.rank_correlation:+.2f} over {found.clients} clients; "
    if found.interval is None:
        return f"{text}insufficient evidence: an interval needs {effects.ENOUGH_CLIENTS} clients."
    return f"{text}95 % interval {found.interval.low:+.2f} to {found.interval.high:+.2f}."


def _judged(report: RunReport) -> list[tuple[str, Population]]:
    """The baselines of which gain, loss and harm are said, with what was found."""
    return [(name, report.effects[name]) for name in JUDGED if name in report.effects]


def _points(report: RunReport, baseline: str) -> list[float]:
    return [c.gains[baseline].points for c in report.clients if baseline in c.gains]


def _forest(report: RunReport, baseline: str) -> str:
    known = [c for c in report.clients if baseline in c.gains]
    known.sort(key=lambda client: client.gains[baseline].points)
    if len(known) > MOST_SHOWN:
        known = known[: MOST_SHOWN // 2] + known[-MOST_SHOWN // 2 :]
    bars = [_bar(client, baseline) for client in known]
    title = f"Gain of each client against {AGAINST[baseline]}, with 95 % intervals"
    return plots.intervals(title, bars, unit="gain in percentage points", mark=-2.0)


def _bar(client: ClientReport, baseline: str) -> plots.Bar:
    gain = client.gains[baseline]
    label = f"{client.name} (n={gain.examples})"
    return plots.Bar(label, gain.points, (gain.interval.low, gain.interval.high), gain.sign)


def _populations(report: RunReport) -> str:
    heads = ["gain against", "clients (n)", "mean", "95 % interval of the mean", "lowest"]
    heads += ["lower quartile", "median", "upper quartile", "highest", "worst tenth, mean"]
    rows = []
    for name, found in report.effects.items():
        spread = [found.lowest_points, found.lower_quartile_points, found.median_points]
        spread += [found.upper_quartile_points, found.highest_points, found.worst_decile_points]
        between = "insufficient evidence (fewer than 10 clients)"
        if found.interval is not None:
            between = f"{found.interval.low:+.1f} to {found.interval.high:+.1f}"
        first = (AGAINST[name], found.clients, f"{found.mean_points:+.1f}", between)
        rows.append([*first, *(f"{value:+.1f}" for value in spread)])
    return table("Gain over all clients, in percentage points.", heads, rows)


def _accuracy_table(report: RunReport) -> str:
    rows = []
    models = [m for m in MODELS if any(m in client.accuracy for client in report.clients)]
    for client in report.clients:
        cells: list[object] = [client.name]
        post = client.accuracy.get("post")
        cells.append("withheld" if post is None else post.examples)
        for model in models:
            score = client.accuracy.get(model)
            cells.append(
                "–"
                if score is None
                else f"{score.percent:.1f} ({score.interval.low:.1f}–{score.interval.high:.1f})"
            )
        rows.append(cells)
    if report.fairness:
        index = [f"{report.fairness[m]:.3f}" if m in report.fairness else "–" for m in models]
        rows.append(["evenness (Jain's index, 1 = all equal)", "", *index])
    heads = ("client", "held-out examples (n)", *(NAMES[model] for model in models))
    return table("Accuracy in % on own held-out data, with 95 % intervals.", heads, rows)


def _lost(report: RunReport) -> Iterable[str]:
    yield heading("Who lost?")
    yield from _too_few(report)
    for baseline, found in _judged(report):
        yield from _losses(report, baseline, found)
    for name, why in report.unmeasured.items():
        yield note(f"Not measured in this run ({name}): {why}")


def _losses(report: RunReport, baseline: str, found: Population) -> Iterable[str]:
    n, against = found.clients, AGAINST[baseline]
    worse, harmed = found.worse or [], found.harmed or []
    yield paragraph(
        f"Against {against} {_of(harmed, n)} are harmed: the upper end of the 95 % interval of "
        f"their gain is below 0. {_listed(harmed)}"
    )
    yield paragraph(
        f"Against {against} {_of(worse, n)} are worse: more than 2 percentage points below it, "
        f"whatever the interval. {_listed(worse)}"
    )
    chance = (1 - effects.LEVEL) / 2 * n
    yield note(
        f"With {n} intervals of 95 %, chance alone shows about {chance:.1f} clients as harmed "
        "where there is no effect at all."
    )
    rows = [_loss_row(c, baseline) for c in report.clients if c.name in {*worse, *harmed}]
    heads = ("client", "gain", "95 % interval", "held-out examples (n)", "worse", "harmed")
    if rows:
        caption = f"Clients that lost against {against}, in percentage points."
        yield table(caption, heads, rows)
    yield paragraph(
        f"Against {against} the tenth that gains least ({len(found.worst_decile)} of {n} clients: "
        f"{', '.join(found.worst_decile)}) gains {found.worst_decile_points:+.1f} points in the "
        "mean."
    )


def _loss_row(client: ClientReport, baseline: str) -> Sequence[object]:
    gain = client.gains[baseline]
    between = f"{gain.interval.low:+.1f} to {gain.interval.high:+.1f}"
    marks = ["yes" if mark else "no" for mark in (gain.worse, gain.harmed)]
    return [client.name, f"{gain.points:+.1f}", between, gain.examples, *marks]


def _too_few(report: RunReport) -> Iterable[str]:
    if "local_only" in report.effects:
        return
    known = sum(1 for client in report.clients if "local_only" in client.gains)
    yield paragraph(
        f"This cannot be said: {known} clients have reported scores of their personal model and of "
        f"training alone; figures are formed over at least {report.suppression.min_clients} "
        f"clients, of clients with at least {report.suppression.min_examples} held-out examples."
    )


def _mean(against: str, found: Population) -> str:
    n = found.clients
    text = f"Against {against} the personal models gain {found.mean_points:+.1f} percentage points "
    text += f"in the mean over {n} clients"
    if found.interval is None:
        return f"{text}. Insufficient evidence: fewer than 10 clients say nothing of others."
    return f"{text} (95 % interval {found.interval.low:+.1f} to {found.interval.high:+.1f})."


# --- what it cost ------------------------------------------------------------------------------


def _cost(report: RunReport) -> Iterable[str]:
    cost = report.cost
    yield heading("What did it cost?")
    if cost.clients and cost.of_fedavg_percent is not None:
        moved, dense = cost.sent_bytes + cost.received_bytes, cost.fedavg_sent_bytes
        dense += cost.fedavg_received_bytes
        yield paragraph(
            f"{cost.clients} clients moved {megabytes(moved)} MB of files, "
            f"{cost.of_fedavg_percent:.1f} % of the {megabytes(dense)} MB that FedAvg in float32 "
            "would have moved in as many rounds."
        )
        rows = {
            "sent, this run": cost.sent_bytes / 1e6,
            "sent, FedAvg": cost.fedavg_sent_bytes / 1e6,
            "received, this run": cost.received_bytes / 1e6,
            "received, FedAvg": cost.fedavg_received_bytes / 1e6,
        }
        yield plots.amounts("Megabytes moved, against FedAvg", rows, unit="MB, all clients")
    yield paragraph(
        f"Beside the files: {megabytes(cost.control_bytes)} MB of headers and messages. "
        f"Local work of a participation: {report.run.budget}, the same as FedAvg."
    )
    yield paragraph(_time_spent(cost))
    share = cost.rejected
    yield paragraph(
        f"{share.count} of {share.of} delivered updates were refused; {cost.unpublished_rounds} "
        "rounds ended without a version."
    )
    yield note(
        "FedAvg in float32: 4 bytes for every element that is not frozen, sent once and received "
        "once for each participation, and received once more to be evaluated; a calculation, "
        "without file headers. Its seconds were not measured."
    )
    yield _cost_table(report)


def _time_spent(cost: RunCost) -> str:
    return (
        f"Elapsed: {_seconds(cost.elapsed_seconds)} from the first round opened to the last one "
        f"published. In {cost.rounds_timed} published rounds {_seconds(cost.collecting_seconds)} "
        f"went by waiting for clients and {_seconds(cost.aggregating_seconds)} in summing and "
        f"publishing. A client spent {_seconds(cost.client_seconds)} (median of "
        f"{cost.client_seconds_known}) from being asked to a complete upload, in all rounds "
        "together."
    )


def _cost_table(report: RunReport) -> str:
    heads = ["client", "rounds (n)", "sent, MB", "received, MB", "messages, MB"]
    heads += ["FedAvg sent, MB", "FedAvg received, MB", "seconds"]
    rows: list[list[object]] = []
    for client in report.clients:
        c = client.cost
        control = c.control_sent_bytes + c.control_received_bytes
        sizes = (c.sent_bytes, c.received_bytes, control, c.fedavg_sent_bytes)
        cells = [megabytes(size) for size in (*sizes, c.fedavg_received_bytes)]
        spent = "–" if c.seconds is None else f"{c.seconds:.1f}"
        rows.append([client.name, client.participations, *cells, spent])
    return table("What each client spent.", heads, rows)


def _seconds(value: float | None) -> str:
    if value is None:
        return "an unknown time"
    return f"{value:.1f} seconds" if value < 600 else f"{value / 60:.1f} minutes"


# --- may we roll out ---------------------------------------------------------------------------


def _rollout(report: RunReport) -> Iterable[str]:
    yield heading("May we roll out?")
    yield paragraph("The facts. This report does not decide: who does should know all of these.")
    rows = [[f.text, _known(f.value), f.unit, f.n] for f in report.facts]
    yield table("Facts, each with its value, unit and n.", ("fact", "value", "unit", "n"), rows)


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def _method(report: RunReport) -> Iterable[str]:
    yield heading("How to read this")
    for name in MODELS:
        what = effects.BASELINES.get(name, "the client's own model as it was last trained")
        yield paragraph(f"{NAMES[name]}: {what}.")
    paired = any(gain.paired for c in report.clients for gain in c.gains.values())
    pairs = "paired examples" if paired else "independent examples (too wide, not too narrow)"
    yield note(
        f"Intervals are 95 %. Accuracy: Wilson. Gain of a client: Newcombe, for {pairs}. Mean over "
        f"clients: bootstrap, {effects.RESAMPLES:,} resamples of clients with seed "
        f"{report.run.seed}, from {effects.ENOUGH_CLIENTS} clients on. They speak of chance in the "
        "held-out examples and in which clients took part, not of another seed, other data or "
        "later times."
    )
    yield note(
        f"Clients with fewer than {report.suppression.min_examples} held-out examples send no "
        f"scores. Format: {report.format}."
    )


# --- pieces ------------------------------------------------------------------------------------


def _of(names: Sequence[str], n: int) -> str:
    return f"{len(names)} of {n} clients"


def _listed(names: Sequence[str]) -> str:
    return f"They are: {', '.join(names)}." if names else "There are none."
