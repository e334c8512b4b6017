"""Pushes of results to other hubs: a job of its own after the merge, which cannot harm the result.

How far a push is stands in the record of its merge. Pushing the same result twice is harmless, so a job that
was interrupted is simply run again. Those that have not ended are listed; one whose job is nowhere is started
again, and one whose job was given up has failed.
"""

from __future__ import annotations

import redis
from rq import Queue, Retry
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from merging.errors import MergeFailure
from service.broker import NORMAL_QUEUE, PUSH_TASK, PUSHES, UNSAVED, merge_key, text
from service.clock import now
from service.documents import MergeRecord, Push
from service.errors import Conflict
from service.jobs import MAX_RETRIES, Jobs
from service.problems import describe

_TIMEOUT_SECONDS = 6 * 3600
_KEPT_SECONDS = 3600
_ALIVE = (JobStatus.QUEUED, JobStatus.STARTED, JobStatus.DEFERRED, JobStatus.SCHEDULED)
_GIVEN_UP = (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)

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
        if push is None or not record.push_owed:
            return False
        self._redis.sadd(PUSHES, f"{record.tenant}/{record.id}")
        if self._under_way(record.id, push):
            return False
        self._enqueue(record.tenant, record.id, push)
        return True

    def note(self, record: MergeRecord, push: Push) -> None:
        """Write down how far a push is, in Redis while the record is there, and in storage."""
        tenant, merge_id = record.tenant, record.id
        keys, member = [merge_key(tenant, merge_id), UNSAVED], f"{tenant}/{merge_id}"
        if not push.ended:
            self._redis.sadd(PUSHES, member)
        if self._write(keys=keys, args=[push.model_dump_json(), member]):
            self._jobs.settle(tenant, merge_id)
        elif self._jobs.find(tenant, merge_id) is not None:  # not deleted meanwhile
            self._jobs.save_end(record.model_copy(update={"push": push}))
        if push.ended:
            self._redis.srem(PUSHES, member)

    def listed(self) -> list[tuple[MergeRecord, str]]:
        """The records of all pushes that have not ended, and the id of the job that each should have."""
        found = []
        for tenant, merge_id in self._jobs.members(PUSHES):
            record = self._jobs.find(tenant, merge_id)
            if record is None or record.push is None or not record.push_owed:
                self._redis.srem(PUSHES, f"{tenant}/{merge_id}")
            else:
                found.append((record, _job_id(merge_id, record.push)))
        return found

    def rescue(self, record: MergeRecord) -> None:
        """Start a push again whose job is nowhere, or let it fail when its job was given up."""
        push = record.push
        assert push is not None
        if self._status(record.id, push) not in _GIVEN_UP:
            self._enqueue(record.tenant, record.id, push)
            return
        error = MergeFailure(
            "worker_lost",
            f"none of the attempts to push the result to {push.repo} came to an end",
            remedy="Push it again; the result is as it was",
        )
        failed = {"state": "failed", "error": describe(error), "finished_at": now()}
        self.note(record, push.model_copy(update=failed))

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
        return not push.ended and self._status(merge_id, push) in _ALIVE

    def _status(self, merge_id: str, push: Push) -> str | None:
        status = self._redis.hget(f"rq:job:{_job_id(merge_id, push)}", "status")
        return None if status is None else text(status)


def _job_id(merge_id: str, push: Push) -> str:
    return f"push_{merge_id.removeprefix('mrg_')}_{push.asked}"
