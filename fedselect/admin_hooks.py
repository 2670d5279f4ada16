"""The ``fedselect admin`` commands about who is told of what: webhooks and their deliveries.

Owns their names and arguments; each is one call. Must not print (``remote`` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal
from uuid import UUID

import typer

from fedselect.client import Client
from fedselect.hooks import (
    DeliveryInfo,
    WebhookChange,
    WebhookCreate,
    WebhookInfo,
    WebhookIssued,
)
from fedselect.remote import command, given, group, valid

webhooks = group("Addresses that are told of the project's events.")

Id = Annotated[UUID, typer.Argument(metavar="ID")]
Url = Annotated[str, typer.Option(help="https://…")]
Events = Annotated[list[str] | None, typer.Option("--event", help="docs/WEBHOOKS.md; repeat.")]


@command(webhooks, "list", columns=("id", "url", "events", "state", "waiting", "dead"))
def list_webhooks(client: Client) -> Iterator[WebhookInfo]:
    """List webhooks, oldest first; never a secret."""
    return client.webhooks()


@command(webhooks, "show")
def show_webhook(client: Client, webhook_id: Id) -> WebhookInfo:
    """Show one webhook, without its secret."""
    return client.webhook(webhook_id)


@command(webhooks, "create")
def create_webhook(client: Client, url: Url, event: Events = None) -> WebhookIssued:
    """Tell an address of events from now on; the secret that signs is shown this one time."""
    return client.create_webhook(valid(WebhookCreate, url=url, events=event or []))


@command(webhooks, "edit")
def edit_webhook(
    client: Client,
    webhook_id: Id,
    url: Annotated[str | None, typer.Option(help="https://…")] = None,
    event: Events = None,
    state: Annotated[str | None, typer.Option(help="active or disabled")] = None,
) -> WebhookInfo:
    """Change address or events, or switch it off and on; what is not given stays."""
    change = given(url=url, events=event or None, state=state)
    return client.change_webhook(webhook_id, valid(WebhookChange, **change))


@command(webhooks, "rotate-secret")
def rotate_secret(client: Client, webhook_id: Id) -> WebhookIssued:
    """Make a new secret, shown this one time; for a day both sign."""
    return client.rotate_webhook_secret(webhook_id)


@command(webhooks, "test")
def send_test(client: Client, webhook_id: Id) -> WebhookInfo:
    """Send the event webhook.tested."""
    return client.test_webhook(webhook_id)


@command(webhooks, "deliveries", columns=("id", "seq", "state", "attempts", "status", "error"))
def list_deliveries(
    client: Client,
    webhook_id: Id,
    state: Annotated[
        Literal["waiting", "delivered", "dead"] | None, typer.Option(help="Only these.")
    ] = None,
) -> Iterator[DeliveryInfo]:
    """List what was sent to a webhook, oldest first."""
    return client.deliveries(webhook_id, state)


@command(webhooks, "retry")
def retry_delivery(client: Client, delivery_id: Id) -> DeliveryInfo:
    """Send a dead delivery again."""
    return client.retry_delivery(delivery_id)
