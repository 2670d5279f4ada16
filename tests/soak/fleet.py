"""Light clients: they train nothing, send what the one-hot oracle needs, and note what happened.

Client i puts a value on element i and zero elsewhere. All elements are shared, weights are
uniform and k is 1, so a published mean times its count says exactly who was counted, and how
often. Every call is noted as ok, failed or unknown (no answer came), as Jepsen does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from fedselect import Mask, ParameterSpace, RunSettings, wire
from fedselect.checkindocs import Assignment
from fedselect.client import AsyncClient, announce
from fedselect.errors import ServiceError
from fedselect.evaluations import EvaluationReport
from fedselect.explaindocs import AblationReport
from fedselect.policies import preset
from fedselect.protocol import ModelCreate, Registration, RunCreate, RunInfo
from fedselect.space import FloatVector, Kind, Role
from fedselect.uploads import UploadStatus

from .stack import Stack

SCORE = {"correct": 8, "total": 10, "loss": 0.4}
REPORT = EvaluationReport.model_validate(
    {
        "scores": {"pre": SCORE, "post": SCORE, "before": SCORE},
        "participations": 1,
        "personal_share": 0,
        "bytes_sent": 1,
        "bytes_received": 1,
    }
)
WORTH = AblationReport.model_validate({"whole": SCORE, "without": SCORE, "tensors": []})
KINDS = ("train", "evaluate", "ablate")
Upload = Callable[["Site", Assignment], bytes]


@dataclass(frozen=True)
class Event:
    """One call of a site's upload: ``outcome`` is ok, failed or unknown."""

    site: str
    assignment: UUID
    call: str
    outcome: str
    detail: str = ""


@dataclass
class History:
    """What the sites saw, in the order in which they saw it."""

    events: list[Event] = field(default_factory=list)

    def note(self, site: Site, assignment: UUID, call: str, outcome: str, detail: str = "") -> None:
        self.events.append(Event(site.name, assignment, call, outcome, detail))

    def completed(self) -> set[UUID]:
        """Assignments whose upload the service has acknowledged as being on time."""
        return {
            event.assignment
            for event in self.events
            if (event.call, event.outcome) == ("complete", "ok") and event.detail != "late"
        }


@dataclass
class Site:
    """One light client; all that it needs to come back after a crash is its key."""

    stack: Stack
    name: str
    index: int
    key: str
    history: History
    upload: Upload
    _client: AsyncClient | None = None
    _step: asyncio.Task[bool] | None = None

    @property
    def client(self) -> AsyncClient:
        if self._client is None:
            self._client = self.stack.async_client(self.key, tries=6)
        return self._client

    async def take_part(self, is_over: Callable[[], bool], *, insist: bool) -> None:
        """Do what there is to do, whatever happens on the way; give up when the round is over.

        ``insist``: there must be work, so ask again if there is none.
        """
        while not is_over():
            self._step = asyncio.create_task(self._attempt())
            await asyncio.wait({self._step})
            error = None if self._step.cancelled() else self._step.exception()
            if error is not None and not isinstance(error, ServiceError):
                raise error
            if not self._step.cancelled() and error is None and (self._step.result() or not insist):
                return
            await asyncio.sleep(0.1)

    async def _attempt(self) -> bool:
        """One assignment from beginning to end; False if there is none."""
        work = (await self.client.check_in(kinds=KINDS)).assignment
        if work is not None and work.kind == "evaluate":
            await self.client.evaluate(work.id, REPORT)
        elif work is not None and work.kind == "ablate":
            await self.client.ablate(work.id, WORTH)
        elif work is not None:
            await self.deliver(work)
        return work is not None

    async def deliver(self, work: Assignment) -> None:
        data = self.upload(self, work)
        reserving = self.client.reserve_update(work.id, announce(data))
        ticket = await self._noted(work, "reserve", reserving)
        await self._noted(work, "put", self.client.put_file(ticket, data))
        await self._noted(work, "complete", self.client.complete(ticket.id))

    async def _noted(self, work: Assignment, call: str, asked: Any) -> Any:
        outcome, detail = "unknown", ""  # also if we are killed in the middle
        try:
            answer = await asked
            outcome = "ok"
            detail = answer.state if isinstance(answer, UploadStatus) else ""
        except ServiceError as error:
            outcome = "failed" if error.status else "unknown"
            detail = error.code
            raise
        else:
            return answer
        finally:
            self.history.note(self, work.id, call, outcome, detail)

    async def crash(self) -> bool:
        """Die in the middle of whatever it does and forget all but the key; False: it is idle."""
        step = self._step
        if step is None or step.done():
            return False
        client, self._client = self._client, None
        step.cancel()
        await asyncio.wait({step})
        if client is not None:
            await client.aclose()
        return True

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


# --- what they send -------------------------------------------------------------------------------


def value(round_number: int) -> float:
    """What a site adds in this round: a value of another round gives itself away."""
    return float(1 + round_number % 7)


def one_hot(site: Site, work: Assignment, *, elements: int) -> bytes:
    theta = np.zeros(elements, dtype=np.float32)
    theta[site.index] = value(work.round or 0)
    return encode(work, theta, Mask.empty(elements))


def encode(work: Assignment, theta: FloatVector, mask: Mask, **changes: Any) -> bytes:
    """An update file for this assignment; the mask travels unless the service has it."""
    known = work.mask is not None and work.mask.sha256 == mask.digest
    before = work.mask.version if work.mask else 0
    meta = wire.UpdateMeta(
        space=work.space_digest,
        run=str(work.run.id),
        round=work.round or 0,
        assignment=str(work.id),
        base_version=work.base.sha256,
        mask_version=before + (not known),
        examples=7,
    )
    return wire.encode_update(meta, theta, mask=mask, send_mask=not known, **changes)


def counted(values: FloatVector, number: int, round_number: int) -> FloatVector:
    """How often each element's site is in a published mean of ``number`` updates."""
    times: FloatVector = values.astype(np.float64) * number / value(round_number)
    return times


# --- setting up -----------------------------------------------------------------------------------


@dataclass
class Campaign:
    """A project with a model, sites and a run."""

    stack: Stack
    admin: AsyncClient
    run: RunInfo
    sites: list[Site]
    history: History

    def newest_round(self) -> tuple[UUID, int, str] | None:
        """(id, number, state) of the run's newest round, straight from the rows."""
        query = "SELECT id, number, state FROM rounds WHERE run_id = %s ORDER BY opened_at DESC"
        found = self.stack.rows(f"{query} LIMIT 1", self.run.id)
        return found[0] if found else None  # type: ignore[return-value]

    async def aclose(self) -> None:
        for each in (*self.sites, self.admin):
            await each.aclose()


def flat_space(elements: int) -> ParameterSpace:
    return ParameterSpace.of([("x", (elements,), Kind.BIAS, Role.SHARED)])


def plain_settings(rounds: int, sites: int, *, personal: bool = False, **rules: Any) -> RunSettings:
    """Every site in every round, every sharer counts, all shared unless masks may be personal."""
    policy = preset("fedselect", start_round=0, growth=0) if personal else preset("fedavg")
    usual = {
        "goal": sites,
        "quorum": sites,
        "over_selection": 1,
        "min_contributors": 1,
        "retry_after": 1,
        "selection_deadline": 120,
        "report_deadline": 120,
        "verification_timeout": 120,
    }
    return RunSettings.model_validate(
        {
            "rounds": rounds,
            "policy": policy.model_dump(),
            "training": {"steps": 1},
            "round": usual | rules,
        }
    )


async def found(
    stack: Stack,
    name: str,
    settings: RunSettings,
    *,
    space: ParameterSpace,
    sites: int,
    upload: Upload | None = None,
) -> Campaign:
    """Everything from enrolment to a started run, through the interface."""
    _, key = await asyncio.to_thread(stack.project, name)
    admin = stack.async_client(key)
    model = await admin.create_model(ModelCreate(name=name, space=space.to_json()))
    weights = wire.encode_version(space.digest, np.zeros(space.dim, dtype=np.float32))
    sent = await admin.send_weights(model.id, weights)
    await _until_verified(admin, sent.id)
    tokens: list[str] = []
    while len(tokens) < sites:
        asked = min(100, sites - len(tokens))
        tokens += (await admin.create_enrolments(asked)).tokens
    history = History()
    send = upload or (lambda site, work: one_hot(site, work, elements=space.dim))
    members = await _register(stack, name, tokens, history, send)
    run = await admin.create_run(RunCreate(name=name, model_id=model.id, settings=settings))
    return Campaign(stack, admin, await _start(admin, run.id), members, history)


async def _register(
    stack: Stack, name: str, tokens: Sequence[str], history: History, send: Upload
) -> list[Site]:
    async with stack.async_client(None) as nobody:
        members = []
        for index, token in enumerate(tokens):
            site = f"{name}-{index:03}"
            joined = await nobody.register(Registration(token=token, name=site))
            members.append(Site(stack, site, index, joined.key, history, send))
        return members


async def _until_verified(admin: AsyncClient, upload_id: UUID) -> None:
    while (state := (await admin.upload(upload_id)).state) in {"reserved", "uploaded"}:
        await asyncio.sleep(0.05)
    assert state == "accepted", state


async def _start(admin: AsyncClient, run_id: UUID) -> RunInfo:
    try:
        return await admin.start_run(run_id)
    except ServiceError as error:
        # Our own first try has started it, its answer was lost on the way.
        if error.code != "run_running":
            raise
        return await admin.run(run_id)


# --- playing ------------------------------------------------------------------------------------

GATHERING = {"selecting", "collecting"}
Around = Callable[[], Awaitable[None]]


async def play(campaign: Campaign, *, until: set[str], around: Around | None = None) -> str:
    """Let the sites take part in round after round until the run is in one of these states.

    ``around`` is done beside every round once (and may outlast it); an unreachable service is
    asked again.
    """
    played: set[UUID] = set()
    while True:
        await asyncio.sleep(0.1)
        try:
            state = (await campaign.admin.run(campaign.run.id)).state.value
            current = await asyncio.to_thread(campaign.newest_round)
        except (ServiceError, psycopg.OperationalError):
            continue
        if state in until:
            return state
        if state == "evaluating":
            await _take_part(campaign, None)
        elif current is not None and current[2] in GATHERING and current[0] not in played:
            played.add(current[0])
            beside = asyncio.create_task(around()) if around else None
            await _take_part(campaign, current[0])
            if beside is not None:
                await beside


async def _take_part(campaign: Campaign, round_id: UUID | None) -> None:
    over = asyncio.Event()
    watch = asyncio.create_task(_note_the_end(campaign, round_id, over))
    try:
        insist = round_id is not None
        await asyncio.gather(*(s.take_part(over.is_set, insist=insist) for s in campaign.sites))
    finally:
        watch.cancel()


async def _note_the_end(campaign: Campaign, round_id: UUID | None, over: asyncio.Event) -> None:
    while round_id is not None and not over.is_set():
        await asyncio.sleep(0.5)
        with suppress(psycopg.OperationalError):
            newest = await asyncio.to_thread(campaign.newest_round)
            if newest is None or newest[0] != round_id or newest[2] not in GATHERING:
                over.set()


def settle(stack: Stack, *, seconds: float = 90) -> None:
    """Wait until no job is open and every ledger entry is sealed."""
    query = """SELECT (SELECT count(*) FROM jobs WHERE state IN ('due', 'leased')),
        (SELECT count(*) FROM ledger_entries e LEFT JOIN ledger_seals s ON s.entry_id = e.id
         WHERE s.seq IS NULL)"""
    deadline = time.monotonic() + seconds
    while stack.rows(query) != [(0, 0)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"open jobs, unsealed entries: {stack.rows(query)[0]}")
        time.sleep(0.2)
