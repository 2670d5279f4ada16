"""What was personalized: the section of a report's page about masks.

Owns its wording and plots. Must not compute figures: they are in the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedselect import plots
from fedselect.pages import heading, megabytes, note, paragraph, table
from fedselect.reportdoc import RunReport, TensorReport
from fedselect.space import Role

MOST_LINES = plots.LABELLED  # tensors that are told apart over the rounds


def personalized(report: RunReport) -> Iterable[str]:
    """The section: shares, over time, by tensor, and how far clients agree."""
    masks = report.masks
    yield heading("What was personalized?")
    shares = [client.personal_percent for client in report.clients]
    if shares:
        yield paragraph(
            f"Of the elements that could be personal or shared, {min(shares):.1f} % to "
            f"{max(shares):.1f} % are personal at the end ({len(shares)} clients). Only which "
            "elements are personal is known here; their values never left the clients."
        )
    if masks.clients:
        yield from _over_time(report)
    yield from _tensors(report)
    yield from _layers_over_time(report)
    yield from _agreement(report)
    yield from _rerun(report)
    if not masks.single_clients:
        yield note("Masks of single clients are shown to keys with the scope mask:read alone.")
    reading = masks.reading
    yield note(
        f"From {reading.read} of {reading.wanted} stored masks "
        f"({megabytes(reading.read_bytes)} MB; {reading.missing} deleted since, "
        f"{reading.left_out} beyond the limit of {megabytes(reading.limit_bytes)} MB) of "
        + (f"{len(masks.clients)} of " if masks.single_clients else "")
        + f"{masks.clients_known} clients, "
        + ("every round." if masks.every == 1 else f"one round in {masks.every}.")
    )


def _over_time(report: RunReport) -> Iterable[str]:
    clients = report.masks.clients
    yield heading("Personal share over the rounds", 3)
    shares = {c.name: list(zip(c.rounds, c.personal_percent, strict=True)) for c in clients}
    top = max(100.0 if value > 50 else 50.0 for line in shares.values() for _, value in line)
    title = "Personal share of each client over the rounds"
    yield plots.lines(title, shares, x="round", y="personal, %", top=top)
    steps = {c.name: list(zip(c.rounds, c.jaccard, strict=True)) for c in clients}
    if any(value is not None for line in steps.values() for _, value in line):
        yield heading("How much a client's mask stays the same", 3)
        title = "Similarity of each client's successive masks over the rounds"
        yield plots.lines(title, steps, x="round", y="Jaccard", top=1.0)
        yield note(
            "Jaccard index of a mask and the one before: elements chosen in both, divided by those "
            "chosen in either. 1: nothing changed."
        )


def _tensors(report: RunReport) -> Iterable[str]:
    masks = report.masks
    if not masks.tensors:
        return
    n = len(masks.tensors[0].clients_percent)
    of = f"{n} clients" if masks.single_clients else "the clients"
    yield heading(f"Personal share of each tensor, last masks of {of}", 3)
    rows = {each.name: each.clients_percent or [each.mean_percent] for each in masks.tensors}
    unit = "personal, % (bar: mean, line: lowest to highest client)"
    yield plots.spans("Personal share of each tensor", rows, unit=unit)
    heads = ("tensor", "role", "elements (n)", "mean", "lowest", "highest")
    lines = [_tensor_row(tensor) for tensor in masks.tensors]
    yield table(f"Personal share in %, over {of}.", heads, lines)
    if masks.tensors_left_out:
        yield note(f"{masks.tensors_left_out} smaller tensors are left out.")


def _tensor_row(tensor: TensorReport) -> Sequence[object]:
    every = tensor.clients_percent
    ends = [f"{min(every):.1f}", f"{max(every):.1f}"] if every else ["–", "–"]
    cells = [f"{tensor.mean_percent:.1f}", *ends]
    return [tensor.name, tensor.role, f"{tensor.elements:,}", *cells]


def _agreement(report: RunReport) -> Iterable[str]:
    masks, overlap = report.masks, report.masks.overlap
    if overlap is None:
        least = report.suppression.min_clients
        yield note(f"Masks are compared, and tensors shown, from {least} clients on.")
        return
    yield heading("Do clients choose the same elements?", 3)
    if overlap.mean is None or overlap.by_chance is None:
        yield paragraph(
            "The policy has chosen no element: apart from what roles decide, all is shared."
        )
        return
    of = f"{len(overlap.clients)} clients" if masks.single_clients else "clients"
    yield paragraph(
        f"Two clients agree on {100 * overlap.mean:.1f} % of what either chose, in the mean over "
        f"all pairs of {of}; choosing as many of each tensor blindly would give "
        f"{100 * overlap.by_chance:.1f} %."
    )
    if not masks.single_clients:
        return
    yield plots.matrix("Agreement of the clients' masks, in %", overlap.clients, overlap.jaccard)
    yield note("Columns stand in the order of the rows. The darker, the more two clients agree.")
    if overlap.tree:
        yield heading("Which clients choose alike?", 3)
        joins = [(each.one, each.other, each.distance) for each in overlap.tree]
        unit = "1 − Jaccard (average linkage)"
        yield plots.dendrogram("Clients by their masks", overlap.clients, joins, unit=unit)
        yield note(
            "Clients, or groups of them, are joined where their masks are on average as far apart "
            "as the scale says: the further left, the more alike. 1: nothing in common."
        )


def _layers_over_time(report: RunReport) -> Iterable[str]:
    masks = report.masks
    chosen = [each for each in masks.tensors if each.role == Role.SELECTABLE.value]
    largest = sorted(chosen, key=lambda each: -each.elements)[:MOST_LINES]
    rows = {
        each.name: list(zip(masks.rounds, each.rounds_percent, strict=True))
        for each in largest
        if each.rounds_percent
    }
    if not any(value is not None for line in rows.values() for _, value in line):
        return
    yield heading("Personal share of each tensor over the rounds", 3)
    values = [value for line in rows.values() for _, value in line if value is not None]
    top = 100.0 if max(values) > 50 else 50.0
    title = "Personal share of each tensor over the rounds, mean over clients"
    yield plots.lines(title, rows, x="round", y="personal, %", top=top)
    if len(chosen) > len(largest):
        yield note(f"The {len(largest)} largest of {len(chosen)} tensors.")


def _rerun(report: RunReport) -> Iterable[str]:
    rerun = report.masks.rerun
    if rerun is None:
        return
    yield heading("Would another seed choose the same?", 3)
    if rerun.mean_again_percent is None or rerun.mean_chance_percent is None:
        least = report.suppression.min_clients
        yield paragraph(f"Not said: it takes {least} clients with a mask in both runs.")
        return
    known = [each for each in rerun.clients if each.again_percent is not None]
    of = f"{len(known)} clients" if report.masks.single_clients else "the clients"
    yield paragraph(
        f"Of what was chosen here, run {rerun.name} with seed {rerun.seed} chose "
        f"{rerun.mean_again_percent:.1f} % again, in the mean over {of}; choosing "
        f"as many of each tensor blindly would give {rerun.mean_chance_percent:.1f} %."
    )
    if not known:
        return
    rows = [(c.name, f"{c.again_percent:.1f}", f"{c.chance_percent:.1f}") for c in known]
    heads = ("client", "chosen again, %", "by chance, %")
    yield table(f"Last masks of both runs, {len(known)} clients.", heads, rows)
