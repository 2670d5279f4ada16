"""Judges that die, hang and lie; files that kill; and where refused ones go."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from app import jobs
from app.encrypted import SUFFIX
from fedselect.errors import WireError
from fedselect.protocol import MULTIPART_FROM
from workers import court, running, verify
from workers.copying import Copy
from workers.court import Case, Court, JudgeDied

from .conftest import MovableClock
from .factories import (
    Client,
    Json,
    Project,
    deliver,
    drain,
    due_jobs,
    make_clients,
    make_model,
    make_run,
    make_space,
    ok,
    train,
)

SPACE = make_space()
READ = "import sys; sys.stdin.buffer.read(4); "
SAY = "import sys; sys.stdout.buffer.write(b'%s'); sys.stdout.flush(); sys.stdin.buffer.read()"
MALADIES = {  # a program in place of the judge, and what is said of it
    "dies at once": ("raise SystemExit(3)", "ended .exit status 3"),
    "is killed": (READ + "import os; os.kill(os.getpid(), 9)", "ended .exit status -9"),
    "hangs": (READ + "import time; time.sleep(600)", "took too long"),
    "reads nothing": ("import time; time.sleep(600)", "took too long"),
    "babbles": (SAY % ("x" * 99), "answer that is too long"),
    "tells no JSON": (SAY % r"\0\0\0\1{\0\0\0\0", "answer that is none"),
    "has no room of its own": (
        "from workers import judge; import mmap; full = mmap.mmap(-1, judge.MEMORY); judge.main()",
        "ended .exit status 1",
    ),
    "finds no memory at the host": (
        "import resource; from workers import judge; limit = (judge.MEMORY, judge.MEMORY); "
        "resource.setrlimit(resource.RLIMIT_AS, limit); "
        "judge._inspection = lambda *_: bytearray(8 * judge.MEMORY); judge.main()",
        "ended .exit status 1",
    ),
}
COSTLY = {  # real judges with a file that costs too much
    "memory": "from workers import judge; "
    "judge._inspection = lambda *_: bytearray(4 * judge.MEMORY); judge.main()",
    "time": """
from workers import judge
def forever(*_):
    while True: pass
judge._inspection = forever
judge.main()
""",
}
HEALTHY = court.COMMAND


@pytest.fixture
def ill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let every judge be another program; it has two seconds."""
    monkeypatch.setattr(verify, "COURT", found := Court())

    def make(program: str | None, *, seconds: float = 2.0) -> None:
        found.close()
        command = HEALTHY if program is None else (sys.executable, "-c", program)
        monkeypatch.setattr(court, "COMMAND", command)
        monkeypatch.setattr(court, "WALL_TIME", seconds)

    yield make
    found.close()


@pytest.mark.parametrize("malady", MALADIES)
def test_a_judge_without_a_verdict_is_survived(ill: Any, malady: str) -> None:
    program, said = MALADIES[malady]
    ill(program, seconds=30.0 if said.startswith("ended") else 0.5)
    courtroom = Court()
    with pytest.raises(JudgeDied, match=said), courtroom.judge() as judge:  # noqa: PT012  # one protocol
        judge.open(Case(10**6, SPACE))
        judge.feed(bytes(10**6))
        judge.decide()
    assert not courtroom._idle, "it is not used again"
    with pytest.raises(ProcessLookupError):
        os.kill(judge.pid, 0)


@pytest.mark.parametrize("what", COSTLY)
def test_a_file_that_a_new_judge_cannot_afford_is_refused(
    ill: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ill(COSTLY[what], seconds=60.0)
    monkeypatch.setattr(court, "CPU_TIME", 1.0)
    courtroom = Court()
    with pytest.raises(WireError, match=f"more {what} than") as error, courtroom.judge() as judge:  # noqa: PT012
        judge.open(Case(10**6, SPACE))
        judge.decide()
    assert error.value.code == "file_too_costly"
    assert not courtroom._idle
    with pytest.raises(JudgeDied), courtroom.judge() as judge:  # noqa: PT012
        judge.files = 7  # what it has judged before may have taken what is missing now
        judge.open(Case(10**6, SPACE))
        judge.decide()


def test_a_judge_is_kept_for_the_next_file_and_replaced_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(court, "FILES", 2)
    courtroom, pids = Court(), []
    for _ in range(3):
        with courtroom.judge() as judge:
            judge.open(Case(5, SPACE))
            judge.feed(b"hello")
            refusal = judge.decide().refusal
            assert refusal is not None
            assert refusal.code == "file_truncated"
            pids.append(judge.pid)
    assert pids[0] == pids[1] != pids[2]
    with courtroom.judge(new=True) as judge:
        assert (judge.pid in pids, judge.files) == (False, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    with pytest.raises(KeyError), courtroom.judge() as judge:
        raise KeyError("the store is away")
    assert len(courtroom._idle) == 1, "it had not begun"
    courtroom.close()


# --- poison ------------------------------------------------------------------------------------


def _updates(project: Project, count: int) -> tuple[list[Client], list[Json], list[bytes]]:
    model = make_model(project, space=SPACE)
    make_run(project, model, goal=2)
    clients = make_clients(project, count)
    assignments = [client.assignment() for client in clients]
    files = [train(a, SPACE, seed=n).data for n, a in enumerate(assignments)]
    return clients, assignments, files


def test_a_file_that_kills_its_judge_is_tried_five_times_and_set_aside(
    project: Project, clock: MovableClock, ill: Any
) -> None:
    clients, assignments, files = _updates(project, 2)
    ticket = deliver(clients[0], assignments[0], files[0])
    ill(MALADIES["is killed"][0])
    for attempt in range(1, 8):
        drain(project)
        (job,) = project.sql(
            "SELECT state, attempts FROM jobs WHERE project_id = :project AND kind = 'verify'"
            " ORDER BY created_at DESC LIMIT 1"
        )
        assert job.attempts == min(attempt, 5), "each death is an attempt"
        clock.advance(60)
    assert job.state == "failed"
    status = ok(clients[0].get(f"/v1/uploads/{ticket['id']}"))
    assert (status["state"], status["reason"]) == ("rejected", "verification_failed")
    told = [e["action"] for e in _entries(project)]
    assert "job.failed" in told
    assert "upload.quarantined" in told
    assert "assignment.rejected" in told
    key = project.core.ring.named(f"quarantine/{project.id}/{ticket['id']}")
    assert project.core.storage.read(key) == files[0]
    ill(None, seconds=20)
    deliver(clients[1], assignments[1], files[1])
    drain(project)
    answer = clients[1].check_in(pending=assignments[1]["id"])
    assert answer["pending"]["state"] == "accepted"


@pytest.mark.parametrize(("costly", "state"), [(True, "suspended"), (False, "active")])
def test_what_ends_the_judge_is_the_clients_fault_only_if_its_file_does(
    project: Project, clock: MovableClock, ill: Any, costly: bool, state: str
) -> None:
    model = make_model(project, space=SPACE)
    make_run(project, model, goal=2, influence={"strikes": 1})
    client, _ = make_clients(project, 2)
    assignment = client.assignment()
    ticket = deliver(client, assignment, train(assignment, SPACE).data)
    ill(COSTLY["memory"] if costly else MALADIES["is killed"][0], seconds=60.0)
    for _ in range(1 if costly else 5):
        drain(project)
        clock.advance(60)
    query = "SELECT reason FROM uploads WHERE id = :id"
    expected = "file_too_costly" if costly else "verification_failed"
    assert [row.reason for row in project.sql(query, id=ticket["id"])] == [expected]
    assert ok(project.owner.get(f"/v1/clients/{client.id}"))["state"] == state


def test_a_worker_that_lost_its_lease_notes_no_quarantine(
    project: Project, clock: MovableClock, ill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it sets the file aside, its lease runs out and another one takes the job."""
    clients, assignments, files = _updates(project, 1)
    deliver(clients[0], assignments[0], files[0])
    ill(MALADIES["dies at once"][0])
    for _ in range(4):
        drain(project)
        clock.advance(60)
    (job,) = due_jobs(project)
    set_aside = verify._set_aside

    def slow(*place: Any) -> bytes | None:
        clock.advance(project.core.settings.lease + 1)
        with project.core.db.transaction("test", "test") as tx:
            assert jobs.claim(tx, job, seconds=60) is not None
        return set_aside(*place)

    monkeypatch.setattr(verify, "_set_aside", slow)
    running.run_job(project.core, job)
    told = [e["action"] for e in _entries(project)]
    assert "upload.quarantined" not in told
    assert "job.failed" not in told


def _entries(project: Project) -> list[Any]:
    rows = project.sql(
        "SELECT action, subject, body FROM ledger_entries WHERE project_id = :project"
    )
    return [row._asdict() for row in rows]


def test_a_judge_killed_by_chance_costs_one_attempt(
    project: Project, clock: MovableClock, ill: Any
) -> None:
    clients, assignments, files = _updates(project, 1)
    ticket = deliver(clients[0], assignments[0], files[0])
    ill(MALADIES["dies at once"][0])
    drain(project)
    ill(None, seconds=20)
    clock.advance(60)
    drain(project)
    assert ok(clients[0].get(f"/v1/uploads/{ticket['id']}"))["state"] == "accepted"


def test_a_run_may_bound_its_updates(project: Project) -> None:
    model = make_model(project, space=SPACE)
    body = {"rounds": 1, "round": {"goal": 3, "quorum": 3}, "training": {"steps": 1}}
    for name in ("max_abs", "max_norm"):
        refused = {**body, "limits": {name: 0}}
        answer = project.owner.post(
            "/v1/runs", {"name": "bad", "model_id": model.id, "settings": refused}
        )
        assert answer.status_code == 422
    settings = {**body, "policy": {"personal": "none"}, "limits": {"max_abs": 2, "max_norm": 9}}
    request = {"name": "bounded", "model_id": model.id, "settings": settings}
    run = ok(project.owner.post("/v1/runs", request), 201)
    ok(project.owner.post(f"/v1/runs/{run['id']}/start"))
    shared = SPACE.dim - 6
    for size, reason in ((1.0, None), (2.5, "value_too_large"), (1.9, "norm_too_large")):
        (client,) = make_clients(project, 1)
        assignment = client.assignment()
        assert assignment["run"]["settings"]["limits"] == settings["limits"]
        assert size * np.sqrt(shared) < 9 or reason
        made = train(assignment, SPACE)
        theta = np.full(SPACE.dim, size, dtype=np.float32)
        data = _with_values(made, theta)
        ticket = deliver(client, assignment, data)
        drain(project)
        status = ok(client.get(f"/v1/uploads/{ticket['id']}"))
        assert status["reason"] == reason


def _with_values(made: Any, theta: Any) -> bytes:
    values = made.theta[~made.mask.to_bool()].tobytes()
    assert made.data.count(values) == 1
    return bytes(made.data.replace(values, theta[~made.mask.to_bool()].tobytes()))


# --- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", SUFFIX])
@pytest.mark.parametrize("size", [0, 1000, MULTIPART_FROM - 1, MULTIPART_FROM, 2**24 + 2**23 + 5])
def test_a_copy_is_the_very_bytes_or_nothing(project: Project, size: int, end: str) -> None:
    storage = project.core.storage
    data = np.random.default_rng(size).bytes(size)
    key = f"accepted/{project.id}/copy-{size}{end}"
    for keep in (False, True):
        with Copy(storage, key, max(size, 1)) as copy:
            for start in range(0, size, 999_983):
                copy.write(data[start : start + 999_983])
            if keep:
                copy.keep()
        assert storage.size(key) == (size if keep else None)
        assert not list(storage.multiparts(key))
    assert storage.read(key) == data if size else True
    storage.delete([key])


def test_refused_files_are_in_quarantine(project: Project) -> None:
    clients, assignments, files = _updates(project, 1)
    bad = files[0] + b"!"
    ticket = deliver(clients[0], assignments[0], bad)
    drain(project)
    key = project.core.ring.named(f"quarantine/{project.id}/{ticket['id']}")
    assert project.core.storage.read(key) == bad
    (entry,) = [e for e in _entries(project) if e["action"] == "upload.quarantined"]
    assert entry["subject"] == f"upload:{ticket['id']}"
    assert entry["body"]["size"] == len(bad)
