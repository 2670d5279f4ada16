"""Every call of the SDK reaches its place, and its secrets reach none."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import traceback
from uuid import UUID

import httpx
import pytest

from fedselect import (
    cohortdocs,
    estimatedocs,
    evaluations,
    hooks,
    protocol,
    rolloutdocs,
    tenancy,
    uploads,
)
from fedselect.administration import Administration
from fedselect.client import AsyncClient, Client, announce
from fedselect.errors import ServiceError
from fedselect.operations import Operations

from .fake_coordinator import KEY, NOW, SERVER, TOKEN, problem
from .fake_talk import script, talk

ID = UUID(int=7)

# --- the whole surface -------------------------------------------------------------------------

CALLS = {
    "register": ("POST", "/v1/clients"),
    "check_in": ("POST", "/v1/check-ins"),
    "version": ("GET", "/v1/versions/{id}"),
    "download": ("GET", "/v1/versions/{id}/download"),
    "reserve_update": ("POST", "/v1/assignments/{id}/uploads"),
    "complete": ("POST", "/v1/uploads/{id}/complete"),
    "upload": ("GET", "/v1/uploads/{id}"),
    "evaluate": ("POST", "/v1/assignments/{id}/evaluations"),
    "ablate": ("POST", "/v1/assignments/{id}/ablation"),
    "decline": ("POST", "/v1/assignments/{id}/decline"),
    "create_enrolments": ("POST", "/v1/enrolments"),
    "clients": ("GET", "/v1/clients"),
    "client": ("GET", "/v1/clients/{id}"),
    "client_conduct": ("GET", "/v1/clients/{id}/conduct"),
    "suspend_client": ("POST", "/v1/clients/{id}/suspend"),
    "activate_client": ("POST", "/v1/clients/{id}/activate"),
    "revoke_client": ("POST", "/v1/clients/{id}/revoke"),
    "erase_client": ("POST", "/v1/clients/{id}/erase"),
    "create_model": ("POST", "/v1/models"),
    "models": ("GET", "/v1/models"),
    "model": ("GET", "/v1/models/{id}"),
    "send_weights": ("POST", "/v1/models/{id}/uploads"),
    "create_run": ("POST", "/v1/runs"),
    "runs": ("GET", "/v1/runs"),
    "run": ("GET", "/v1/runs/{id}"),
    "start_run": ("POST", "/v1/runs/{id}/start"),
    "pause_run": ("POST", "/v1/runs/{id}/pause"),
    "resume_run": ("POST", "/v1/runs/{id}/resume"),
    "stop_run": ("POST", "/v1/runs/{id}/stop"),
    "rounds": ("GET", "/v1/runs/{id}/rounds"),
    "versions": ("GET", "/v1/runs/{id}/versions"),
    "evaluations": ("GET", "/v1/runs/{id}/evaluations"),
    "make_estimate": ("POST", "/v1/estimates"),
    "run_estimate": ("GET", "/v1/runs/{id}/estimate"),
    "round": ("GET", "/v1/rounds/{id}"),
    "cancel_round": ("POST", "/v1/rounds/{id}/cancel"),
    "manifest": ("GET", "/v1/rounds/{id}/manifest"),
    "jobs": ("GET", "/v1/jobs"),
    "job": ("GET", f"/v1/jobs/{ID}"),
    "retry_job": ("POST", f"/v1/jobs/{ID}/retry"),
    "ledger_entries": ("GET", "/v1/ledger/entries"),
    "checkpoint": ("GET", "/v1/ledger/checkpoint"),
    "ledger_keys": ("GET", "/v1/ledger/keys"),
    "prove_inclusion": ("GET", "/v1/ledger/proofs/inclusion"),
    "prove_consistency": ("GET", "/v1/ledger/proofs/consistency"),
}
ADMINISTRATION = {
    "who_am_i": ("GET", "/v1/me"),
    "rotate_own_key": ("POST", "/v1/me/key"),
    "create_project": ("POST", "/v1/projects"),
    "projects": ("GET", "/v1/projects"),
    "project": ("GET", "/v1/projects/{id}"),
    "edit_project": ("PATCH", "/v1/projects/{id}"),
    "edit_client": ("PATCH", "/v1/clients/{id}"),
    "create_key": ("POST", "/v1/keys"),
    "keys": ("GET", "/v1/keys"),
    "key": ("GET", "/v1/keys/{id}"),
    "rotate_key": ("POST", "/v1/keys/{id}/rotate"),
    "revoke_key": ("POST", "/v1/keys/{id}/revoke"),
    "space": ("GET", "/v1/models/{id}/space"),
    "lineage": ("GET", "/v1/versions/{id}/lineage"),
    "difference": ("GET", "/v1/versions/{id}/diff"),
    "card": ("GET", "/v1/versions/{id}/card"),
    "create_cohort": ("POST", "/v1/cohorts"),
    "cohorts": ("GET", "/v1/cohorts"),
    "cohort": ("GET", "/v1/cohorts/{id}"),
    "cohort_clients": ("GET", "/v1/cohorts/{id}/clients"),
    "channels": ("GET", "/v1/models/{id}/channels"),
    "channel": ("GET", "/v1/models/{id}/channels/{id}"),
    "move_channel": ("PUT", "/v1/models/{id}/channels/{id}"),
    "roll_channel_back": ("POST", "/v1/models/{id}/channels/{id}/roll-back"),
    "start_rollout": ("POST", "/v1/rollouts"),
    "rollouts": ("GET", "/v1/rollouts"),
    "rollout": ("GET", "/v1/rollouts/{id}"),
    "promote_rollout": ("POST", "/v1/rollouts/{id}/promote"),
    "hold_rollout": ("POST", "/v1/rollouts/{id}/hold"),
    "roll_rollout_back": ("POST", "/v1/rollouts/{id}/roll-back"),
    "add_member": ("POST", "/v1/members"),
    "members": ("GET", "/v1/members"),
    "end_member": ("POST", "/v1/members/{id}/end"),
    "create_webhook": ("POST", "/v1/webhooks"),
    "webhooks": ("GET", "/v1/webhooks"),
    "webhook": ("GET", "/v1/webhooks/{id}"),
    "change_webhook": ("PATCH", "/v1/webhooks/{id}"),
    "rotate_webhook_secret": ("POST", "/v1/webhooks/{id}/secret"),
    "test_webhook": ("POST", "/v1/webhooks/{id}/test"),
    "deliveries": ("GET", "/v1/webhooks/{id}/deliveries"),
    "retry_delivery": ("POST", "/v1/deliveries/{id}/retry"),
    "run_report": ("GET", "/v1/runs/{id}/report"),
    "comparison": ("GET", "/v1/runs/{id}/comparison"),
    "ask_ablations": ("POST", "/v1/versions/{id}/ablations"),
    "ablations": ("GET", "/v1/versions/{id}/ablations"),
    "explanation": ("GET", "/v1/runs/{id}/clients/{id}/explanation"),
}
BODIES = {
    "rotation": tenancy.KeyRotate(),
    "project": tenancy.ProjectCreate(name="p"),
    "change": tenancy.ProjectChange(),
    "key": tenancy.KeyCreate(role="viewer"),
    "registration": protocol.Registration(token=TOKEN, name="ward-7"),
    "announced": announce(b"x"),
    "report": evaluations.EvaluationReport(
        scores={}, participations=0, personal_share=0, bytes_sent=0, bytes_received=0
    ),
    "asked": estimatedocs.EstimateCreate(elements=5, clients=3),
    "model": protocol.ModelCreate(name="m", space={}),
    "run": protocol.RunCreate(name="r", model_id=ID),
    "data": b"x",
    "cohort": cohortdocs.CohortCreate(name="c", rule=cohortdocs.CohortRule(tag="t")),
    "move": cohortdocs.ChannelMove(version_id=ID, reason="r"),
    "why": cohortdocs.Justified(reason="r"),
    "rollout": rolloutdocs.RolloutCreate(name="r", model_id=ID, version_id=ID),
    "member": tenancy.MemberCreate(subject="s", role="viewer"),
    "webhook": hooks.WebhookCreate(url="https://example.org", events=["round.published"]),
}


def test_every_public_call_is_listed_above() -> None:
    public = {name for name in vars(Operations) if not name.startswith("_")}
    assert public == set(CALLS) | {"put_file", "fetch"}
    assert {n for n in vars(Administration) if not n.startswith("_")} == set(ADMINISTRATION)


@pytest.mark.parametrize("name", [*CALLS, *ADMINISTRATION])
def test_each_call_reaches_its_path_with_the_key(name: str) -> None:
    names = list(inspect.signature(getattr(Client, name).__wrapped__).parameters.values())[1:]
    given = [BODIES.get(p.name, ID) for p in names if p.default is p.empty]
    found = talk(script(problem(409, "stop")), name, *given)
    method, path = (CALLS | ADMINISTRATION)[name]
    assert found.requests[0][0] == method
    assert found.requests[0][1].partition("?")[0] == SERVER + path.format(id=ID)
    assert found.requests[0][2]["authorization"] == f"Bearer {KEY}"
    assert ("idempotency-key" in found.requests[0][2]) == (method == "POST")
    assert inspect.getdoc(getattr(Client, name))


# --- secrets -----------------------------------------------------------------------------------


def test_the_key_is_in_no_repr_exception_or_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = httpx.Response(400, json=json.loads(problem(400, "echo").content) | {"detail": KEY})
    steps = [
        script(echo),
        script(httpx.Response(403, text=KEY)),
        script(httpx.Response(200, json={"key": KEY, "client": KEY})),
        script(httpx.LocalProtocolError(f"Illegal header value b'Bearer {KEY}'")),
        script(httpx.ConnectError("refused")),
    ]
    registration = protocol.Registration(token=TOKEN, name="ward-7")
    for make in steps:
        error = talk(make, "register", registration).result
        assert isinstance(error, ServiceError)
        assert error.__cause__ is None
        assert error.__context__ is None
        shown = "".join(traceback.format_exception(error)) + repr(error)
        assert KEY not in shown
        assert TOKEN not in shown
    assert KEY not in caplog.text
    for client in (Client(SERVER, key=KEY), AsyncClient(SERVER, key=KEY)):
        assert repr(client) == f"{type(client).__name__}('{SERVER}')"
    info = protocol.ClientInfo(id=ID, name="a", state="active", tags=[], created_at=NOW)
    assert KEY not in repr(protocol.Registered(client=info, key=KEY))
    assert TOKEN not in repr(registration)


def test_a_signed_address_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """httpx logs the address of every request at INFO."""
    caplog.set_level(logging.DEBUG)
    until = {"expires_at": NOW}
    signed = "http://store:9000/bucket/staging/1?X-Amz-Expires=900&X-Amz-Signature=5ec4e7"
    ticket = uploads.UploadTicket(id=ID, url=signed, headers={}, **until)
    digest = hashlib.sha256(b"x").hexdigest()
    download = protocol.Download(url=signed, sha256=digest, size=1, **until)
    for call in (("put_file", ticket, b"x"), ("fetch", download)):
        found = talk(script(httpx.Response(200, content=b"x")), *call)
        assert found.requests[0][1] == signed
    assert caplog.text.count("http://store:9000/bucket/staging/1 ") == 4
    assert "X-Amz" not in caplog.text
    assert "5ec4e7" not in caplog.text


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY} ", f"{KEY}é", f"a\r\nX-Evil: {KEY}"])
def test_a_key_that_would_break_the_header_is_refused_unseen(key: str) -> None:
    with pytest.raises(ServiceError) as caught:
        Client(SERVER, key=key)
    assert caught.value.code == "key_invalid"
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "server",
    [
        "coordinator",
        "ftp://host",
        "https://",
        "https://user:pw@host",
        "http://a\tb",
        "http://h?a=1",
    ],
)
def test_an_impossible_address_is_refused(server: str) -> None:
    with pytest.raises(ServiceError) as caught:
        Client(server)
    assert caught.value.code == "server_invalid"
    assert "pw" not in str(caught.value)
