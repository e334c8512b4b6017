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

_POLL_SECONDS = 0.1
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
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for key in keys:
                moved = connection.lmove(key, f"{key}:intermediate", "LEFT", "RIGHT")
                if moved is None:
                    continue
                job_id = text(moved)
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
                break  # the queues of higher priority come first again
            else:
                if deadline is None:
                    return None
                if time.monotonic() >= deadline:
                    raise DequeueTimeout(timeout, keys)
                time.sleep(_POLL_SECONDS)
