"""Redis rebuilt from the storage: the same models, merges, results and numbers as before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service import results
from service.broker import NORMAL_QUEUE, merges_key
from service.bulk import documents
from service.documents import FileEntry, MergeRecord, MergeResult, result_key
from service.jobs import Jobs
from service.names import Reference
from service.quota import Reservations
from service.records import new_record
from service.registry import Registry
from service.reindex import INDEXED, Reindexed, Reindexer
from service.storage import Blob, Storage
from tests.redis_server import RECIPE
from tests.seaweed import Seaweed


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open((tmp_path / "storage").as_uri())
    server: Seaweed = request.getfixturevalue("seaweed")
    return server.storage()


@pytest.fixture
def registry(storage: Storage, connection: redis.Redis, tmp_path: Path) -> Registry:
    return Registry(storage, connection, tmp_path / "scratch")


def put(storage: Storage, content: bytes) -> Blob:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    return asyncio.run(storage.put_stream("t", chunks(), limit=1 << 20))


def revise(registry: Registry, model: str, parent: str | None, blob: Blob) -> str:
    made = registry.revise("t", model, parent, (FileEntry(path="a.md", sha256=blob.sha256, size=blob.size),))
    assert made is not None
    return made.revision


def succeed(jobs: Jobs, storage: Storage, record: MergeRecord) -> None:
    jobs.submit(record)
    jobs.claim("t", record.id, "one")
    storage.put_json(result_key("t", record.id, "one", "f"), "result")
    result = MergeResult(
        attempt="one", recipe_digest="0", seconds=1.0, files=(FileEntry(path="f", sha256="0" * 64, size=8),)
    )
    assert jobs.publish("t", record.id, result) == "finished"


def everything(registry: Registry, jobs: Jobs, connection: redis.Redis) -> dict[str, Any]:
    """What clients see."""
    names = [item.model for item in registry.models("t", limit=99, cursor=None)[0]]
    return {
        "models": registry.models("t", limit=99, cursor=None),
        "revisions": {name: registry.revisions("t", name, limit=99, cursor=None) for name in names},
        "merges": jobs.recent("t", limit=99, cursor=None, state=None),
        "by state": {
            state: jobs.recent("t", limit=99, cursor=None, state=state)
            for state in ("queued", "succeeded", "failed", "cancelled")
        },
        "known": jobs.known_result("t", "digest"),
        "stored": Reservations(connection, 0).used("t"),
        "queue": connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1),
    }


@pytest.fixture
def before(registry: Registry, jobs: Jobs, storage: Storage, connection: redis.Redis) -> dict[str, Any]:
    """Two models, one with three revisions of which the first is the newest again; merges in every state."""
    first, second = put(storage, b"first"), put(storage, b"second")
    start = revise(registry, "a/b", None, first)
    middle = revise(registry, "a/b", start, second)
    assert revise(registry, "a/b", middle, first) == start
    revise(registry, "a/c", None, second)
    succeed(jobs, storage, new_record("t", RECIPE, digest="digest"))
    reused = new_record("t", RECIPE, digest="digest")
    assert results.reuse(jobs, storage, reused) is not None
    failed = jobs.create("t", RECIPE)
    jobs.claim("t", failed.id, "one")
    jobs.fail("t", failed.id, "one", {"code": "x"})
    jobs.cancel("t", jobs.create("t", RECIPE).id)
    jobs.create("t", RECIPE, name="waiting")
    Reservations(connection, 0).correct("t", first.size + second.size + 2 * 8)
    return everything(registry, jobs, connection)


def reindex(storage: Storage, connection: redis.Redis) -> Reindexed:
    done = Reindexer(storage, connection).run()
    assert done is not None
    return done


def test_everything_is_as_it_was(
    before: dict[str, Any], registry: Registry, jobs: Jobs, storage: Storage, connection: redis.Redis
) -> None:
    assert {len(before["by state"][state][0]) for state in ("queued", "failed", "cancelled")} == {1}
    connection.flushall()
    assert registry.models("t", limit=9, cursor=None) == ([], None)
    done = reindex(storage, connection)
    assert done.found == {
        **{"models": 2, "revisions": 3, "succeeded": 2, "failed": 1, "cancelled": 1, "unfinished": 1},
    }
    assert len(done.queued) == 1
    after = everything(registry, jobs, connection)
    for key, value in before.items():
        if key not in ("known", "queue"):
            assert after[key] == value, key
    assert after["known"] in [record.id for record in before["by state"]["succeeded"][0]]
    assert after["queue"] == [done.queued[0].encode()]


def test_again_changes_nothing(
    before: dict[str, Any], registry: Registry, jobs: Jobs, storage: Storage, connection: redis.Redis
) -> None:
    assert reindex(storage, connection).queued == []
    assert everything(registry, jobs, connection) == before
    connection.flushall()
    reindex(storage, connection)
    once = everything(registry, jobs, connection)
    assert reindex(storage, connection).queued == []
    assert everything(registry, jobs, connection) == once


def test_what_redis_knows_is_newer(jobs: Jobs, storage: Storage, connection: redis.Redis) -> None:
    merge = jobs.create("t", RECIPE)
    jobs.claim("t", merge.id, "one")
    reindex(storage, connection)
    running = jobs.get("t", merge.id)
    assert (running.state, running.attempt, running.attempts) == ("running", "one", 1)
    assert connection.zcard(merges_key("t", "queued")) == 0


def test_what_is_deleted_meanwhile_stays_deleted(
    registry: Registry,
    jobs: Jobs,
    storage: Storage,
    connection: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    revise(registry, "a/b", None, put(storage, b"content"))
    merge = new_record("t", RECIPE)
    succeed(jobs, storage, merge)

    def deleted_after(storage: Storage, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
        found = list(documents(storage, keys))
        if any(key.startswith("models/") for key, _ in found):
            registry.delete("t", Reference("a", "b"))
        else:
            jobs.delete("t", merge.id)
        yield from found

    monkeypatch.setattr("service.reindex.documents", deleted_after)
    reindex(storage, connection)
    assert connection.keys("mg:t:models") == connection.keys("mg:t:revisions:*") == []
    assert connection.zcard(merges_key("t")) == connection.zcard(merges_key("t", "succeeded")) == 0


def test_one_at_a_time(storage: Storage, connection: redis.Redis) -> None:
    reindexer = Reindexer(storage, connection)
    assert reindexer.needed()
    connection.set("mg:reindexing", "someone")
    assert reindexer.run() is None
    connection.delete("mg:reindexing")
    assert reindexer.run() is not None
    assert not reindexer.needed()
    assert connection.exists(INDEXED)
