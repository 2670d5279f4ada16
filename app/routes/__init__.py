"""HTTP handlers: check the scope, open the transaction, call one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.convertors import StringConvertor, register_url_convertor

from app.description import TEXTS
from fedselect.lifecycle import AssignmentState, RoundState, RunState
from fedselect.rolloutdocs import RolloutState

# What an operation on a thing is refused with when its state does not allow it.
ASSIGNMENT_STATE = [f"assignment_{state.value}" for state in AssignmentState]
ROUND_STATE = [f"round_{state.value}" for state in RoundState]
RUN_STATE = [f"run_{state.value}" for state in RunState]
ROLLOUT_STATE = [f"rollout_{state.value}" for state in RolloutState]


class _ClientCommand(StringConvertor):
    """The last word of an order to a client: no other path is taken for one."""

    regex = "suspend|activate|revoke"


class _RunCommand(StringConvertor):
    """The last word of an order to a run."""

    regex = "start|pause|resume|stop"


class _RolloutCommand(StringConvertor):
    """The last word of an order to a rollout."""

    regex = "promote|hold|roll-back"


register_url_convertor("client_command", _ClientCommand())
register_url_convertor("run_command", _RunCommand())
register_url_convertor("rollout_command", _RolloutCommand())


def problems(
    *statuses: int, codes: Mapping[int, Sequence[str]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The refusals of an operation, for its description; ``codes`` are those of its own.

    What any operation may answer (no key, a bad request, too many calls) ``description`` adds.
    """
    own = codes or {}
    return {
        status: {"description": TEXTS[status], "x-codes": [*own.get(status, [])]}
        for status in sorted({*statuses, *own, 422})
    }
