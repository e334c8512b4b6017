"""Webhooks: register who is told of the end of merges, and see what was delivered."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, status

from service.deps import AdminDep, Cursor, Limit, ServicesDep, TenantDep
from service.gates import BODY_LIMIT
from service.schemas.webhooks import (
    DeliveryPage,
    MergeEnded,
    NewWebhook,
    Webhook,
    WebhookList,
    WebhookPing,
    WebhookRequest,
    WebhookSecret,
)
from service.webhooks.deliveries import DELIVERY_ID_PATTERN, Delivery
from service.webhooks.endpoints import WEBHOOK_ID_PATTERN
from service.webhooks.guard import check_url
from service.webhooks.messages import ping
from service.webhooks.sign import check_secret

router = APIRouter(tags=["webhooks"])
messages = APIRouter()
"""What receivers get; it is described, not served."""

WebhookId = Annotated[str, Path(description="Id of the webhook", pattern=WEBHOOK_ID_PATTERN)]
DeliveryId = Annotated[str, Path(description="Id of the message", pattern=DELIVERY_ID_PATTERN)]
_Id = Annotated[str, Header(description="the same however often the message is sent")]
_Time = Annotated[str, Header(description="seconds since the epoch")]
_Signature = Annotated[str, Header(description="`v1,<base64 of HMAC-SHA256 over id.timestamp.body>`")]


@router.post("/v1/webhooks", status_code=status.HTTP_201_CREATED, max_body_size=BODY_LIMIT)
def create_webhook(services: ServicesDep, tenant: TenantDep, body: WebhookRequest) -> NewWebhook:
    """Register an endpoint for the ends of all merges. Its secret is in this answer and in no other."""
    check_url(body.url, services.webhook_allowed)
    secret = None if body.secret is None else check_secret(body.secret)
    endpoint = services.webhooks.create(
        tenant, body.url, secret=secret, events=tuple(body.events), description=body.description
    )
    shown = Webhook.of(endpoint).model_dump()
    return NewWebhook(**shown, secret=services.webhooks.secret_of(endpoint))


@router.get("/v1/webhooks")
def list_webhooks(services: ServicesDep, tenant: TenantDep) -> WebhookList:
    """The registered endpoints, the oldest first."""
    return WebhookList(data=[Webhook.of(endpoint) for endpoint in services.webhooks.every(tenant)])


@router.get("/v1/webhook-secret")
def get_webhook_secret(services: ServicesDep, tenant: AdminDep) -> WebhookSecret:
    """What verifies the messages of merges whose `webhook` brought no secret."""
    return WebhookSecret(secret=services.webhooks.tenant_secret(tenant))


@router.get("/v1/webhooks/{webhook_id}")
def get_webhook(services: ServicesDep, tenant: TenantDep, webhook_id: WebhookId) -> Webhook:
    """One endpoint. That of the merge `mrg_X` is `whk_X`."""
    return Webhook.of(services.webhooks.get(tenant, webhook_id))


@router.delete("/v1/webhooks/{webhook_id}", status_code=status.HTTP_204_NO_CONTENT)
def delete_webhook(services: ServicesDep, tenant: TenantDep, webhook_id: WebhookId) -> None:
    """Forget an endpoint; what was on its way to it is dropped."""
    services.webhooks.get(tenant, webhook_id)
    services.webhooks.delete(tenant, webhook_id)
    services.deliveries.drop_all(tenant, webhook_id)


@router.post("/v1/webhooks/{webhook_id}/enable")
def enable_webhook(services: ServicesDep, tenant: TenantDep, webhook_id: WebhookId) -> Webhook:
    """Let an endpoint that was disabled be told again."""
    return Webhook.of(services.webhooks.enable(tenant, webhook_id))


@router.post("/v1/webhooks/{webhook_id}/ping", status_code=status.HTTP_202_ACCEPTED)
def ping_webhook(services: ServicesDep, tenant: TenantDep, webhook_id: WebhookId) -> Delivery:
    """Send an endpoint a message of the type `webhook.ping`."""
    endpoint = services.webhooks.get(tenant, webhook_id)
    message = ping(endpoint)
    services.deliveries.add(tenant, endpoint.id, message)
    return services.deliveries.get(tenant, webhook_id, message.id)


@router.get("/v1/webhooks/{webhook_id}/deliveries")
def list_deliveries(
    services: ServicesDep, tenant: TenantDep, webhook_id: WebhookId, limit: Limit = 50, cursor: Cursor = None
) -> DeliveryPage:
    """The messages to an endpoint, the newest first, each with its attempts. They are kept for 30 days."""
    services.webhooks.get(tenant, webhook_id)
    found, following = services.deliveries.log(tenant, webhook_id, limit=limit, cursor=cursor)
    return DeliveryPage(data=found, next_cursor=following)


@router.post("/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/retry", status_code=status.HTTP_202_ACCEPTED)
def retry_delivery(
    services: ServicesDep, tenant: TenantDep, webhook_id: WebhookId, delivery_id: DeliveryId
) -> Delivery:
    """Send a message once more, now."""
    services.webhooks.get(tenant, webhook_id)
    return services.deliveries.again(tenant, webhook_id, delivery_id)


@messages.post("merge.ended")
def merge_ended(
    body: MergeEnded, webhook_id: _Id, webhook_timestamp: _Time, webhook_signature: _Signature
) -> None:
    """A merge has ended. Any 2xx answer within 10 s will do; the body of the answer does not matter."""


@messages.post("webhook.ping")
def webhook_pinged(
    body: WebhookPing, webhook_id: _Id, webhook_timestamp: _Time, webhook_signature: _Signature
) -> None:
    """Somebody tries out the endpoint."""
