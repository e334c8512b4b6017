"""Free what dead processes held: jobs that nobody runs, records that nobody will end.

``sweep`` is idempotent and may run in any number of processes at once.
"""

from __future__ import annotations

import contextlib
import logging
import time

import redis
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE
from rq.job import JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from merging.errors import Cancelled, MergeFailure
from service.broker import ACTIVE, QUEUES, UNSAVED, merge_key, merge_of_job, text
from service.clock import millis
from service.jobs import MAX_RETRIES, Jobs
from service.problems import describe
from service.pushes import Pushes
from workers.job import MergeJob
from workers.queue import ReliableQueue

GRACE_SECONDS = 10.0
"""So long a cancelled attempt may take to stop by itself."""
GIVE_UP_SECONDS = 15.0
"""After so long a cancelled merge has ended, whatever its attempt does."""
PATIENCE_SECONDS = 3.0
"""How long a job may belong to nobody before it is taken for lost."""

# RQ notes when it first saw a job on its way, and fails it where it sees it there again a minute later.
_PUT_BACK = """
redis.call('DEL', KEYS[1] .. ':first_seen:' .. ARGV[1])
if redis.call('LREM', KEYS[1], 1, ARGV[1]) > 0 then redis.call('LPUSH', KEYS[2], ARGV[1]) return 1 end
return 0
"""
_log = logging.getLogger("merganser.reaper")


class Reaper:
    """Looks after the queues of one Redis server."""

    def __init__(self, connection: redis.Redis, jobs: Jobs) -> None:
        self._redis = connection
        self._jobs = jobs
        self._pushes = Pushes(connection, jobs)
        self._queues = [
            ReliableQueue(name, connection=connection, job_class=MergeJob, serializer=JSONSerializer)
            for name in QUEUES
        ]
        self._put_back = connection.register_script(_PUT_BACK)
        self._seen: dict[tuple[str, str], float] = {}

    def sweep(self) -> None:
        """One round: expired executions, jobs stuck on the way, records without a job, what was half done."""
        overdue = self._overdue()
        for queue in self._queues:
            self._registry(queue).cleanup()  # a job whose worker fell silent is queued again
            live = self._live(queue)
            for job_id in self._intermediate(queue):
                if job_id not in live and overdue(queue.name, job_id):
                    _log.warning("put %s back into %s", job_id, queue.name)
                    self._put_back(keys=[queue.intermediate_queue_key, queue.key], args=[job_id])
        self._enforce_cancellations()
        self._settle_orphans(overdue)
        self._rescue_pushes(overdue)
        for tenant, merge_id in self._jobs.members(UNSAVED):
            self._jobs.settle(tenant, merge_id)
        for merge_id in self._jobs.complete_entries():
            _log.warning("queued %s, which was requested from a process that died", merge_id)
        overdue.forget_others()

    def free(self, worker_name: str, *, blameless: bool = False) -> None:
        """Queue again at once what a worker held that is known to be dead.

        ``blameless``: it was stopped in order, which does not count against the merge.
        """
        key = WORKER_EXECUTIONS_KEY_TEMPLATE.format(worker_name)
        held = [text(member) for member in self._redis.smembers(key)]
        for queue in self._queues:
            registry = self._registry(queue)
            if held:
                self._redis.zadd(registry.key, dict.fromkeys(held, 1), xx=True)
            registry.cleanup()
        for member in held if blameless else ():
            job_key = MergeJob.key_for(member.partition(":")[0])
            if self._redis.hexists(job_key, "retries_left"):
                self._redis.hincrby(job_key, "retries_left", 1)
        worker_key = f"{BaseWorker.redis_worker_namespace_prefix}{worker_name}"
        with self._redis.pipeline() as pipe:
            pipe.delete(key, worker_key)
            pipe.srem(BaseWorker.redis_workers_keys, worker_key)
            for queue in self._queues:
                pipe.srem(f"{BaseWorker.redis_workers_keys}:{queue.name}", worker_key)
            pipe.execute()

    def free_all(self) -> None:
        """Free what all registered workers held; for whoever knows that none of them can be alive."""
        for key in sorted(text(member) for member in self._redis.smembers(BaseWorker.redis_workers_keys)):
            self.free(key.removeprefix(BaseWorker.redis_worker_namespace_prefix))

    def _enforce_cancellations(self) -> None:
        """Kill what does not stop by itself; end what cannot be killed. Its attempt can publish nothing."""
        for tenant, merge_id in self._jobs.members(ACTIVE):
            state, since = self._redis.hmget(merge_key(tenant, merge_id), "state", "cancelling_at")
            if state is None or text(state) != "cancelling" or since is None:
                continue
            waited = time.time() - millis(text(since)) / 1000
            if waited >= GIVE_UP_SECONDS:
                self._jobs.cancelled(tenant, merge_id, "", describe(Cancelled()))
            elif waited >= GRACE_SECONDS:
                for job_id in self._running(merge_id):
                    with contextlib.suppress(InvalidJobOperation, NoSuchJobError):
                        send_stop_job_command(self._redis, job_id, serializer=JSONSerializer)
                        _log.warning("killed the attempt of %s, which did not stop", merge_id)

    def _running(self, merge_id: str) -> list[str]:
        """The jobs of a merge that workers are at."""
        jobs = [job_id for queue in self._queues for job_id in self._live(queue)]
        return [job_id for job_id in jobs if merge_of_job(job_id) == merge_id]

    def _settle_orphans(self, overdue: _Overdue) -> None:
        """Unfinished merges whose job is nowhere: start them again, or give them up."""
        active = self._jobs.members(ACTIVE)
        if not active:
            return
        known = {merge_of_job(job_id) for job_id in self._everywhere()}
        for tenant, merge_id in active:
            if merge_id in known or not overdue("", merge_id):
                continue
            record = self._jobs.find(tenant, merge_id)
            if record is None or record.ended:
                self._redis.srem(ACTIVE, f"{tenant}/{merge_id}")
            elif record.state == "cancelling":
                self._jobs.cancelled(tenant, merge_id, "", describe(Cancelled()))
            elif self._gave_up(merge_id) or record.attempts > MAX_RETRIES:
                self._jobs.fail(tenant, merge_id, "", describe(_lost(record.attempts)))
            else:
                _log.warning("queued %s again: nobody had its job", merge_id)
                self._jobs.push(record)

    def _rescue_pushes(self, overdue: _Overdue) -> None:
        """Pushes whose job is nowhere: start them again, or let them fail."""
        pushes = self._pushes.listed()
        known = self._everywhere() if pushes else set()
        for record, job_id in pushes:
            if job_id not in known and overdue("push", job_id):
                _log.warning("nobody had the job of the push of %s", record.id)
                self._pushes.rescue(record)

    def _everywhere(self) -> set[str]:
        """All jobs that wait, are on their way or in the hands of a worker."""
        return {
            job_id
            for queue in self._queues
            for found in (queue.get_job_ids(), self._intermediate(queue), self._live(queue))
            for job_id in found
        }

    def _gave_up(self, merge_id: str) -> bool:
        status = self._redis.hget(MergeJob.key_for(merge_id), "status")
        return status is not None and text(status) in (JobStatus.FAILED, JobStatus.STOPPED)

    def _overdue(self) -> _Overdue:
        return _Overdue(self._seen, time.monotonic())

    def _registry(self, queue: ReliableQueue) -> StartedJobRegistry:
        return StartedJobRegistry(
            queue.name, connection=self._redis, job_class=MergeJob, serializer=JSONSerializer
        )

    def _live(self, queue: ReliableQueue) -> list[str]:
        return [job_id for job_id, _ in self._registry(queue).get_job_and_execution_ids(cleanup=False)]

    def _intermediate(self, queue: ReliableQueue) -> list[str]:
        return [text(item) for item in self._redis.lrange(queue.intermediate_queue_key, 0, -1)]


class _Overdue:
    """Whether something has looked lost for long enough. Remembered for each place and job."""

    def __init__(self, seen: dict[tuple[str, str], float], now: float) -> None:
        self._seen = seen
        self._now = now
        self._asked: dict[tuple[str, str], bool] = {}

    def __call__(self, place: str, job_id: str) -> bool:
        key = (place, job_id)
        self._asked[key] = True
        return self._now - self._seen.setdefault(key, self._now) >= PATIENCE_SECONDS

    def forget_others(self) -> None:
        """Drop what did not look lost this time."""
        for key in [key for key in self._seen if key not in self._asked]:
            del self._seen[key]


def _lost(attempts: int) -> MergeFailure:
    return MergeFailure(
        "worker_lost",
        f"none of the {attempts} attempts to run this merge came to an end",
        remedy="The merge may need more memory or disk than the workers have; see their log",
    )
