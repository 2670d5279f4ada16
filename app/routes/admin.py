"""What administrators call: enrolments, clients, models, runs, rounds, jobs."""

from __future__ import annotations

from functools import partial
from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Response

from app import catalog, clients, commands, conduct, erasure, manifests, reports, runs, updates
from app.auth import Scope
from app.db import Tx
from app.routes import ROUND_STATE, RUN_STATE, problems
from app.tables import EvaluationRecord, Round
from app.web import Call, IfMatch, Page, Paged, check_match, each, etag, require
from fedselect.evaluations import Evaluation
from fedselect.lifecycle import RunEvent
from fedselect.manifestdocs import ManifestDocument
from fedselect.protocol import (
    ClientConduct,
    ClientInfo,
    EnrolmentCreate,
    Enrolments,
    JobInfo,
    ModelCreate,
    ModelInfo,
    RoundDetail,
    RoundInfo,
    RunCreate,
    RunInfo,
    VersionInfo,
)
from fedselect.retention import Erasure
from fedselect.tenancy import ClientChange
from fedselect.uploads import UploadReserve, UploadTicket

router = APIRouter(prefix="/v1", tags=["administration"])
READ, WRITE = require(Scope.ROUND_READ), require(Scope.ROUND_ADMIN)
CLIENTS, ERASE = require(Scope.CLIENT_ADMIN), require(Scope.CLIENT_ERASE)


@router.post(
    "/enrolments",
    operation_id="createEnrolments",
    summary="Make single-use enrolment tokens",
    status_code=201,
    responses=problems(401, 403, 409, codes={409: ["client_limit"]}),
)
def enrol(body: EnrolmentCreate, call: Call = CLIENTS) -> Enrolments:
    """Each token is shown once and admits one client."""
    settings = call.core.settings
    return call.create(
        body, lambda tx: clients.enrol(tx, call.who, body, settings=settings), Enrolments
    )


@router.get(
    "/clients", operation_id="listClients", summary="List clients", responses=problems(401, 403)
)
def list_clients(paging: Paged, call: Call = READ) -> Page[ClientInfo]:
    """Oldest first."""
    return call.page(paging, lambda _: clients.listed(call.who), each(clients.info))


@router.get(
    "/clients/{client_id}",
    operation_id="getClient",
    summary="Look at a client",
    responses=problems(401, 403, 404),
)
def get_client(client_id: UUID, response: Response, call: Call = READ) -> ClientInfo:
    """One client, with its entity tag for a later change."""
    found = call.run(lambda tx: clients.info(clients.get(tx, call.who, client_id)))
    response.headers["ETag"] = _tag(found)
    return found


@router.get(
    "/clients/{client_id}/conduct",
    operation_id="getClientConduct",
    summary="See which strikes count against a client",
    responses=problems(401, 403, 404),
)
def get_conduct(client_id: UUID, call: Call = READ) -> ClientConduct:
    """By run, of those that suspend clients whose updates are refused too often."""
    return call.run(lambda tx: conduct.standing_of(tx, clients.get(tx, call.who, client_id)))


def _tag(client: ClientInfo) -> str:
    return etag(client.id, client.name, client.tags)


@router.patch(
    "/clients/{client_id}",
    operation_id="editClient",
    summary="Give a client another name or other tags",
    responses=problems(
        401,
        403,
        404,
        409,
        412,
        codes={409: ["client_name_taken", "client_revoked"], 412: ["etag_mismatch"]},
    ),
)
def edit_client(
    client_id: UUID,
    body: ClientChange,
    response: Response,
    if_match: IfMatch = None,
    call: Call = CLIENTS,
) -> ClientInfo:
    """What is left out stays."""

    def work(tx: Tx) -> ClientInfo:
        client = clients.get(tx, call.who, client_id, lock=True)
        check_match(if_match, _tag(clients.info(client)))
        return clients.edit(tx, client, body)

    changed = call.run(work)
    response.headers["ETag"] = _tag(changed)
    return changed


@router.post(
    "/clients/{client_id}/erase",
    operation_id="eraseClient",
    summary="Delete all that a client has sent, for good",
    responses=problems(401, 403, 404, 503, codes={503: ["retention_busy", "storage_unavailable"]}),
)
def erase_client(client_id: UUID, call: Call = ERASE) -> Erasure:
    """Revokes it too. Repeating it is harmless; the answer says what remains inside sums."""
    return erasure.erase(call.core, client_id, project=call.who.project_id, actor=call.actor)


@router.post(
    "/clients/{client_id}/{command:client_command}",
    operation_id="changeClient",
    summary="Suspend, activate or revoke a client",
    responses=problems(401, 403, 404, 409, codes={409: ["client_revoked"]}),
)
def change_client(
    client_id: UUID, command: Literal["suspend", "activate", "revoke"], call: Call = CLIENTS
) -> ClientInfo:
    """Revoking is final and ends the client's keys at once."""
    return call.run(lambda tx: clients.change(tx, call.who, client_id, command=command))


@router.post(
    "/models",
    operation_id="registerModel",
    summary="Register a model by its parameter space",
    status_code=201,
    responses=problems(
        401, 403, 409, 413, codes={409: ["model_name_taken"], 422: ["space_invalid"]}
    ),
)
def register_model(body: ModelCreate, call: Call = WRITE) -> ModelInfo:
    """Its initial weights follow as a version file, by upload."""
    return call.create(body, lambda tx: catalog.register_model(tx, call.who, body), ModelInfo)


@router.get(
    "/models", operation_id="listModels", summary="List models", responses=problems(401, 403)
)
def list_models(paging: Paged, call: Call = READ) -> Page[ModelInfo]:
    """Oldest first."""
    return call.page(paging, lambda _: catalog.models(call.who), catalog.model_infos)


@router.get(
    "/models/{model_id}",
    operation_id="getModel",
    summary="Look at a model",
    responses=problems(401, 403, 404),
)
def get_model(model_id: UUID, call: Call = READ) -> ModelInfo:
    """One model and its initial version, once that is verified."""

    def work(tx: Tx) -> ModelInfo:
        return catalog.model_infos(tx, [catalog.get_model(tx, call.who, model_id)])[0]

    return call.run(work)


@router.post(
    "/models/{model_id}/uploads",
    operation_id="reserveWeights",
    summary="Announce a model's initial weights and get a signed PUT address",
    status_code=201,
    responses=problems(
        401, 403, 404, 409, 413, codes={409: ["model_has_weights"], 413: ["upload_too_large"]}
    ),
)
def reserve_weights(model_id: UUID, body: UploadReserve, call: Call = WRITE) -> UploadTicket:
    """PUT the version file there, or its parts (`missingParts`), then complete the upload."""

    def work(tx: Tx) -> UploadTicket:
        upload = updates.reserve_weights(tx, call.who, model_id, body, core=call.core)
        return updates.ticket(tx, upload, core=call.core)

    return call.create(body, work, UploadTicket)


@router.post(
    "/runs",
    operation_id="createRun",
    summary="Create a run",
    status_code=201,
    responses=problems(
        401,
        403,
        404,
        409,
        codes={
            409: ["run_name_taken", "model_without_weights"],
            422: [
                "settings_invalid",
                "space_invalid",
                "privacy_useless",
                "secure_prototype",
                "pooled_prototype",
                "accountant_missing",
                "noise_key_missing",
            ],
        },
    ),
)
def create_run(body: RunCreate, call: Call = WRITE) -> RunInfo:
    """Unknown settings are refused; `warnings` names those that are rarely meant."""
    noise = call.core.settings.noise_seed
    return call.create(body, lambda tx: runs.create(tx, call.who, body, noise=noise), RunInfo)


@router.get("/runs", operation_id="listRuns", summary="List runs", responses=problems(401, 403))
def list_runs(paging: Paged, call: Call = READ) -> Page[RunInfo]:
    """Oldest first."""
    return call.page(paging, lambda _: runs.listed(call.who), runs.infos)


@router.get(
    "/runs/{run_id}",
    operation_id="getRun",
    summary="Look at a run",
    responses=problems(401, 403, 404),
)
def get_run(run_id: UUID, call: Call = READ) -> RunInfo:
    """State, settings and how many rounds are published."""
    return call.run(lambda tx: runs.info(tx, runs.get(tx, call.who, run_id)))


@router.post(
    "/runs/{run_id}/{command:run_command}",
    operation_id="commandRun",
    summary="Start, pause, resume or stop a run",
    responses=problems(
        401,
        403,
        404,
        409,
        codes={409: [*RUN_STATE, *ROUND_STATE, "transition_refused"], 422: ["arm_too_small"]},
    ),
)
def command_run(
    run_id: UUID, command: Literal["start", "pause", "resume", "stop"], call: Call = WRITE
) -> RunInfo:
    """Pausing lets the present round end; stopping cancels it."""
    event = RunEvent(command)
    return call.run(lambda tx: commands.command_run(tx, call.who, run_id, event))


@router.get(
    "/runs/{run_id}/rounds",
    operation_id="listRounds",
    summary="List a run's rounds",
    responses=problems(401, 403, 404),
)
def list_rounds(run_id: UUID, paging: Paged, call: Call = READ) -> Page[RoundInfo]:
    """Oldest first; an abandoned round is followed by its next attempt."""
    return call.page(
        paging,
        lambda tx: runs.rounds_of(tx, call.who, run_id),
        runs.round_infos,
        order=(Round.opened_at, Round.id),
    )


@router.get(
    "/runs/{run_id}/versions",
    operation_id="listVersions",
    summary="List a run's versions",
    responses=problems(401, 403, 404),
)
def list_versions(run_id: UUID, paging: Paged, call: Call = READ) -> Page[VersionInfo]:
    """Version 0 first."""
    return call.page(
        paging, lambda tx: runs.versions_of(tx, call.who, run_id), each(catalog.version_info)
    )


@router.get(
    "/runs/{run_id}/evaluations",
    operation_id="listEvaluations",
    summary="List what the clients measured at the end of a run",
    responses=problems(401, 403, 404),
)
def list_evaluations(run_id: UUID, paging: Paged, call: Call = READ) -> Page[Evaluation]:
    """One per client, oldest first."""
    return call.page(
        paging,
        lambda tx: reports.evaluations_of(tx, call.who, run_id),
        reports.evaluation_infos,
        order=(EvaluationRecord.created_at, EvaluationRecord.assignment_id),
    )


@router.get(
    "/rounds/{round_id}",
    operation_id="getRound",
    summary="Look at a round and its assignments",
    responses=problems(401, 403, 404),
)
def get_round(round_id: UUID, call: Call = READ) -> RoundDetail:
    """Who was assigned, who was accepted, and why somebody was not."""
    return call.run(lambda tx: runs.round_detail(tx, call.who, round_id))


@router.post(
    "/rounds/{round_id}/cancel",
    operation_id="cancelRound",
    summary="End a round without a version",
    responses=problems(401, 403, 404, 409, codes={409: [*ROUND_STATE, *RUN_STATE]}),
)
def cancel_round(round_id: UUID, call: Call = WRITE) -> RoundInfo:
    """The run pauses; resuming it opens the round again."""
    return call.run(lambda tx: commands.cancel_round(tx, call.who, round_id))


@router.get(
    "/rounds/{round_id}/manifest",
    operation_id="getManifest",
    summary="Get what is needed to recompute a round's version",
    responses=problems(
        401, 403, 404, 410, codes={404: ["manifest_missing"], 410: ["version_unrecomputable"]}
    ),
)
def get_manifest(
    round_id: UUID, files: bool = True, call: Call = require(Scope.AUDIT_READ)
) -> ManifestDocument:
    """The frozen manifest, its digest, and signed addresses of all files it names, if wanted: these
    are updates and masks of single clients, and need the scope `mask:read`.
    """

    def work(tx: Tx) -> ManifestDocument:
        if files:
            call.who.require(Scope.MASK_READ)
        runs.get_round(tx, call.who, round_id)
        document = partial(manifests.document, core=call.core) if files else manifests.bare
        return document(tx, round_id)

    return call.run(work)


@router.get("/jobs", operation_id="listJobs", summary="List jobs", responses=problems(401, 403))
def list_jobs(
    paging: Paged,
    state: Literal["due", "leased", "done", "failed"] | None = None,
    call: Call = READ,
) -> Page[JobInfo]:
    """Oldest first."""
    return call.page(paging, lambda _: reports.jobs(call.who, state), each(reports.job_info))


@router.get(
    "/jobs/{job_id}",
    operation_id="getJob",
    summary="Look at a job",
    responses=problems(401, 403, 404),
)
def get_job(job_id: UUID, call: Call = READ) -> JobInfo:
    """One job, with the error of its last attempt."""
    return call.run(lambda tx: reports.job_info(reports.job(tx, call.who, job_id)))


@router.post(
    "/jobs/{job_id}/retry",
    operation_id="retryJob",
    summary="Have a job done now",
    responses=problems(
        401,
        403,
        404,
        409,
        codes={409: ["job_leased", "job_done", "job_final", *ROUND_STATE, *RUN_STATE]},
    ),
)
def retry_job(job_id: UUID, call: Call = WRITE) -> JobInfo:
    """A due job runs at once; a failed one of a round takes round and run back to work."""
    return call.run(lambda tx: commands.retry_job(tx, call.who, job_id))
