"""The explanation of a client's mask as one HTML page: plain sentences first, then the figures.

Owns wording and layout; the frame and its pieces are ``pages``. Must not compute figures: they are
in the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedselect import effects, plots
from fedselect.explaindocs import LEAST_ELEMENTS, MOST_ABLATED, Explanation, TensorExplanation
from fedselect.pages import bullets, frame, heading, note, paragraph, table

MOST_DRAWN = 40  # tensors of a plot


def page(found: Explanation) -> str:
    """The whole page."""
    title = f"{found.client_name}: what of its model is its own, and why"
    run = "explained at the site" if found.run_name is None else f"run {found.run_name}"
    subtitle = (
        f"Model {found.model}, {run}, policy {found.policy}; mask of round {found.round}; "
        f"made {found.made_at:%Y-%m-%d %H:%M} UTC."
    )
    sections = (_summary, _layers, _worth, _chosen, _agreement, _method)
    return frame(title, subtitle, (section(found) for section in sections))


def _summary(found: Explanation) -> Iterable[str]:
    yield heading("In short")
    yield bullets(found.summary)


def _layers(found: Explanation) -> Iterable[str]:
    yield heading("Layer by layer")
    if not found.tensors:
        yield paragraph("The policy can make nothing of this model personal.")
        return
    yield bullets(each.text for each in found.tensors)
    if found.tensors_left_out:
        yield note(f"{found.tensors_left_out} smaller tensors are left out.")
    drawn = found.tensors[:MOST_DRAWN]
    rows = {each.name: [each.percent] for each in drawn}
    yield plots.spans("Share of each layer that is its own", rows, unit="its own, %")


def _worth(found: Explanation) -> Iterable[str]:
    yield heading("What is it worth?")
    measured = found.measured
    if measured is None or measured.whole is None:
        yield paragraph("Nothing can be said here: see above.")
        return
    known = [each for each in found.tensors if each.lost is not None]
    if known:
        bars = [_bar(each) for each in known[:MOST_DRAWN]]
        title = "Accuracy lost without the own part of each layer, with 95 % intervals"
        yield plots.intervals(title, bars, unit="percentage points lost without it")
        chance = (1 - effects.LEVEL) / 2 * len(known)
        yield note(
            "Dot: accuracy of the model with all that is its own, minus that with the shared "
            "values in place of this layer's own part. Green: all above 0, the part is needed; "
            "red: all below 0, the shared values would be better; grey: so many examples cannot "
            f"tell. With {len(known)} intervals, chance alone shows about {chance:.1f} on either "
            "side where there is no effect."
        )
    which = "the version" if measured.version is None else f"version {measured.version}"
    yield note(
        f"Measured by the site's agent on its own held-out examples with {which}, "
        f"{measured.at:%Y-%m-%d %H:%M} UTC. Of many layers the {MOST_ABLATED} with the most own "
        "elements. Losses of single layers do not add up to that of all."
    )


def _bar(each: TensorExplanation) -> plots.Bar:
    if each.lost is None:
        raise ValueError("nothing was measured of this tensor")
    sign = {"loss": "gain", "gain": "loss"}.get(each.lost.sign, each.lost.sign)
    ends = (each.lost.interval.low, each.lost.interval.high)
    return plots.Bar(each.name, each.lost.points, ends, sign)


def _chosen(found: Explanation) -> Iterable[str]:
    yield heading("How was it chosen?")
    yield paragraph(
        "The policy watches how far each parameter moves in the site's own training (Δ) and makes "
        "those personal that move furthest, some of each layer at a time. A parameter that moves a "
        "lot is one on which this site's data and the others' may disagree."
    )
    heads = ["layer", "elements", "its own", "share, %", "rank", "threshold of Δ"]
    heads += ("Δ of the chosen", "Δ of the others", "distance from the shared, %")
    rows = [_row(each) for each in found.tensors]
    yield table("Each layer, with what decided.", heads, rows)
    yield note(
        "Threshold: the smallest Δ taken at the last growth. Δ of the chosen: mean, each when it "
        "was chosen. Δ of the others: mean of those that stayed shared at the last growth. "
        f"–: not kept by the agent, not what decided, or fewer than {LEAST_ELEMENTS} elements."
    )


def _row(each: TensorExplanation) -> Sequence[object]:
    values = (each.threshold, each.delta_chosen, each.delta_shared, each.distance_percent)
    first = (each.name, f"{each.elements:,}", f"{each.chosen:,}", f"{each.percent:.1f}", each.rank)
    return [*first, *("–" if value is None else f"{value:.3g}" for value in values)]


def _agreement(found: Explanation) -> Iterable[str]:
    yield heading("Did others choose the same?")
    met = [each for each in found.tensors if each.others_percent is not None]
    if not met:
        least = found.suppression.min_clients
        yield paragraph(f"Not said: it takes a mask of its own and {least} others to compare with.")
        return
    heads = ("layer", "others that chose it too, %", "by chance, %", "nobody else chose, %")
    rows = [[each.name, *(f"{value:.1f}" for value in _shares(each))] for each in met]
    yield table(f"Means over its chosen elements, {found.compared} other clients.", heads, rows)
    yield note(
        "Close to chance: the choice says nothing of what the sites have in common. Which elements "
        "anybody chose is in no figure here."
    )


def _shares(each: TensorExplanation) -> Iterable[float]:
    for value in (each.others_percent, each.chance_percent, each.alone_percent):
        yield value or 0.0


def _method(found: Explanation) -> Iterable[str]:
    yield heading("How to read this")
    yield paragraph(
        "Personal: kept and trained at the site alone. Shared: the mean over all sites that share "
        "it, the same everywhere. The model that is scored is the shared version with the site's "
        "personal part merged in."
    )
    yield note(
        "Intervals are 95 %: accuracy Wilson's, losses Newcombe's for paired shares. They speak of "
        "chance in the held-out examples, not of other data or later times. That a part is worth "
        "something does not say that another choice of as many would be worth less. "
        f"Scores of fewer than {found.suppression.min_examples} examples never leave a site. "
        f"Format: {found.format}."
    )
