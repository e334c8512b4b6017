"""Merges: what is asked for, and what is answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merging.recipe import Recipe, validation_error
from service.documents import MergeRecord, MergeState, Priority, Push, PushState
from service.remote.references import Hubs, check_target
from service.schemas.models import StoredFile
from service.schemas.problem import Problem
from service.sizes import size_for
from service.webhooks.endpoints import EVENTS, EventType
from service.webhooks.guard import MAX_URL, Allowed, check_url
from service.webhooks.sign import check_secret


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PushTo(_Strict):
    """A repository of another hub. It is made if it does not exist."""

    repo: str = Field(max_length=96, description="`org/name`")
    revision: str | None = Field(default=None, max_length=128, description="branch; default `main`")
    private: bool = Field(default=True, description="if it is made: whether only its owner sees it")
    endpoint: str | None = Field(
        default=None, max_length=200, description="one of the hubs this service may reach; default the first"
    )

    def resolved(self, hubs: Hubs, tenant: str) -> Push:
        """The push that is asked for.

        Raises ``hub_reference_invalid``, ``hub_endpoint_not_allowed``, ``hub_push_not_granted``.
        """
        check_target(self.repo, self.revision)
        endpoint = hubs.endpoint(self.endpoint, field="push_to.endpoint")
        hubs.demand_push(tenant, endpoint, self.repo)
        return Push(repo=self.repo, revision=self.revision, private=self.private, endpoint=endpoint)


class PushStatus(_Strict):
    """How far a push is. A failed one leaves the result as it is, and can be asked for again."""

    repo: str
    revision: str | None
    private: bool
    endpoint: str
    state: PushState
    commit: str | None
    error: Problem | None
    finished_at: str | None


class WebhookTo(_Strict):
    """Who is told of the end of this one merge."""

    url: str = Field(max_length=MAX_URL, description="`https://host[:443|8443]/path`")
    secret: str | None = Field(
        default=None,
        max_length=100,
        description="`whsec_<base64>`, signs the message; default that of `GET /v1/webhook-secret`",
    )
    events: list[EventType] = Field(default=list(EVENTS), min_length=1, max_length=len(EVENTS))

    def checked(self, allowed: Allowed) -> WebhookTo:
        """Itself. Raises ``webhook_url_invalid``, ``webhook_url_refused``, ``webhook_secret_invalid``."""
        check_url(self.url, allowed, field="webhook.url")
        if self.secret is not None:
            check_secret(self.secret, field="webhook.secret")
        return self


class MergeOptions(_Strict):
    """What may stand beside a recipe or a configuration."""

    name: str | None = Field(default=None, min_length=1, max_length=200)
    push_to: PushTo | None = Field(default=None, description="where the result is pushed when it is there")
    webhook: WebhookTo | None = Field(default=None, description="who is told of its end; a URL alone will do")
    priority: Priority = Field(default="normal", description="queued merges of a higher one start first")

    @field_validator("webhook", mode="before")
    @classmethod
    def _url_alone(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @classmethod
    def split(cls, body: dict[str, Any]) -> tuple[MergeOptions, dict[str, Any]]:
        """The options in the body of a request, and what is to be merged. Raises `recipe_*` errors."""
        given = {key: value for key, value in body.items() if key in cls.model_fields}
        try:
            found = cls.model_validate(given, strict=True)
        except ValidationError as error:
            raise validation_error(error, "recipe") from error
        return found, {key: value for key, value in body.items() if key not in given}


class MergeRequest(MergeOptions, Recipe):
    """A recipe, whose models are `ns/name[@revision]` or `merges/<id>`, and how to call the merge."""


class ConfigurationRequest(MergeOptions):
    """A mergekit configuration, whose models are named as those of a recipe, and how to call the merge."""

    merge_method: str = Field(max_length=1024)
    models: list[dict[str, Any]] | None = Field(default=None, description="either these or `slices`")
    slices: list[dict[str, Any]] | None = None
    base_model: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="scalars, gradients or filters")
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: dict[str, Any] | None = None
    compat: Literal["mergekit"] | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 63)


class Links(_Strict):
    """Where to go on from a merge."""

    self: str
    events: str
    report: str
    files: str


class Outcome(_Strict):
    """What a successful merge produced."""

    model: str = Field(description="how to name the result in another recipe")
    recipe_digest: str
    seconds: float = Field(description="wall time of the merge itself")
    files: list[StoredFile]
    summary: dict[str, Any] = Field(description="the global part of the report")
    imports: dict[str, str] = Field(description="the commits that `hf://` references meant")


class MergeSummary(_Strict):
    """A merge, in a list."""

    id: str
    name: str | None
    state: MergeState
    method: str
    priority: Priority
    phase: str
    progress: float = Field(ge=0.0, le=1.0)
    message: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempts: int = Field(description="how often it was started; more than once after a worker died")
    cached_from: str | None = Field(description="the merge whose result this is, because it is the same job")
    retry_of: str | None = Field(description="the merge that this one repeats")
    error: Problem | None
    links: Links

    @classmethod
    def of(cls, record: MergeRecord) -> MergeSummary:
        """The public form of a record."""
        return cls.model_validate(_common(record))


class Merge(MergeSummary):
    """A merge."""

    recipe: dict[str, Any] = Field(description="as it runs: every model with its revision")
    result: Outcome | None
    push: PushStatus | None
    memory_class: int = Field(description="GB of memory of the workers that may run it")
    queue_position: int | None = Field(description="while it is queued: how many start before it")
    eta_seconds: float | None = Field(description="a guess at the time to its end")

    @classmethod
    def of(cls, record: MergeRecord, position: int | None = None, eta: float | None = None) -> Merge:
        """The public form of a record."""
        result = record.result
        outcome = None
        if result is not None:
            outcome = {
                "model": f"merges/{record.id}",
                **result.model_dump(mode="json", exclude={"attempt"}),
            }
        push = record.push.model_dump(mode="json", exclude={"asked"}) if record.push else None
        more: dict[str, Any] = {"recipe": record.recipe, "result": outcome, "push": push}
        more |= {"queue_position": position, "eta_seconds": eta}
        size = size_for(record.memory_bytes)
        return cls.model_validate({**_common(record), **more, "memory_class": size})


class MergePage(_Strict):
    """A page of merges."""

    data: list[MergeSummary]
    next_cursor: str | None


def _common(record: MergeRecord) -> dict[str, Any]:
    here = f"/v1/merges/{record.id}"
    data = record.model_dump(mode="json", include=set(MergeSummary.model_fields))
    data["method"] = record.recipe["merge_method"]
    data["links"] = {
        "self": here,
        "events": f"{here}/events",
        "report": f"{here}/report",
        "files": f"{here}/files",
    }
    return data
