"""What agents call: register, check in, download, upload, complete, evaluate, decline."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from fastapi import APIRouter

from app import catalog, checkins, clients, completions, evaluations, parts, reports, updates
from app.auth import Scope
from app.db import Tx
from app.routes import ASSIGNMENT_STATE, problems
from app.web import Call, public, require
from fedselect.checkindocs import CheckIn, CheckInAnswer, Decline, Outcome
from fedselect.evaluations import Evaluation, EvaluationReport
from fedselect.protocol import Download, Registered, Registration, VersionInfo
from fedselect.uploads import MissingParts, UploadReserve, UploadStatus, UploadTicket

router = APIRouter(prefix="/v1", tags=["agents"])
OWN = require(Scope.CLIENT_OWN)


@router.post(
    "/clients",
    operation_id="registerClient",
    summary="Register with an enrolment token",
    status_code=201,
    responses=problems(
        401,
        409,
        413,
        codes={
            401: ["enrolment_unknown", "enrolment_used", "enrolment_expired"],
            409: ["client_name_taken", "client_limit"],
        },
    ),
)
def register(body: Registration, call: Call = public()) -> Registered:
    """Admits the holder of a single-use enrolment token; the key is shown this one time."""
    ours, settings = call.core.sealer.public_key, call.core.settings
    call = replace(call, anonymous=clients.applicant(body))

    def work(tx: Tx) -> Registered:
        key = reports.ledger_keys(tx, public_key=ours).public_key
        shown = call.certificate
        return clients.register(tx, body, shown, settings=settings, ledger_key=key)

    return call.create(body, work, Registered)


@router.post(
    "/check-ins",
    operation_id="checkIn",
    summary="Ask for work and for the outcome of the last work",
    responses=problems(401, 403, 404),
)
def check_in(body: CheckIn, call: Call = OWN) -> CheckInAnswer:
    """Gives an assignment if there is one, the state of `pending`, and a retry window.

    Say in `versions` which version files you hold: the assignment then names the smallest way to
    its `base`.
    """
    return call.run(lambda tx: checkins.check_in(tx, call.who, body, core=call.core))


@router.get(
    "/versions/{version_id}",
    operation_id="getVersion",
    summary="Look at a model version",
    responses=problems(401, 403, 404),
)
def version(version_id: UUID, call: Call = require(Scope.VERSION_READ)) -> VersionInfo:
    """Number, digest, parent and manifest of one version."""
    return call.run(lambda tx: catalog.version_info(catalog.get_version(tx, call.who, version_id)))


@router.get(
    "/versions/{version_id}/download",
    operation_id="downloadVersion",
    summary="Get a signed address of a version file",
    responses=problems(401, 403, 404, 410, codes={410: ["version_deleted"]}),
)
def download(version_id: UUID, call: Call = require(Scope.VERSION_READ)) -> Download:
    """The address is short-lived; check the file against `sha256`."""
    core = call.core
    return call.run(
        lambda tx: catalog.download(
            tx,
            call.who,
            version_id,
            storage=core.storage,
            lifetime=core.settings.url_lifetime,
        )
    )


@router.post(
    "/assignments/{assignment_id}/uploads",
    operation_id="reserveUpload",
    summary="Announce an update and get a signed PUT address",
    status_code=201,
    responses=problems(
        401,
        403,
        404,
        409,
        413,
        429,
        codes={
            409: ["assignment_kind", "assignment_expired", *ASSIGNMENT_STATE],
            413: ["upload_too_large"],
            429: ["upload_rate", "upload_quota"],
        },
    ),
)
def reserve(assignment_id: UUID, body: UploadReserve, call: Call = OWN) -> UploadTicket:
    """The address admits exactly the announced length and content, until the deadline.

    A file in parts has no `url`: ask for the addresses of its parts. Announcing the same file again
    goes on where it was cut, announcing another one replaces it.
    """

    def work(tx: Tx) -> UploadTicket:
        upload = updates.reserve_update(tx, call.who, assignment_id, body, core=call.core)
        return updates.ticket(tx, upload, core=call.core)

    return call.create(body, work, UploadTicket)


@router.post(
    "/uploads/{upload_id}/parts",
    operation_id="missingParts",
    summary="Get signed addresses of the parts that are missing",
    responses=problems(
        401,
        403,
        404,
        409,
        429,
        codes={
            403: ["client_key_needed"],
            409: ["upload_over", "upload_whole", "assignment_expired"],
            429: ["upload_rate"],
            503: ["storage_unavailable"],
        },
    ),
)
def missing_parts(upload_id: UUID, call: Call = require(Scope.UPLOAD)) -> MissingParts:
    """Ask after every cut and every expired address: what the store has is not asked for again."""
    return parts.missing(call.core, call.who, upload_id)


@router.get(
    "/uploads/{upload_id}",
    operation_id="getUpload",
    summary="See whether an upload was accepted",
    responses=problems(401, 403, 404),
)
def upload_status(upload_id: UUID, call: Call = require(Scope.UPLOAD)) -> UploadStatus:
    """`reason` is a stable code, `detail` says it in words."""
    return call.run(lambda tx: updates.status(updates.own(tx, call.who, upload_id)))


@router.post(
    "/uploads/{upload_id}/complete",
    operation_id="completeUpload",
    summary="Say that the file is in the store",
    status_code=202,
    responses=problems(
        401, 403, 404, 409, codes={403: ["client_key_needed"], 409: ASSIGNMENT_STATE}
    ),
)
def complete(upload_id: UUID, call: Call = require(Scope.UPLOAD)) -> UploadStatus:
    """A durable fact once answered; verification follows. Repeating it is harmless."""
    return call.together(completions.complete, (call.who, upload_id))


@router.post(
    "/assignments/{assignment_id}/evaluations",
    operation_id="reportEvaluation",
    summary="Report scores on the client's own held-out data",
    status_code=201,
    responses=problems(401, 403, 404, 409, codes={409: ["assignment_kind", *ASSIGNMENT_STATE]}),
)
def evaluate(assignment_id: UUID, body: EvaluationReport, call: Call = OWN) -> Evaluation:
    """Numbers only; repeating it changes nothing."""
    return call.create(
        body, lambda tx: evaluations.evaluate(tx, call.who, assignment_id, body), Evaluation
    )


@router.post(
    "/assignments/{assignment_id}/decline",
    operation_id="declineAssignment",
    summary="Give an assignment back",
    responses=problems(401, 403, 404, 409, codes={409: ASSIGNMENT_STATE}),
)
def decline(assignment_id: UUID, body: Decline, call: Call = OWN) -> Outcome:
    """The round goes on without this client."""
    return call.run(lambda tx: checkins.decline(tx, call.who, assignment_id, body))
