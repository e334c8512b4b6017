"""Merge records: created by the API, moved through their states by workers, kept in storage for good.

Redis holds the live record; storage holds it as it was submitted and as it ended, which is all that is
needed to rebuild Redis.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, Literal

import redis
from redis.client import Pipeline
from redis.commands.core import Script
from rq import Queue, Retry
from rq.serializers import JSONSerializer

from merging.recipe import Recipe
from service import transitions
from service.broker import ACTIVE, QUEUES, TASK, UNSAVED, events_key, merge_key, merges_key, text
from service.clock import millis, now
from service.documents import MergeRecord, MergeResult, MergeState, record_key
from service.errors import NotFound
from service.paging import page
from service.storage import Storage

MAX_RETRIES = 5
"""How often a merge is started again after its worker died; input errors are never retried."""
TIMEOUT_SECONDS = 24 * 3600
_RESULT_SECONDS = 3600
_MUTABLE = ("state", "started_at", "finished_at", "attempt", "phase", "message")


class Jobs:
    """The merges of all tenants. Every method takes the tenant first."""

    def __init__(self, connection: redis.Redis, storage: Storage) -> None:
        self._redis = connection
        self._storage = storage
        self._queue = Queue(QUEUES[0], connection=connection, serializer=JSONSerializer)
        self._claim = connection.register_script(transitions.CLAIM)
        self._report = connection.register_script(transitions.REPORT)
        self._finish = connection.register_script(transitions.FINISH)

    # the API's side

    def create(self, tenant: str, recipe: Recipe, *, name: str | None = None) -> MergeRecord:
        """A new merge, queued. It is in storage before it is in Redis."""
        record = MergeRecord(
            id=f"mrg_{secrets.token_hex(16)}",
            tenant=tenant,
            name=name,
            recipe=recipe.model_dump(mode="json"),
            created_at=now(),
        )
        self.save(record)
        self.enqueue(record)
        return record

    def enqueue(self, record: MergeRecord) -> None:
        """Enter a queued record into Redis and its job into the queue, all or nothing."""
        tenant, merge_id = record.tenant, record.id
        score = millis(record.created_at)
        fixed = record.model_dump(mode="json", include={"id", "tenant", "name", "recipe", "created_at"})
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.multi()  # said first, or RQ would say it in the middle
            pipe.hset(
                merge_key(tenant, merge_id),
                mapping={
                    "id": merge_id,
                    "score": score,
                    "doc": json.dumps(fixed),
                    "state": "queued",
                    "phase": "queued",
                    "progress": "0",
                    "message": "",
                },
            )
            pipe.zadd(merges_key(tenant), {merge_id: score})
            pipe.zadd(merges_key(tenant, "queued"), {merge_id: score})
            pipe.sadd(ACTIVE, f"{tenant}/{merge_id}")
            data = json.dumps({"state": "queued", "at": record.created_at})
            pipe.xadd(events_key(tenant, merge_id), {"event": "state", "data": data})
            self.push(tenant, merge_id, pipe)
            pipe.execute()

    def push(self, tenant: str, merge_id: str, pipe: Pipeline | None = None) -> None:
        """Put the job of a merge into the queue. Its payload is two ids."""
        self._queue.enqueue_call(
            TASK,
            args=(tenant, merge_id),
            job_id=merge_id,
            description=f"merge {merge_id}",
            timeout=TIMEOUT_SECONDS,
            result_ttl=_RESULT_SECONDS,
            failure_ttl=_RESULT_SECONDS,
            retry=Retry(max=MAX_RETRIES),
            pipeline=pipe,
        )

    def get(self, tenant: str, merge_id: str) -> MergeRecord:
        """The record of a merge. Raises ``merge_not_found``."""
        found = self.find(tenant, merge_id)
        if found is None:
            raise NotFound("merge_not_found", f"there is no merge {merge_id}")
        return found

    def find(self, tenant: str, merge_id: str) -> MergeRecord | None:
        """The record of a merge, from Redis or else from storage, or None."""
        fields = self._redis.hgetall(merge_key(tenant, merge_id))
        if fields:
            return _decode(fields)
        data = self._storage.get_json(record_key(tenant, merge_id))
        return None if data is None else MergeRecord.model_validate(data)

    def recent(
        self, tenant: str, *, limit: int, cursor: str | None, state: MergeState | None
    ) -> tuple[list[MergeRecord], str | None]:
        """Merges, the newest first, and the cursor of the next page."""
        ids, following = page(self._redis, merges_key(tenant, state), limit=limit, cursor=cursor)
        return [record for merge_id in ids if (record := self.find(tenant, merge_id))], following

    # the workers' side

    def claim(self, tenant: str, merge_id: str, attempt: str) -> str:
        """Make ``attempt`` the current one: 'claimed', or the state that forbids it, or 'missing'."""
        moment = now()
        data = json.dumps({"state": "running", "at": moment})
        return self._run(self._claim, tenant, merge_id, attempt, moment, data)

    def report(
        self, tenant: str, merge_id: str, attempt: str, phase: str, progress: float, message: str
    ) -> str:
        """Note progress (0 to 1): 'running', or 'superseded', or the state that forbids it."""
        data = json.dumps({"phase": phase, "progress": round(progress, 4), "message": message})
        return self._run(self._report, tenant, merge_id, attempt, phase, f"{progress:.4f}", message, data)

    def publish(self, tenant: str, merge_id: str, result: MergeResult) -> str:
        """End a merge with a result: 'finished', or 'superseded', or the state that forbids it."""
        return self._end(
            tenant, merge_id, result.attempt, "succeeded", "result", result.model_dump(mode="json")
        )

    def fail(self, tenant: str, merge_id: str, attempt: str, error: dict[str, Any]) -> str:
        """End a merge with an error; an empty ``attempt`` ends whichever is current."""
        return self._end(tenant, merge_id, attempt, "failed", "error", error)

    def cancelled(self, tenant: str, merge_id: str, attempt: str, error: dict[str, Any]) -> str:
        """End a merge that was asked to stop."""
        return self._end(tenant, merge_id, attempt, "cancelled", "error", error)

    def _end(
        self,
        tenant: str,
        merge_id: str,
        attempt: str,
        state: MergeState,
        field: Literal["result", "error"],
        value: dict[str, Any],
    ) -> str:
        moment = now()
        data: dict[str, Any] = {"state": state, "at": moment}
        if field == "error":
            data["error"] = value
        answer = self._run(
            self._finish,
            tenant,
            merge_id,
            attempt,
            state,
            moment,
            field,
            json.dumps(value),
            json.dumps(data),
            f"{tenant}/{merge_id}",
        )
        if answer == "finished":
            self.settle(tenant, merge_id)
        return answer

    def _run(self, script: Script, tenant: str, merge_id: str, *arguments: str) -> str:
        keys = [
            merge_key(tenant, merge_id),
            events_key(tenant, merge_id),
            ACTIVE,
            UNSAVED,
            merges_key(tenant),
        ]
        answer = script(keys=keys, args=list(arguments))
        return text(answer)

    # durability

    def save(self, record: MergeRecord) -> None:
        """Write a record to storage."""
        self._storage.put_json(record_key(record.tenant, record.id), record.model_dump(mode="json"))

    def settle(self, tenant: str, merge_id: str) -> None:
        """Write an ended record to storage; after that Redis may forget it. Safe to repeat."""
        fields = self._redis.hgetall(merge_key(tenant, merge_id))
        if fields:
            self.save(_decode(fields))
        with self._redis.pipeline() as pipe:
            pipe.srem(UNSAVED, f"{tenant}/{merge_id}")
            pipe.expire(merge_key(tenant, merge_id), transitions.ENDED_SECONDS)
            pipe.execute()

    def members(self, key: str) -> list[tuple[str, str]]:
        """(tenant, merge) of the set of unfinished (``ACTIVE``) or of unsaved (``UNSAVED``) merges."""
        found = sorted(text(item) for item in self._redis.smembers(key))
        return [(tenant, merge_id) for tenant, _, merge_id in (item.partition("/") for item in found)]


def _decode(fields: Mapping[Any, Any]) -> MergeRecord:
    found = {text(key): text(value) for key, value in fields.items()}
    data = json.loads(found["doc"])
    data.update({key: found[key] for key in _MUTABLE if key in found})
    data["progress"] = float(found.get("progress", "0"))
    data["attempts"] = int(found.get("attempts", "0"))
    for key in ("error", "result"):
        if key in found:
            data[key] = json.loads(found[key])
    return MergeRecord.model_validate(data)
