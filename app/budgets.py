"""Budgets: what is written down when a run's differential privacy is spent.

Owns the ledger entry ``budget.reached``. The figures are ``fedselect.accounting``'s; that the run
ends is decided in ``rounds``.
"""

from __future__ import annotations

from app import ledger
from app.db import Tx
from app.tables import Run
from fedselect.accounting import epsilon, rounds_allowed
from fedselect.policies import RunSettings


def reached(tx: Tx, run: Run, settings: RunSettings) -> str | None:
    """Note that one more round would spend more than the budget; returns why, in words."""
    dp = settings.privacy.dp
    if dp is None:
        return None
    rounds = rounds_allowed(settings)
    spent = epsilon(dp.grid.multiplier, rounds, dp.delta)
    # Ledger entries hold no floats: their text form depends on who writes them.
    body: dict[str, str | int] = {
        "rounds": rounds,
        "spent": f"{spent:.6g}",
        "epsilon": f"{dp.epsilon:.6g}",
        "delta": f"{dp.delta:.6g}",
    }
    ledger.append(tx, "budget.reached", f"run:{run.id}", project=run.project_id, body=body)
    return (
        f"budget reached: {rounds} rounds have spent ε = {spent:.3g} of {dp.epsilon:g} at "
        f"δ = {dp.delta:g}, and one more would exceed it"
    )
