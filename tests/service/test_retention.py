"""Merges are deleted when they are old enough, with their results."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from merging.recipe import Recipe
from service.documents import FileEntry, MergeRecord, MergeResult, MergeState, result_key
from service.jobs import Jobs
from service.quota import Reservations
from service.records import new_record
from service.retention import Retention
from service.storage import Storage
from tests.redis_server import RECIPE


def ago(days: float) -> str:
    moment = datetime.now(UTC) - timedelta(days=days)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def ended(
    jobs: Jobs, storage: Storage, *, requested: float, finished: float, state: MergeState = "succeeded"
) -> MergeRecord:
    """A merge that was requested and ended so many days ago."""
    record = new_record("t", RECIPE, created_at=ago(requested))
    more: dict[str, Any] = {"state": state, "finished_at": ago(finished)}
    if state == "succeeded":
        storage.put_json(result_key("t", record.id, "one", "f"), "result")
        file = FileEntry(path="f", sha256="0" * 64, size=8)
        more["result"] = MergeResult(attempt="one", recipe_digest="0", seconds=1.0, files=(file,))
    record = record.model_copy(update=more)
    jobs.enter_ended(record)
    return record


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_old_merges_go(jobs: Jobs, storage: Storage, connection: redis.Redis, state: MergeState) -> None:
    old = ended(jobs, storage, requested=9, finished=8, state=state)
    late = ended(jobs, storage, requested=9, finished=1)
    young = ended(jobs, storage, requested=2, finished=1)
    assert Retention(storage, connection, 7).sweep() == [old.id]
    assert {record.id for record in jobs.recent("t", limit=9, cursor=None, state=None)[0]} == {
        late.id,
        young.id,
    }
    assert not any(old.id in key for key, _ in storage.keys("merges"))
    assert Reservations(connection, 0).used("t") == str(2 * 8)


def test_without_days_all_stay(jobs: Jobs, storage: Storage, connection: redis.Redis) -> None:
    ended(jobs, storage, requested=9999, finished=9998)
    assert Retention(storage, connection, 0).sweep() == []


def test_unfinished_merges_stay(jobs: Jobs, storage: Storage, connection: redis.Redis) -> None:
    jobs.submit(new_record("t", RECIPE, created_at=ago(9)))
    assert Retention(storage, connection, 7).sweep() == []


def test_a_result_stays_while_a_merge_reads_it(jobs: Jobs, storage: Storage, connection: redis.Redis) -> None:
    old = ended(jobs, storage, requested=9, finished=8)
    reading = {"merge_method": "linear", "models": [{"model": f"merges/{old.id}"}]}
    reader = jobs.create("t", Recipe.load(reading))
    retention = Retention(storage, connection, 7)
    assert retention.sweep() == []
    jobs.cancel("t", reader.id)
    assert retention.sweep() == [old.id]


@pytest.mark.parametrize("place", ["base_model", "calibration"])
def test_a_result_stays_wherever_a_recipe_names_it(
    jobs: Jobs, storage: Storage, connection: redis.Redis, place: str
) -> None:
    old = ended(jobs, storage, requested=9, finished=8)
    model = f"merges/{old.id}"
    more = {"base_model": model} if place == "base_model" else {"calibration": {"data": model}}
    jobs.create("t", Recipe.load({"merge_method": "linear", "models": [{"model": "a/b"}], **more}))
    assert Retention(storage, connection, 7).sweep() == []
