"""What endpoints are told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from service.clock import now
from service.documents import MergeRecord
from service.webhooks.endpoints import Endpoint

PING = "webhook.ping"


@dataclass(frozen=True)
class Message:
    """One message to one endpoint. ``id`` stays the same however often it is sent."""

    id: str
    kind: str
    body: str


def of_end(record: MergeRecord, endpoint: Endpoint) -> Message:
    """The message about the end of a merge; made again it is the same."""
    kind = f"merge.{record.state}"
    digest = hashlib.sha256(json.dumps([endpoint.id, record.id, kind]).encode()).hexdigest()
    moment = record.finished_at or record.created_at
    return Message(f"msg_{digest[:32]}", kind, _body(kind, moment, _merge(record)))


def ping(endpoint: Endpoint) -> Message:
    """A message for trying out an endpoint."""
    moment = now()
    digest = hashlib.sha256(json.dumps([endpoint.id, moment]).encode()).hexdigest()
    return Message(f"msg_{digest[:32]}", PING, _body(PING, moment, {"webhook": endpoint.id}))


def _body(kind: str, moment: str, data: dict[str, Any]) -> str:
    return json.dumps({"type": kind, "timestamp": moment, "data": data}, separators=(",", ":"))


def _merge(record: MergeRecord) -> dict[str, Any]:
    fields = ("id", "name", "state", "created_at", "started_at", "finished_at", "attempts", "error")
    data = record.model_dump(mode="json", include=set(fields))
    result = record.result
    outcome = None
    if result is not None:
        files = [entry.model_dump(mode="json") for entry in result.files]
        outcome = {"model": f"merges/{record.id}", "recipe_digest": result.recipe_digest, "files": files}
    return {
        **{name: data[name] for name in fields},
        "method": record.recipe["merge_method"],
        "result": outcome,
        "url": f"/v1/merges/{record.id}",
    }
