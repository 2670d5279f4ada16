"""Files that want to do harm, before the real judge: refused by name, quickly, in little memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedselect import wire
from workers import court
from workers.court import Case

from . import corpus_deltas
from .corpus import FOR_KNOWN, GOOD, HOSTILE, KNOWN, PLAN, SPACE
from .trial import WITHOUT_MASK, Trial, expected, mutated

SECONDS, MEMORY = 1.0, 256 * 1024**2


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """One court for all files: whoever harms a judge harms the tests behind."""
    trial = Trial()
    yield trial
    trial.court.close()


def test_the_corpus_differs_from_honest_files_only_in_what_it_says(trial: Trial) -> None:
    assert trial.outcome(GOOD, PLAN) == expected(GOOD, PLAN) == "ok"
    assert trial.outcome(WITHOUT_MASK, KNOWN) == expected(WITHOUT_MASK, KNOWN) == "ok"
    assert len(HOSTILE) + len(FOR_KNOWN) >= 60


@pytest.mark.parametrize("name", [*HOSTILE, *FOR_KNOWN])
def test_a_hostile_file_is_refused_with_its_own_code(trial: Trial, name: str) -> None:
    code, data = {**HOSTILE, **FOR_KNOWN}[name]
    plan = PLAN if name in HOSTILE else KNOWN
    assert trial.outcome(data, plan) == code
    assert expected(data, plan) == code, "the decoder of whole files agrees"
    assert trial.slowest < SECONDS
    assert trial.peak < MEMORY


@pytest.mark.parametrize(
    ("data", "plan"),
    [
        (corpus_deltas.GOOD, corpus_deltas.PLAN),
        (corpus_deltas.STREAMED, corpus_deltas.PLAN),
        (corpus_deltas.GOOD_WIDE, corpus_deltas.WIDE),
        (corpus_deltas.WITHOUT_MASK, corpus_deltas.KNOWN),
    ],
)
def test_honest_delta_files_are_let_through(
    trial: Trial, data: bytes, plan: wire.UpdatePlan
) -> None:
    assert trial.outcome(data, plan) == expected(data, plan) == "ok"


@pytest.mark.parametrize(
    ("plan", "code", "data"),
    [case[1:] for case in corpus_deltas.CASES],
    ids=[case[0] for case in corpus_deltas.CASES],
)
def test_a_hostile_delta_file_is_refused_with_its_own_code(
    trial: Trial, plan: wire.UpdatePlan, code: str, data: bytes
) -> None:
    assert trial.outcome(data, plan) == code
    assert expected(data, plan) == code, "the decoder of whole files agrees"
    assert trial.slowest < SECONDS
    assert trial.peak < MEMORY


def test_damaged_files_are_judged_as_the_decoder_judges_them(trial: Trial) -> None:
    found: Counter[str] = Counter()
    for number, (data, plan) in enumerate(mutated(500, seed=1)):
        outcome = trial.outcome(data, plan)
        assert outcome == expected(data, plan), f"file {number} of seed 1"
        found[outcome] += 1
    assert found["ok"] < 100, "most changes do harm"
    assert len(found) > 10, "and not all the same"
    assert trial.deaths == 0
    assert trial.slowest < SECONDS
    assert trial.peak < MEMORY


def test_the_judge_has_nothing_and_can_do_nothing(trial: Trial) -> None:
    with trial.court.judge() as judge:
        judge.open(Case(len(GOOD), SPACE, PLAN))
        judge.feed(GOOD)
        assert judge.decide().refusal is None
        process = Path(f"/proc/{judge.pid}")
        lines = (process / "limits").read_text().splitlines()
        names = {line[:26].strip(): line[26:].split()[:2] for line in lines}
        assert names["Max core file size"] == ["0", "0"]
        assert names["Max file size"] == ["0", "0"]
        assert names["Max processes"] == ["0", "0"]
        assert names["Max open files"] == ["3", "3"]
        assert int(names["Max address space"][0]) < 600 * 1024**2
        assert int(names["Max cpu time"][0]) < 60
        assert sorted(fd.name for fd in (process / "fd").iterdir()) == ["0", "1", "2"]
        variables = (process / "environ").read_bytes().split(b"\0")
        assert {v.split(b"=")[0].decode() for v in variables if v} == set(court.ENVIRONMENT)
