"""The comparison of a run's arms as one HTML page: which policy, how sure, at what cost.

Owns wording and layout; the frame is ``pages``'s. Must not compute figures: they are in the
document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedselect import effects, plots
from fedselect.comparedoc import ArmResult, Comparison, Difference
from fedselect.pages import bullets, frame, heading, megabytes, note, paragraph, table
from fedselect.reportdoc import Accuracy, Interval
from fedselect.reporting import AGAINST

SIGNS = {"better": "gain", "worse": "loss", "undecided": "undecided"}
MOST_SHOWN = 60  # clients in the table


def page(comparison: Comparison) -> str:
    """The whole page."""
    run = comparison.run
    subtitle = (
        f"Model {run.model}, {len(comparison.arms)} arms ({run.mode}), {run.rounds} rounds each of "
        f"{run.budget}; state {run.state.value}; made {comparison.made_at:%Y-%m-%d %H:%M} UTC."
    )
    sections = (_which, _accuracy, _differences, _harm, _cost, _clients, _method)
    title = f"Run {run.name}: its arms compared"
    return frame(title, subtitle, (section(comparison) for section in sections))


def _which(comparison: Comparison) -> Iterable[str]:
    found = comparison.recommendation
    yield heading("1. Which policy should this federation use?")
    if found.policy is None:
        yield paragraph("Nothing can be said.")
    else:
        yield paragraph(f"{found.policy}. {_certainty(comparison)}")
    yield bullets(reason.text for reason in found.reasons)


def _certainty(comparison: Comparison) -> str:
    found = comparison.recommendation
    if found.can_tell:
        whom = "clients like these" if found.scope == "population" else "these clients alone"
        return f"The data can tell, for {whom}."
    if found.tied:
        even = ", ".join([name for name in (found.leader, *found.tied) if name])
        return f"The data cannot tell {even} apart; it is the safer or cheaper one of them."
    return "It leads, but a short trial is no evidence; run a long pilot before you decide."


def _accuracy(comparison: Comparison) -> Iterable[str]:
    known = [arm for arm in comparison.arms if arm.pooled is not None]
    yield heading("2. What did the clients' own models score?")
    if not known:
        least = comparison.suppression.min_clients
        yield paragraph(f"Fewer than {least} clients have reported scores in every arm.")
        return
    bars = [_bar(arm, arm.pooled) for arm in known if arm.pooled is not None]
    title = "Pooled held-out accuracy of each arm, with 95 % intervals"
    yield plots.intervals(title, bars, unit="accuracy in %", mark=0.0)
    heads = ["arm", "clients (n)", "examples (n)", "pooled", "95 %, clients", "95 %, examples"]
    heads += ["merged model", "mean client", "worst client"]
    yield table("Accuracy in % on held-out data.", heads, [_accuracy_row(arm) for arm in known])


def _bar(arm: ArmResult, pooled: Accuracy) -> plots.Bar:
    between = arm.pooled_over_clients or pooled.interval
    return plots.Bar(arm.name, pooled.percent, (between.low, between.high))


def _accuracy_row(arm: ArmResult) -> Sequence[object]:
    pooled, pre, worst = arm.pooled, arm.pooled_pre, arm.worst
    return [
        f"{arm.name} (control)" if arm.control else arm.name,
        arm.clients,
        "–" if pooled is None else pooled.examples,
        "–" if pooled is None else f"{pooled.percent:.1f}",
        _between(arm.pooled_over_clients),
        "–" if pooled is None else _between(pooled.interval),
        "–" if pre is None else f"{pre.percent:.1f}",
        "–" if arm.mean_percent is None else f"{arm.mean_percent:.1f}",
        "–" if worst is None else f"{worst.percent:.1f} ({worst.name})",
    ]


def _between(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return "too few clients"
    return f"{found.low:{sign}.1f} to {found.high:{sign}.1f}"


def _differences(comparison: Comparison) -> Iterable[str]:
    found = comparison.differences
    if not found:
        return
    yield heading("3. Does it differ?")
    bars = [
        plots.Bar(
            f"{each.arm} − {each.against}",
            each.pooled_points,
            (each.decisive.low, each.decisive.high),
            SIGNS[each.verdict],
        )
        for each in found
    ]
    title = "Differences between arms, with the intervals that decide"
    yield plots.intervals(title, bars, unit="pooled accuracy, percentage points", mark=0.0)
    heads = ["difference", "clients (n)", "pooled", "95 %, clients", "95 %, examples"]
    heads += ["decides", "mean client", "worst client", "verdict"]
    rows = [_difference_row(each) for each in found]
    yield table("Differences in percentage points.", heads, rows)


def _difference_row(each: Difference) -> Sequence[object]:
    n = each.clients if each.paired else f"{each.clients} / {each.against_clients}"
    verdict = "not distinguishable" if each.verdict == "undecided" else each.verdict
    return [
        f"{each.arm} − {each.against}",
        n,
        f"{each.pooled_points:+.1f}",
        _between(each.over_clients, "+"),
        _between(each.over_examples, "+"),
        f"{_between(each.decisive, '+')} ({each.level_percent:.1f} %, {each.unit})",
        f"{each.mean_points:+.1f}",
        f"{each.worst_points:+.1f}",
        verdict,
    ]


def _harm(comparison: Comparison) -> Iterable[str]:
    rows = [
        [arm.name, words, found.clients, f"{found.mean_points:+.1f}"]
        + [len(each or ()) for each in (found.gained, found.worse, found.harmed)]
        for arm in comparison.arms
        for baseline, words in AGAINST.items()
        if (found := arm.effects.get(baseline)) is not None
    ]
    if rows:
        yield heading("4. Who gained, who lost?")
        heads = ["arm", "against", "clients (n)", "mean gain", "gained clearly", "worse", "harmed"]
        yield table("Clients by what an arm did for them.", heads, rows)


def _cost(comparison: Comparison) -> Iterable[str]:
    known = [arm for arm in comparison.arms if arm.participations is not None]
    if not known:
        return
    yield heading("5. What did it cost?")
    rows = {arm.name: (arm.sent_bytes_each or 0.0) / 1e6 for arm in known}
    yield plots.amounts("Update files of a client, mean", rows, unit="MB sent")
    heads = [
        "arm",
        "participations",
        "sent, MB a client",
        "sent, MB",
        "received, MB",
        "control, MB",
    ]
    lines = [
        [
            arm.name,
            f"{arm.participations:g}",
            megabytes(arm.sent_bytes_each or 0.0),
            megabytes(arm.sent_bytes),
            megabytes(arm.received_bytes),
            megabytes(arm.control_bytes),
        ]
        for arm in known
    ]
    yield table("Bytes as the clients counted them.", heads, lines)
    yield note("A file that two arms share is fetched once and counts for the arm that came first.")


def _clients(comparison: Comparison) -> Iterable[str]:
    if not comparison.clients:
        return
    yield heading("6. Every client")
    names = [arm.name for arm in comparison.arms]
    by_client: dict[str, dict[str, str]] = {}
    for row in comparison.clients:
        cells = by_client.setdefault(row.name, {})
        cells[row.arm] = f"{row.accuracy.percent:.1f} (n={row.accuracy.examples})"
    shown = list(by_client.items())[:MOST_SHOWN]
    rows = [[client, *(cells.get(name, "–") for name in names)] for client, cells in shown]
    left = len(by_client) - len(shown)
    caption = "Accuracy in % of the client's own model."
    caption += f" {left} more are in the CSV." if left else ""
    yield table(caption, ["client", *names], rows)


def _method(comparison: Comparison) -> Iterable[str]:
    yield heading("How to read this")
    parallel = comparison.run.mode == "parallel"
    yield paragraph(
        "Every client did every arm; compared are those with a score in all of them."
        if parallel
        else "Every client did one arm, drawn by a hash; differences are between groups."
    )
    yield note(
        f"Intervals over clients: bootstrap, {effects.RESAMPLES:,} resamples with seed "
        f"{comparison.run.seed}, from {effects.ENOUGH_CLIENTS} clients on. Over examples: "
        "Newcombe, independent, so rather too wide. What decides is corrected for the pairs of "
        "arms (Bonferroni). Worse, harmed, gained: as in the report of a run, at 95 % for each "
        "client. Nothing here speaks of another seed, other data or later times."
    )
    yield note(
        f"Clients with fewer than {comparison.suppression.min_examples} held-out examples send no "
        f"scores. Format: {comparison.format}."
    )
