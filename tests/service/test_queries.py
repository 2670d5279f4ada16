"""How many statements a call costs: as many for a large project as for a small one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from workers import sweep

from .factories import (
    announce,
    complete,
    deliver,
    drain,
    make_client,
    make_clients,
    make_model,
    make_run,
    ok,
    put,
    train,
)
from .rolling import World

AGENTS = 5  # of a project that is larger than one with a single agent


@pytest.fixture
def counted(core):
    """A context in which statements are counted; what it yields is their list."""

    @contextmanager
    def counting() -> Iterator[list[str]]:
        seen: list[str] = []

        def note(connection, cursor, statement, parameters, context, many):
            seen.append(statement)

        event.listen(core.db._engine, "before_cursor_execute", note)
        try:
            yield seen
        finally:
            event.remove(core.db._engine, "before_cursor_execute", note)

    return counting


def test_a_check_in_without_work_asks_three_times(project, counted):
    make_run(project, rounds=1)
    agents = make_clients(project, 3)
    for agent in agents[:2]:
        agent.assignment()
    agents[2].check_in()  # notes that it was seen, and its key used, once a minute
    with counted() as seen:
        assert agents[2].check_in()["assignment"] is None
    assert len(seen) == 3, seen


def test_a_check_in_costs_the_same_in_a_large_project(project, counted):
    agent = make_client(project)
    model = make_model(project)
    agent.check_in()
    found = []
    for runs in (1, 3):
        for _ in range(runs):
            run = make_run(project, model)
            for other in make_clients(project, 2):
                other.assignment()
            ok(project.owner.post(f"/v1/runs/{run['id']}/stop"))
        with counted() as seen:
            agent.check_in()
        found.append(len(seen))
    assert found[0] == found[1]


def _staged(project, count):
    """A round with room for many, whose agents have all put their files there."""
    model = make_model(project)
    make_run(project, model, goal=AGENTS + 1)
    tickets = []
    for seed, agent in enumerate(make_clients(project, count)):
        assignment = agent.assignment()
        data = train(assignment, model.space, seed=seed).data
        path = f"/v1/assignments/{assignment['id']}/uploads"
        ticket = ok(agent.post(path, announce(data)), 201)
        assert put(ticket, data).status_code == 200
        tickets.append((agent, assignment, ticket, data))
    return tickets


@pytest.mark.parametrize(("call", "most"), [("reserve", 15), ("complete", 12)])
def test_an_upload_costs_a_fixed_number_of_statements(project, other, counted, call, most):
    found = []
    for tenant, count in ((project, 1), (other, AGENTS)):
        agent, assignment, ticket, data = _staged(tenant, count)[0]
        with counted() as seen:
            if call == "reserve":
                path = f"/v1/assignments/{assignment['id']}/uploads"
                ok(agent.post(path, announce(data)), 201)
            else:
                complete(agent, ticket)
        found.append(len(seen))
    assert found[0] == found[1] <= most, found


def test_accepting_an_update_costs_the_same_in_a_large_round(project, other, counted):
    found = []
    for tenant, count in ((project, 1), (other, AGENTS)):
        *others, (agent, _, ticket, _) = _staged(tenant, count)
        for each, _, staged, _ in others:
            complete(each, staged)
        drain(tenant)
        complete(agent, ticket)
        with counted() as seen:
            drain(tenant)
        found.append(len(seen))
    assert found[0] == found[1] <= 24, found


def test_a_sweep_costs_the_same_however_many_take_part(project, counted):
    make_run(project, goal=AGENTS + 1)
    found = []
    for _ in range(2):
        for agent in make_clients(project, 2):
            agent.assignment()
        sweep.sweep(project.core)
        with counted() as seen:
            sweep.sweep(project.core)
        found.append(len(seen))
    assert found[0] == found[1], found


def test_what_to_serve_costs_a_check_in_one_statement(project, counted):
    world = World(project, count=4)
    agent = make_client(project)
    found = []
    for prepare in (agent.check_in, world.set, world.set):
        prepare()
        with counted() as seen:
            served = agent.check_in()["serving"]
        found.append((served is not None, len(seen)))
        make_clients(project, 2)
    (_, without), *more = found
    assert more == [(True, without + 1)] * 2


LISTS = ["/v1/clients", "/v1/models", "/v1/runs", "/v1/jobs", "/v1/ledger/entries"]


@pytest.mark.parametrize("path", LISTS)
def test_a_list_costs_the_same_however_long_it_is(project, counted, path):
    found = []
    for _ in range(2):
        model = make_model(project)
        run = make_run(project, model)
        for agent in make_clients(project, 2):
            assignment = agent.assignment()
            deliver(agent, assignment, train(assignment, model.space).data)
        ok(project.owner.post(f"/v1/runs/{run['id']}/stop"))
        ok(project.owner.get(path))
        with counted() as seen:
            ok(project.owner.get(path))
        found.append(len(seen))
    assert found[0] == found[1], found


def test_opening_a_stage_costs_the_same_with_many_clients(project, other, counted):
    found = []
    for tenant, count in ((project, 6), (other, 30)):
        world = World(tenant, count=count)
        world.set()
        with counted() as seen:
            rollout = world.start(minimum=count // 3, stages=[100])
        found.append(len(seen))
        shares = (rollout["stage_clients"], rollout["control_clients"])
        assert shares == (count - count // 3, count // 3)
        query = "SELECT count(*) FROM assignments WHERE rollout_id = :r"
        assert tenant.sql(query, r=rollout["id"]) == [(count,)]
        for table, condition in (
            ("transitions", "subject_id IN (SELECT id FROM assignments WHERE rollout_id = :r)"),
            (
                "ledger_entries",
                "subject IN (SELECT 'assignment:' || id FROM assignments WHERE rollout_id = :r)",
            ),
        ):
            query = f"SELECT count(*) FROM {table} WHERE {condition}"
            assert tenant.sql(query, r=rollout["id"]) == [(count,)]
        with counted() as seen:
            ok(world.order(rollout, "hold"))
        found.append(len(seen))
    assert found[:2] == found[2:], found
