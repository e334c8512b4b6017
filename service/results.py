"""A merge that was done before is not done again: its result is copied."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from merging import __version__, catalog
from service.clock import now
from service.documents import MergeRecord, attempts_prefix, result_key
from service.jobs import Jobs
from service.storage import Storage
from service.work import Configuration, Work


def job_digest(pinned: Work) -> str:
    """sha256 (hex) of what a job is: pinned models, method and parameters with their defaults, version.

    Models are told apart by name and revision, because the files of a result name them. Of a configuration
    it is what it says.
    """
    if isinstance(pinned, Configuration):
        return _sha256({"configuration": pinned.document, "version": __version__})
    resolved = catalog.resolve(pinned)
    spelled_out = pinned.model_copy(
        update={
            "merge_method": resolved.method.name,
            "space": resolved.space,
            "parameters": resolved.params.model_dump(mode="json", by_alias=True),
        }
    )
    names = {entry.model: entry.model for entry in pinned.models}
    job = {
        "recipe": spelled_out.canonical(names, ordered=resolved.method.contract.ordered),
        "version": __version__,
    }
    return _sha256(job)


def _sha256(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def reuse(jobs: Jobs, storage: Storage, record: MergeRecord) -> MergeRecord | None:
    """A new merge ended at once with the result of an earlier one that did the same job, or None.

    The files are copied, so that either merge can be deleted without the other.
    """
    assert record.digest is not None
    known = jobs.known_result(record.tenant, record.digest)
    source = jobs.find(record.tenant, known) if known else None
    if source is None or source.result is None or source.digest != record.digest:
        return None
    attempt = source.result.attempt
    try:
        for entry in source.result.files:
            origin = result_key(record.tenant, source.id, attempt, entry.path)
            storage.copy(origin, result_key(record.tenant, record.id, attempt, entry.path))
    except FileNotFoundError:  # deleted meanwhile, or lost
        storage.delete_prefix(attempts_prefix(record.tenant, record.id))
        return None
    moment = now()
    ended = record.model_copy(
        update={
            "state": "succeeded",
            "phase": "succeeded",
            "progress": 1.0,
            "started_at": moment,
            "finished_at": moment,
            "attempt": attempt,
            "cached_from": source.cached_from or source.id,
            "result": source.result,
        }
    )
    jobs.enter_ended(ended)
    return ended
