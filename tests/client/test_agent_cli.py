"""The agent command: its options, its signals, its log."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedselect import agent_cli
from fedselect.agent import Step, StepOutcome
from fedselect.errors import FedSelectError

from .fake_coordinator import TOKEN, TinyLearner


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Signal handlers are the process's own: put them back."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_at_once_and_every_later_one(number: signal.Signals) -> None:
    stop = agent_cli.Stop()
    assert not stop.wait(0)
    signal.raise_signal(number)
    assert stop.wait(3600)
    assert stop.wait(3600)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_step_is_logged_for_programs_and_for_people() -> None:
    step = Step(StepOutcome.DISCARDED, 2.00049, 3, "rejected\x1b[2J")
    assert json.loads(agent_cli.log_line(step, as_json=True)) == {
        "outcome": "discarded",
        "round": 3,
        "wait": 2.0,
        "detail": "rejected\x1b[2J",
    }
    text = agent_cli.log_line(step, as_json=False)
    assert text == "discarded round 3: rejected [2J (next in 2.0 s)"
    assert agent_cli.log_line(Step(StepOutcome.WAITING, 1), as_json=False) == (
        "waiting (next in 1.0 s)"
    )


def test_the_first_start_needs_a_name_and_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_cli, "_load", lambda *_, **__: (TinyLearner(), None))
    monkeypatch.delenv("FEDSELECT_TOKEN", raising=False)
    app = typer.Typer()
    agent_cli.register(app)
    app.callback()(lambda: None)
    options = ["agent", "--server", "http://127.0.0.1:9", "--task", "a:B", "--state", str(tmp_path)]
    for more, environment in (([], {"FEDSELECT_TOKEN": TOKEN}), (["--name", "ward-7"], {})):
        result = CliRunner().invoke(app, [*options, *more], env=environment)
        assert isinstance(result.exception, FedSelectError)
        assert result.exception.code == "enrolment_missing"
        assert "FEDSELECT_TOKEN" in str(result.exception)
