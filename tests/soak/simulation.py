"""A deterministic simulation: the real rules over a database, a store and a queue in memory.

One seed decides everything: who acts next, which message is lost or comes twice, who dies between
two steps, when a frozen worker wakes up, how the clock jumps. What is decided is asked from
``fedselect.lifecycle`` and ``fedselect.leases``, as the coordinator does; what is done with the
answer follows ``app/rounds.py``, ``app/commands.py``, ``app/updates.py``, ``app/jobs.py``,
``app/sums.py`` and ``workers/``, in the same order inside the same transactions. Every commit is
checked against the invariants, which are stated here once more and share no code with the rules.

Accounting is one-hot: a version is a count of updates per client and part, so a lost update is a
0 and a doubled one a 2.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from fedselect import leases, lifecycle
from fedselect.errors import LifecycleError
from fedselect.lifecycle import (
    AfterRound,
    AssignmentEvent,
    AssignmentState,
    Decision,
    RoundEvent,
    RoundFacts,
    RoundState,
    RunEvent,
    RunState,
)
from fedselect.policies import RoundPolicy

PARTS, ATTEMPTS, LEASE = 2, 3, 30.0
GROUP = 2  # updates whose sum is formed while a round of three or four gathers
START = datetime(2030, 1, 1, tzinfo=UTC)
Steps = Iterator[None]


class Broken(AssertionError):
    """An invariant does not hold."""


class LeaseLost(Exception):
    """As in the coordinator: nothing may be written."""


class Trouble(Exception):
    """The store did not answer, or the like: the job is given back."""


class Death(Exception):
    """The worker is killed."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


# --- rows --------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Run:
    state: RunState = RunState.CREATED


@dataclass(slots=True, eq=False)
class Round:
    number: int
    attempt: int
    selection_ends: datetime
    report_ends: datetime
    state: RoundState = RoundState.SELECTING
    manifest: tuple[int, ...] | None = None  # clients in the order of their updates


@dataclass(slots=True, eq=False)
class Assignment:
    round: Round
    client: int
    attempt: int
    state: AssignmentState = AssignmentState.ASSIGNED


@dataclass(slots=True, eq=False)
class Upload:
    assignment: Assignment
    kind: str  # honest, corrupt or poison
    state: str = "reserved"  # uploaded, accepted, rejected, late; withdrawn: accepted before
    completed_at: datetime | None = None


@dataclass(slots=True, eq=False)
class Job:
    id: int
    kind: str
    subject: Any
    part: int
    run_after: datetime
    state: str = "due"
    token: UUID | None = None
    epoch: int = 0
    attempts: int = 0
    until: datetime | None = None
    runs: int = 0  # times that its handler has begun since it was made due (anew)
    since: int = 0  # the epoch at that time: whoever took it before is a zombie, not a run


@dataclass(frozen=True, slots=True)
class Lease:
    job: Job
    token: UUID
    epoch: int
    attempt: int


@dataclass(slots=True, eq=False)
class PartialSum:
    round: Round
    part: int
    clients: tuple[int, ...] = ()
    key: Any = None
    there: bool = True  # rows are never taken out of a table here


@dataclass(slots=True, eq=False)
class Version:
    number: int
    round: Round
    counts: tuple[Counter[int], ...]


@dataclass(slots=True)
class Tx:
    """A journal: what is undone when a transaction fails, and looked at when it commits."""

    changes: list[tuple[Any, str, Any]] = field(default_factory=list)
    added: list[tuple[list[Any], Any]] = field(default_factory=list)
    rings: list[Job] = field(default_factory=list)

    def set(self, row: Any, **values: Any) -> None:
        for name, value in values.items():
            self.changes.append((row, name, getattr(row, name)))
            setattr(row, name, value)

    def add(self, table: list[Any], row: Any) -> None:
        table.append(row)
        self.added.append((table, row))

    def undo(self) -> None:
        for row, name, value in reversed(self.changes):
            setattr(row, name, value)
        for table, _ in reversed(self.added):
            table.pop()


class Rows:
    """The database: tables, transactions, the queue that the doorbell fills, and the clock."""

    def __init__(self, rng: random.Random, policy: RoundPolicy, rounds: int) -> None:
        self.rng, self.policy, self.rounds_wanted = rng, policy, rounds
        self.now = START
        self.run = Run()
        self.rounds: list[Round] = []
        self.assignments: list[Assignment] = []
        self.uploads: list[Upload] = []
        self.updates: list[Upload] = []
        self.jobs: list[Job] = []
        self.versions: list[Version] = []
        self.sums: list[PartialSum] = []
        self.queue: list[Job] = []
        self.trouble = rng.choice((0.02, 0.1, 0.9))  # how often summing and publishing fail
        self.calm = False  # at the end nothing is lost, repeated or killed any more

    @contextmanager
    def transaction(self) -> Iterator[Tx]:
        tx, self.cut_off, self.cut_short = Tx(), 0, 0
        try:
            yield tx
        except (LeaseLost, LifecycleError):
            tx.undo()
            raise
        if not self.calm and self.rng.random() < 0.02:  # killed before the commit
            tx.undo()
            raise Death
        self.check(tx)
        if not self.calm and self.rng.random() < 0.02:  # killed behind it: nobody rings
            raise Death
        for job in tx.rings:
            self.ring(job)

    def ring(self, job: Job) -> None:
        copies = 1 if self.calm else self.rng.choice((0, 1, 1, 1, 2))
        self.queue += [job] * copies

    def of(self, current: Round) -> list[Assignment]:
        return [a for a in self.assignments if a.round is current]

    def counted(self, current: Round) -> tuple[int, ...]:
        """The clients whose updates a round would aggregate now, in order."""
        mine = (u for u in self.updates if u.assignment.round is current)
        return tuple(u.assignment.client for u in mine if u.state != "withdrawn")

    def sum_of(self, current: Round, part: int) -> PartialSum | None:
        place = (s for s in self.sums if s.round is current and s.part == part and s.there)
        return next(place, None)

    def active(self) -> Round | None:
        return next((r for r in self.rounds if r.state not in ENDED), None)

    # --- what must hold at every commit ----------------------------------------------------------

    def check(self, tx: Tx) -> None:
        for row, name, old in tx.changes:
            if name == "state" and old is not row.state:
                CHECKS[type(row)](self, row, old)
            elif name == "epoch":
                demand(row.epoch > old, "the epoch of a lease did not grow")
            elif name == "token" and row.token is not None:
                demand(row.state == "leased", "a token without a lease")
        for table, row in tx.added:
            if type(row) in ADDED:
                ADDED[type(row)](self, table, row)
        active = [r for r in self.rounds if r.state not in ENDED]
        demand(len(active) <= 1, "two rounds are under way")
        if self.run.state is RunState.RUNNING:
            demand(len(active) == 1, "a running run has no round")

    def check_round(self, row: Round, old: RoundState) -> None:
        demand(old not in ENDED, f"a round that was {old} is {row.state}")
        states = Counter(a.state for a in self.of(row))
        accepted = self.counted(row)
        demand(len(accepted) == len(set(accepted)), "a client counts twice")
        demand(len(accepted) == states[AssignmentState.ACCEPTED], "accepted without an update")
        left = states[AssignmentState.UPLOADED]
        if row.state in {RoundState.AGGREGATING, RoundState.ABANDONED, RoundState.CANCELLED}:
            demand(not left, "a closed round waits for a verification")
        if row.state is RoundState.AGGREGATING and old is not RoundState.FAILED:
            demand(len(accepted) >= self.policy.quorum, "a round closed below its quorum")
            demand(row.manifest == accepted, "the manifest is not what was accepted")
            demand(not self.cut_off, "an update on time was cut off by the closing of its round")
        if row.state is RoundState.ABANDONED:
            most = len(accepted) + self.cut_off
            demand(most < self.policy.quorum, "a round that had, or would have, a quorum ended")
        early = old is RoundState.COLLECTING and self.now < row.report_ends
        if early and row.state is not RoundState.CANCELLED and len(accepted) < self.policy.goal:
            demand(not self.cut_short, "a round ended while clients had time to deliver")
        if row.state is RoundState.COLLECTING:
            demand(len({a.client for a in self.of(row)}) >= self.policy.quorum, "selected too few")
        if row.state is RoundState.PUBLISHED:
            demand(old is RoundState.AGGREGATING, f"published from {old}")
            found = [v for v in self.versions if v.round is row]
            demand(len(found) == 1, "a published round without its version")
            for counts in found[0].counts:
                demand(set(counts) == set(accepted), "an accepted update is lost, or a strange one")
                demand(set(counts.values()) <= {1}, "an update counts twice")

    # What a closing round does to others in the same transaction:
    cut_off = 0  # updates that were complete and are refused
    cut_short = 0  # assignments that were open and expire

    def check_assignment(self, row: Assignment, old: AssignmentState) -> None:
        if old is AssignmentState.ACCEPTED and row.state is AssignmentState.REJECTED:
            frozen = row.round.manifest or ()  # the withdrawal itself may be what closes the round
            demand(row.client not in frozen, "withdrawn, and aggregated all the same")
            return
        final = {"accepted", "rejected", "late", "declined"}
        demand(old.value not in final, f"an assignment that was {old} is {row.state}")
        if row.state is AssignmentState.ACCEPTED:
            demand(old is AssignmentState.UPLOADED, f"accepted from {old}")
        if row.state is AssignmentState.UPLOADED:
            demand(row.round.state in GATHERS, "uploaded into a round that is closed")

    def check_job(self, row: Job, old: str) -> None:
        demand(old != "done" or row.kind == "fold", f"a job that was done is {row.state}")
        if row.state == "failed":
            demand(row.attempts >= ATTEMPTS, "a job failed before its attempts were used up")

    def check_run(self, row: Run, old: RunState) -> None:
        demand(old not in {RunState.FINISHED, RunState.STOPPED}, f"{old} is not the end")
        if row.state is RunState.EVALUATING:
            demand(len(self.versions) == self.rounds_wanted, "the run ends with versions missing")

    def added_round(self, table: list[Round], row: Round) -> None:
        demand(self.run.state is RunState.RUNNING, "a round was opened by a run that does not run")
        demand(row.number == len(self.versions) + 1, "rounds have a gap")
        demand(row.number <= self.rounds_wanted, "one round too many")
        same = [r.attempt for r in table if r.number == row.number]
        demand(same == list(range(1, len(same) + 1)), "attempts have a gap")

    def added_version(self, table: list[Version], row: Version) -> None:
        demand([v.number for v in table] == list(range(1, len(table) + 1)), "versions have a gap")
        demand(row.round.state is RoundState.PUBLISHED, f"a version of a {row.round.state} round")

    def added_upload(self, table: list[Upload], row: Upload) -> None:
        if table is self.updates:
            demand(row.kind == "honest", f"a {row.kind} file was accepted")
            demand(row.assignment.state is AssignmentState.ACCEPTED, "an update was not accepted")

    def added_assignment(self, table: list[Assignment], row: Assignment) -> None:
        mine = [a for a in self.of(row.round) if a.client == row.client]
        demand(len(mine) <= self.policy.client_attempts, "a client has too many attempts")
        others = [a.state for a in mine if a is not row]
        demand(set(others) <= {AssignmentState.REJECTED}, "a client has two places in a round")


ENDED = {RoundState.PUBLISHED, RoundState.ABANDONED, RoundState.CANCELLED}
GATHERS = {RoundState.SELECTING, RoundState.COLLECTING}
CHECKS: dict[type, Callable[..., None]] = {
    Round: Rows.check_round,
    Assignment: Rows.check_assignment,
    Job: Rows.check_job,
    Run: Rows.check_run,
    Upload: lambda *_: None,
}
ADDED: dict[type, Callable[..., None]] = {
    Round: Rows.added_round,
    Version: Rows.added_version,
    Upload: Rows.added_upload,
    Assignment: Rows.added_assignment,
}


# --- the coordinator ---------------------------------------------------------------------------


class Coordinator:
    """The transactions of ``app/``, over rows in memory."""

    def __init__(self, rows: Rows) -> None:
        self.db = rows
        self.failures = 0

    # jobs

    def enqueue(self, tx: Tx, kind: str, subject: Any, part: int = 0) -> None:
        job = Job(len(self.db.jobs), kind, subject, part, self.db.now)
        tx.add(self.db.jobs, job)
        tx.rings.append(job)

    def require(self, tx: Tx, kind: str, subject: Any, parts: Iterable[int]) -> None:
        mine = {j.part: j for j in self.db.jobs if j.kind == kind and j.subject is subject}
        for part in parts:
            if part not in mine:
                self.enqueue(tx, kind, subject, part)
            elif mine[part].state == "done":
                self.anew(tx, mine[part])

    def anew(self, tx: Tx, job: Job) -> None:
        fresh = {"attempts": 0, "runs": 0, "since": job.epoch}
        tx.set(job, state="due", run_after=self.db.now, until=None, token=None, **fresh)
        tx.rings.append(job)

    def claim(self, tx: Tx, job: Job) -> Lease | None:
        now = self.db.now
        if not leases.claimable(job.state, run_after=job.run_after, lease_until=job.until, now=now):
            return None
        live = job.state == "leased" and job.until is not None and job.until >= now
        demand(not live, "a job was taken from a worker whose lease runs")
        demand(job.state in {"due", "leased"}, f"a job that is {job.state} was taken")
        token = UUID(int=self.db.rng.getrandbits(128))
        until = now + timedelta(seconds=LEASE)
        hold = leases.claim(job.epoch, job.attempts, token=token, until=until)
        tx.set(job, state="leased", token=hold.token, epoch=hold.epoch)
        tx.set(job, attempts=hold.attempt, until=hold.until)
        return Lease(job, hold.token, hold.epoch, hold.attempt)

    def fence(self, lease: Lease) -> Job:
        job = lease.job
        present, mine = (job.token, job.epoch), (lease.token, lease.epoch)
        if not leases.held(job.state, present, mine):
            raise LeaseLost
        demand(job.state == "leased" and present == mine, "a write under an older lease")
        return job

    def finish(self, tx: Tx, lease: Lease) -> None:
        tx.set(self.fence(lease), state="done", until=None)

    def give_back(self, tx: Tx, lease: Lease) -> None:
        job = self.fence(lease)
        again = leases.after_error(lease.attempt, attempts=ATTEMPTS, now=self.db.now)
        if again is not None:
            tx.set(job, state="due", run_after=again, until=None)
            return
        tx.set(job, state="failed", until=None)
        if job.kind == "verify":
            self.give_up(tx, job.subject)
        if job.kind in {"verify", "fold", "discard"}:
            return
        if job.subject.state is RoundState.AGGREGATING:
            self.failures += 1
            self.advance(tx, job.subject, RoundEvent.FAIL)

    def revive(self, tx: Tx, subject: Any) -> None:
        for job in self.db.jobs:
            mine = job.subject is subject and job.kind in {"aggregate", "publish"}
            if mine and job.state == "failed":
                self.anew(tx, job)

    # rounds

    def facts(self, current: Round) -> RoundFacts:
        mine = self.db.of(current)
        counts = Counter(a.state for a in mine)
        rejected = [a for a in mine if lifecycle.may_try_again(a.state, a.attempt, self.db.policy)]
        further = sum(a.attempt > 1 for a in mine)
        return RoundFacts(
            state=current.state,
            selection_ends=current.selection_ends,
            report_ends=current.report_ends,
            assigned=len(mine) - further,
            open=sum(counts[s] for s in lifecycle.OPEN_ASSIGNMENTS),
            pending=counts[AssignmentState.UPLOADED],
            accepted=counts[AssignmentState.ACCEPTED],
            again=len(rejected) - further,
        )

    def advance(self, tx: Tx, current: Round, event: RoundEvent) -> None:
        found = lifecycle.decide(self.facts(current), event, policy=self.db.policy, now=self.db.now)
        if found.to is not None:
            self.enter(tx, current, found)

    def enter(self, tx: Tx, current: Round, decision: Decision) -> None:
        to = decision.to
        assert to is not None
        before = current.state
        tx.set(current, state=to)
        ended = to in lifecycle.TERMINAL_ROUNDS
        if before is RoundState.FAILED and not ended:
            self.revive(tx, current)
        elif ended or to is RoundState.AGGREGATING:
            self.close_assignments(tx, current)
        if to is RoundState.AGGREGATING and before is not RoundState.FAILED:
            self.drop(tx, current)
            tx.set(current, manifest=self.db.counted(current))
            for part in range(PARTS):
                self.enqueue(tx, "aggregate", current, part)
        if ended or to is RoundState.FAILED:
            self.follow(tx, current)

    def close_assignments(self, tx: Tx, current: Round) -> None:
        for a in self.db.of(current):
            if a.state is AssignmentState.UPLOADED:
                self.db.cut_off += 1
                self.move(tx, a, AssignmentEvent.REJECT)
            elif a.state in lifecycle.OPEN_ASSIGNMENTS:
                self.db.cut_short += 1
                self.move(tx, a, AssignmentEvent.EXPIRE)

    def follow(self, tx: Tx, ended: Round) -> None:
        if ended.state not in {RoundState.PUBLISHED, RoundState.FAILED}:
            self.drop(tx, ended)
        if ended.state is not RoundState.FAILED:
            self.discard(tx, ended)
        step = lifecycle.after_round(
            self.db.run.state,
            lifecycle.Ended(ended.state, ended.number, ended.attempt),
            rounds=self.db.rounds_wanted,
            max_attempts=self.db.policy.max_attempts,
        )
        if step is AfterRound.NEXT:
            self.open_round(tx)
        elif step is AfterRound.RETRY:
            self.open_round(tx, attempt=ended.attempt + 1)
        elif step is AfterRound.PAUSE:
            self.move_run(tx, RunEvent.PAUSE)
        elif step is AfterRound.EVALUATE:
            self.move_run(tx, RunEvent.EVALUATE)

    def drop(self, tx: Tx, subject: Round) -> None:
        for job in self.db.jobs:
            if job.subject is subject and job.state in {"due", "leased"}:
                tx.set(job, state="done", until=None)

    def discard(self, tx: Tx, ended: Round) -> None:
        for row in self.db.sums:
            if row.round is ended:
                tx.set(row, there=False)
        folded = any(j.kind == "fold" and j.subject is ended for j in self.db.jobs)
        if folded or ended.manifest is not None:
            self.enqueue(tx, "discard", ended)

    def open_round(self, tx: Tx, attempt: int = 1) -> None:
        policy = self.db.policy
        ends = self.db.now + timedelta(seconds=policy.selection_deadline)
        last = ends + timedelta(seconds=policy.report_deadline)
        tx.add(self.db.rounds, Round(len(self.db.versions) + 1, attempt, ends, last))

    def move_run(self, tx: Tx, event: RunEvent) -> None:
        tx.set(self.db.run, state=lifecycle.next_run_state(self.db.run.state, event))

    def move(self, tx: Tx, assignment: Assignment, event: AssignmentEvent) -> None:
        tx.set(assignment, state=lifecycle.next_assignment_state(assignment.state, event))

    def tick(self, tx: Tx, current: Round) -> None:
        if current.state not in lifecycle.GATHERING_ROUNDS:
            return
        before = self.db.now - timedelta(seconds=self.db.policy.verification_timeout)
        for upload in self.db.uploads:
            mine = upload.assignment.round is current and upload.completed_at is not None
            waiting = upload.assignment.state is AssignmentState.UPLOADED
            if mine and waiting and upload.completed_at < before:
                self.move(tx, upload.assignment, AssignmentEvent.REJECT)
        self.advance(tx, current, RoundEvent.TICK)

    # clients

    def check_in(self, tx: Tx, client: int) -> Assignment | None:
        db = self.db
        current = db.active()
        if current is None or current.state not in lifecycle.GATHERING_ROUNDS:
            return None
        if db.now >= current.report_ends:
            return None
        mine = [a for a in db.of(current) if a.client == client]
        if mine and mine[-1].state in lifecycle.OPEN_ASSIGNMENTS:
            return mine[-1]
        if any(u.assignment in mine and u.state == "withdrawn" for u in db.uploads):
            return None  # in truth it is revoked; here it comes again in the next round
        if mine and lifecycle.may_try_again(mine[-1].state, mine[-1].attempt, db.policy):
            return self.assign(tx, current, client, mine[-1].attempt + 1)
        selecting = current.state is RoundState.SELECTING and db.now < current.selection_ends
        if mine or not selecting or db.run.state is not RunState.RUNNING:
            return None
        return self.assign(tx, current, client, 1)

    def assign(self, tx: Tx, current: Round, client: int, attempt: int) -> Assignment:
        row = Assignment(current, client, attempt)
        tx.add(self.db.assignments, row)
        if attempt == 1:
            self.advance(tx, current, RoundEvent.JOIN)
        return row

    def gathering(self, assignment: Assignment) -> bool:
        current = assignment.round
        in_time = self.db.now < current.report_ends
        return in_time and current.state in lifecycle.GATHERING_ROUNDS

    def reserve(self, tx: Tx, assignment: Assignment, kind: str) -> Upload:
        for upload in self.db.uploads:
            if upload.assignment is assignment:
                return upload
        if not self.gathering(assignment):
            raise LifecycleError("the round takes no more updates", code="assignment_expired")
        self.move(tx, assignment, AssignmentEvent.RESERVE)
        upload = Upload(assignment, kind)
        tx.add(self.db.uploads, upload)
        return upload

    def complete(self, tx: Tx, upload: Upload) -> None:
        if upload.state != "reserved":
            return
        if not self.gathering(upload.assignment):
            self.move(tx, upload.assignment, AssignmentEvent.MISS)
            tx.set(upload, state="late")
            return
        self.move(tx, upload.assignment, AssignmentEvent.COMPLETE)
        tx.set(upload, state="uploaded", completed_at=self.db.now)
        self.enqueue(tx, "verify", upload)

    def decline(self, tx: Tx, assignment: Assignment) -> None:
        if assignment.state is not AssignmentState.DECLINED:
            self.move(tx, assignment, AssignmentEvent.DECLINE)
            self.advance(tx, assignment.round, RoundEvent.SETTLE)

    # what workers write

    def accept(self, tx: Tx, lease: Lease) -> None:
        self.finish(tx, lease)
        upload: Upload = lease.job.subject
        if upload.assignment.state is not AssignmentState.UPLOADED:
            return
        self.move(tx, upload.assignment, AssignmentEvent.ACCEPT)
        tx.set(upload, state="accepted")
        tx.add(self.db.updates, upload)
        current = upload.assignment.round
        self.advance(tx, current, RoundEvent.SETTLE)
        complete = len(self.db.counted(current)) % GROUP == 0
        if complete and current.state in lifecycle.GATHERING_ROUNDS:
            self.require(tx, "fold", current, range(PARTS))

    def withdraw(self, tx: Tx, upload: Upload) -> list[Any]:
        current = upload.assignment.round
        if upload.state != "accepted" or current.state not in lifecycle.GATHERING_ROUNDS:
            return []
        self.move(tx, upload.assignment, AssignmentEvent.WITHDRAW)
        tx.set(upload, state="withdrawn")
        doomed = []
        for row in self.db.sums:
            if row.round is current and row.there and not self.fits(row, self.db.counted(current)):
                doomed.append(row.key)
                tx.set(row, there=False)
        for job in self.db.jobs:
            if job.kind == "fold" and job.subject is current:
                self.anew(tx, job)
        self.advance(tx, current, RoundEvent.SETTLE)
        return doomed

    def fits(self, row: PartialSum, clients: tuple[int, ...]) -> bool:
        return row.clients == clients[: len(row.clients)]

    def fitting(self, current: Round, part: int, clients: tuple[int, ...]) -> PartialSum | None:
        row = self.db.sum_of(current, part)
        return row if row is not None and self.fits(row, clients) else None

    def keep_sum(self, tx: Tx, lease: Lease, clients: tuple[int, ...], key: Any) -> Any:
        self.finish(tx, lease)
        current, part = lease.job.subject, lease.job.part
        row = self.db.sum_of(current, part)
        if row is None:
            row = PartialSum(current, part)
            tx.add(self.db.sums, row)
        before = row.key
        tx.set(row, clients=clients, key=key)
        self.go_on(tx, lease, clients)
        return before

    def go_on(self, tx: Tx, lease: Lease, clients: tuple[int, ...]) -> None:
        if len(self.db.counted(lease.job.subject)) - len(clients) >= GROUP:
            self.require(tx, "fold", lease.job.subject, [lease.job.part])

    def reject(self, tx: Tx, lease: Lease) -> None:
        self.finish(tx, lease)
        self.give_up(tx, lease.job.subject)

    def give_up(self, tx: Tx, upload: Upload) -> None:
        if upload.assignment.state is AssignmentState.UPLOADED:
            self.move(tx, upload.assignment, AssignmentEvent.REJECT)
            tx.set(upload, state="rejected")
            self.advance(tx, upload.assignment.round, RoundEvent.SETTLE)

    def part_done(self, tx: Tx, lease: Lease) -> None:
        self.finish(tx, lease)
        current = lease.job.subject
        mine = [j for j in self.db.jobs if j.kind == "aggregate" and j.subject is current]
        if all(job.state == "done" for job in mine):
            self.enqueue(tx, "publish", current)

    def publish(self, tx: Tx, lease: Lease, counts: tuple[Counter[int], ...]) -> None:
        self.finish(tx, lease)
        current = lease.job.subject
        tx.add(self.db.versions, Version(current.number, current, counts))
        self.advance(tx, current, RoundEvent.PUBLISH)

    # an administrator

    def order(self, tx: Tx, event: RunEvent) -> None:
        db = self.db
        current = db.active()
        failed = current is not None and current.state is RoundState.FAILED
        if event is RunEvent.RESUME and db.run.state is RunState.PAUSED and failed:
            self.advance(tx, current, RoundEvent.CANCEL)
        self.move_run(tx, event)
        current = db.active()
        if event is RunEvent.STOP and current is not None:
            self.advance(tx, current, RoundEvent.CANCEL)
        if event in {RunEvent.START, RunEvent.RESUME} and current is None:
            same = [r.attempt for r in db.rounds if r.number == len(db.versions) + 1]
            self.open_round(tx, attempt=max(same, default=0) + 1)

    def retry(self, tx: Tx, current: Round) -> None:
        self.advance(tx, current, RoundEvent.RETRY)
        if self.db.run.state is RunState.PAUSED:
            self.move_run(tx, RunEvent.RESUME)


def check_attempts(lease: Lease) -> None:
    if lease.attempt > ATTEMPTS:
        raise Trouble("every attempt ended with the death of its worker")


# --- workers -----------------------------------------------------------------------------------


class Workers:
    """Handlers as generators: between two steps a worker may be killed, or freeze for long."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.do, self.db = coordinator, coordinator.db
        self.partials: dict[tuple[int, ...], Counter[int]] = {}

    def work(self, job: Job) -> Steps:
        with self.db.transaction() as tx:
            lease = self.do.claim(tx, job)
        if lease is None:
            return
        yield
        try:
            check_attempts(lease)
            job.runs += lease.epoch > job.since
            demand(job.runs <= ATTEMPTS, "a job ran more often than its attempts allow")
            yield from getattr(self, job.kind)(lease)
        except LeaseLost:
            return
        except (Trouble, LifecycleError):
            yield
            try:
                with self.db.transaction() as tx:
                    self.do.give_back(tx, lease)
            except LeaseLost:
                return

    def stumble(self, odds: float) -> None:
        if not self.db.calm and self.db.rng.random() < odds:
            raise Trouble("the store does not answer")

    def verify(self, lease: Lease) -> Steps:
        upload: Upload = lease.job.subject
        if upload.kind == "poison":
            raise Death
        self.stumble(0.05)
        yield
        with self.db.transaction() as tx:
            (self.do.accept if upload.kind == "honest" else self.do.reject)(tx, lease)

    def aggregate(self, lease: Lease) -> Steps:
        current: Round = lease.job.subject
        if current.state in lifecycle.TERMINAL_ROUNDS:
            raise LeaseLost
        self.stumble(self.db.trouble)
        yield
        assert current.manifest is not None
        known = self.do.fitting(current, lease.job.part, current.manifest)
        self.partials[id(current), lease.job.part] = self.begun(known, current.manifest)
        yield
        with self.db.transaction() as tx:
            self.do.part_done(tx, lease)

    def publish(self, lease: Lease) -> Steps:
        current: Round = lease.job.subject
        keys = [(id(current), part) for part in range(PARTS)]
        if not all(key in self.partials for key in keys):
            raise Trouble("partials are missing")
        counts = tuple(self.partials[key] for key in keys)
        self.stumble(self.db.trouble)
        yield
        with self.db.transaction() as tx:
            self.do.publish(tx, lease, counts)

    def fold(self, lease: Lease) -> Steps:
        current, part = lease.job.subject, lease.job.part
        with self.db.transaction() as tx:
            self.do.fence(lease)
            clients = self.db.counted(current)
            clients = clients[: len(clients) // GROUP * GROUP]
            known = self.do.fitting(current, part, clients)
            if len(clients) == (len(known.clients) if known else 0):
                self.do.finish(tx, lease)
                self.do.go_on(tx, lease, clients)
                return
            known = replace(known) if known else None
        self.stumble(self.db.trouble)
        yield
        key = (id(current), part, len(clients), lease.epoch)
        self.partials[key] = self.begun(known, clients)
        yield
        try:
            with self.db.transaction() as tx:
                before = self.do.keep_sum(tx, lease, clients, key)
        except LeaseLost:
            self.partials.pop(key, None)
            raise
        yield
        self.partials.pop(before, None)

    def begun(self, known: PartialSum | None, clients: tuple[int, ...]) -> Counter[int]:
        held = self.partials.get(known.key) if known else None
        if known is None or held is None:
            return Counter(clients)
        return held + Counter(clients[len(known.clients) :])

    def discard(self, lease: Lease) -> Steps:
        for key in [key for key in self.partials if key[0] == id(lease.job.subject)]:
            del self.partials[key]
        yield
        with self.db.transaction() as tx:
            self.do.finish(tx, lease)


# --- everybody together ------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one seed did, for the figures."""

    steps: int = 0
    deaths: int = 0
    published: int = 0
    accepted: int = 0
    abandoned: int = 0
    failures: int = 0


class World:
    """One seed's life: a run, its clients, its workers and all that goes wrong."""

    CLIENTS, WORKERS = 5, 3

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        policy = RoundPolicy(
            goal=3,
            quorum=2,
            over_selection=self.rng.choice((1.0, 1.3)),
            selection_deadline=60,
            report_deadline=self.rng.choice((60, 300)),
            verification_timeout=600,
            max_attempts=3,
        )
        self.db = Rows(self.rng, policy, rounds=self.rng.choice((1, 2, 3)))
        self.do = Coordinator(self.db)
        self.workers = Workers(self.do)
        self.odds = self.rng.choice(((8, 1, 1), (5, 4, 1)))  # honest, corrupt, poisonous files
        self.busy: list[Steps] = []
        self.known: dict[int, Assignment] = {}  # what each client believes its work to be
        self.outcome = Outcome()

    def live(self, steps: int = 240) -> Outcome:
        """A troubled life, then a calm one that must lead to the end.

        Raises:
            Broken: an invariant does not hold.
        """
        self.db.calm = True
        self.attempt(lambda tx: self.do.order(tx, RunEvent.START))
        self.db.calm = False
        actions = (self.client, self.worker, self.sweep, self.time, self.admin, self.erase)
        for _ in range(steps):
            self.act(self.rng.choices(actions, weights=(50, 40, 6, 8, 1.5, 1))[0])
        self.db.calm = True
        self.settle()
        self.outcome.published = len(self.db.versions)
        self.outcome.accepted = len(self.db.updates)
        self.outcome.failures = self.do.failures
        states = Counter(current.state for current in self.db.rounds)
        self.outcome.abandoned = states[RoundState.ABANDONED]
        return self.outcome

    def act(self, action: Callable[[], None]) -> None:
        self.outcome.steps += 1
        try:
            action()
        except Death:
            self.outcome.deaths += 1
        except LifecycleError as error:
            raise Broken(f"a worker cannot end its job: {error}") from error

    def attempt(self, work: Callable[[Tx], Any]) -> Any:
        """One request; a refusal is an answer, too."""
        try:
            with self.db.transaction() as tx:
                return work(tx)
        except LifecycleError:
            return None

    def client(self) -> None:
        # At the end one client stays away for good: the others must not wait for it.
        client = self.rng.randrange(1 if self.db.calm else 0, self.CLIENTS)
        known = self.known.get(client)
        if known is None or self.rng.random() < 0.3 or known.state.value not in OPEN:
            found = self.attempt(lambda tx: self.do.check_in(tx, client))
            if found is not None and (self.db.calm or self.rng.random() < 0.9):  # answer lost
                self.known[client] = found
        elif not self.db.calm and self.rng.random() < 0.05:
            self.attempt(lambda tx: self.do.decline(tx, known))
        else:
            self.upload(known)

    def upload(self, known: Assignment) -> None:
        odds = (1, 0, 0) if self.db.calm else self.odds
        kind = self.rng.choices(("honest", "corrupt", "poison"), weights=odds)[0]
        upload = self.attempt(lambda tx: self.do.reserve(tx, known, kind))
        if upload is None or (not self.db.calm and self.rng.random() < 0.3):
            return  # it comes back later, perhaps behind the deadline
        for _ in range(self.rng.choice((1, 1, 2))):
            self.attempt(lambda tx: self.do.complete(tx, upload))

    def worker(self) -> None:
        if self.db.queue and (len(self.busy) < self.WORKERS or self.rng.random() < 0.1):
            place = self.rng.randrange(len(self.db.queue))
            self.busy.append(self.workers.work(self.db.queue.pop(place)))
        if not self.busy:
            return
        one = self.rng.choice(self.busy)
        if not self.db.calm and self.rng.random() < 0.03:
            self.busy.remove(one)
            raise Death
        try:
            next(one)
        except StopIteration:
            self.busy.remove(one)
        except Death:
            self.busy.remove(one)
            raise

    def sweep(self) -> None:
        for current in self.db.rounds:
            if current.state in lifecycle.GATHERING_ROUNDS:
                self.attempt(lambda tx, current=current: self.do.tick(tx, current))
        if self.db.run.state is RunState.EVALUATING:
            self.attempt(lambda tx: self.do.move_run(tx, RunEvent.FINISH))
        for job in self.db.jobs:
            now, after, until = self.db.now, job.run_after, job.until
            if leases.claimable(job.state, run_after=after, lease_until=until, now=now):
                self.db.ring(job)

    def time(self) -> None:
        jump = self.rng.choice((1, 1, 3, 10, 31, 70, 400, -20))
        self.db.now += timedelta(seconds=jump)

    def erase(self) -> None:
        """A client withdraws; what sums held its update is deleted."""
        if self.db.updates:
            upload = self.rng.choice(self.db.updates)
            for key in self.attempt(lambda tx: self.do.withdraw(tx, upload)) or ():
                self.workers.partials.pop(key, None)

    def admin(self) -> None:
        current = self.db.active()
        if current is not None and current.state is RoundState.FAILED and self.rng.random() < 0.7:
            self.attempt(lambda tx: self.do.retry(tx, current))
        elif self.rng.random() < 0.3:
            chosen = self.rng.choice(self.db.rounds)  # the interface takes any of them
            self.attempt(lambda tx: self.do.advance(tx, chosen, RoundEvent.CANCEL))
        else:
            orders = (RunEvent.PAUSE, RunEvent.RESUME, RunEvent.RESUME)
            event = RunEvent.STOP if self.rng.random() < 0.02 else self.rng.choice(orders)
            self.attempt(lambda tx: self.do.order(tx, event))

    # --- the end ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """Without faults everything comes to its end; that is the other half of the promise."""
        for _ in range(400):
            if self.db.run.state in {RunState.FINISHED, RunState.STOPPED} and self.idle():
                break
            if self.db.run.state is RunState.PAUSED:
                self.resume()
            for _ in range(10):
                self.act(self.client)
            for _ in range(30):
                self.act(self.worker)
            self.act(self.sweep)
            self.db.now += timedelta(seconds=20)
        demand(self.db.run.state in {RunState.FINISHED, RunState.STOPPED}, "the run does not end")
        demand(self.idle(), "jobs are left over")
        for assignment in self.db.assignments:
            demand(assignment.state.value not in {"uploaded", *OPEN}, "an assignment has no end")
        for current in self.db.rounds:
            demand(current.state in ENDED, "a round has no end")
        for upload in self.db.uploads:
            accepted = upload.assignment.state is AssignmentState.ACCEPTED
            counts = upload in self.db.updates and upload.state != "withdrawn"
            demand(counts == accepted, "accepted and not counted, or reverse")
        for row in self.db.sums:
            demand(not row.there, "a sum is kept for a round that has ended")

    def resume(self) -> None:
        current = self.db.active()
        failed = current is not None and current.state is RoundState.FAILED
        if failed:
            self.attempt(lambda tx: self.do.retry(tx, current))
        else:
            self.attempt(lambda tx: self.do.order(tx, RunEvent.RESUME))

    def idle(self) -> bool:
        return all(job.state in {"done", "failed"} for job in self.db.jobs)


OPEN = {"assigned", "reserved"}
