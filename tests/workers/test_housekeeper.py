"""What supervisors do now and then: once for all of them, and in the right order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from service.broker import DELETED
from service.collect import Collected
from service.jobs import Jobs
from service.reindex import INDEXED, Reindexer
from service.settings import Settings
from service.storage import Storage
from tests.redis_server import RECIPE
from workers import housekeeper
from workers.housekeeper import Housekeeper


@pytest.fixture
def make(connection: redis.Redis, storage: Storage) -> Callable[..., Housekeeper]:
    def make(**settings: float) -> Housekeeper:
        return Housekeeper(Settings(**settings), connection, storage)

    return make


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done beside the index."""
    found: list[str] = []

    def note(name: str) -> Callable[..., list[str]]:
        def act(*_: object) -> list[str]:
            found.append(name)
            return []

        return act

    monkeypatch.setattr(housekeeper, "expired", note("uploads"))
    monkeypatch.setattr(housekeeper.Retention, "sweep", note("retention"))
    monkeypatch.setattr(housekeeper.Collector, "run", lambda self: (found.append("collect"), Collected())[1])
    return found


def test_a_lost_index_is_rebuilt(
    make: Callable[..., Housekeeper], jobs: Jobs, connection: redis.Redis
) -> None:
    merge = jobs.create("t", RECIPE)
    keeper = make()
    keeper.sweep()
    connection.flushall()
    keeper.sweep()
    assert connection.exists(INDEXED)
    assert [found.id for found in jobs.recent("t", limit=9, cursor=None, state="queued")[0]] == [merge.id]


def test_each_thing_is_done_once_in_its_time_by_whoever_comes_first(
    make: Callable[..., Housekeeper], done: list[str]
) -> None:
    for keeper in (make(), make()):
        keeper.sweep()
        keeper.sweep()
    assert done == ["uploads", "retention", "collect"]


def test_collection_can_be_turned_off(make: Callable[..., Housekeeper], done: list[str]) -> None:
    make(collect_hours=0).sweep()
    assert done == ["uploads", "retention"]


def test_nothing_is_removed_while_another_process_rebuilds_the_index(
    make: Callable[..., Housekeeper],
    done: list[str],
    connection: redis.Redis,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Reindexer, "run", lambda self: None)
    make().sweep()
    assert done == []


def test_a_deletion_is_completed(
    make: Callable[..., Housekeeper],
    jobs: Jobs,
    storage: Storage,
    connection: redis.Redis,
    done: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge = jobs.create("t", RECIPE)
    jobs.cancel("t", merge.id)
    record = jobs.get("t", merge.id)
    jobs.delete("t", merge.id)
    jobs.save(record)  # by a process that was writing it meanwhile, and died
    keeper = make()
    keeper.sweep()
    assert connection.zcard(DELETED) == 1
    monkeypatch.setattr("service.ledger.REMEMBERED_SECONDS", 0.0)
    keeper.sweep()
    assert connection.zcard(DELETED) == 0
    assert jobs.find("t", merge.id) is None
