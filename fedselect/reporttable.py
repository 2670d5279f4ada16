"""The report of a run as a table: one line per client.

Owns its columns. Must not compute figures: they are in the document.
"""

from __future__ import annotations

import csv
import io

from fedselect import effects
from fedselect.reportdoc import ClientCost, ClientReport, RunReport
from fedselect.reporting import MODELS


def table(report: RunReport) -> str:
    """The clients as CSV (RFC 4180), one line each; empty where something is not known."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(_row(each) for each in report.clients)
    return out.getvalue()


_FIRST = ("client_id", "name", "withheld", "participations", "personal_percent", "gated")
_LAST = ("divergence", "label_distance")
COLUMNS = (
    *_FIRST,
    *(f"{m}_{part}" for m in MODELS for part in ("examples", "percent", "low", "high")),
    *(f"gain_{b}_{part}" for b in effects.BASELINES for part in ("points", "low", "high")),
    *(f"{word}_{b}" for b in effects.JUDGED for word in ("worse", "harmed")),
    *ClientCost.model_fields,
    *_LAST,
)


def _row(client: ClientReport) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(client, name) for name in (*_FIRST, *_LAST)}
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
