"""Pushes of results to other hubs: a job of its own after the merge, which cannot harm the result.

How far a push is stands in the record of its merge. Pushing the same result twice is harmless, so a job that
was interrupted is simply run again.
"""

from __future__ import annotations

import redis
from rq import Queue, Retry
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from service.broker import NORMAL_QUEUE, PUSH_TASK, UNSAVED, merge_key, text
from service.documents import MergeRecord, Push
from service.errors import Conflict
from service.jobs import MAX_RETRIES, Jobs

_TIMEOUT_SECONDS = 6 * 3600
_KEPT_SECONDS = 3600
_ALIVE = (JobStatus.QUEUED, JobStatus.STARTED, JobStatus.DEFERRED, JobStatus.SCHEDULED)

# Write the push into a record that is in Redis, and see to it that the record reaches the storage.
_NOTE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'push', ARGV[1])
redis.call('SADD', KEYS[2], ARGV[2])
return 1
"""


class Pushes:
    """The pushes of all tenants. Every method takes the tenant first."""

    def __init__(self, connection: redis.Redis, jobs: Jobs) -> None:
        self._redis = connection
        self._jobs = jobs
        self._queue = Queue(NORMAL_QUEUE, connection=connection, serializer=JSONSerializer)
        self._write = connection.register_script(_NOTE)

    def ask(self, tenant: str, merge_id: str, push: Push | None) -> MergeRecord:
        """Push a result, or push it again (``push`` None: to where it was to go before).

        Raises ``merge_not_found``, ``merge_not_succeeded``, ``push_not_requested``, ``push_in_progress``.
        """
        record = self._jobs.get(tenant, merge_id)
        if record.result is None:
            raise Conflict(
                "merge_not_succeeded", f"the merge {merge_id} has no result; its state is {record.state}"
            )
        wanted = push or record.push
        if wanted is None:
            raise Conflict(
                "push_not_requested",
                f"it was never said where the result of {merge_id} is to be pushed",
                remedy="Send a body with the repository",
            )
        if record.push is not None and self._under_way(merge_id, record.push):
            raise Conflict(
                "push_in_progress", f"the result of {merge_id} is being pushed", remedy="Wait for its end"
            )
        fresh = wanted.again(record.push.asked + 1 if record.push else 1)
        self.note(record, fresh)
        self._enqueue(tenant, merge_id, fresh)
        return self._jobs.get(tenant, merge_id)

    def start_waiting(self, tenant: str, merge_id: str) -> None:
        """Start the push of a result that has just appeared, if one was asked for and none was started."""
        record = self._jobs.find(tenant, merge_id)
        push = record.push if record is not None else None
        if push is not None and push.state == "waiting" and not self._under_way(merge_id, push):
            self._enqueue(tenant, merge_id, push)

    def resume(self, record: MergeRecord) -> bool:
        """Start a push again that had not ended, unless its job is there; after Redis has lost everything."""
        push = record.push
        if push is None or record.result is None or push.state not in ("waiting", "running"):
            return False
        if self._under_way(record.id, push):
            return False
        self._enqueue(record.tenant, record.id, push)
        return True

    def note(self, record: MergeRecord, push: Push) -> None:
        """Write down how far a push is, in Redis while the record is there, and in storage."""
        tenant, merge_id = record.tenant, record.id
        keys = [merge_key(tenant, merge_id), UNSAVED]
        if self._write(keys=keys, args=[push.model_dump_json(), f"{tenant}/{merge_id}"]):
            self._jobs.settle(tenant, merge_id)
        elif self._jobs.find(tenant, merge_id) is not None:  # not deleted meanwhile
            self._jobs.save(record.model_copy(update={"push": push}))

    def _enqueue(self, tenant: str, merge_id: str, push: Push) -> None:
        self._queue.enqueue_call(
            PUSH_TASK,
            args=(tenant, merge_id),
            job_id=_job_id(merge_id, push),
            description=f"push the result of {merge_id}",
            timeout=_TIMEOUT_SECONDS,
            result_ttl=_KEPT_SECONDS,
            failure_ttl=_KEPT_SECONDS,
            retry=Retry(max=MAX_RETRIES),
        )

    def _under_way(self, merge_id: str, push: Push) -> bool:
        """Whether a push has not ended and will end; one whose job was given up is not under way."""
        if push.state in ("succeeded", "failed"):
            return False
        status = self._redis.hget(f"rq:job:{_job_id(merge_id, push)}", "status")
        return status is not None and text(status) in _ALIVE


def _job_id(merge_id: str, push: Push) -> str:
    return f"push_{merge_id.removeprefix('mrg_')}_{push.asked}"
