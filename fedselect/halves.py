"""The halves of the distribution that bring commands: what to say of one that is not installed.

Owns that list; ``cli`` dispatches by it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Half:
    """Commands that another part of the distribution brings, and the extra that it needs."""

    extra: str
    commands: dict[str, str]
    joins: tuple[str, ...] = ()  # groups of ours that it adds commands to

    @property
    def cure(self) -> str:
        """What to do when it is missing."""
        return f"pip install 'fedselect[{self.extra}]'" if self.extra else "see its documentation"


# What to say of a half that is not installed; test_cli.py compares it with the real commands.
HALVES = {
    "learning": Half(
        "torch",
        {
            "agent": "Take part in runs with a task of your own.",
            "compare": "Run several policies in this process and say which to use.",
            "data": "Fetch data sets, and deal them to clients.",
            "estimate": "Say what a run would cost.",
            "explain": "Explain what of this site's model is its own.",
            "export": "Write a version as a plain state_dict.",
            "import": "Make a parameter space and version 0 of a model.",
            "personalized": "Write this client's own model as a plain state_dict.",
            "simulate": "Run a whole federation in this process.",
            "study": "Compare policies over splits and seeds, resumably.",
        },
    ),
    "server": Half(
        "server",
        {
            "up": "Start the whole service on this machine.",
            "down": "Stop what `up` started.",
            "status": "Show what runs.",
            "jobs": "Look at the coordinator's work and retry it.",
            "storage": "Try what the object store enforces.",
            "gc": "Delete what is too old.",
            "backup": "Write database and bucket to a folder.",
            "restore": "Read them back, and verify everything.",
        },
        joins=("admin",),
    ),
}
