"""The state machine of merges, over a real Redis: attempts are fenced, results are published once."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from service.broker import ACTIVE, NORMAL_QUEUE, UNSAVED, events_key
from service.documents import MergeRecord, MergeResult
from service.errors import NotFound
from service.jobs import Jobs
from service.storage import Storage
from tests.redis_server import RECIPE


@pytest.fixture
def merge(jobs: Jobs) -> MergeRecord:
    return jobs.create("t", RECIPE)


def result(attempt: str) -> MergeResult:
    return MergeResult(attempt=attempt, recipe_digest="d", seconds=1.0, files=())


def states(connection: redis.Redis, merge: MergeRecord) -> list[str]:
    rows = connection.xrange(events_key("t", merge.id))
    return [fields[b"data"].decode() for _, fields in rows if fields[b"event"] == b"state"]


def test_a_new_merge_is_queued_everywhere(jobs: Jobs, connection: redis.Redis, merge: MergeRecord) -> None:
    assert jobs.get("t", merge.id) == merge
    assert merge.state == "queued"
    assert connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1) == [merge.id.encode()]
    assert jobs.members(ACTIVE) == [("t", merge.id)]
    assert [row.id for row in jobs.recent("t", limit=9, cursor=None, state="queued")[0]] == [merge.id]


def test_the_payload_of_a_job_is_two_ids(connection: redis.Redis, merge: MergeRecord) -> None:
    raw = connection.hget(f"rq:job:{merge.id}", "data")
    assert raw is not None
    name, instance, args, kwargs = json.loads(zlib.decompress(raw))
    assert (name, instance, args, kwargs) == ("workers.tasks.run_merge", None, ["t", merge.id], {})


def test_the_straight_way(jobs: Jobs, connection: redis.Redis, merge: MergeRecord) -> None:
    assert jobs.claim("t", merge.id, "one") == "claimed"
    assert jobs.report("t", merge.id, "one", "merge", 0.25, "half") == "running"
    running = jobs.get("t", merge.id)
    assert (running.state, running.phase, running.progress) == ("running", "merge", 0.25)
    assert jobs.publish("t", merge.id, result("one")) == "finished"
    done = jobs.get("t", merge.id)
    assert (done.state, done.progress, done.attempts, done.message) == ("succeeded", 1.0, 1, "")
    assert done.result == result("one")
    assert [text.split('"')[3] for text in states(connection, merge)] == ["queued", "running", "succeeded"]
    assert jobs.members(ACTIVE) == jobs.members(UNSAVED) == []
    assert [row.id for row in jobs.recent("t", limit=9, cursor=None, state="succeeded")[0]] == [merge.id]
    assert jobs.recent("t", limit=9, cursor=None, state="running")[0] == []


def test_a_late_attempt_can_do_nothing(jobs: Jobs, merge: MergeRecord) -> None:
    assert jobs.claim("t", merge.id, "one") == "claimed"
    assert jobs.claim("t", merge.id, "two") == "claimed"
    assert jobs.report("t", merge.id, "one", "merge", 0.9, "") == "superseded"
    assert jobs.publish("t", merge.id, result("one")) == "superseded"
    assert jobs.fail("t", merge.id, "one", {"code": "x"}) == "superseded"
    assert jobs.get("t", merge.id).state == "running"
    assert jobs.publish("t", merge.id, result("two")) == "finished"
    done = jobs.get("t", merge.id)
    assert done.result == result("two")
    assert done.attempts == 2


def test_of_many_attempts_at_once_one_is_published(jobs: Jobs, merge: MergeRecord) -> None:
    names = [f"attempt-{i}" for i in range(16)]

    def run(name: str) -> str:
        jobs.claim("t", merge.id, name)
        return jobs.publish("t", merge.id, result(name))

    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(names, pool.map(run, names), strict=True))
    published = [name for name, answer in answers.items() if answer == "finished"]
    assert len(published) == 1
    assert jobs.get("t", merge.id).result == result(published[0])


def test_an_ended_merge_stays_as_it_is(jobs: Jobs, merge: MergeRecord) -> None:
    jobs.claim("t", merge.id, "one")
    assert jobs.fail("t", merge.id, "one", {"code": "x", "status": 500}) == "finished"
    before = jobs.get("t", merge.id)
    assert before.error == {"code": "x", "status": 500}
    assert jobs.claim("t", merge.id, "two") == "failed"
    assert jobs.publish("t", merge.id, result("one")) == "failed"
    assert jobs.fail("t", merge.id, "", {"code": "y"}) == "failed"
    assert jobs.get("t", merge.id) == before


def test_a_merge_that_is_to_stop_is_not_published(
    jobs: Jobs, connection: redis.Redis, merge: MergeRecord
) -> None:
    jobs.claim("t", merge.id, "one")
    assert jobs.cancel("t", merge.id).state == "cancelling"
    assert jobs.cancel("t", merge.id).state == "cancelling"
    assert jobs.report("t", merge.id, "one", "merge", 0.5, "") == "cancelling"
    assert jobs.claim("t", merge.id, "two") == "cancelling"
    assert jobs.publish("t", merge.id, result("one")) == "cancelling"
    assert jobs.cancelled("t", merge.id, "one", {"code": "cancelled"}) == "finished"
    assert jobs.get("t", merge.id).state == "cancelled"


def test_storage_knows_a_merge_from_its_beginning_and_its_end(
    jobs: Jobs, connection: redis.Redis, merge: MergeRecord
) -> None:
    connection.flushall()
    assert jobs.get("t", merge.id) == merge
    jobs.enqueue(merge)
    jobs.claim("t", merge.id, "one")
    jobs.publish("t", merge.id, result("one"))
    before = jobs.get("t", merge.id)
    connection.flushall()
    assert jobs.get("t", merge.id) == before


def test_an_end_that_was_not_saved_is_saved_later(
    jobs: Jobs, connection: redis.Redis, merge: MergeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.claim("t", merge.id, "one")

    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "put_json", broken)
        with pytest.raises(OSError, match="full"):
            jobs.publish("t", merge.id, result("one"))
    assert jobs.members(UNSAVED) == [("t", merge.id)]
    jobs.settle("t", merge.id)
    assert jobs.members(UNSAVED) == []
    connection.flushall()
    assert jobs.get("t", merge.id).state == "succeeded"


def test_another_tenant_sees_nothing(jobs: Jobs, merge: MergeRecord) -> None:
    with pytest.raises(NotFound):
        jobs.get("u", merge.id)
    assert jobs.recent("u", limit=9, cursor=None, state=None) == ([], None)
    assert jobs.claim("u", merge.id, "one") == "missing"


def test_pages_survive_what_happens_between_them(jobs: Jobs) -> None:
    ids = [jobs.create("t", RECIPE).id for _ in range(7)]
    first, cursor = jobs.recent("t", limit=3, cursor=None, state=None)
    late = jobs.create("t", RECIPE).id
    second, cursor = jobs.recent("t", limit=3, cursor=cursor, state=None)
    third, end = jobs.recent("t", limit=3, cursor=cursor, state=None)
    found = [row.id for row in (*first, *second, *third)]
    assert sorted(found) == sorted(ids)
    assert late not in found
    assert end is None


def test_cancelling_what_is_queued_leaves_nothing_to_run(
    jobs: Jobs, connection: redis.Redis, merge: MergeRecord
) -> None:
    done = jobs.cancel("t", merge.id)
    assert (done.state, done.attempts) == ("cancelled", 0)
    assert states(connection, merge)[-1].startswith('{"state": "cancelled"')
    assert connection.keys("rq:queue:merges*") == connection.keys("rq:job:*") == []
    assert jobs.claim("t", merge.id, "one") == "cancelled"
    connection.flushall()
    assert jobs.cancel("t", merge.id) == done


def test_a_worker_that_took_the_job_just_before_drops_it(
    jobs: Jobs, connection: redis.Redis, merge: MergeRecord
) -> None:
    connection.lpop("rq:queue:merges")
    assert jobs.cancel("t", merge.id).state == "cancelled"
    assert connection.exists(f"rq:job:{merge.id}")
    assert jobs.claim("t", merge.id, "one") == "cancelled"


def test_cancel_and_claim_at_once_agree(jobs: Jobs) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            merge = jobs.create("t", RECIPE)
            claimed = pool.submit(jobs.claim, "t", merge.id, "one")
            stopped = pool.submit(jobs.cancel, "t", merge.id)
            pair = (claimed.result(), stopped.result().state)
            assert pair in (("claimed", "cancelling"), ("cancelled", "cancelled"))


def test_a_deleted_merge_is_gone_everywhere(
    jobs: Jobs, connection: redis.Redis, storage: Storage, merge: MergeRecord
) -> None:
    jobs.cancel("t", merge.id)
    jobs.delete("t", merge.id)
    assert list(storage.keys("")) == []
    assert not [key for key in connection.keys("mg:*") if merge.id.encode() in key]
    assert jobs.recent("t", limit=9, cursor=None, state=None) == ([], None)
    with pytest.raises(NotFound):
        jobs.delete("t", merge.id)


def test_filtered_pages_skip_what_does_not_match(jobs: Jobs) -> None:
    wanted = jobs.create("t", RECIPE, name="needle").id
    for _ in range(10):
        jobs.create("t", RECIPE)
    found: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = jobs.recent(
            "t", limit=2, cursor=cursor, state="queued", matches=lambda record: record.name == "needle"
        )
        found += [record.id for record in page]
        if cursor is None:
            break
    assert found == [wanted]
