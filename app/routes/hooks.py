"""Webhooks: whom a project's events are told to, and what has become of it."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Response

from app import webhooks
from app.auth import Scope
from app.db import Tx
from app.routes import problems
from app.web import Call, IfMatch, Page, Paged, check_match, each, etag, require
from fedselect.hooks import DeliveryInfo, WebhookChange, WebhookCreate, WebhookInfo, WebhookIssued
from fedselect.protocol import Request

router = APIRouter(prefix="/v1", tags=["webhooks"])
READ, WRITE = require(Scope.WEBHOOK_READ), require(Scope.WEBHOOK_ADMIN)


@router.post(
    "/webhooks",
    operation_id="createWebhook",
    summary="Have an address told of events",
    status_code=201,
    responses=problems(401, 403, 409, codes={409: ["webhook_limit"], 422: ["webhook_address"]}),
)
def create_webhook(body: WebhookCreate, call: Call = WRITE) -> WebhookIssued:
    """From now on. The secret that signs is shown once; docs/WEBHOOKS.md says how to check it."""
    settings = call.core.settings
    webhooks.check_address(body.url, private=settings.webhook_private)
    pepper = settings.pepper
    return call.create(
        body, lambda tx: webhooks.create(tx, call.who, body, pepper=pepper), WebhookIssued
    )


@router.get(
    "/webhooks", operation_id="listWebhooks", summary="List webhooks", responses=problems(401, 403)
)
def list_webhooks(paging: Paged, call: Call = READ) -> Page[WebhookInfo]:
    """Oldest first."""
    return call.page(paging, lambda _: webhooks.listed(call.who), webhooks.infos)


@router.get(
    "/webhooks/{webhook_id}",
    operation_id="getWebhook",
    summary="Look at a webhook",
    responses=problems(401, 403, 404),
)
def get_webhook(webhook_id: UUID, response: Response, call: Call = READ) -> WebhookInfo:
    """One webhook, with its entity tag for a later change."""
    found = call.run(lambda tx: webhooks.infos(tx, [webhooks.get(tx, call.who, webhook_id)])[0])
    response.headers["ETag"] = _tag(found)
    return found


@router.patch(
    "/webhooks/{webhook_id}",
    operation_id="changeWebhook",
    summary="Change a webhook's address, events or state",
    responses=problems(
        401, 403, 404, 412, codes={412: ["etag_mismatch"], 422: ["webhook_address"]}
    ),
)
def change_webhook(
    webhook_id: UUID,
    body: WebhookChange,
    response: Response,
    if_match: IfMatch = None,
    call: Call = WRITE,
) -> WebhookInfo:
    """What is left out stays. A disabled one is not told later what happened meanwhile."""
    if body.url is not None:
        webhooks.check_address(body.url, private=call.core.settings.webhook_private)

    def work(tx: Tx) -> WebhookInfo:
        row = webhooks.get(tx, call.who, webhook_id, lock=True)
        check_match(if_match, _tag(webhooks.infos(tx, [row])[0]))
        return webhooks.change(tx, row, body)

    changed = call.run(work)
    response.headers["ETag"] = _tag(changed)
    return changed


def _tag(webhook: WebhookInfo) -> str:
    return etag(webhook.id, webhook.url, webhook.events, webhook.state)


@router.post(
    "/webhooks/{webhook_id}/secret",
    operation_id="rotateWebhookSecret",
    summary="Get a new secret",
    status_code=201,
    responses=problems(401, 403, 404),
)
def rotate_secret(webhook_id: UUID, call: Call = WRITE) -> WebhookIssued:
    """For a day both sign, then the new one alone."""

    def work(tx: Tx) -> WebhookIssued:
        row = webhooks.get(tx, call.who, webhook_id, lock=True)
        return webhooks.rotate(tx, row, pepper=call.core.settings.pepper)

    return call.create(Request(), work, WebhookIssued)


@router.post(
    "/webhooks/{webhook_id}/test",
    operation_id="testWebhook",
    summary="Send a webhook a test",
    status_code=202,
    responses=problems(401, 403, 404, 409, codes={409: ["webhook_disabled"]}),
)
def send_test(webhook_id: UUID, call: Call = WRITE) -> WebhookInfo:
    """The event is `webhook.tested`; its delivery shows what the receiver answered."""
    return call.run(lambda tx: webhooks.test(tx, webhooks.get(tx, call.who, webhook_id)))


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    operation_id="listDeliveries",
    summary="List what was sent to a webhook",
    responses=problems(401, 403, 404),
)
def list_deliveries(
    webhook_id: UUID,
    paging: Paged,
    state: Literal["waiting", "delivered", "dead"] | None = None,
    call: Call = READ,
) -> Page[DeliveryInfo]:
    """Oldest first; those that have ended stay for two weeks."""
    return call.page(
        paging,
        lambda tx: webhooks.deliveries(webhooks.get(tx, call.who, webhook_id), state),
        each(webhooks.delivery_info),
    )


@router.post(
    "/deliveries/{delivery_id}/retry",
    operation_id="retryDelivery",
    summary="Send a delivery again",
    responses=problems(401, 403, 404, 409, codes={409: ["webhook_disabled", "delivery_done"]}),
)
def retry_delivery(delivery_id: UUID, call: Call = WRITE) -> DeliveryInfo:
    """Also one that was given up."""
    return call.run(lambda tx: webhooks.retry(tx, call.who, delivery_id))
