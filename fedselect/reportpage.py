"""The report of a run as one HTML page: five questions, answered in plain words, tables and plots.

Owns wording and layout. The page stands alone: no script, nothing fetched, one stylesheet, which is
named by its digest in the page's own content security policy. All text from outside is escaped.
Must not compute figures: they are in the document.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from fedselect import effects, plots
from fedselect.reportdoc import ClientReport, Population, RunCost, RunReport, TensorReport
from fedselect.reporting import AGAINST as JUDGED
from fedselect.reporting import MODELS

STYLE = """
body{font:15px/1.5 sans-serif;color:#222;max-width:1040px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:0}
h2{font-size:1.2em;margin:2em 0 .3em;border-bottom:1px solid #ccc}
h3{font-size:1em;margin:1.3em 0 .2em}p{margin:.4em 0}
table{border-collapse:collapse;margin:.6em 0}caption{text-align:left;color:#555;font-size:.9em}
th,td{padding:.2em .7em;border-bottom:1px solid #e4e4e4;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}td:not(:first-child){white-space:nowrap}
th{border-bottom:2px solid #999;font-weight:600}.note{color:#555;font-size:.9em}
svg{max-width:100%;height:auto;display:block}.scroll{overflow-x:auto}
""".strip()
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CSP = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"
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
    sections = (_gained, _lost, _cost, _masks, _rollout, _method)
    body = "".join(f"<section>{''.join(section(report))}</section>" for section in sections)
    version = "none yet" if run.version is None else f"version {run.version}"
    subtitle = (
        f"Model {run.model} ({run.elements:,} elements), policy {run.policy}, {run.wire} on the "
        f"wire; state {run.state.value}, {run.published} of {run.rounds} rounds published; "
        f"evaluated: {version}; report made {report.made_at:%Y-%m-%d %H:%M} UTC."
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p>{body}</body></html>'
    )


# --- who gained, who lost ----------------------------------------------------------------------


def _gained(report: RunReport) -> Iterable[str]:
    yield "<h2>1. Who gained?</h2>"
    yield from _too_few(report)
    for baseline, found in _judged(report):
        yield _p(_mean(AGAINST[baseline], found))
        yield _p(
            f"{_of(found.gained, found.clients)} gained clearly: the whole 95 % interval lies "
            f"above 0. {_listed(found.gained)}"
        )
    for baseline in JUDGED:
        if any(baseline in client.gains for client in report.clients):
            yield f"<h3>Gain of each client against {AGAINST[baseline]}</h3>"
            yield _forest(report, baseline)
    if any(client.gains for client in report.clients):
        yield _note(
            "Dot: accuracy of the personal model minus that of the other one, trained for as many "
            "steps, on the client's own held-out examples, in percentage points. Line: 95 % "
            "interval. Green: all above 0; red: all below 0; grey: so many examples cannot tell. "
            "Dashed: −2 points."
        )
    if report.effects:
        yield "<h3>Gain against every baseline, all clients</h3>"
        rows = {f"against {AGAINST[name]}": _points(report, name) for name in report.effects}
        title = "Gain of every client against each baseline"
        yield plots.strips(title, rows, unit="gain in percentage points (bar: median client)")
        yield _populations(report)
    if report.clients:
        yield "<h3>Accuracy of every client</h3>"
        yield _accuracy_table(report)


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
    return _table("Gain over all clients, in percentage points.", heads, rows)


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
    return _table("Accuracy in % on own held-out data, with 95 % intervals.", heads, rows)


def _lost(report: RunReport) -> Iterable[str]:
    yield "<h2>2. Who lost?</h2>"
    yield from _too_few(report)
    for baseline, found in _judged(report):
        yield from _losses(report, baseline, found)
    for name, why in report.unmeasured.items():
        yield _note(f"Not measured in this run ({name}): {why}")


def _losses(report: RunReport, baseline: str, found: Population) -> Iterable[str]:
    n, against = found.clients, AGAINST[baseline]
    worse, harmed = found.worse or [], found.harmed or []
    yield _p(
        f"Against {against} {_of(harmed, n)} are harmed: the upper end of the 95 % interval of "
        f"their gain is below 0. {_listed(harmed)}"
    )
    yield _p(
        f"Against {against} {_of(worse, n)} are worse: more than 2 percentage points below it, "
        f"whatever the interval. {_listed(worse)}"
    )
    chance = (1 - effects.LEVEL) / 2 * n
    yield _note(
        f"With {n} intervals of 95 %, chance alone shows about {chance:.1f} clients as harmed "
        "where there is no effect at all."
    )
    rows = [_loss_row(c, baseline) for c in report.clients if c.name in {*worse, *harmed}]
    heads = ("client", "gain", "95 % interval", "held-out examples (n)", "worse", "harmed")
    if rows:
        caption = f"Clients that lost against {against}, in percentage points."
        yield _table(caption, heads, rows)
    yield _p(
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
    yield _p(
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
    yield "<h2>3. What did it cost?</h2>"
    if cost.clients and cost.of_fedavg_percent is not None:
        moved, dense = cost.sent_bytes + cost.received_bytes, cost.fedavg_sent_bytes
        dense += cost.fedavg_received_bytes
        yield _p(
            f"{cost.clients} clients moved {_mb(moved)} MB of files, {cost.of_fedavg_percent:.1f} "
            f"% of the {_mb(dense)} MB that FedAvg in float32 would have moved in as many rounds."
        )
        rows = {
            "sent, this run": cost.sent_bytes / 1e6,
            "sent, FedAvg": cost.fedavg_sent_bytes / 1e6,
            "received, this run": cost.received_bytes / 1e6,
            "received, FedAvg": cost.fedavg_received_bytes / 1e6,
        }
        yield plots.amounts("Megabytes moved, against FedAvg", rows, unit="MB, all clients")
    yield _p(
        f"Beside the files: {_mb(cost.control_bytes)} MB of headers and messages. "
        f"Local work of a participation: {report.run.budget}, the same as FedAvg."
    )
    yield _p(_time_spent(cost))
    share = cost.rejected
    yield _p(
        f"{share.count} of {share.of} delivered updates were refused; {cost.unpublished_rounds} "
        "rounds ended without a version."
    )
    yield _note(
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
        cells = [_mb(size) for size in (*sizes, c.fedavg_received_bytes)]
        spent = "–" if c.seconds is None else f"{c.seconds:.1f}"
        rows.append([client.name, client.participations, *cells, spent])
    return _table("What each client spent.", heads, rows)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "an unknown time"
    return f"{value:.1f} seconds" if value < 600 else f"{value / 60:.1f} minutes"


# --- what was personalized ---------------------------------------------------------------------


def _masks(report: RunReport) -> Iterable[str]:
    masks = report.masks
    yield "<h2>4. What was personalized?</h2>"
    shares = [client.personal_percent for client in report.clients]
    if shares:
        yield _p(
            f"Of the elements that could be personal or shared, {min(shares):.1f} % to "
            f"{max(shares):.1f} % are personal at the end ({len(shares)} clients). Only which "
            "elements are personal is known here; their values never left the clients."
        )
    if masks.clients:
        yield from _over_time(report)
    yield from _tensors(report)
    yield from _agreement(report)
    reading = masks.reading
    yield _note(
        f"From {reading.read} of {reading.wanted} stored masks ({_mb(reading.read_bytes)} MB; "
        f"{reading.missing} deleted since, {reading.left_out} beyond the limit of "
        f"{_mb(reading.limit_bytes)} MB) of {len(masks.clients)} of {masks.clients_known} clients, "
        + ("every round." if masks.every == 1 else f"one round in {masks.every}.")
    )


def _over_time(report: RunReport) -> Iterable[str]:
    clients = report.masks.clients
    yield "<h3>Personal share over the rounds</h3>"
    shares = {c.name: list(zip(c.rounds, c.personal_percent, strict=True)) for c in clients}
    top = max(100.0 if value > 50 else 50.0 for line in shares.values() for _, value in line)
    title = "Personal share of each client over the rounds"
    yield plots.lines(title, shares, x="round", y="personal, %", top=top)
    steps = {c.name: list(zip(c.rounds, c.jaccard, strict=True)) for c in clients}
    if any(value is not None for line in steps.values() for _, value in line):
        yield "<h3>How much a client's mask stays the same</h3>"
        title = "Similarity of each client's successive masks over the rounds"
        yield plots.lines(title, steps, x="round", y="Jaccard", top=1.0)
        yield _note(
            "Jaccard index of a mask and the one before: elements chosen in both, divided by those "
            "chosen in either. 1: nothing changed."
        )


def _tensors(report: RunReport) -> Iterable[str]:
    masks = report.masks
    if not masks.tensors:
        return
    n = len(masks.tensors[0].clients_percent)
    yield f"<h3>Personal share of each tensor, last masks of {n} clients</h3>"
    rows = {tensor.name: tensor.clients_percent for tensor in masks.tensors}
    unit = "personal, % (bar: mean, line: lowest to highest client)"
    yield plots.spans("Personal share of each tensor", rows, unit=unit)
    heads = ("tensor", "role", "elements (n)", "mean", "lowest", "highest")
    lines = [_tensor_row(tensor) for tensor in masks.tensors]
    yield _table(f"Personal share in %, over {n} clients.", heads, lines)
    if masks.tensors_left_out:
        yield _note(f"{masks.tensors_left_out} smaller tensors are left out.")


def _tensor_row(tensor: TensorReport) -> Sequence[object]:
    every = tensor.clients_percent
    shares = (tensor.mean_percent, min(every), max(every))
    cells = [f"{share:.1f}" for share in shares]
    return [tensor.name, tensor.role, f"{tensor.elements:,}", *cells]


def _agreement(report: RunReport) -> Iterable[str]:
    overlap = report.masks.overlap
    if overlap is None:
        least = report.suppression.min_clients
        yield _note(f"Masks are compared, and tensors shown, from {least} clients on.")
        return
    yield "<h3>Do clients choose the same elements?</h3>"
    if overlap.mean is None or overlap.by_chance is None:
        yield _p("The policy has chosen no element: apart from what roles decide, all is shared.")
        return
    yield _p(
        f"Two clients agree on {100 * overlap.mean:.1f} % of what either chose, in the mean over "
        f"all pairs of {len(overlap.clients)} clients; choosing as many of each tensor blindly "
        f"would give {100 * overlap.by_chance:.1f} %."
    )
    yield plots.matrix("Agreement of the clients' masks, in %", overlap.clients, overlap.jaccard)
    yield _note("Columns stand in the order of the rows. The darker, the more two clients agree.")


# --- may we roll out ---------------------------------------------------------------------------


def _rollout(report: RunReport) -> Iterable[str]:
    yield "<h2>5. May we roll out?</h2>"
    yield _p("The facts. This report does not decide: who does should know all of these.")
    rows = [[f.text, _known(f.value), f.unit, f.n] for f in report.facts]
    yield _table("Facts, each with its value, unit and n.", ("fact", "value", "unit", "n"), rows)


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def _method(report: RunReport) -> Iterable[str]:
    yield "<h2>How to read this</h2>"
    for name in MODELS:
        what = effects.BASELINES.get(name, "the client's own model as it was last trained")
        yield _p(f"{NAMES[name]}: {what}.")
    paired = any(gain.paired for c in report.clients for gain in c.gains.values())
    pairs = "paired examples" if paired else "independent examples (too wide, not too narrow)"
    yield _note(
        f"Intervals are 95 %. Accuracy: Wilson. Gain of a client: Newcombe, for {pairs}. Mean over "
        f"clients: bootstrap, {effects.RESAMPLES:,} resamples of clients with seed "
        f"{report.run.seed}, from {effects.ENOUGH_CLIENTS} clients on. They speak of chance in the "
        "held-out examples and in which clients took part, not of another seed, other data or "
        "later times."
    )
    yield _note(
        f"Clients with fewer than {report.suppression.min_examples} held-out examples send no "
        f"scores. Format: {report.format}."
    )


# --- pieces ------------------------------------------------------------------------------------


def _p(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _of(names: Sequence[str], n: int) -> str:
    return f"{len(names)} of {n} clients"


def _listed(names: Sequence[str]) -> str:
    return f"They are: {', '.join(names)}." if names else "There are none."


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    first = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )
