"""Agents as witnesses: what makes one stop, what does not, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from fedselect import audit
from fedselect.agent_state import AgentFolder
from fedselect.client import Client, Retries
from fedselect.errors import LedgerError, ServiceError
from fedselect.witness import PATIENCE, Witness

from .fake_coordinator import SERVER
from .fake_ledger import Ledger
from .fake_site import Life, sites

Make = Callable[[Ledger], Witness]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[AgentFolder]:
    folder = AgentFolder(tmp_path)
    yield folder
    folder.close()


@pytest.fixture
def make(folder: AgentFolder) -> Iterator[Make]:
    """A witness with this folder, as after a start of the agent."""
    clients = []

    def start(ledger: Ledger) -> Witness:
        def handle(request: httpx.Request) -> httpx.Response:
            return ledger.answer(request.url.path.split("/")[3:], request.url.params)

        client = Client(
            SERVER,
            key="fsk_x",
            retries=Retries(random.Random(0), tries=1),
            transport=httpx.MockTransport(handle),
        )
        clients.append(client)
        return Witness(client, folder)

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Life]]:
    with sites(monkeypatch) as start:
        yield start


def kept(folder: AgentFolder) -> int:
    return audit.read_checkpoint(folder.head() or "").size


def stopped(code: str, witness: Witness, head: str) -> str:
    with pytest.raises(LedgerError) as caught:
        witness.see(head, working=True)
    assert caught.value.code == code
    return str(caught.value)


def test_a_ledger_that_grows_is_followed_with_one_proof_for_each_new_head(
    make: Make, folder: AgentFolder
) -> None:
    ledger = Ledger()
    witness = make(ledger)
    for size in (5, 5, 8, 8, 100):
        witness.see(ledger.head(size), working=True)
        assert kept(folder) == size
    assert ledger.asked == ["checkpoint", "proofs/consistency", "proofs/consistency"]
    assert folder.pinned() == ledger.key


def test_without_work_nothing_is_asked_for_minutes(make: Make, folder: AgentFolder) -> None:
    ledger = Ledger()
    folder.pin(ledger.key)
    witness = make(ledger)
    witness.see(ledger.head(5), working=False)
    for size in range(6, 66):
        witness.see(ledger.head(size), working=False)
        witness.wait(PATIENCE / 60)
    assert ledger.asked == []
    witness.see(ledger.head(66), working=False)
    assert (ledger.asked, kept(folder)) == (["proofs/consistency"], 66)


def test_a_forged_signature_is_noticed_even_without_work(make: Make, folder: AgentFolder) -> None:
    ledger = Ledger()
    folder.pin(ledger.key)
    witness = make(ledger)
    witness.see(ledger.head(5), working=False)
    with pytest.raises(LedgerError) as caught:
        witness.see(Ledger(number=7).head(6), working=False)
    assert caught.value.code == "ledger_key_unknown"


@pytest.mark.parametrize("forked", range(40))
def test_a_fork_is_found_wherever_it_begins(make: Make, folder: AgentFolder, forked: int) -> None:
    honest, other = Ledger(), Ledger(forked=forked)
    make(honest).see(honest.head(40), working=True)
    for size in (40, 41, 64):
        said = stopped("ledger_forked", make(other), other.head(size))
        assert "Nothing more is sent" in said
    assert kept(folder) == 40


def test_both_heads_are_kept_as_evidence(make: Make, folder: AgentFolder) -> None:
    honest, other = Ledger(), Ledger(forked=3)
    make(honest).see(honest.head(5), working=True)
    said = stopped("ledger_forked", make(other), other.head(9))
    place = next((folder.path / "evidence").iterdir())
    assert str(place) in said
    for name, text in (("kept.txt", honest.head(5)), ("shown.txt", other.head(9))):
        assert (place / name).read_text() == text
        audit.verify_checkpoint(text, honest.key)  # the coordinator cannot deny either
    stopped("ledger_forked", make(other), other.head(9))
    assert len(list((folder.path / "evidence").iterdir())) == 1


def test_a_fork_shown_to_two_sites_is_found_when_one_shows_its_head_to_the_other(
    make: Make, folder: AgentFolder
) -> None:
    """Each site alone sees a ledger that only ever grew."""
    one, two = Ledger(), Ledger(forked=10)
    here = make(one)
    here.see(one.head(8), working=True)
    here.see(one.head(20), working=True)
    assert audit.verify_checkpoint(two.head(20), folder.pinned() or "").size == 20
    stopped("ledger_forked", here, two.head(20))


def test_a_ledger_that_was_cut_is_found(make: Make, folder: AgentFolder) -> None:
    ledger = Ledger()
    make(ledger).see(ledger.head(50), working=True)
    ledger.sealed = 30
    stopped("ledger_rolled_back", make(ledger), ledger.head(30))
    assert kept(folder) == 50


def test_an_answer_that_was_overtaken_is_no_reason_to_stop(make: Make, folder: AgentFolder) -> None:
    """A smaller head is no lie while the coordinator can prove that the larger one extends it."""
    ledger = Ledger()
    witness = make(ledger)
    witness.see(ledger.head(50), working=True)
    witness.see(ledger.head(30), working=True)
    assert kept(folder) == 50


def test_a_key_that_was_rotated_is_followed_and_pinned(make: Make, folder: AgentFolder) -> None:
    ledger = Ledger()
    make(ledger).see(ledger.head(5), working=True)
    ledger.rotate()
    ledger.rotate()
    make(ledger).see(ledger.head(9), working=True)
    assert (folder.pinned(), kept(folder)) == (ledger.key, 9)
    stopped("ledger_key_unknown", make(ledger), Ledger().head(12))


def test_a_new_key_that_the_old_one_did_not_sign_is_refused(
    make: Make, folder: AgentFolder
) -> None:
    ledger, thief = Ledger(), Ledger(number=8)
    make(ledger).see(ledger.head(5), working=True)
    thief.rotate()
    stopped("ledger_key_unknown", make(thief), thief.head(9))
    assert folder.pinned() == ledger.key


def test_a_coordinator_out_of_reach_is_not_accused(make: Make, folder: AgentFolder) -> None:
    ledger = Ledger()
    witness = make(ledger)
    witness.see(ledger.head(5), working=True)
    ledger.refuse = httpx.Response(503)
    with pytest.raises(ServiceError):
        witness.see(ledger.head(9), working=True)
    assert kept(folder) == 5
    ledger.refuse = None
    witness.see(ledger.head(9), working=True)
    assert kept(folder) == 9


def test_a_coordinator_that_will_not_prove_is(make: Make, folder: AgentFolder) -> None:
    ledger = Ledger()
    witness = make(ledger)
    witness.see(ledger.head(5), working=True)
    ledger.refuse = httpx.Response(404, json={})
    stopped("ledger_forked", witness, ledger.head(9))


def test_an_agent_stops_before_it_sends_anything_to_a_forked_ledger(
    live: Callable[..., Life],
) -> None:
    life = live(rounds=3)
    life.run(steps=2)
    sent = len(life.other.signed)
    life.other.ledger.forked = 0
    with pytest.raises(LedgerError) as caught:
        life.run()
    assert caught.value.code == "ledger_forked"
    assert len(life.other.signed) == sent
    assert (life.path / "evidence").exists()


def test_an_agent_goes_through_a_rotation(live: Callable[..., Life]) -> None:
    life = live(rounds=3)
    life.run(steps=2)
    life.other.ledger.rotate()
    life.run()
    assert life.other.published == [1, 2, 3]
    assert (life.path / "ledger-key.txt").read_text() == life.other.ledger.key
