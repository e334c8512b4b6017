"""What dead processes leave behind is found and freed."""

from __future__ import annotations

import time

import pytest
import redis

from service.broker import ACTIVE, NORMAL_QUEUE, PUSHES
from service.documents import MergeRecord, MergeResult, Push
from service.jobs import Jobs
from service.pushes import Pushes
from service.records import new_record
from tests.redis_server import RECIPE, dequeue
from workers import reaper
from workers.worker import MergeWorker


class Lost:
    """A reaper whose patience is at its end at once."""

    def __init__(self, connection: redis.Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reaper, "PATIENCE_SECONDS", 0.0)
        self.sweep = reaper.Reaper(connection, jobs).sweep


@pytest.fixture
def lost(connection: redis.Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Lost:
    return Lost(connection, jobs, monkeypatch)


def test_a_job_that_nobody_started_goes_back(connection: redis.Redis, jobs: Jobs, lost: Lost) -> None:
    merge = jobs.create("t", RECIPE)
    assert dequeue(connection, NORMAL_QUEUE) is not None
    lost.sweep()
    assert connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1) == [merge.id.encode()]
    assert not connection.exists(f"rq:queue:{NORMAL_QUEUE}:intermediate")


def test_a_job_that_went_back_is_not_taken_for_stuck_the_next_time(
    connection: redis.Redis, jobs: Jobs, lost: Lost
) -> None:
    """RQ's maintenance remembers for a day that it saw a job on its way."""
    merge = jobs.create("t", RECIPE)
    worker = MergeWorker([NORMAL_QUEUE], connection=connection, name="w")
    (work,) = worker.queues
    assert dequeue(connection, NORMAL_QUEUE) is not None
    work.intermediate_queue.cleanup(worker, work)
    lost.sweep()
    assert dequeue(connection, NORMAL_QUEUE) is not None
    assert not work.intermediate_queue.should_be_cleaned_up(merge.id)
    assert work.intermediate_queue.get_first_seen(merge.id) is None


def test_a_job_on_its_way_is_left_alone_for_a_while(connection: redis.Redis, jobs: Jobs) -> None:
    jobs.create("t", RECIPE)
    assert dequeue(connection, NORMAL_QUEUE) is not None
    patient = reaper.Reaper(connection, jobs)
    patient.sweep()
    patient.sweep()
    assert connection.llen(f"rq:queue:{NORMAL_QUEUE}:intermediate") == 1


def started(connection: redis.Redis, name: str = "w") -> str:
    worker = MergeWorker([NORMAL_QUEUE], connection=connection, name=name)
    found = dequeue(connection, NORMAL_QUEUE)
    assert found is not None
    worker.register_birth()
    worker.prepare_execution(found[0])
    worker.prepare_job_execution(found[0])
    return str(found[0].id)


def test_a_dead_worker_is_freed_at_once(connection: redis.Redis, jobs: Jobs) -> None:
    jobs.create("t", RECIPE)
    merge_id = started(connection)
    reaper.Reaper(connection, jobs).free("w")
    assert connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1) == [merge_id.encode()]
    assert connection.smembers("rq:workers") == set()
    assert not connection.keys("rq:worker:w*")
    assert connection.hget(f"rq:job:{merge_id}", "retries_left") == b"4"


def test_an_orderly_stop_does_not_count_as_a_failure(connection: redis.Redis, jobs: Jobs) -> None:
    jobs.create("t", RECIPE)
    for _ in range(10):
        merge_id = started(connection)
        reaper.Reaper(connection, jobs).free("w", blameless=True)
        assert connection.hget(f"rq:job:{merge_id}", "retries_left") == b"5"


def test_a_silent_worker_loses_its_job(connection: redis.Redis, jobs: Jobs) -> None:
    jobs.create("t", RECIPE)
    merge_id = started(connection)
    patient = reaper.Reaper(connection, jobs)
    patient.sweep()
    assert connection.llen(f"rq:queue:{NORMAL_QUEUE}") == 0
    for member in connection.zrange("rq:wip:merges", 0, -1):
        connection.zadd("rq:wip:merges", {member: time.time() - 1})
    patient.sweep()
    assert connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1) == [merge_id.encode()]


def test_a_merge_that_kills_every_worker_fails(connection: redis.Redis, jobs: Jobs, lost: Lost) -> None:
    merge = jobs.create("t", RECIPE)
    for attempt in range(6):
        started(connection)
        jobs.claim("t", merge.id, f"attempt-{attempt}")
        assert jobs.get("t", merge.id).state == "running"
        reaper.Reaper(connection, jobs).free("w")
    lost.sweep()
    done = jobs.get("t", merge.id)
    assert done.state == "failed"
    assert done.error is not None
    assert done.error["code"] == "worker_lost"
    assert jobs.members(ACTIVE) == []


def test_a_merge_whose_job_vanished_is_queued_again(connection: redis.Redis, jobs: Jobs, lost: Lost) -> None:
    merge = jobs.create("t", RECIPE)
    connection.delete(f"rq:queue:{NORMAL_QUEUE}", f"rq:job:{merge.id}")
    lost.sweep()
    assert connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1) == [merge.id.encode()]
    assert connection.exists(f"rq:job:{merge.id}")


def test_many_reapers_put_a_job_back_once(connection: redis.Redis, jobs: Jobs, lost: Lost) -> None:
    jobs.create("t", RECIPE)
    assert dequeue(connection, NORMAL_QUEUE) is not None
    for _ in range(5):
        reaper.Reaper(connection, jobs).sweep()
        lost.sweep()
    assert connection.llen(f"rq:queue:{NORMAL_QUEUE}") == 1


def test_a_cancelled_attempt_that_does_not_answer_is_given_up(
    connection: redis.Redis, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = jobs.create("t", RECIPE)
    started(connection)
    jobs.claim("t", merge.id, "one")
    jobs.cancel("t", merge.id)
    patient = reaper.Reaper(connection, jobs)
    patient.sweep()
    assert jobs.get("t", merge.id).state == "cancelling"
    monkeypatch.setattr(reaper, "GIVE_UP_SECONDS", 0.0)
    patient.sweep()
    done = jobs.get("t", merge.id)
    assert done.state == "cancelled"
    assert done.error is not None
    assert done.error["code"] == "cancelled"
    assert jobs.report("t", merge.id, "one", "merge", 0.5, "") == "cancelled"


def test_a_cancelled_merge_whose_worker_died_ends(connection: redis.Redis, jobs: Jobs, lost: Lost) -> None:
    merge = jobs.create("t", RECIPE)
    started(connection)
    jobs.claim("t", merge.id, "one")
    jobs.cancel("t", merge.id)
    connection.delete(f"rq:job:{merge.id}", "rq:wip:merges")
    lost.sweep()
    assert jobs.get("t", merge.id).state == "cancelled"
    assert not connection.exists("rq:queue:merges")


def test_a_lost_job_returns_to_the_queue_of_its_priority(
    connection: redis.Redis, jobs: Jobs, lost: Lost
) -> None:
    merge = jobs.create("t", RECIPE, priority="high")
    connection.delete("rq:queue:merges-high", f"rq:job:{merge.id}")
    lost.sweep()
    assert connection.lrange("rq:queue:merges-high", 0, -1) == [merge.id.encode()]


def with_push(jobs: Jobs) -> MergeRecord:
    """A merge with a result that is to be pushed."""
    merge = jobs.create("t", RECIPE, push=Push(repo="org/name", endpoint="https://hub.example"))
    connection = jobs._redis
    connection.delete("rq:queue:merges", f"rq:job:{merge.id}")
    jobs.claim("t", merge.id, "one")
    jobs.publish("t", merge.id, MergeResult(attempt="one", recipe_digest="d", seconds=1.0, files=()))
    return jobs.get("t", merge.id)


def test_a_push_that_nobody_started_is_started(connection: redis.Redis, jobs: Jobs, lost: Lost) -> None:
    merge = with_push(jobs)
    for _ in range(3):
        lost.sweep()
    assert connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1) == [f"push_{merge.id[4:]}_1".encode()]


def test_a_push_that_kills_every_worker_fails_and_can_be_repeated(
    connection: redis.Redis, jobs: Jobs, lost: Lost
) -> None:
    merge = with_push(jobs)
    pushes = Pushes(connection, jobs)
    pushes.start_waiting("t", merge.id)
    for attempt in range(6):
        started(connection)
        assert merge.push is not None
        pushes.note(merge, merge.push.model_copy(update={"state": "running"}))
        lost.sweep()
        assert connection.llen("rq:queue:merges") == 0, f"attempt {attempt} is in the hands of a worker"
        reaper.Reaper(connection, jobs).free("w")
    lost.sweep()
    done = jobs.get("t", merge.id)
    assert done.state == "succeeded"
    assert done.push is not None
    assert (done.push.state, done.push.error and done.push.error["code"]) == ("failed", "worker_lost")
    assert jobs.members(PUSHES) == []
    assert connection.llen("rq:queue:merges") == 0
    again = pushes.ask("t", merge.id, None).push
    assert again is not None
    assert (again.state, again.asked) == ("waiting", 2)
    assert connection.llen("rq:queue:merges") == 1


def test_what_a_dead_api_saved_is_queued(
    connection: redis.Redis, jobs: Jobs, lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs._ENTRY_SECONDS", 0.0)
    record = new_record("t", RECIPE)
    jobs.note_entry(record)
    jobs.save(record)
    lost.sweep()
    assert connection.lrange("rq:queue:merges", 0, -1) == [record.id.encode()]
