"""Merges: what is asked for, and what is answered."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from merging.recipe import Recipe
from service.documents import MergeRecord, MergeState
from service.schemas.models import StoredFile
from service.schemas.problem import Problem


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MergeRequest(Recipe):
    """A recipe, whose models are `ns/name[@revision]` or `merges/<id>`, and how to call the merge."""

    name: str | None = Field(default=None, min_length=1, max_length=200)

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
    phase: str
    progress: float = Field(ge=0.0, le=1.0)
    message: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    attempts: int = Field(description="how often it was started; more than once after a worker died")
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

    @classmethod
    def of(cls, record: MergeRecord) -> Merge:
        """The public form of a record."""
        result = record.result
        outcome = None
        if result is not None:
            outcome = {
                "model": f"merges/{record.id}",
                **result.model_dump(mode="json", exclude={"attempt"}),
            }
        return cls.model_validate({**_common(record), "recipe": record.recipe, "result": outcome})


class MergePage(_Strict):
    """A page of merges."""

    data: list[MergeSummary]
    next_cursor: str | None


def _common(record: MergeRecord) -> dict[str, Any]:
    here = f"/v1/merges/{record.id}"
    data = record.model_dump(mode="json", exclude={"tenant", "attempt", "recipe", "result"})
    data["method"] = record.recipe["merge_method"]
    data["links"] = {
        "self": here,
        "events": f"{here}/events",
        "report": f"{here}/report",
        "files": f"{here}/files",
    }
    return data
