"""The option that gives a command its key: from the environment, never from the command line.

Owns that rule alone; keys in files are ``profiles``.
"""

from __future__ import annotations

from typing import Any

import typer


def typed(context: typer.Context, parameter: str) -> bool:
    """Whether an option comes from the command line, not from the environment."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def from_environment(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """The callback of an option that is a key.

    Raises:
        typer.BadParameter: it was typed, where every user of the machine can read it.
    """
    if typed(context, parameter.name or ""):
        raise typer.BadParameter(
            "every user of this machine can read it here; use --key-file or FEDSELECT_KEY"
        )
    return value
