"""What the worker class changes in RQ: each of these fails without it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import redis
from rq.job import Callback

from service.broker import TASK
from tests.redis_server import dequeue, queue
from workers import environment as env
from workers.worker import HEARTBEAT_SECONDS, MergeWorker


@pytest.fixture
def worker(connection: redis.Redis) -> MergeWorker:
    return MergeWorker(["high", "low"], connection=connection, name="w")


def test_a_job_is_given_up_after_seconds(worker: MergeWorker, connection: redis.Redis) -> None:
    job = queue(connection, "high").enqueue_call(TASK, job_id="j", timeout=3600)
    execution = worker.prepare_execution(job)
    score = connection.zscore("rq:wip:high", execution.composite_key)
    assert score is not None
    assert score - time.time() <= HEARTBEAT_SECONDS


def test_a_job_is_taken_over_without_a_gap_and_without_what_it_calls_back(
    worker: MergeWorker, connection: redis.Redis
) -> None:
    """The worker's own classes of queue, job and serializer are those that its tests are about."""
    queue(connection, "low").enqueue_call(TASK, job_id="j", on_stopped=Callback("os.getpid"))
    found = worker.dequeue_job_and_maintain_ttl(1)
    assert found is not None
    assert (found[0].func_name, found[0].stopped_callback) == (TASK, None)
    assert connection.lrange("rq:queue:low:intermediate", 0, -1) == [b"j"]


def test_a_worker_is_heard_of_often_enough(worker: MergeWorker, connection: redis.Redis) -> None:
    assert 3 * worker.job_monitoring_interval < HEARTBEAT_SECONDS
    worker.register_birth()
    worker.heartbeat()
    ttl = connection.ttl(worker.key)
    assert isinstance(ttl, int)
    assert 30 <= ttl <= 90


def test_a_started_job_leaves_the_intermediate_list_of_any_queue(
    worker: MergeWorker, connection: redis.Redis
) -> None:
    queue(connection, "low").enqueue_call(TASK, job_id="j")
    found = dequeue(connection, "high", "low")
    assert found is not None
    worker.prepare_job_execution(found[0])
    assert not connection.exists("rq:queue:low:intermediate")


def test_an_outage_of_redis_does_not_end_the_worker(
    worker: MergeWorker, connection: redis.Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = queue(connection, "high").enqueue_call(TASK, job_id="j")
    execution = worker.prepare_execution(job)
    worker.connection = redis.Redis(unix_socket_path=str(tmp_path / "none.sock"), retry=None)
    worker.maintain_heartbeats(job, execution)
    assert "heartbeat of j not delivered" in caplog.text


def test_no_secret_is_on_the_command_line_of_the_work_horse(
    worker: MergeWorker, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue(connection, "high").enqueue_call(TASK, job_id="j")
    worker.prepare_execution(job)
    monkeypatch.setenv("MERGANSER_REDIS_URL", "redis://:geheim@127.0.0.1:1/0")
    seen: list[tuple[list[str], dict[str, str]]] = []

    def spawn(path: str, command: list[str], environment: dict[str, str], **options: object) -> int:
        seen.append((command, environment))
        assert options == {"setpgroup": 0}
        return 4711

    monkeypatch.setattr(os, "posix_spawn", spawn)
    worker.fork_work_horse(job, queue(connection, "high"))
    command, environment = seen[0]
    assert command == [sys.executable, "-m", "workers.horse"]
    assert environment["RQ_JOB_ID"] == "j"
    assert environment[env.WORKER_PID] == str(os.getpid())


def test_a_worker_stays_in_the_lists_though_redis_lost_them(
    worker: MergeWorker, connection: redis.Redis
) -> None:
    worker.register_birth()
    connection.flushall()
    worker.heartbeat()
    assert connection.smembers("rq:workers") == connection.smembers("rq:workers:low") == {b"rq:worker:w"}
