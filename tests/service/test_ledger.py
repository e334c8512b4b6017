"""Records: a beginning or an end that a dead process left half done is completed, and counts once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from service import jobs as jobs_module
from service import ledger, tally
from service.broker import DELETED, ENTERING, PUSHES, UNSAVED, merges_key, text
from service.documents import FileEntry, MergeRecord, MergeResult, Push, record_key, result_key
from service.jobs import Jobs
from service.quota import Reservations
from service.records import new_record
from service.storage import Storage, StorageUnavailable
from tests.redis_server import RECIPE

FILE = FileEntry(path="f", sha256="0" * 64, size=8)
RESULT = MergeResult(attempt="one", recipe_digest="0", seconds=1.0, files=(FILE,))


class Died(BaseException):
    """Stands for the end of the process."""


def succeeded(jobs: Jobs, storage: Storage) -> MergeRecord:
    record = jobs.create("t", RECIPE)
    jobs.claim("t", record.id, "one")
    storage.put_json(result_key("t", record.id, "one", "f"), "result")
    jobs.publish("t", record.id, RESULT)
    return jobs.get("t", record.id)


def ids(jobs: Jobs, state: Any = None) -> list[str]:
    return [record.id for record in jobs.recent("t", limit=9, cursor=None, state=state)[0]]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not done the next step at once is dead."""
    monkeypatch.setattr(jobs_module, "_ENTRY_SECONDS", 0.0)
    monkeypatch.setattr(ledger, "REMEMBERED_SECONDS", 0.0)


class TestBeginnings:
    def test_one_that_was_saved_but_not_queued_is_queued(
        self, jobs: Jobs, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch, impatient: None
    ) -> None:
        def die(*_: object) -> bool:
            raise Died

        record = new_record("t", RECIPE)
        with monkeypatch.context() as patched:
            patched.setattr(Jobs, "enqueue", die)
            with pytest.raises(Died):
                jobs.submit(record)
        assert not jobs.entered("t", record.id)
        assert jobs.complete_entries() == [record.id]
        assert jobs.complete_entries() == []
        assert connection.lrange("rq:queue:merges", 0, -1) == [record.id.encode()]
        assert jobs.entered("t", record.id)
        assert connection.zcard(ENTERING) == 0

    def test_one_that_is_being_saved_is_given_time(self, jobs: Jobs, connection: redis.Redis) -> None:
        record = new_record("t", RECIPE)
        jobs.note_entry(record)
        jobs.save(record)
        assert jobs.complete_entries() == []
        assert connection.zcard(ENTERING) == 1

    def test_one_that_was_never_saved_is_forgotten(
        self, jobs: Jobs, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch, impatient: None
    ) -> None:
        jobs.note_entry(new_record("t", RECIPE))
        assert jobs.complete_entries() == []
        assert connection.zcard(ENTERING) == 1, "its record may still come"
        monkeypatch.setattr(jobs_module, "_NO_ENTRY_SECONDS", -1.0)
        assert jobs.complete_entries() == []
        assert connection.zcard(ENTERING) == 0

    def test_one_that_is_queued_is_not_waited_for(self, jobs: Jobs, connection: redis.Redis) -> None:
        jobs.create("t", RECIPE)
        assert connection.zcard(ENTERING) == 0

    def test_a_reused_result_is_listed_though_its_process_died(
        self,
        jobs: Jobs,
        storage: Storage,
        connection: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
        impatient: None,
    ) -> None:
        def die(*_: object) -> None:
            raise Died

        push = Push(repo="org/name", endpoint="https://hub.example")
        more = {"state": "succeeded", "finished_at": "2026-01-01T00:00:00.000Z", "result": RESULT}
        record = new_record("t", RECIPE, push=push).model_copy(update=more)
        with monkeypatch.context() as patched:
            patched.setattr(ledger, "announce", die)
            with pytest.raises(Died):
                jobs.enter_ended(record)
        assert ids(jobs) == []
        for _ in range(3):
            jobs.complete_entries()
        assert ids(jobs) == ids(jobs, "succeeded") == [record.id]
        assert Reservations(connection, 0).used("t") == str(FILE.size)
        assert tally.read(connection)["ended", "linear", "succeeded"] == 1
        assert jobs.members(PUSHES) == [("t", record.id)]

    def test_a_request_that_is_taken_over_late_does_not_undo_the_end(
        self, jobs: Jobs, storage: Storage
    ) -> None:
        done = succeeded(jobs, storage)
        jobs.submit(new_record("t", RECIPE, id=done.id))
        document = storage.get_json(record_key("t", done.id))
        assert (document["state"], jobs.get("t", done.id)) == ("succeeded", done)

    def test_one_that_is_in_storage_only_can_be_cancelled(self, jobs: Jobs, connection: redis.Redis) -> None:
        record = new_record("t", RECIPE)
        jobs.save(record)
        assert jobs.cancel("t", record.id).state == "cancelled"
        assert connection.exists("rq:queue:merges") == 0


class TestEnds:
    def test_an_end_is_counted_once_however_often_it_is_settled(
        self, jobs: Jobs, storage: Storage, connection: redis.Redis
    ) -> None:
        record = succeeded(jobs, storage)
        for _ in range(3):
            connection.sadd(UNSAVED, f"t/{record.id}")
            jobs.settle("t", record.id)
        assert Reservations(connection, 0).used("t") == str(FILE.size)
        assert tally.read(connection)["ended", "linear", "succeeded"] == 1
        jobs.delete("t", record.id)
        assert Reservations(connection, 0).used("t") == "0"

    def test_one_that_was_not_counted_is_not_taken_off_either(
        self, jobs: Jobs, storage: Storage, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: object) -> None:
            raise StorageUnavailable("storage_unavailable", "away")

        with monkeypatch.context() as patched:
            patched.setattr(ledger, "announce", away)
            record = succeeded(jobs, storage)
        jobs.delete("t", record.id)
        assert Reservations(connection, 0).used("t") in ("", "0")

    def test_a_push_that_moved_on_while_the_record_was_saved_is_saved_again(
        self, jobs: Jobs, storage: Storage, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = succeeded(jobs, storage)
        save = Jobs.save
        push = Push(repo="org/name", endpoint="https://hub.example", state="running").model_dump_json()

        def slow(self: Jobs, saved: MergeRecord) -> None:
            connection.hset(f"mg:t:merge:{record.id}", "push", push)
            save(self, saved)

        with monkeypatch.context() as patched:
            patched.setattr(Jobs, "save", slow)
            jobs.settle("t", record.id)
        assert jobs.members(UNSAVED) == [("t", record.id)]
        jobs.settle("t", record.id)
        assert jobs.members(UNSAVED) == []
        assert storage.get_json(record_key("t", record.id))["push"] == json.loads(push)


class TestDeletion:
    def test_one_that_is_deleted_while_its_end_is_written_stays_deleted(
        self, jobs: Jobs, storage: Storage, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = succeeded(jobs, storage)
        save = Jobs.save

        def late(self: Jobs, saved: MergeRecord) -> None:
            Jobs(connection, storage).delete("t", record.id)
            save(self, saved)

        with monkeypatch.context() as patched:
            patched.setattr(Jobs, "save", late)
            jobs.settle("t", record.id)
        assert jobs.find("t", record.id) is None
        assert ids(jobs) == []
        assert [key for key, _ in storage.keys("merges")] == []
        assert connection.keys(f"mg:t:merge:{record.id}*") == []
        assert Reservations(connection, 0).used("t") == "0"

    def test_what_a_dead_process_wrote_or_left_is_deleted_after_a_while(
        self,
        jobs: Jobs,
        storage: Storage,
        connection: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
        impatient: None,
    ) -> None:
        record = succeeded(jobs, storage)

        def die(*_: object) -> None:
            raise Died

        with monkeypatch.context() as patched:
            patched.setattr(Storage, "delete_prefix", die)
            with pytest.raises(Died):
                jobs.delete("t", record.id)
        jobs.save(record)  # and one that was still writing died before it looked
        assert [text(item) for item in connection.zrange(DELETED, 0, -1)] == [f"t/{record.id}"]
        jobs.complete_deletions()
        assert [key for key, _ in storage.keys("merges")] == []
        assert connection.zcard(DELETED) == connection.zcard(merges_key("t")) == 0

    def test_it_is_remembered_for_a_while(
        self, jobs: Jobs, storage: Storage, connection: redis.Redis
    ) -> None:
        record = succeeded(jobs, storage)
        jobs.delete("t", record.id)
        jobs.complete_deletions()
        assert connection.zcard(DELETED) == 1
