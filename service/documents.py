"""The documents kept in storage: manifests of revisions and records of merges. Storage is the truth."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MergeState = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
Priority = Literal["high", "normal", "low"]
PushState = Literal["waiting", "running", "succeeded", "failed"]
STATES: tuple[MergeState, ...] = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
FINAL: tuple[MergeState, ...] = ("succeeded", "failed", "cancelled")


class Document(BaseModel):
    """Base of the stored documents: unknown keys are refused, so that a mix-up shows at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Document):
    """One file: its path inside the model, its sha256 (hex) and its bytes."""

    path: str
    sha256: str
    size: int


class Manifest(Document):
    """An immutable revision of a model. ``revision`` is a digest of ``files``."""

    model: str
    revision: str
    created_at: str
    format: str
    modules: int
    rank: int
    base_model: str | None = None
    warnings: tuple[str, ...] = ()
    files: tuple[FileEntry, ...]

    def file(self, path: str) -> FileEntry | None:
        """The entry of a path, or None."""
        return next((entry for entry in self.files if entry.path == path), None)


class Push(Document):
    """Where a result is to be pushed, and how far that is."""

    repo: str
    revision: str | None = None
    private: bool = True
    endpoint: str
    state: PushState = "waiting"
    commit: str | None = None
    error: dict[str, Any] | None = None
    finished_at: str | None = None
    asked: int = 1
    """How often it was asked for; each time has a job of its own."""

    @property
    def ended(self) -> bool:
        """Whether it was done, or given up."""
        return self.state in ("succeeded", "failed")

    def again(self, asked: int = 1) -> Push:
        """The same, to be done."""
        cleared: dict[str, Any] = {"state": "waiting", "commit": None, "error": None, "finished_at": None}
        return self.model_copy(update={**cleared, "asked": asked})


class MergeResult(Document):
    """What a finished merge left: files under its attempt, and what the engine said about it."""

    attempt: str
    recipe_digest: str
    seconds: float
    files: tuple[FileEntry, ...]
    summary: dict[str, Any] = Field(default_factory=dict)
    imports: dict[str, str] = Field(default_factory=dict)
    """From reference to another hub to the commit that it meant."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)


class MergeRecord(Document):
    """One merge, from the request to its end."""

    id: str
    tenant: str
    name: str | None = None
    state: MergeState = "queued"
    recipe: dict[str, Any]
    priority: Priority = "normal"
    memory_bytes: int = 0
    """What the merge is thought to need at its peak; more, after it did not fit."""
    digest: str | None = None
    """Of the job: equal digests, equal results."""
    cached_from: str | None = None
    retry_of: str | None = None
    request_id: str | None = None
    created_at: str
    started_at: str | None = None
    cancelling_at: str | None = None
    finished_at: str | None = None
    attempt: str | None = None
    attempts: int = 0
    phase: str = "queued"
    progress: float = 0.0
    message: str = ""
    error: dict[str, Any] | None = None
    result: MergeResult | None = None
    push: Push | None = None

    @property
    def ended(self) -> bool:
        """Whether the state can no longer change."""
        return self.state in FINAL

    @property
    def push_owed(self) -> bool:
        """Whether the result is there and still to be pushed."""
        return self.result is not None and self.push is not None and not self.push.ended


def revision_of(files: tuple[FileEntry, ...]) -> str:
    """The revision (40 hex) of a set of files: it changes if and only if a path or a content does."""
    rows = sorted([entry.path, entry.sha256, entry.size] for entry in files)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()[:40]


def manifest_key(tenant: str, model: str, revision: str) -> str:
    """Where the manifest of a revision lies."""
    return f"models/{tenant}/{model}/{revision}.json"


def record_key(tenant: str, merge_id: str) -> str:
    """Where the record of a merge lies."""
    return f"merges/{tenant}/{merge_id}.json"


def attempts_prefix(tenant: str, merge_id: str) -> str:
    """Where the attempts of a merge lie."""
    return f"merges/{tenant}/{merge_id}/attempts"


def result_key(tenant: str, merge_id: str, attempt: str, path: str) -> str:
    """Where one file of an attempt's result lies."""
    return f"{attempts_prefix(tenant, merge_id)}/{attempt}/{path}"
