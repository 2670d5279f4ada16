"""Publish latency: from the last accepted update to the published version, and a worker's memory.

The real stack with its two worker processes; light clients send real files through the front door,
four at a time, and nobody trains. Every number of clients has a stack of its own, because a
process's high-water mark is that of its whole life.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
import psutil
import psycopg

from app.cli import admin_key_file, prepare
from app.encrypted import KeyRing, encrypted
from app.localprocess import until
from app.localservice import MARK as SERVICE
from app.localstack import LocalStack
from app.settings import read
from app.storage import S3Storage
from bench.harness import Curve, Figure, Outcome, Room, bench
from bench.memory import Peaks
from fedselect import Kind, Mask, ParameterSpace, Role, RunSettings, wire
from fedselect.checkindocs import Assignment
from fedselect.client import Client, announce
from fedselect.policies import preset
from fedselect.protocol import ModelCreate, Registration, RunCreate
from fedselect.space import FloatVector

PERSONAL = 0.3
SENDERS = 4
PATIENCE = 120.0  # seconds for one update to be accepted, and for a round to be published
LOOK = 0.005
LIMITS = {10: 2.0, 100: 3.0}  # seconds, by clients
MEMORY = 500.0  # MiB
# When the last update of each round was accepted; none while a round still gathers.
ACCEPTED = """SELECT r.number, extract(epoch FROM max(u.created_at)) FROM rounds r
    JOIN updates u ON u.round_id = r.id WHERE r.state = 'published' GROUP BY 1 ORDER BY 1"""


Numbers = tuple[int, ...]


@bench(
    quick={"elements": 1_500_000, "clients": (9,), "rounds": 1},
    full={"elements": 11_200_000, "clients": (8, 10, 50, 100), "rounds": 2},
    minutes=(2, 60),
)
def publish(room: Room, *, elements: int, clients: Numbers, rounds: int) -> Outcome:
    """Against the number of clients."""
    return _against_clients(room, elements, clients, rounds)


@bench(
    quick=None,
    full={"elements": 250_000_000, "clients": (8,), "rounds": 1},
    minutes=(2, 30),
)
def publish_large(room: Room, *, elements: int, clients: Numbers, rounds: int) -> Outcome:
    """A model that is many times larger than a worker may grow."""
    return _against_clients(room, elements, clients, rounds)


def _against_clients(room: Room, elements: int, clients: Numbers, rounds: int) -> Outcome:
    """Seconds and peaks; the first round of each stack, which compiles, does not count."""
    model = Sent.of(elements)
    found = {n: _measured(room.folder / f"{n}", model, clients=n, rounds=rounds) for n in clients}
    size = f"{elements / 1e6:.1f} M"
    figures = [
        Figure(
            f"last accepted to published, {size} × {number} clients",
            *(taken.seconds, "the limit", LIMITS.get(number, max(LIMITS.values()))),
            1.0 if number in LIMITS and elements == 11_200_000 else None,
            "s",
        )
        for number, taken in found.items()
    ]
    few = found[clients[0]].peak
    figures += [
        Figure(f"peak of a worker, {size} × {number} clients", *reference, "MiB")
        for number, taken in found.items()
        for reference in ((taken.peak, "the limit", MEMORY, 1.0), (taken.peak, FEW, few, 1.1))
        if number != clients[0] or reference[1] != FEW
    ]
    most = found[clients[-1]]
    figures.append(Figure(f"reading an update of {size} once", most.reading, WORK, most.working))
    seconds = [found[number].seconds for number in clients]
    axes = ("clients", "s")
    curve = Curve("Publish latency against clients", size, clients, seconds, axes)
    return Outcome(figures, [curve] if len(clients) > 1 else [])


FEW = "with the fewest clients"
WORK = "a worker's processor time for each update in all"


@dataclass(frozen=True)
class Taken:
    """Median seconds from the last acceptance to the version, peak MiB of a worker process;
    processor time in ms of reading an update once, and of all that the workers did for each.
    """

    seconds: float
    peak: float
    reading: float
    working: float


@dataclass(frozen=True)
class Sent:
    """What every client sends: the same values under the same mask."""

    space: ParameterSpace
    mask: Mask
    theta: FloatVector

    @classmethod
    def of(cls, elements: int) -> Sent:
        """A flat model of so many elements, three tenths of them personal."""
        space = ParameterSpace.of([("x", (elements,), Kind.WEIGHT, Role.SELECTABLE)])
        rng = np.random.default_rng(0)
        mask = Mask.from_bool(rng.random(elements, dtype=np.float32) < PERSONAL)
        return cls(space, mask, rng.standard_normal(elements, dtype=np.float32))

    def file(self, work: Assignment) -> bytes:
        """An update for this assignment."""
        version = work.mask.version if work.mask else 0
        meta = wire.UpdateMeta(
            space=work.space_digest,
            run=str(work.run.id),
            round=work.round or 0,
            assignment=str(work.id),
            base_version=work.base.sha256,
            mask_version=version or 1,
            examples=7,
        )
        return wire.encode_update(meta, self.theta, mask=self.mask, send_mask=not version)


def _measured(folder: Path, model: Sent, *, clients: int, rounds: int) -> Taken:
    stack = LocalStack(folder, given={})
    try:
        stack.up(prepare=lambda ready: prepare(stack.root, ready))
        database = stack.environment()["DATABASE_URL"].replace("+psycopg", "")
        key = admin_key_file(stack.root).read_text().strip()
        with (
            Client(stack.environment()["PUBLIC_URL"], key=key) as owner,
            _sites(owner, clients) as sites,
            psycopg.connect(database, autocommit=True) as rows,
            Peaks() as peaks,
        ):
            run_id = _run(owner, model, clients=clients, rounds=rounds + 2)
            seconds = [_round(owner, run_id, rows, sites, model) for _ in range(rounds + 1)]
            (key,) = rows.execute("SELECT object_key FROM updates LIMIT 1").fetchall()[0]
            reading = _reading(stack.environment(), key)
            working = 1000 * _busy(folder) / (clients * (rounds + 1))
        peak = peaks.largest("celery", " worker ")
        return Taken(statistics.median(seconds[1:]), peak, reading, working)
    finally:
        stack.down()
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes, and the next stack needs the disk


def _reading(environment: Mapping[str, str], key: str) -> float:
    """Processor time in ms of a worker that reads an object; the store's own comes on top."""
    settings = read(environment)
    storage = encrypted(S3Storage(settings), KeyRing(settings.encryption_keys))
    took = []
    for _ in range(5):
        begin = time.process_time()
        storage.read(key)
        took.append(1000 * (time.process_time() - begin))
    return statistics.median(took)


def _busy(folder: Path) -> float:
    """Seconds of processor time of all worker processes since they started."""
    times = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(SERVICE, "").startswith(f"{folder}/") and _works(process):
                times.append(process.cpu_times())
    return sum(float(each.user + each.system) for each in times)


def _works(process: psutil.Process) -> bool:
    words = process.cmdline()
    return "worker" in words or "workers.judge" in words


def _round(
    owner: Client, run_id: UUID, rows: psycopg.Connection, sites: Sequence[Client], model: Sent
) -> float:
    """Let everybody deliver; seconds from the last acceptance until the version is there."""
    number = owner.run(run_id).published + 1
    with ThreadPoolExecutor(SENDERS) as pool:
        list(pool.map(lambda site: _deliver(site, model), sites))
    deadline = time.monotonic() + PATIENCE + len(sites)
    while not (found := rows.execute(ACCEPTED).fetchall()) or found[-1][0] < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"round {number} was not published")
        time.sleep(LOOK)
    return time.time() - float(found[-1][1])


def _deliver(site: Client, model: Sent) -> None:
    asked = until_given(lambda: site.check_in().assignment)
    data = model.file(asked)
    ticket = site.reserve_update(asked.id, announce(data))
    site.put_file(ticket, data)
    site.complete(ticket.id)


def until_given(ask: Callable[[], Assignment | None]) -> Assignment:
    """The next assignment; the round may be opening at this moment."""
    deadline = time.monotonic() + PATIENCE
    while (found := ask()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError("there is no work")
        time.sleep(LOOK)
    return found


@contextmanager
def _sites(owner: Client, clients: int) -> Iterator[list[Client]]:
    tokens = owner.create_enrolments(clients).tokens
    sites = []
    try:
        with Client(owner.server, key=None) as nobody:
            for number, token in enumerate(tokens):
                joined = nobody.register(Registration(token=token, name=f"site-{number}"))
                sites.append(Client(owner.server, key=joined.key))
        yield sites
    finally:
        for site in sites:
            site.close()


def _run(owner: Client, model: Sent, *, clients: int, rounds: int) -> UUID:
    found = owner.create_model(ModelCreate(name="flat", space=model.space.to_json()))
    weights = np.zeros(model.space.dim, dtype=np.float32)
    upload = owner.send_weights(found.id, wire.encode_version(model.space.digest, weights))
    if not until(lambda: owner.upload(upload.id).state == "accepted", seconds=PATIENCE):
        raise TimeoutError("the initial weights were not accepted")
    everybody = {"goal": clients, "quorum": clients, "over_selection": 1.0, "retry_after": 1}
    settings = RunSettings.model_validate(
        {
            "rounds": rounds,
            "policy": preset("fedselect", start_round=0, growth=0).model_dump(),
            "training": {"steps": 1},
            "round": everybody,
        }
    )
    run = owner.create_run(RunCreate(name="flat", model_id=found.id, settings=settings))
    return owner.start_run(run.id).id
