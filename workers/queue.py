"""The queue class: taking a job from one of several queues never loses it.

RQ takes from several queues with BLPOP; a worker that dies right after it takes the job along. Here a job
moves to the queue's intermediate list in the same step, whatever the number of queues, and the reaper puts
it back if nobody starts it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import redis
from rq.exceptions import DequeueTimeout
from rq.job import Job
from rq.queue import Queue

from service.broker import TRANSIENT, text

_POLL_SECONDS = 0.05
_TAKE = """
for _, key in ipairs(KEYS) do
  local job = redis.call('LMOVE', key, key .. ':intermediate', 'LEFT', 'RIGHT')
  if job then return {key, job} end
end
"""
_log = logging.getLogger("merganser.worker")


class ReliableQueue(Queue):
    """A queue that hands jobs over through its intermediate list."""

    @classmethod
    def dequeue_any(
        cls,
        queues: Iterable[Queue],
        timeout: int | None,
        connection: redis.Redis,
        job_class: type[Job] | None = None,
        serializer: Any = None,
        death_penalty_class: Any = None,
    ) -> tuple[Job, Queue] | None:
        """The first job of the first queue that has one; ``DequeueTimeout`` after ``timeout`` seconds."""
        keys = [queue.key for queue in queues]
        take = connection.register_script(_TAKE)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            moved: Any = take(keys=keys)
            if moved is not None:
                key, job_id = text(moved[0]), text(moved[1])
                found: tuple[Job, Queue] | None = None
                try:
                    found = cls._fetch_dequeued_job(
                        connection,
                        key,
                        job_id,
                        job_class=job_class,
                        serializer=serializer,
                        death_penalty_class=death_penalty_class,
                    )
                except TRANSIENT:
                    raise
                except Exception:  # not one of our jobs: it would stop every worker in turn
                    _log.exception("dropped the unreadable job %s of %s", job_id, key)
                if found is not None:
                    return found
                connection.lrem(f"{key}:intermediate", 1, job_id)  # deleted, or unreadable
                continue
            if deadline is None:
                return None
            if time.monotonic() >= deadline:
                raise DequeueTimeout(timeout, keys)
            time.sleep(_POLL_SECONDS)
