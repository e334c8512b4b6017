"""How far a push is, over a real Redis: started once, asked for again, and harmless to the record."""

from __future__ import annotations

import pytest
import redis
from rq.job import JobStatus

from service import tally
from service.broker import NORMAL_QUEUE, PUSHES, merge_key, text
from service.documents import FileEntry, MergeRecord, MergeResult, Push, record_key
from service.errors import Conflict, NotFound
from service.jobs import Jobs
from service.pushes import Pushes
from service.quota import Reservations
from service.reindex import Reindexer
from service.storage import Storage
from tests.redis_server import RECIPE

PUSH = Push(repo="org/name", endpoint="https://hub.example")


@pytest.fixture
def pushes(connection: redis.Redis, jobs: Jobs) -> Pushes:
    return Pushes(connection, jobs)


def ended(jobs: Jobs, push: Push | None = PUSH) -> MergeRecord:
    """A merge with a result."""
    record = jobs.create("t", RECIPE, push=push)
    jobs.claim("t", record.id, "one")
    file = FileEntry(path="a.json", sha256="0" * 64, size=1)
    jobs.publish("t", record.id, MergeResult(attempt="one", recipe_digest="d", seconds=1.0, files=(file,)))
    return jobs.get("t", record.id)


def queued(connection: redis.Redis) -> list[str]:
    found = connection.lrange(f"rq:queue:{NORMAL_QUEUE}", 0, -1)
    return [text(item) for item in found if text(item).startswith("push_")]


def state_of(jobs: Jobs, record: MergeRecord) -> str:
    push = jobs.get("t", record.id).push
    assert push is not None
    return push.state


def test_a_push_that_was_asked_for_is_started_once(
    jobs: Jobs, connection: redis.Redis, pushes: Pushes
) -> None:
    record = ended(jobs)
    assert record.push == PUSH
    assert queued(connection) == [], "the one who publishes starts it"
    for _ in range(3):
        pushes.start_waiting("t", record.id)
    assert queued(connection) == [f"push_{record.id[4:]}_1"]
    other = ended(jobs, None)
    pushes.start_waiting("t", other.id)
    pushes.start_waiting("t", "mrg_none")
    assert len(queued(connection)) == 1


def test_it_is_noted_in_redis_and_in_storage(
    jobs: Jobs, connection: redis.Redis, storage: Storage, pushes: Pushes
) -> None:
    record = ended(jobs)
    assert record.push is not None
    pushes.note(record, record.push.model_copy(update={"state": "running"}))
    assert state_of(jobs, record) == "running"
    connection.delete(merge_key("t", record.id))  # after a week
    assert state_of(jobs, record) == "running"
    pushes.note(record, record.push.model_copy(update={"state": "failed"}))
    assert state_of(jobs, record) == "failed"
    assert connection.exists(merge_key("t", record.id)) == 0
    jobs.delete("t", record.id)
    pushes.note(record, record.push)
    assert storage.get_json(record_key("t", record.id)) is None, "a deleted merge stays deleted"


def test_it_is_asked_for_again_when_it_has_ended(jobs: Jobs, connection: redis.Redis, pushes: Pushes) -> None:
    record = ended(jobs)
    pushes.start_waiting("t", record.id)
    with pytest.raises(Conflict) as caught:
        pushes.ask("t", record.id, None)
    assert caught.value.code == "push_in_progress"
    pushes.note(record, PUSH.model_copy(update={"state": "failed", "error": {"code": "x"}}))
    again = pushes.ask("t", record.id, None).push
    assert again is not None
    assert (again.state, again.error, again.asked) == ("waiting", None, 2)
    elsewhere = PUSH.model_copy(update={"repo": "org/other", "state": "failed"})
    pushes.note(record, again.model_copy(update={"state": "succeeded"}))
    found = pushes.ask("t", record.id, elsewhere).push
    assert found is not None
    assert (found.repo, found.state, found.asked) == ("org/other", "waiting", 3)
    assert queued(connection) == [f"push_{record.id[4:]}_{n}" for n in (1, 2, 3)]


def test_one_whose_job_was_given_up_is_not_under_way(
    jobs: Jobs, connection: redis.Redis, pushes: Pushes
) -> None:
    record = ended(jobs)
    pushes.start_waiting("t", record.id)
    pushes.note(record, PUSH.model_copy(update={"state": "running"}))
    connection.hset(f"rq:job:push_{record.id[4:]}_1", "status", JobStatus.FAILED)
    assert pushes.ask("t", record.id, None).push is not None


def test_what_cannot_be_pushed(jobs: Jobs, pushes: Pushes) -> None:
    waiting, unasked = jobs.create("t", RECIPE, push=PUSH), ended(jobs, None)
    for merge_id, code in ((waiting.id, "merge_not_succeeded"), (unasked.id, "push_not_requested")):
        with pytest.raises(Conflict) as caught:
            pushes.ask("t", merge_id, None)
        assert caught.value.code == code
    with pytest.raises(NotFound):
        pushes.ask("other", unasked.id, PUSH)


def test_a_merge_that_is_repeated_is_pushed_too(jobs: Jobs) -> None:
    record = jobs.create("t", RECIPE, push=PUSH)
    jobs.cancel("t", record.id)
    assert jobs.repeat("t", record.id).push == PUSH


def test_a_wiped_redis_forgets_no_push(
    jobs: Jobs, connection: redis.Redis, storage: Storage, pushes: Pushes
) -> None:
    broken, done, unasked = ended(jobs), ended(jobs), ended(jobs, None)
    pushes.note(broken, PUSH.model_copy(update={"state": "running"}))
    pushes.note(done, PUSH.model_copy(update={"state": "succeeded"}))
    assert unasked.push is None
    connection.flushall()
    for _ in range(2):
        Reindexer(storage, connection).run()
    assert queued(connection) == [f"push_{broken.id[4:]}_1"]


def test_its_steps_are_not_counted_as_ends_of_the_merge(
    jobs: Jobs, connection: redis.Redis, pushes: Pushes
) -> None:
    record = ended(jobs)
    for state in ("running", "succeeded"):
        pushes.note(record, PUSH.model_copy(update={"state": state}))
    assert tally.read(connection)["ended", "linear", "succeeded"] == 1
    assert Reservations(connection, 0).used("t") == "1"


def test_it_is_listed_until_it_has_ended(jobs: Jobs, connection: redis.Redis, pushes: Pushes) -> None:
    record, gone = ended(jobs), ended(jobs)
    ended(jobs, None)
    assert len(pushes.listed()) == 2, "from the moment of the result, whoever should have started it"
    jobs.delete("t", gone.id)
    assert [(found.id, job_id) for found, job_id in pushes.listed()] == [
        (record.id, f"push_{record.id[4:]}_1")
    ]
    connection.delete(merge_key("t", record.id))  # after a week
    pushes.note(record, PUSH.model_copy(update={"state": "running"}))
    assert len(pushes.listed()) == 1
    pushes.note(record, PUSH.model_copy(update={"state": "failed"}))
    assert jobs.members(PUSHES) == []
