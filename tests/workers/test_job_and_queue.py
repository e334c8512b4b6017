"""What may run, and how a job gets from a queue to a worker."""

from __future__ import annotations

import time

import pytest
import redis
from rq.exceptions import DequeueTimeout
from rq.job import Callback
from rq.serializers import JSONSerializer

from service.broker import TASK
from tests.redis_server import dequeue, queue
from workers.job import ForbiddenFunction, MergeJob


class TestJob:
    """Whoever writes to Redis does not choose what code runs."""

    def test_our_function_is_found(self, connection: redis.Redis) -> None:
        job = MergeJob.create(TASK, args=("t", "m"), connection=connection, serializer=JSONSerializer)
        assert job.func.__name__ == "run_merge"

    @pytest.mark.parametrize("name", ["os.system", "workers.tasks.Task", "builtins.eval", "workers.tasks"])
    def test_others_are_refused(self, connection: redis.Redis, name: str) -> None:
        job = MergeJob.create(name, args=("x",), connection=connection, serializer=JSONSerializer)
        job.save()
        found = MergeJob.fetch(job.id, connection=connection, serializer=JSONSerializer)
        with pytest.raises(ForbiddenFunction, match=name):
            found.perform()

    def test_callbacks_are_never_run(self, connection: redis.Redis) -> None:
        job = MergeJob.create(
            TASK,
            connection=connection,
            serializer=JSONSerializer,
            on_success=Callback("os.getpid"),
            on_failure=Callback("os.getpid"),
            on_stopped=Callback("os.getpid"),
        )
        job.save()
        found = MergeJob.fetch(job.id, connection=connection, serializer=JSONSerializer)
        callbacks = (found.success_callback, found.failure_callback, found.stopped_callback)
        assert callbacks == (None, None, None)


class TestQueue:
    """Jobs are handed over without a moment in which they are nowhere."""

    def test_several_queues_keep_their_order_and_lose_nothing(self, connection: redis.Redis) -> None:
        for name, count in (("low", 2), ("high", 2)):
            for i in range(count):
                queue(connection, name).enqueue_call(TASK, job_id=f"{name}-{i}")
        for expected in ("high-0", "high-1", "low-0", "low-1"):
            found = dequeue(connection, "high", "low")
            assert found is not None
            assert found[0].id == expected
            key = f"rq:queue:{expected.split('-')[0]}:intermediate"
            assert expected.encode() in connection.lrange(key, 0, -1)
        assert dequeue(connection, "high", "low") is None

    def test_nothing_to_do_is_a_timeout(self, connection: redis.Redis) -> None:
        started = time.monotonic()
        with pytest.raises(DequeueTimeout):
            dequeue(connection, "high", "low", timeout=1)
        assert time.monotonic() - started >= 1

    def test_deleted_and_unreadable_jobs_are_passed_over(self, connection: redis.Redis) -> None:
        work = queue(connection, "high")
        for job_id in ("gone", "broken", "good"):
            work.enqueue_call(TASK, job_id=job_id)
        connection.delete("rq:job:gone")
        connection.hset("rq:job:broken", "created_at", "yesterday")
        found = dequeue(connection, "high", "low")
        assert found is not None
        assert found[0].id == "good"
        assert connection.lrange("rq:queue:high:intermediate", 0, -1) == [b"good"]
