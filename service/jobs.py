"""Merges: queued by the API, moved through their states by workers."""

from __future__ import annotations

import json
from typing import Any, Literal

import redis
from redis.client import Pipeline
from redis.commands.core import Script
from rq import Queue, Retry
from rq.serializers import JSONSerializer

from merging.errors import Cancelled
from service import transitions
from service.broker import (
    ACTIVE,
    ENTERING,
    QUEUES,
    TASK,
    events_key,
    merge_key,
    merges_key,
    queue_name,
    text,
    transition_keys,
)
from service.clock import millis, now
from service.documents import MergeRecord, MergeResult, MergeState
from service.errors import Conflict
from service.ledger import Ledger
from service.problems import describe
from service.records import encode, new_id, new_record
from service.sizes import move_up, size_for
from service.storage import Storage
from service.webhooks.endpoints import Endpoints
from service.work import Work, kept

MAX_RETRIES = 5
"""How often a merge is started again after its worker died; input errors are never retried."""
TIMEOUT_SECONDS = 24 * 3600
_RESULT_SECONDS = 3600
_ENTRY_SECONDS = 3.0
"""After so long whoever requested a merge and has not queued it yet is taken for dead."""
_NO_ENTRY_SECONDS = 120.0
"""After so long nobody will write the record of a merge any more."""
_ENTRIES_AT_ONCE = 200


class Jobs(Ledger):
    """The merges of all tenants. Every method takes the tenant first."""

    def __init__(self, connection: redis.Redis, storage: Storage) -> None:
        super().__init__(connection, storage)
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
        """Queue a new record. It is in storage before it is in Redis; should this process die in between,
        :meth:`complete_entries` does the rest.
        """
        self.note_entry(record)
        self.save(record)
        if not self.enqueue(record):
            self.settle(record.tenant, record.id)  # what was just written may be older than its end
        return record

    def complete_entries(self) -> list[str]:
        """Queue what was requested and saved, but not queued; the ids of those merges."""
        queued = []
        moment = millis(now())
        before = moment - _ENTRY_SECONDS * 1000
        found: Any = self._redis.zrangebyscore(
            ENTERING, "-inf", before, start=0, num=_ENTRIES_AT_ONCE, withscores=True
        )
        for item, since in found:
            tenant, _, merge_id = text(item).partition("/")
            record = self.stored(tenant, merge_id)
            if record is None:
                if moment - since > _NO_ENTRY_SECONDS * 1000:
                    self._redis.zrem(ENTERING, item)
            elif record.ended:
                self.enter_ended(record)
            elif self.enqueue(record):
                queued.append(merge_id)
        return queued

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

    def enqueue(self, record: MergeRecord) -> bool:
        """Enter a queued record into Redis and its job into the queue, all or nothing.

        Whether that was done; a record that is in Redis already stays as it is.
        """
        tenant, merge_id = record.tenant, record.id
        score = millis(record.created_at)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(merge_key(tenant, merge_id))  # type: ignore[no-untyped-call]
            if pipe.exists(merge_key(tenant, merge_id)):
                self._redis.zrem(ENTERING, f"{tenant}/{merge_id}")
                return False
            pipe.multi()  # said first, or RQ would say it in the middle
            pipe.zrem(ENTERING, f"{tenant}/{merge_id}")
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
            self.settle_if_possible(tenant, merge_id)
        elif answer == "missing" and not record.ended and self.enqueue(record):
            return self.cancel(tenant, merge_id)  # it was in storage only
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
                self.make_known(self.find(tenant, merge_id))
            self.settle_if_possible(tenant, merge_id)
        return answer

    def _run(self, script: Script, tenant: str, merge_id: str, *arguments: str) -> str:
        answer = script(keys=transition_keys(tenant, merge_id), args=list(arguments))
        return text(answer)
