"""Merges: what is asked for, and what is answered."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from merging.recipe import Recipe
from service.documents import MergeRecord, MergeState, Priority
from service.schemas.models import StoredFile
from service.schemas.problem import Problem
from service.sizes import size_for


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MergeRequest(Recipe):
    """A recipe, whose models are `ns/name[@revision]` or `merges/<id>`, and how to call the merge."""

    name: str | None = Field(default=None, min_length=1, max_length=200)
    priority: Priority = Field(default="normal", description="queued merges of a higher one start first")

    @classmethod
    def read(cls, body: dict[str, Any]) -> MergeRequest:
        """A request from JSON data. Raises the `recipe_*` errors."""
        found = cls.load(body)
        assert isinstance(found, cls)
        return found

    def recipe(self) -> Recipe:
        """The recipe alone."""
        return Recipe.model_validate({name: getattr(self, name) for name in Recipe.model_fields})


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
        more = {"recipe": record.recipe, "result": outcome, "queue_position": position, "eta_seconds": eta}
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
