"""Whatever is done with an upload's address is refused by the store, or harmless to what counts."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from service.factories import (
    Project,
    TestClient,
    Trained,
    complete,
    drain,
    make_project,
    ok,
)

from app import wiring
from app.cli import migrate
from app.main import create_app
from app.settings import AppSettings
from app.wiring import Coordinator

from .misuse import AFTER, BEFORE, Case, Siege, overwrite_trials, verify


@pytest.fixture(scope="session")
def core(store_variables: dict[str, str], store_settings: AppSettings) -> Iterator[Coordinator]:
    """The coordinator on this store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store_variables.items():
            patch.setenv(name, value)
        migrate()
    core = wiring.build(store_settings)
    yield core
    core.close()


@pytest.fixture(scope="session")
def api(core: Coordinator) -> Iterator[TestClient]:
    with TestClient(create_app(core.settings)) as client:
        yield client


@pytest.fixture
def project(core: Coordinator, api: TestClient) -> Project:
    return make_project(core, api)


def outcome(status: int) -> str:
    """What an attack came to as far as the store is concerned."""
    assert status < 500
    return "refused" if status >= 400 else "admitted"


def test_misuse_is_refused_or_harmless(project: Project, maker: str) -> None:
    """Two of three clients attack, before their files have come and after they are accepted."""
    siege = Siege.begin(project, clients=3)
    base = siege.published()
    *attackers, last = siege.clients
    cases = [siege.case(client, seed=number) for number, client in enumerate(attackers)]
    before = {name: {outcome(attack(case)) for case in cases} for name, attack in BEFORE.items()}
    assert set.union(*before.values()) == {"refused"}, before
    staged = list(project.core.storage.keys("staging/"))
    assert not [case.key for case in cases if case.key in staged], "nothing was written"

    sent = [_deliver(case) for case in cases]
    kept = siege.objects()
    after = {name: {outcome(attack(case)) for case in cases} for name, attack in AFTER.items()}
    assert after.pop("replay") == {"admitted"}, "the same bytes, until the address expires"
    assert set.union(*after.values()) == {"refused"}, after
    for case in cases:
        project.core.storage.put(case.key, io.BytesIO(case.evil), len(case.evil))
    assert siege.objects() == kept

    final = siege.case(last, seed=len(cases))
    sent.append(_deliver(final))
    drain(project)
    published = siege.published()
    assert published == siege.expected(base, sent)
    finished = siege.objects()
    assert kept.items() <= finished.items()
    for case in (*cases, final):
        assert outcome(case.send()) == "admitted"
        project.core.storage.put(case.key, io.BytesIO(case.evil), len(case.evil))
    drain(project)
    assert siege.objects() == finished
    assert siege.published() == published


def _deliver(case: Case) -> Trained:
    """The honest file is still admitted, and accepted."""
    assert case.send() == 200
    complete(case.client, case.ticket)
    verify(case.project)
    status = ok(case.client.get(f"/v1/uploads/{case.ticket['id']}"))
    assert status["state"] == "accepted", status
    return case.made


def test_staging_overwritten_after_acceptance_changes_nothing(project: Project) -> None:
    """A few trials; the soak suite makes 100."""
    assert overwrite_trials(project, 3) == 3
