"""Webhooks: where messages go, what they say, what came of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.documents import MergeState
from service.schemas.models import StoredFile
from service.schemas.problem import Problem
from service.webhooks.deliveries import Delivery
from service.webhooks.endpoints import EVENTS, Endpoint, EventType
from service.webhooks.guard import MAX_URL


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WebhookRequest(_Strict):
    """An endpoint that is told of the end of every merge of the tenant."""

    url: str = Field(max_length=MAX_URL, description="`https://host[:443|8443]/path`")
    secret: str | None = Field(
        default=None, max_length=100, description="`whsec_<base64 of 24 to 64 bytes>`; one is made by default"
    )
    events: list[EventType] = Field(default=list(EVENTS), min_length=1, max_length=len(EVENTS))
    description: str | None = Field(default=None, max_length=200)


class Webhook(_Strict):
    """An endpoint."""

    id: str
    url: str
    events: list[EventType]
    description: str | None
    merge: str | None = Field(description="the one merge it is for; none: all merges of the tenant")
    created_at: str
    disabled_at: str | None = Field(description="it is told nothing since then, because it kept failing")
    disabled_because: str | None

    @classmethod
    def of(cls, endpoint: Endpoint) -> Webhook:
        """The public form of an endpoint."""
        return cls.model_validate(endpoint.model_dump(mode="json", exclude={"tenant", "secret"}))


class NewWebhook(Webhook):
    """An endpoint, with what verifies its messages."""

    secret: str = Field(description="shown once")


class WebhookSecret(_Strict):
    """What verifies the messages of merges whose webhook brought no secret."""

    secret: str


class WebhookList(_Strict):
    """The endpoints of a tenant."""

    data: list[Webhook]


class DeliveryPage(_Strict):
    """A page of deliveries."""

    data: list[Delivery]
    next_cursor: str | None


class EndedResult(_Strict):
    """What a successful merge produced."""

    model: str
    recipe_digest: str
    files: list[StoredFile]


class EndedMerge(_Strict):
    """A merge that has ended."""

    id: str
    name: str | None
    state: MergeState
    method: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempts: int
    error: Problem | None
    result: EndedResult | None
    url: str = Field(description="path of the merge in this API")


class MergeEnded(_Strict):
    """The body of a message about a merge."""

    type: EventType
    timestamp: str
    data: EndedMerge


class PingedWebhook(_Strict):
    """What a ping says."""

    webhook: str


class WebhookPing(_Strict):
    """The body of a message that tries out an endpoint."""

    type: Literal["webhook.ping"]
    timestamp: str
    data: PingedWebhook
