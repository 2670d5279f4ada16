"""Every call of the HTTP interface, written once for the blocking and the asyncio client.

Owns paths, documents and names of the calls. How a call is tried is ``exchange``, how it is sent is
``client``. Must not import httpx, open files or keep the state of an agent.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload
from uuid import UUID

from pydantic import BaseModel

from fedselect import exchange, sending
from fedselect.checkindocs import CheckIn, CheckInAnswer, Decline, Outcome
from fedselect.estimatedocs import Estimate, EstimateCreate, Measured, RunEstimate
from fedselect.evaluations import Evaluation, EvaluationReport
from fedselect.exchange import Flow, Retries
from fedselect.explaindocs import AblationInfo, AblationReport
from fedselect.ledgerdocs import (
    Checkpoint,
    ConsistencyProof,
    InclusionProof,
    LedgerEntry,
    LedgerKeys,
)
from fedselect.manifestdocs import ManifestDocument
from fedselect.policies import MOST_ARMS
from fedselect.protocol import (
    MOST_HELD,
    Answer,
    ClientConduct,
    ClientInfo,
    Download,
    EnrolmentCreate,
    Enrolments,
    JobInfo,
    ModelCreate,
    ModelInfo,
    Registered,
    Registration,
    RoundDetail,
    RoundInfo,
    RunCreate,
    RunInfo,
    VersionInfo,
)
from fedselect.retention import Erasure
from fedselect.sending import Source, announce
from fedselect.uploads import UploadReserve, UploadStatus, UploadTicket

if TYPE_CHECKING:
    from fedselect.client import AsyncClient, Client

PAGE = 200  # items asked for at once

P = ParamSpec("P")
T = TypeVar("T")


class Page(Answer, Generic[T]):
    """One page of a list; ``next`` is the cursor of the page behind it."""

    items: list[T]
    next: str | None = None


@dataclass(frozen=True)
class Listing(Generic[T]):
    """A list to page through: where it is and what its items are."""

    path: str
    item: type[T]
    query: Mapping[str, str] = field(default_factory=dict)

    def page(self, retries: Retries, cursor: str | None) -> Flow[Page[T]]:
        """The page behind a cursor, None for the first one."""
        query = {"limit": str(PAGE), **self.query, **({"cursor": cursor} if cursor else {})}
        form: type[Page[T]] = Page[self.item]  # type: ignore[name-defined]  # made at run time
        return exchange.get(self.path, form, retries=retries, query=query)


class operation(Generic[P, T]):  # noqa: N801 - a decorator
    """Make a flow a method that gives its answer: ``Client`` at once, ``AsyncClient`` awaited."""

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self._flow = flow
        functools.update_wrapper(self, flow)  # type: ignore[arg-type]  # for help() and the docs

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:
            return self
        bound = MethodType(self._flow, client)

        @functools.wraps(bound)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.drive(bound(*args, **kwargs))

        return call


class listing(Generic[P, T]):  # noqa: N801 - a decorator
    """Make a list a method that walks all its pages, with ``for`` or with ``async for``."""

    def __init__(self, find: Callable[Concatenate[Any, P], Listing[T]]) -> None:
        self._find = find
        functools.update_wrapper(self, find)  # type: ignore[arg-type]  # for help() and the docs

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, AsyncIterator[T]]: ...

    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:
            return self
        bound = MethodType(self._find, client)

        @functools.wraps(bound)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.walk(bound(*args, **kwargs))

        return call


class Operations:
    """Every call, written once. All of them raise ``ServiceError`` when they do not succeed."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries

    def _get(self, path: str, answer: type[T]) -> Flow[T]:
        return exchange.get(path, answer, retries=self._retries)

    def _post(self, path: str, answer: type[T], *, body: BaseModel | None = None) -> Flow[T]:
        return exchange.post(path, answer, retries=self._retries, body=body)

    # --- what an agent calls -------------------------------------------------------------------

    @operation
    def register(
        self, registration: Registration, *, idempotency_key: str | None = None
    ) -> Flow[Registered]:
        """Join with an enrolment token; give a stored ``idempotency_key`` to survive a restart."""
        return exchange.post(
            "/v1/clients",
            Registered,
            retries=self._retries,
            body=registration,
            idempotency_key=idempotency_key,
        )

    @operation
    def check_in(
        self,
        pending: UUID | None = None,
        agent_version: str = "",
        *,
        encodings: Sequence[str] = ("f32",),
        versions: Sequence[str] = (),
        waiting: Sequence[UUID] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> Flow[CheckInAnswer]:
        """Ask for work of these ``kinds`` that can be done in one of these ``encodings``, and for
        the outcome of ``pending``; ``versions`` are the digests of version files that need not be
        fetched whole.

        With ``waiting``, the further assignments whose outcomes are awaited, other arms' work may
        come meanwhile.
        """
        body = CheckIn(
            pending=pending,
            waiting=None if waiting is None else list(waiting)[:MOST_ARMS],
            agent_version=agent_version,
            encodings=list(encodings),
            versions=list(versions)[:MOST_HELD],
            kinds=None if kinds is None else list(kinds),
        )
        return self._post("/v1/check-ins", CheckInAnswer, body=body)

    @operation
    def version(self, version_id: UUID) -> Flow[VersionInfo]:
        """One model version."""
        return self._get(f"/v1/versions/{version_id}", VersionInfo)

    @operation
    def download(self, version_id: UUID) -> Flow[Download]:
        """A signed address of a version's file, for :meth:`fetch`."""
        return self._get(f"/v1/versions/{version_id}/download", Download)

    @operation
    def fetch(self, download: Download) -> Flow[bytes]:
        """Get a file; its size and SHA-256 are checked."""
        return exchange.fetch(download, retries=self._retries)

    @operation
    def reserve_update(self, assignment_id: UUID, announced: UploadReserve) -> Flow[UploadTicket]:
        """Announce an update (see :func:`announce`); announcing another file replaces it."""
        return self._post(f"/v1/assignments/{assignment_id}/uploads", UploadTicket, body=announced)

    @operation
    def put_file(self, ticket: UploadTicket, data: bytes | Source) -> Flow[int]:
        """Send an announced file to the object store; returns the bytes that were sent for it.

        A large file goes in parts: what the store has already is not sent again.
        """
        return sending.put_file(ticket, data, retries=self._retries)

    @operation
    def complete(self, upload_id: UUID) -> Flow[UploadStatus]:
        """Say that the file is there; it is verified later. Repeating it changes nothing."""
        return self._post(f"/v1/uploads/{upload_id}/complete", UploadStatus)

    @operation
    def upload(self, upload_id: UUID) -> Flow[UploadStatus]:
        """Where an upload stands."""
        return self._get(f"/v1/uploads/{upload_id}", UploadStatus)

    @operation
    def evaluate(self, assignment_id: UUID, report: EvaluationReport) -> Flow[Evaluation]:
        """Report the scores of an evaluation."""
        return self._post(f"/v1/assignments/{assignment_id}/evaluations", Evaluation, body=report)

    @operation
    def ablate(self, assignment_id: UUID, report: AblationReport) -> Flow[AblationInfo]:
        """Report what the client's personal part is worth."""
        return self._post(f"/v1/assignments/{assignment_id}/ablation", AblationInfo, body=report)

    @operation
    def decline(self, assignment_id: UUID, reason: str = "") -> Flow[Outcome]:
        """Give an assignment back; any reason is cut and cleaned to what the service takes."""
        clean = "".join(c if c.isprintable() or c in "\n\t" else " " for c in reason)
        body = Decline(reason=clean[:500])
        return self._post(f"/v1/assignments/{assignment_id}/decline", Outcome, body=body)

    # --- what an administrator calls -----------------------------------------------------------

    @operation
    def create_enrolments(self, count: int = 1, expires_in: int = 3600) -> Flow[Enrolments]:
        """Make single-use enrolment tokens that live ``expires_in`` seconds."""
        body = EnrolmentCreate(count=count, expires_in=expires_in)
        return self._post("/v1/enrolments", Enrolments, body=body)

    @listing
    def clients(self) -> Listing[ClientInfo]:
        """All registered clients."""
        return Listing("/v1/clients", ClientInfo)

    @operation
    def client(self, client_id: UUID) -> Flow[ClientInfo]:
        """One registered client."""
        return self._get(f"/v1/clients/{client_id}", ClientInfo)

    @operation
    def client_conduct(self, client_id: UUID) -> Flow[ClientConduct]:
        """Which strikes count against a client."""
        return self._get(f"/v1/clients/{client_id}/conduct", ClientConduct)

    @operation
    def suspend_client(self, client_id: UUID) -> Flow[ClientInfo]:
        """Keep a client out until it is activated again."""
        return self._post(f"/v1/clients/{client_id}/suspend", ClientInfo)

    @operation
    def activate_client(self, client_id: UUID) -> Flow[ClientInfo]:
        """Let a suspended client in again."""
        return self._post(f"/v1/clients/{client_id}/activate", ClientInfo)

    @operation
    def revoke_client(self, client_id: UUID) -> Flow[ClientInfo]:
        """Shut a client out for good; its keys end."""
        return self._post(f"/v1/clients/{client_id}/revoke", ClientInfo)

    @operation
    def erase_client(self, client_id: UUID) -> Flow[Erasure]:
        """Revoke a client and delete all that it has sent; the answer says what remains."""
        return self._post(f"/v1/clients/{client_id}/erase", Erasure)

    @operation
    def create_model(self, model: ModelCreate) -> Flow[ModelInfo]:
        """Register a model by its parameter space."""
        return self._post("/v1/models", ModelInfo, body=model)

    @listing
    def models(self) -> Listing[ModelInfo]:
        """All models."""
        return Listing("/v1/models", ModelInfo)

    @operation
    def model(self, model_id: UUID) -> Flow[ModelInfo]:
        """One model."""
        return self._get(f"/v1/models/{model_id}", ModelInfo)

    @operation
    def send_weights(self, model_id: UUID, data: bytes | Source) -> Flow[UploadStatus]:
        """Upload a model's initial weights, a version file; poll :meth:`upload` for the verdict."""
        ticket = yield from self._post(
            f"/v1/models/{model_id}/uploads", UploadTicket, body=announce(data)
        )
        yield from sending.put_file(ticket, data, retries=self._retries)
        return (yield from self._post(f"/v1/uploads/{ticket.id}/complete", UploadStatus))

    @operation
    def create_run(self, run: RunCreate) -> Flow[RunInfo]:
        """Create a run; it waits for :meth:`start_run`."""
        return self._post("/v1/runs", RunInfo, body=run)

    @listing
    def runs(self) -> Listing[RunInfo]:
        """All runs."""
        return Listing("/v1/runs", RunInfo)

    @operation
    def run(self, run_id: UUID) -> Flow[RunInfo]:
        """One run."""
        return self._get(f"/v1/runs/{run_id}", RunInfo)

    @operation
    def start_run(self, run_id: UUID) -> Flow[RunInfo]:
        """Open a run's first round."""
        return self._post(f"/v1/runs/{run_id}/start", RunInfo)

    @operation
    def pause_run(self, run_id: UUID) -> Flow[RunInfo]:
        """Open no further round."""
        return self._post(f"/v1/runs/{run_id}/pause", RunInfo)

    @operation
    def resume_run(self, run_id: UUID) -> Flow[RunInfo]:
        """Go on with a paused run."""
        return self._post(f"/v1/runs/{run_id}/resume", RunInfo)

    @operation
    def stop_run(self, run_id: UUID) -> Flow[RunInfo]:
        """End a run for good."""
        return self._post(f"/v1/runs/{run_id}/stop", RunInfo)

    @listing
    def rounds(self, run_id: UUID) -> Listing[RoundInfo]:
        """The rounds of a run."""
        return Listing(f"/v1/runs/{run_id}/rounds", RoundInfo)

    @listing
    def versions(self, run_id: UUID) -> Listing[VersionInfo]:
        """The versions of a run."""
        return Listing(f"/v1/runs/{run_id}/versions", VersionInfo)

    @listing
    def evaluations(self, run_id: UUID) -> Listing[Evaluation]:
        """The clients' evaluations of a run's last version."""
        return Listing(f"/v1/runs/{run_id}/evaluations", Evaluation)

    @operation
    def make_estimate(self, asked: EstimateCreate) -> Flow[Estimate]:
        """What a run would cost; nothing is created."""
        return self._post("/v1/estimates", Estimate, body=asked)

    @operation
    def run_estimate(
        self, run_id: UUID, *, link: str | None = None, measured: Measured | None = None
    ) -> Flow[RunEstimate]:
        """A run's estimate beside what it has cost; ``measured`` are the results of a dry run."""
        given = (measured or Measured()).model_dump(exclude_none=True)
        query = {name: repr(value) for name, value in given.items()}
        query |= {"link": link} if link else {}
        path = f"/v1/runs/{run_id}/estimate"
        return exchange.get(path, RunEstimate, retries=self._retries, query=query)

    @operation
    def round(self, round_id: UUID) -> Flow[RoundDetail]:
        """One round with its assignments."""
        return self._get(f"/v1/rounds/{round_id}", RoundDetail)

    @operation
    def cancel_round(self, round_id: UUID) -> Flow[RoundInfo]:
        """End a round without a version."""
        return self._post(f"/v1/rounds/{round_id}/cancel", RoundInfo)

    @operation
    def manifest(self, round_id: UUID, *, files: bool = True) -> Flow[ManifestDocument]:
        """What a round aggregated, with the files to recompute it unless they were deleted."""
        query = {} if files else {"files": "false"}
        path = f"/v1/rounds/{round_id}/manifest"
        return exchange.get(path, ManifestDocument, retries=self._retries, query=query)

    @listing
    def jobs(self, state: str | None = None) -> Listing[JobInfo]:
        """Background jobs, all or those in one state."""
        return Listing("/v1/jobs", JobInfo, {"state": state} if state else {})

    @operation
    def job(self, job_id: UUID) -> Flow[JobInfo]:
        """One background job."""
        return self._get(f"/v1/jobs/{job_id}", JobInfo)

    @operation
    def retry_job(self, job_id: UUID) -> Flow[JobInfo]:
        """Have a due job done now, or a failed one of a round with the whole round again."""
        return self._post(f"/v1/jobs/{job_id}/retry", JobInfo)

    @listing
    def ledger_entries(self) -> Listing[LedgerEntry]:
        """The sealed ledger, oldest entry first."""
        return Listing("/v1/ledger/entries", LedgerEntry)

    @operation
    def checkpoint(self) -> Flow[Checkpoint]:
        """The newest signed head of the ledger."""
        return self._get("/v1/ledger/checkpoint", Checkpoint)

    @operation
    def ledger_keys(self) -> Flow[LedgerKeys]:
        """The key that signs the ledger, and the signed changes that led to it."""
        return self._get("/v1/ledger/keys", LedgerKeys)

    @operation
    def prove_inclusion(self, seq: int, size: int) -> Flow[InclusionProof]:
        """That an entry is in the ledger of ``size`` entries; check it with ``audit``."""
        query = {"seq": str(seq), "size": str(size)}
        path = "/v1/ledger/proofs/inclusion"
        return exchange.get(path, InclusionProof, retries=self._retries, query=query)

    @operation
    def prove_consistency(self, first: int, second: int) -> Flow[ConsistencyProof]:
        """That the ledger of ``second`` entries extends that of ``first``."""
        query = {"first": str(first), "second": str(second)}
        path = "/v1/ledger/proofs/consistency"
        return exchange.get(path, ConsistencyProof, retries=self._retries, query=query)
