"""The public names are frozen, and importing the light half loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import fedselect

NAMES = [
    "Batch",
    "FedSelectError",
    "Kind",
    "Mask",
    "ParameterSpace",
    "Policy",
    "Role",
    "RoundPolicy",
    "RunSettings",
    "Task",
    "Training",
    "load_personalized",
    "preset",
    "preset_run",
]
LIGHT = ["fedselect", "fedselect.wire", "fedselect.audit", "fedselect.protocol"]
HEAVY = ["torch", "httpx", "numba", "sqlalchemy", "fastapi", "celery", "typer", "rich", "app"]


def test_the_public_names_are_the_promised_ones():
    assert fedselect.__all__ == NAMES
    for name in NAMES:
        assert getattr(fedselect, name) is not None


def test_the_version_is_the_distribution_s():
    from importlib.metadata import version

    assert fedselect.__version__ == version("fedselect")


def test_importing_the_light_half_loads_nothing_heavy():
    script = f"import {', '.join(LIGHT)}, sys; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout.strip(), result.stderr) == ("", "")
