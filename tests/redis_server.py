"""Fixtures: a real Redis for tests of parts. Import them into a conftest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from merging.recipe import Recipe
from service.broker import NORMAL_QUEUE
from service.embedded_redis import DataLock, EmbeddedRedis
from service.jobs import Jobs
from service.storage import Storage
from workers.job import MergeJob
from workers.queue import ReliableQueue

RECIPE = Recipe.load({"merge_method": "linear", "models": [{"model": "a/b"}]})


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    data = tmp_path_factory.mktemp("redis")
    lock = DataLock(data)
    embedded = EmbeddedRedis(data, lock)
    embedded.start()
    yield embedded
    embedded.stop()
    lock.release()


@pytest.fixture
def connection(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A client of an empty server."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open((tmp_path / "storage").as_uri())


@pytest.fixture
def jobs(connection: redis.Redis, storage: Storage) -> Jobs:
    return Jobs(connection, storage)


def queue(connection: redis.Redis, name: str = NORMAL_QUEUE) -> ReliableQueue:
    """A queue as workers see it."""
    return ReliableQueue(name, connection=connection, job_class=MergeJob, serializer=JSONSerializer)


def dequeue(
    connection: redis.Redis, *names: str, timeout: int | None = None
) -> tuple[MergeJob, Queue] | None:
    """Take a job as a worker of these queues does."""
    queues = [queue(connection, name) for name in names]
    return ReliableQueue.dequeue_any(
        queues, timeout, connection, job_class=MergeJob, serializer=JSONSerializer
    )
