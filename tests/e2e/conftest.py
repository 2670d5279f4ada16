"""The product as processes, and the demo that drives it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from app.cli import prepare
from app.localstack import LocalStack


@pytest.fixture(scope="module")
def demo_module() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def product(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    """Coordinator, worker and scheduler as processes, on the servers of the test run."""
    root = tmp_path_factory.mktemp("product")
    servers = {name: value for name, value in environment.items() if name != "PUBLIC_URL"}
    stack = LocalStack(root, given=servers)
    try:
        stack.up(prepare=lambda ready: prepare(root, ready))
        yield stack
    finally:
        stack.down()
