"""The worker: RQ's SpawnWorker, so that every job runs in a fresh process, with what RQ lacks for us.

Each override is here because a test fails without it. This module and what it imports never import torch;
only the work-horse does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import redis
from redis.client import Pipeline
from rq import SpawnWorker
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker_registration import register

from service.broker import TRANSIENT, merge_key, queue_name
from service.records import decode
from service.sizes import move_up, size_for
from workers import environment as env
from workers.job import MergeJob
from workers.queue import ReliableQueue
from workers.warm import COMMAND, WarmHorse

HEARTBEAT_SECONDS = 10
"""A job whose worker was not heard of for so long is given to another."""
_MONITOR_SECONDS = 2
_WORKER_SECONDS = 30

_log = logging.getLogger("merganser.worker")


class MergeWorker(SpawnWorker):
    """Runs merges, one at a time."""

    job_class = MergeJob
    queue_class = ReliableQueue

    def __init__(self, queues: Any, *, connection: redis.Redis, warm: bool = False, **options: Any) -> None:
        self._wants_warm = warm
        self._warm: WarmHorse | None = None
        options.setdefault("serializer", JSONSerializer)
        options.setdefault("job_monitoring_interval", _MONITOR_SECONDS)
        options.setdefault("worker_ttl", _WORKER_SECONDS)
        options.setdefault("work_horse_killed_handler", self._killed)
        super().__init__(queues, connection=connection, **options)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Ten seconds; RQ adds a minute, and a dead worker's job would wait that long."""
        return HEARTBEAT_SECONDS

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Stay in the list of workers, should Redis have lost it."""
        super().heartbeat(timeout, pipeline)
        if pipeline is None:
            with self.connection.pipeline() as own:
                register(self, own)
                own.execute()

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """Outlive an outage of Redis: the merge goes on meanwhile."""
        try:
            super().maintain_heartbeats(job, execution)
        except TRANSIENT as error:
            _log.warning("heartbeat of %s not delivered: %s", job.id, error)

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """Always take the job off the intermediate list; RQ does so for workers of one queue only."""
        super().prepare_job_execution(job, remove_from_intermediate_queue=True)

    def handle_job_failure(self, job: Job, queue: Queue, *arguments: Any, **more: Any) -> None:
        """Queue a job again where its merge now belongs, which may be with larger workers."""
        super().handle_job_failure(job, self._home(job, queue), *arguments, **more)

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        """Start the work-horse by name.

        RQ passes it the connection as source text on the command line, password included, where every
        user of the machine can read it. Ours finds what it needs in its environment.
        """
        execution = self.execution
        assert execution is not None
        names = {
            "RQ_WORKER_ID": self.name,
            "RQ_JOB_ID": job.id,
            "RQ_EXECUTION_ID": execution.id,
            env.QUEUE: queue.name,
            env.WORKER_PID: str(os.getpid()),
        }
        warm, self._warm = self._warm, None
        self._horse_pid = (warm.give(names) if warm else None) or os.posix_spawn(
            sys.executable, COMMAND, {**os.environ, **names}, setpgroup=0
        )

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Make the next work-horse ready once this one is done, not while it needs the cores."""
        super().execute_job(job, queue)
        self.warm_up()

    def warm_up(self) -> None:
        """Have a work-horse ready, if the settings want that."""
        if self._wants_warm and self._warm is None:
            self._warm = WarmHorse()

    def _killed(self, job: Job, _pid: int, status: int | None, _usage: object) -> None:
        """Take a work-horse that was shot from outside for one that ran out of memory: so the kernel ends it.

        Not called for what :meth:`kill_horse` ended. If no worker is larger, the merge starts again here.
        """
        merge = _merge_of(job)
        if merge and status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            memory = int(os.environ.get(env.MEMORY, "0"))
            move_up(self.connection, *merge, "", memory=memory, reason="its process was killed")

    def _home(self, job: Job, queue: Queue) -> Queue:
        """The queue of a merge's priority and size; ``queue`` for a job that is no merge of ours."""
        merge = _merge_of(job)
        fields = self.connection.hgetall(merge_key(*merge)) if merge else {}
        if not fields:
            return queue
        record = decode(fields)
        return ReliableQueue(
            queue_name(record.priority, size_for(record.memory_bytes)),
            connection=self.connection,
            job_class=MergeJob,
            serializer=JSONSerializer,
        )


def _merge_of(job: Job) -> tuple[str, str] | None:
    """Tenant and merge of a job; None for one that somebody else put there."""
    try:
        tenant, merge_id = job.args[:2]
    except Exception:  # unreadable, or of another shape
        return None
    return str(tenant), str(merge_id)
