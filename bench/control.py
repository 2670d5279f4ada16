"""The control plane under load: acknowledgements, verification, check-ins, memory over time.

Everything on one machine, load generators in processes of their own. The stack is durable. What is
called a rate is counted from the first request to the last answer; percentiles are of raw samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.fleet import Fleet, Load, Samples, Tenant, measured, wait
from bench.harness import Figure, Outcome, Room, bench

AGENTS = 200
RATE = 300.0  # acknowledgements a second that are wanted
LIMIT = "the limit"


@bench(
    quick={"processes": [1], "runs": 2, "agents": 40},
    full={"processes": [1, 2], "runs": 20, "agents": AGENTS},
    minutes=(2, 15),
)
def completions(room: Room, *, processes: Sequence[int], runs: int, agents: int) -> Outcome:
    """`complete` with the objects staged, then their verification, both by 1 and 2 processes."""
    figures: list[Figure] = []
    notes: list[str] = []
    for count in processes:
        fleet = Fleet(room, count)
        _acknowledge(fleet, count, runs=runs, agents=agents, figures=figures, notes=notes)
        fleet.stack.down()
    return Outcome(figures, notes=notes)


def _acknowledge(
    fleet: Fleet, count: int, *, runs: int, agents: int, figures: list[Figure], notes: list[str]
) -> None:
    tenants = [fleet.tenant(agents) for _ in range(runs)]
    for each in tenants:
        fleet.run(each, goal=agents)
    half = runs // 2
    pressed = _stage(fleet, tenants[:half], agents)
    paced = _stage(fleet, tenants[half:], agents, rate=RATE)
    fleet.stack.stop("worker")  # what it would do meanwhile is measured below
    with measured(fleet) as used:
        pressed.go()
        found = pressed.result()
    done = found.of("complete")
    done.check(202)
    paced.go()
    calm = paced.result().of("complete")
    calm.check(202)
    what = f"complete, {agents} agents, {_processes(count)}"
    figures += [
        Figure(f"{what}: rate", done.rate, LIMIT, RATE, 1, unit="/s", at_least=True),
        Figure(f"{what}: p99 at {calm.rate:.0f}/s", calm.percentile(99), LIMIT, 250, 1),
        Figure(f"{what}: p99 as fast as they can", done.percentile(99), LIMIT, 250),
        *_information(found, count),
    ]
    notes.append(_where(what, len(done.calls), used, done.span, found.cpu))
    total = len(done.calls) + len(calm.calls)
    rate, verifying = _verified(fleet, total)
    what = f"verified updates of 10 kB, {_processes(count)}"
    figures.append(Figure(what, rate, LIMIT, 40, 1, unit="/s", at_least=True))
    notes.append(_where(what, total, verifying, total / rate, 0))


def _stage(fleet: Fleet, tenants: Sequence[Tenant], agents: int, *, rate: float = 0) -> Load:
    """A generator with one connection an agent, each with an update of each tenant in the store."""
    lines = [[tenant.keys[n] for tenant in tenants] for n in range(agents)]
    load = fleet.load("stage_then_complete", lines, staging=8, rate=rate)
    load.reaches("staged")
    return load


def _information(found: Samples, count: int) -> list[Figure]:
    """What staging showed by the way, with 8 calls at a time."""
    figures = []
    for kind in ("join", "reserve"):
        calls = found.of(kind)
        calls.check(200, 201)
        what = f"{kind}, 8 at a time, {_processes(count)}: median"
        figures.append(Figure(what, calls.percentile(50), LIMIT, 150))
    return figures


def _verified(fleet: Fleet, count: int) -> tuple[float, dict[str, float]]:
    """Updates a second from the first to the last acceptance, with the usual two processes."""
    fleet.stack.start("worker")
    query = "SELECT count(*) FROM updates"
    with measured(fleet) as used:
        begin = time.monotonic()
        wait(lambda: fleet.sql(query)[0][0] == count, "verification", seconds=600)
        print(f"verified within {time.monotonic() - begin:.1f} s")
    spread = "SELECT extract(epoch FROM max(created_at) - min(created_at)) FROM updates"
    return (count - 1) / float(fleet.sql(spread)[0][0]), used


@bench(
    quick={"processes": [1], "registered": 1000, "polling": 100, "seconds": 4, "every": 2},
    full={"processes": [1, 2], "registered": 10_000, "polling": 1000, "seconds": 90, "every": 30},
    minutes=(1, 10),
)
def check_ins(
    room: Room,
    *,
    processes: Sequence[int],
    registered: int,
    polling: int,
    seconds: float,
    every: float,
) -> Outcome:
    """Check-ins of a fleet that polls, while a run goes on that has no place for it."""
    figures, notes = [], []
    for count in processes:
        fleet = Fleet(room, count)
        tenant = fleet.tenant(registered)
        fleet.run(tenant, goal=2)
        _fill(fleet, tenant, 2)
        with measured(fleet) as used:
            plan = {"every": every, "seconds": seconds}
            found = fleet.load("poll", [tenant.keys[-polling:]], **plan).result()
        calls = found.of("check-in")
        calls.check(200)
        what = f"check-in, {registered:,} registered, {polling:,} poll, {_processes(count)}"
        figures += [
            Figure(f"{what}: p99", calls.percentile(99), LIMIT, 150, 1),
            Figure(f"{what}: median", calls.percentile(50), LIMIT, 150),
        ]
        notes.append(_where(what, len(calls.calls), used, calls.span, found.cpu))
        fleet.stack.down()
    return Outcome(figures, notes=notes)


@bench(
    quick={"polite": 20, "seconds": 4, "connections": 8},
    full={"polite": 100, "seconds": 60, "connections": 32},
    minutes=(2, 10),
)
def flood(room: Room, *, polite: int, seconds: float, connections: int) -> Outcome:
    """Check-ins of clients that poll, alone and while one other key asks as fast as it can."""
    fleet = Fleet(room, 1)
    tenant, other = fleet.tenant(polite), fleet.tenant(connections)
    plan = {"every": 1, "seconds": seconds}
    quiet = fleet.load("poll", [tenant.keys], **plan).result().of("check-in")
    storm = fleet.load("flood", [[other.keys[0]]] * connections, seconds=seconds + 4)
    calls = fleet.load("poll", [tenant.keys], **plan).result().of("check-in")
    flooding = storm.result().of("flood")
    for each in (quiet, calls):
        each.check(200)
    refused = sum(status == 429 for *_, status in flooding.calls) / len(flooding.calls)
    what = f"check-in of {polite} clients that poll, under a flood"
    figures = [
        Figure(f"{what}: p99", calls.percentile(99), "without it", quiet.percentile(99), 2),
        Figure(f"{what}: median", calls.percentile(50), "without it", quiet.percentile(50)),
    ]
    note = (
        f"The flood: {connections} connections with one key, {flooding.rate:.0f} calls a second, "
        f"{100 * refused:.1f} % of them answered 429. It comes from the same machine."
    )
    return Outcome(figures, notes=[note])


@bench(
    quick=None,
    full={"agents": 40, "warm": 120, "seconds": 1800},
    minutes=(2, 45),
)
def endurance(room: Room, *, agents: int, warm: float, seconds: float) -> Outcome:
    """Memory of coordinator and workers while rounds go on and on."""
    fleet = Fleet(room, 1)
    tenant = fleet.tenant(agents)
    fleet.run(tenant, rounds=100_000, goal=agents)
    plan = {"every": 0.5, "seconds": warm + seconds}
    load = fleet.load("take_part", [[key] for key in tenant.keys], **plan)
    time.sleep(warm)  # what is measured is time itself
    names = ("coordinator", "worker", "scheduler")
    before = {name: fleet.memory(name) for name in names}
    time.sleep(seconds)
    after = {name: fleet.memory(name) for name in names}
    load.result(seconds=seconds)
    rounds = fleet.sql("SELECT count(*) FROM rounds WHERE state = 'published'")[0][0]
    what = f"after {seconds / 60:.0f} minutes, {rounds} rounds of {agents} clients"
    figures = [
        Figure(f"{name} {what}", after[name], "at the begin", before[name], 1.05, "MiB")
        for name in names
    ]
    return Outcome(figures, notes=["Resident memory, the largest process of each service."])


def _fill(fleet: Fleet, tenant: Tenant, places: int) -> None:
    """Let the first clients take the places of the round, so that the others have to wait."""
    load = fleet.load("stage_then_complete", [[key] for key in tenant.keys[:places]], staging=1)
    load.reaches("staged")
    load.go()
    load.result()


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _where(what: str, calls: int, used: dict[str, float], span: float, cpu: float) -> str:
    """A sentence about who used the processor, in ms per call."""
    parts = [f"{name} {1000 * s / calls:.2f}" for name, s in used.items() if s > 0.01 * span]
    loaded = f"; the load generator used {100 * cpu / span:.0f} % of a core" if cpu else ""
    said = f"{what}: {calls} in {span:.1f} s; processor time in ms for each: {', '.join(parts)}"
    return f"{said}{loaded}."
