"""Split a big merge of whole models into jobs: one for each file of its output, and one that completes it.

The job of the merge makes the passes over the whole model that the recipe asks for, leaves what they found in
the storage and queues the others. A finished file is kept below the merge, under a name that says everything
that decides its bytes; so whoever makes the same file again, after a lost worker, finds it there.
"""

from __future__ import annotations

import logging
from typing import Any

import redis
from rq import Queue, Retry
from rq.job import Dependency
from rq.serializers import JSONSerializer

from service.broker import FINISH_TASK, SHARD_TASK, queue_name, shards_key
from service.documents import MergeRecord, result_key
from service.jobs import MAX_RETRIES, TIMEOUT_SECONDS
from service.sizes import size_for
from service.sources import Sources
from service.storage import Storage
from service.work import Work
from workers.attempt import Attempt
from workers.plans import Files, Resolve, can_be_split, planned
from workers.rungs import rungs

SETTLED = "settled.json"
_SETTLE_SHARE = 0.1
_log = logging.getLogger("merganser.shards")


class Splitter:
    """Decides which merges are split, and queues their jobs. ``shard_bytes``: the size of a file."""

    def __init__(self, connection: redis.Redis, storage: Storage, shard_bytes: int) -> None:
        self._redis = connection
        self._storage = storage
        self._shard_bytes = shard_bytes

    def split(
        self, attempt: Attempt, record: MergeRecord, work: Work, sources: Sources, find: Resolve
    ) -> bool:
        """Queue the jobs of the merge, unless it is not of whole models or writes one file."""
        if not can_be_split(work, find):
            return False
        attempt.advance("plan", 0.0, "planning the files")
        with planned(record.tenant, work, sources, find, self._shard_bytes) as plan:
            count, steps, name = len(plan.sizes), plan.steps, parts_name(plan)
            if count < 2:
                return False
            if plan.final:  # files that are put together first say how large they are when they are there
                attempt.reserve(plan.nbytes)
        key = part_key(record, name, SETTLED)
        if self._storage.size(key) is None:  # an attempt before this one may have come so far
            if steps:
                sources.complete(record.tenant, work, find)
            with planned(record.tenant, work, sources, find, self._shard_bytes) as plan:
                settled = _settled(plan, attempt, threads_for(record))
            self._storage.put_json(key, settled)
        missing = [
            index for index in range(count) if self._storage.size(part_key(record, name, note(index))) is None
        ]
        self._queue(record, attempt.name, name, count, missing)
        _log.info("%s is split into %d files, %d to be made", record.id, count, len(missing))
        return True

    def _queue(self, record: MergeRecord, attempt: str, name: str, count: int, missing: list[int]) -> None:
        queue = Queue(
            queue_name(record.priority, size_for(record.memory_bytes)),
            connection=self._redis,
            serializer=JSONSerializer,
        )
        prefix = f"{record.id}--{attempt[:8]}"
        common: dict[str, Any] = {
            "timeout": TIMEOUT_SECONDS,
            "result_ttl": TIMEOUT_SECONDS,  # the last job asks after the others
            "failure_ttl": TIMEOUT_SECONDS,
            "retry": Retry(max=MAX_RETRIES),
        }
        names = {index: f"{prefix}-{index}" for index in missing}
        progress = shards_key(record.tenant, record.id)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.multi()  # said first, or RQ would say it in the middle
            pipe.delete(progress)
            pipe.hset(progress, mapping={str(i): "0" if i in names else "1" for i in range(count)})
            pipe.expire(progress, TIMEOUT_SECONDS)
            for index, job_id in names.items():
                queue.enqueue_call(
                    SHARD_TASK,
                    args=(record.tenant, record.id, attempt, name, index),
                    job_id=job_id,
                    description=f"file {index} of merge {record.id}",
                    pipeline=pipe,
                    **common,
                )
            pipe.execute()
        queue.enqueue_call(
            FINISH_TASK,
            args=(record.tenant, record.id, attempt, name, count),
            job_id=f"{prefix}-finish",
            description=f"end of merge {record.id}",
            # also after a failure, which it then tells
            depends_on=Dependency(list(names.values()), allow_failure=True) if names else None,
            **common,
        )


def parts_name(plan: Files) -> str:
    """Under which the finished files of a plan lie, beside the attempts of the merge."""
    return f"parts-{plan.key[:24]}"


def part_key(record: MergeRecord, name: str, path: str) -> str:
    """Where a finished file, or what is known of it, lies."""
    return result_key(record.tenant, record.id, name, path)


def note(index: int) -> str:
    """The document that says that a shard is done, and what was measured. It is written last."""
    return f"{index}.json"


def threads_for(record: MergeRecord) -> int:
    """How many threads the merge may use on this worker."""
    from merging.engine import default_threads

    return rungs(record.memory_bytes)[0].threads or default_threads()


def _settled(plan: Files, attempt: Attempt, threads: int) -> dict[str, Any]:
    done = 0

    def tick(phase: str) -> None:
        nonlocal done
        done += 1
        attempt.tick(phase, _SETTLE_SHARE * done / max(1, plan.steps), phase)

    return plan.settle(threads, tick)
