"""Records of merges: a new one, and the hash in Redis that holds a live one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from service.broker import text
from service.clock import millis, now
from service.documents import MergeRecord
from service.work import Work, document_of

_FIXED = (
    *("id", "tenant", "name", "recipe", "priority", "digest", "cached_from", "retry_of", "request_id"),
    "created_at",
)
_MUTABLE = ("state", "started_at", "cancelling_at", "finished_at", "attempt", "phase", "message")


def new_id() -> str:
    """The id of a new merge."""
    return f"mrg_{secrets.token_hex(16)}"


def new_record(tenant: str, work: Work, **more: Any) -> MergeRecord:
    """The record of a new merge."""
    fields = {"id": new_id(), "recipe": document_of(work), "created_at": now(), **more}
    return MergeRecord(tenant=tenant, **fields)


def decode(fields: Mapping[Any, Any]) -> MergeRecord:
    """A record from the fields of its hash."""
    found = {text(key): text(value) for key, value in fields.items()}
    data = json.loads(found["doc"])
    data.update({key: found[key] for key in _MUTABLE if key in found})
    data["progress"] = float(found.get("progress", "0"))
    data["attempts"] = int(found.get("attempts", "0"))
    data["memory_bytes"] = int(found.get("memory_bytes", "0"))
    for key in ("error", "result", "push"):
        if key in found:
            data[key] = json.loads(found[key])
    return MergeRecord.model_validate(data)


def encode(record: MergeRecord) -> dict[Any, Any]:
    """The hash of a queued record. ``doc`` never changes; the other fields are what transitions change."""
    fixed = record.model_dump(mode="json", include=set(_FIXED), exclude_none=True)
    push = {"push": record.push.model_dump_json()} if record.push else {}
    return {
        **push,
        "id": record.id,
        "score": millis(record.created_at),
        "doc": json.dumps(fixed),
        "state": "queued",
        "phase": "queued",
        "progress": "0",
        "message": "",
        "memory_bytes": record.memory_bytes,
    }
