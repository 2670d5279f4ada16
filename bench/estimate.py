"""Estimates against what runs have really cost: bytes in every encoding, and the time of a round.

The real stack with real agents that train the digits; before each run a dry run at the first sites
estimates it, as an administrator would have it done. What is compared is the error in percent.
"""

from __future__ import annotations

import time
from pathlib import Path
from uuid import UUID

from app.cli import admin_key_file, prepare
from app.localprocess import until
from app.localstack import LocalStack
from bench.agents import Sites, agents
from bench.harness import Figure, Outcome, Room, bench
from fedselect import RoundPolicy, RunSettings, Training, preset_run, wire
from fedselect.client import Client
from fedselect.dryrun import measure
from fedselect.estimate import ENCODINGS
from fedselect.estimatedocs import RunEstimate
from fedselect.lifecycle import RunState
from fedselect.policies import Wire
from fedselect.protocol import ModelCreate, RunCreate
from fedselect.task import Task
from fedselect.tasks import example_clients, load_task
from fedselect.training import TorchLearner

PATIENCE = 60.0  # seconds of a round, at most
LIMITS = {"bytes up": 5.0, "bytes down": 5.0, "control bytes": None, "seconds of a round": 30.0}


@bench(
    quick={"clients": 2, "rounds": 4, "encodings": ("int8",)},
    full={"clients": 3, "rounds": 20, "encodings": ENCODINGS},
    minutes=(2, 10),
)
def estimates(room: Room, *, clients: int, rounds: int, encodings: tuple[str, ...]) -> Outcome:
    """Errors in percent, without their sign, of estimates after a dry run."""
    sites = dict(list(example_clients("digits").items())[:clients])
    found = {
        each: _compared(room.folder / each, sites, _rule(each, rounds, clients))
        for each in encodings
    }
    figures = [
        Figure(
            f"error of {name}, {encoding}, {clients} clients, {rounds} rounds",
            *(100 * abs(error), "the limit", limit or 100.0, 1.0 if limit else None, "%"),
        )
        for encoding, result in found.items()
        for (name, limit), error in zip(LIMITS.items(), _errors(result), strict=True)
    ]
    return Outcome(figures, notes=[_told(*item) for item in found.items()])


def _told(encoding: str, found: RunEstimate) -> str:
    said, spent = found.estimate, found.actual
    up, down = (100 * (error or 0) for error in (found.errors.up, found.errors.down))
    return (
        f"{encoding}: bytes {up:+.1f} % up and {down:+.1f} % down; control {said.run.control_up:,} "
        f"and {said.run.control_down:,} bytes estimated, {spent.control_up or 0:,} and "
        f"{spent.control_down or 0:,} counted; a round {said.links[0].round_seconds:.2f} s "
        f"estimated, {spent.round_seconds or 0:.2f} s taken."
    )


def _errors(found: RunEstimate) -> tuple[float, ...]:
    errors = found.errors
    every = (errors.up, errors.down, errors.control, errors.round_seconds)
    return tuple(1.0 if error is None else error for error in every)


def _rule(encoding: str, rounds: int, clients: int) -> RunSettings:
    everybody = {"goal": clients, "quorum": clients, "over_selection": 1.0}
    return preset_run(
        "fedselect",
        rounds=rounds,
        training=Training(steps=20),
        round=RoundPolicy(**everybody, retry_after=2.0),
        wire=Wire.model_validate({"encoding": encoding}),
    )


def _compared(folder: Path, sites: Sites, rule: RunSettings) -> RunEstimate:
    tasks = {name: load_task(spec, **own) for name, (spec, own) in sites.items()}
    measured = measure(tasks, rule).measured
    stack = LocalStack(folder, given={})
    try:
        stack.up(prepare=lambda ready: prepare(stack.root, ready))
        key = admin_key_file(stack.root).read_text().strip()
        with Client(stack.environment()["PUBLIC_URL"], key=key) as owner:
            run_id = _run(owner, next(iter(tasks.values())), rule)
            with agents(owner, folder, sites):
                _await(owner, run_id, rule.rounds)
            return owner.run_estimate(run_id, link="lan", measured=measured)
    finally:
        stack.down()


def _run(owner: Client, task: Task, rule: RunSettings) -> UUID:
    learner = TorchLearner(task)
    model = owner.create_model(ModelCreate(name="digits", space=learner.space.to_json()))
    data = wire.encode_version(learner.space.digest, learner.initial())
    upload = owner.send_weights(model.id, data)
    if not until(lambda: owner.upload(upload.id).state == "accepted", seconds=120):
        raise TimeoutError("the initial weights were not accepted")
    run = owner.create_run(RunCreate(name="digits", model_id=model.id, settings=rule))
    return owner.start_run(run.id).id


def _await(owner: Client, run_id: UUID, rounds: int) -> None:
    deadline = time.monotonic() + PATIENCE * rounds
    while owner.run(run_id).state is not RunState.FINISHED:
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not end in time")
        time.sleep(1)
