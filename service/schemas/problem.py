"""Problems (RFC 9457)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ProblemItem(BaseModel):
    """One complaint: ``pointer`` (RFC 6901) places it in the body, ``parameter`` elsewhere."""

    model_config = ConfigDict(extra="allow")

    detail: str
    kind: str
    pointer: str | None = None
    parameter: str | None = None


class Problem(BaseModel):
    """Why a request, or a merge, failed. ``code`` is stable across releases."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[ProblemItem] = Field(default_factory=list)
    instance: str | None = None
    remedy: str | None = None


Responses = dict[int | str, dict[str, Any]]
