"""Object stores of three makers, each with a bucket of our own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import AppSettings
from app.storage import S3Storage

from .servers import LOCAL, OTHERS, running

STORES = (LOCAL, *OTHERS)


@pytest.fixture(scope="session", params=STORES)
def maker(request: pytest.FixtureRequest) -> str:
    """The wheel that a store comes in."""
    return str(request.param)


@pytest.fixture(scope="session")
def store_variables(maker: str, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """All variables of a coordinator that uses this store."""
    if maker == LOCAL:
        yield environment
        return
    folder = Path(os.environ["FEDSELECT_TEST_STACK"]) / f"stores-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    with running(OTHERS[maker], folder) as variables:
        yield environment | variables


@pytest.fixture(scope="session")
def store_settings(store_variables: dict[str, str]) -> AppSettings:
    """The settings of a coordinator that uses this store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store_variables.items():
            patch.setenv(name, value)
        return AppSettings()


@pytest.fixture(scope="session")
def storage(store_settings: AppSettings) -> S3Storage:
    """The port over this store."""
    return S3Storage(store_settings)


@pytest.fixture
def folder() -> str:
    """A prefix of this test's own."""
    return f"staging/{secrets.token_hex(16)}"
