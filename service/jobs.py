"""Merge records: created by the API, moved through their states by workers, kept in storage for good.

Redis holds the live record; storage holds it as it was submitted and as it ended, which is all that is
needed to rebuild Redis.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any, Literal

import redis
from redis.client import Pipeline
from redis.commands.core import Script
from rq import Queue, Retry
from rq.serializers import JSONSerializer

from merging.errors import Cancelled
from service import outlook, tally, transitions
from service.broker import (
    ACTIVE,
    QUEUES,
    TASK,
    UNSAVED,
    events_key,
    merge_key,
    merges_key,
    queue_name,
    results_key,
    text,
    transition_keys,
)
from service.clock import millis, now
from service.documents import (
    STATES,
    MergeRecord,
    MergeResult,
    MergeState,
    attempts_prefix,
    record_key,
)
from service.errors import Conflict, NotFound
from service.paging import page
from service.problems import describe
from service.quota import usage_key
from service.records import decode, encode, new_id, new_record
from service.sizes import move_up, size_for
from service.storage import Storage, StorageUnavailable
from service.webhooks.deliveries import announce
from service.webhooks.endpoints import Endpoints, of_merge
from service.work import Work, kept

MAX_RETRIES = 5
"""How often a merge is started again after its worker died; input errors are never retried."""
TIMEOUT_SECONDS = 24 * 3600
_RESULT_SECONDS = 3600
_PAGES_SEARCHED = 20


class Jobs:
    """The merges of all tenants. Every method takes the tenant first."""

    def __init__(self, connection: redis.Redis, storage: Storage) -> None:
        self._redis = connection
        self._storage = storage
        self._queues = {
            name: Queue(name, connection=connection, serializer=JSONSerializer) for name in QUEUES
        }
        self._claim = connection.register_script(transitions.CLAIM)
        self._report = connection.register_script(transitions.REPORT)
        self._finish = connection.register_script(transitions.FINISH)
        self._cancel = connection.register_script(transitions.CANCEL)

    # the API's side

    def create(self, tenant: str, work: Work, **more: Any) -> MergeRecord:
        """A new merge, queued. ``more``: fields of the record."""
        return self.submit(new_record(tenant, work, **more))

    def submit(self, record: MergeRecord) -> MergeRecord:
        """Queue a new record. It is in storage before it is in Redis."""
        self.save(record)
        self.enqueue(record)
        return record

    def repeat(self, tenant: str, merge_id: str, **more: Any) -> MergeRecord:
        """A new merge like one that failed or was cancelled. Raises ``merge_not_failed``."""
        old = self.get(tenant, merge_id)
        if old.state not in ("failed", "cancelled"):
            raise Conflict(
                "merge_not_failed",
                f"the merge {merge_id} is {old.state}",
                remedy="Only merges that failed or were cancelled can be repeated",
            )
        same = old.model_dump(include={"name", "priority", "digest", "memory_bytes"})
        same["push"] = old.push.again() if old.push else None
        same["id"] = new_id()
        Endpoints(self._storage).attach_like(tenant, old.id, same["id"])
        return self.create(tenant, kept(old.recipe), retry_of=old.id, **same, **more)

    def entered(self, tenant: str, merge_id: str) -> bool:
        """Whether a merge exists as a whole: it is in Redis, or it has ended."""
        if self._redis.exists(merge_key(tenant, merge_id)):
            return True
        found = self.find(tenant, merge_id)
        return found is not None and found.ended

    def enqueue(self, record: MergeRecord) -> bool:
        """Enter a queued record into Redis and its job into the queue, all or nothing.

        Whether that was done; a record that is in Redis already stays as it is.
        """
        tenant, merge_id = record.tenant, record.id
        score = millis(record.created_at)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(merge_key(tenant, merge_id))  # type: ignore[no-untyped-call]
            if pipe.exists(merge_key(tenant, merge_id)):
                return False
            pipe.multi()  # said first, or RQ would say it in the middle
            pipe.hset(merge_key(tenant, merge_id), mapping=encode(record))
            pipe.zadd(merges_key(tenant), {merge_id: score})
            pipe.zadd(merges_key(tenant, "queued"), {merge_id: score})
            pipe.sadd(ACTIVE, f"{tenant}/{merge_id}")
            data = json.dumps({"state": "queued", "at": record.created_at})
            pipe.xadd(events_key(tenant, merge_id), {"event": "state", "data": data})
            self.push(record, pipe)
            try:
                pipe.execute()
            except redis.WatchError:
                return False
        return True

    def push(self, record: MergeRecord, pipe: Pipeline | None = None) -> None:
        """Put the job of a merge into the queue of its priority and size. Its payload is two ids."""
        tenant, merge_id = record.tenant, record.id
        self._queues[queue_name(record.priority, size_for(record.memory_bytes))].enqueue_call(
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
            return decode(fields)
        data = self._storage.get_json(record_key(tenant, merge_id))
        return None if data is None else MergeRecord.model_validate(data)

    def recent(
        self,
        tenant: str,
        *,
        limit: int,
        cursor: str | None,
        state: MergeState | None,
        matches: Callable[[MergeRecord], bool] = lambda record: True,
    ) -> tuple[list[MergeRecord], str | None]:
        """Merges, the newest first, and the cursor of the next page.

        With ``matches`` a page may be shorter than ``limit``; the cursor alone tells whether there is more.
        """
        key = merges_key(tenant, state)
        for _ in range(_PAGES_SEARCHED):
            ids, cursor = page(self._redis, key, limit=limit, cursor=cursor)
            records = [record for merge_id in ids if (record := self.find(tenant, merge_id))]
            found = [record for record in records if matches(record)]
            if found or cursor is None:
                break
        return found, cursor

    def cancel(self, tenant: str, merge_id: str) -> MergeRecord:
        """Ask a merge to stop; asking again is fine. Raises ``merge_ended`` when it is too late.

        One that nobody runs has ended at once. Otherwise its attempt stops at its next report, and the
        reaper ends what does not.
        """
        record = self.get(tenant, merge_id)
        moment, error = now(), describe(Cancelled())
        answer = self._run(
            self._cancel,
            tenant,
            merge_id,
            moment,
            json.dumps({"state": "cancelling", "at": moment}),
            json.dumps({"state": "cancelled", "at": moment, "error": error}),
            json.dumps(error),
            f"{tenant}/{merge_id}",
        )
        if answer == "dequeued":
            self._unqueue(merge_id)
            self._settle_if_possible(tenant, merge_id)
        elif answer in ("succeeded", "failed") or (answer == "missing" and record.state != "cancelled"):
            raise Conflict("merge_ended", f"the merge {merge_id} can no longer be stopped")
        return self.get(tenant, merge_id)

    def _unqueue(self, merge_id: str) -> None:
        """Take a job out of the queue. If a worker just got it, the claim will tell it to drop it."""
        with self._redis.pipeline() as pipe:
            for queue in self._queues.values():
                pipe.lrem(queue.key, 0, merge_id)
            removed = sum(pipe.execute())
        if removed:
            self._redis.delete(f"rq:job:{merge_id}")

    def delete(self, tenant: str, merge_id: str) -> None:
        """Remove an ended merge and its result. Raises ``merge_not_ended``."""
        record = self.get(tenant, merge_id)
        if not record.ended:
            raise Conflict(
                "merge_not_ended", f"the merge {merge_id} is {record.state}", remedy="Cancel it first"
            )
        self._storage.delete(record_key(tenant, merge_id))
        with self._redis.pipeline() as pipe:
            pipe.srem(UNSAVED, f"{tenant}/{merge_id}")
            pipe.delete(merge_key(tenant, merge_id), events_key(tenant, merge_id))
            for state in (None, *STATES):
                pipe.zrem(merges_key(tenant, state), merge_id)
            uncounted, _, listed, *_ = pipe.execute()
        if record.result is not None and listed and not uncounted:
            self._redis.decrby(usage_key(tenant), record.result.size)
        if record.digest and self.known_result(tenant, record.digest) == merge_id:
            self._redis.hdel(results_key(tenant), record.digest)
        self._storage.delete_prefix(attempts_prefix(tenant, merge_id))
        Endpoints(self._storage).delete(tenant, of_merge(merge_id))

    def known_result(self, tenant: str, digest: str) -> str | None:
        """The id of a merge that did the job with this digest, or None."""
        found = self._redis.hget(results_key(tenant), digest)
        return None if found is None else text(found)

    def enter_ended(self, record: MergeRecord) -> None:
        """Enter a merge that has ended already into storage and into the lists."""
        self.save(record)
        announce(self._redis, self._storage, record)
        score = millis(record.created_at)
        with self._redis.pipeline() as pipe:
            for state in (None, record.state):
                pipe.zadd(merges_key(record.tenant, state), {record.id: score})
            if record.digest and record.state == "succeeded":
                pipe.hset(results_key(record.tenant), record.digest, record.id)
            if record.result is not None:
                pipe.incrby(usage_key(record.tenant), record.result.size)
            pipe.execute()
        tally.note(self._redis, record)

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

    def move_up(self, tenant: str, merge_id: str, attempt: str, memory: int, reason: str) -> int | None:
        """Let a merge that did not fit into ``memory`` bytes wait for a larger worker; its class, or None."""
        return move_up(self._redis, tenant, merge_id, attempt, memory=memory, reason=reason)

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
            if state == "succeeded":
                self._make_known(self.find(tenant, merge_id))
            self._settle_if_possible(tenant, merge_id)
        return answer

    def _make_known(self, record: MergeRecord | None) -> None:
        """Let the result be used again. At once: whoever saw the end may ask for the same the next moment."""
        if record is not None and record.digest:
            self._redis.hset(results_key(record.tenant), record.digest, record.id)

    def _settle_if_possible(self, tenant: str, merge_id: str) -> None:
        """An end counts even while the storage is away; whoever supervises settles it later."""
        with contextlib.suppress(StorageUnavailable):
            self.settle(tenant, merge_id)

    def _conclude(self, record: MergeRecord) -> None:
        """Count an end; remember of a success the result of its job, its bytes, and the pace."""
        tally.note(self._redis, record)
        if record.state != "succeeded":
            return
        self._make_known(record)
        if record.result is not None:
            self._redis.incrby(usage_key(record.tenant), record.result.size)
        if record.started_at and record.finished_at:
            seconds = (millis(record.finished_at) - millis(record.started_at)) / 1000
            outlook.note(self._redis, seconds)

    def _run(self, script: Script, tenant: str, merge_id: str, *arguments: str) -> str:
        answer = script(keys=transition_keys(tenant, merge_id), args=list(arguments))
        return text(answer)

    # durability

    def save(self, record: MergeRecord) -> None:
        """Write a record to storage."""
        self._storage.put_json(record_key(record.tenant, record.id), record.model_dump(mode="json"))

    def settle(self, tenant: str, merge_id: str) -> MergeRecord | None:
        """Write an ended record to storage; after that Redis may forget it. Safe to repeat."""
        fields = self._redis.hgetall(merge_key(tenant, merge_id))
        record = decode(fields) if fields else None
        if record is not None:
            self.save(record)
            if record.ended:
                announce(self._redis, self._storage, record)
        with self._redis.pipeline() as pipe:
            pipe.srem(UNSAVED, f"{tenant}/{merge_id}")
            pipe.expire(merge_key(tenant, merge_id), transitions.ENDED_SECONDS)
            first = pipe.execute()[0]
        if first and record is not None:
            self._conclude(record)
        return record

    def members(self, key: str) -> list[tuple[str, str]]:
        """(tenant, merge) of the set of unfinished (``ACTIVE``) or of unsaved (``UNSAVED``) merges."""
        found = sorted(text(item) for item in self._redis.smembers(key))
        return [(tenant, merge_id) for tenant, _, merge_id in (item.partition("/") for item in found)]
