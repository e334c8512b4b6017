"""One attempt of a merge, in this process: what it publishes, and what it leaves when it may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from adapters import write_adapter
from obstore.store import LocalStore

from merging.recipe import Recipe
from service.broker import merge_key
from service.documents import MergeRecord, attempts_prefix
from service.jobs import Jobs
from service.pushes import Pushes
from service.registry import Registry
from service.sources import Sources
from service.storage import Storage, blob_key
from workers.attempt import Attempt
from workers.tasks import Task


class Watched(Storage):
    """Storage that does something of the test's choice before it stores the first file of a result."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        super().__init__(LocalStore(prefix=root), root)
        self.before: Callable[[], None] | None = None

    def put_file(self, key: str, path: Path) -> None:
        if self.before is not None and "/attempts/" in key:
            act, self.before = self.before, None
            act()
        super().put_file(key, path)


@pytest.fixture
def storage(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "storage")


@pytest.fixture
def sources(connection: redis.Redis, storage: Watched, jobs: Jobs, tmp_path: Path) -> Sources:
    return Sources(Registry(storage, connection, tmp_path / "scratch"), jobs, storage)


@pytest.fixture
def merge(
    connection: redis.Redis, storage: Watched, jobs: Jobs, sources: Sources, tmp_path: Path
) -> MergeRecord:
    registry = Registry(storage, connection, tmp_path / "scratch")
    folder = write_adapter(tmp_path / "adapter", seed=1)
    import hashlib

    from service.storage import Blob

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        storage.put_file(blob_key("t", blob.sha256), file)
        registry.stage("t", "a/b", file.name, blob)
    registry.commit("t", "a/b")
    recipe = Recipe.load({"merge_method": "linear", "models": [{"model": "a/b"}]})
    return jobs.create("t", sources.pin("t", recipe))


@pytest.fixture
def run(
    merge: MergeRecord, jobs: Jobs, storage: Watched, sources: Sources, tmp_path: Path
) -> Callable[[str], None]:
    """Runs an attempt of that name."""

    def run(attempt: str) -> None:
        folder = tmp_path / attempt
        folder.mkdir()
        Task("t", merge.id, attempt, jobs, storage).run(sources, folder)

    return run


def stored(storage: Storage, merge: MergeRecord) -> set[str]:
    """The attempts of which something is stored."""
    prefix = attempts_prefix("t", merge.id)
    return {key.removeprefix(f"{prefix}/").partition("/")[0] for key, _ in storage.keys(prefix)}


def test_an_attempt_publishes_its_result(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    run("one")
    done = jobs.get("t", merge.id)
    assert (done.state, done.attempt) == ("succeeded", "one")
    assert done.result is not None
    for entry in done.result.files:
        key = f"{attempts_prefix('t', merge.id)}/one/{entry.path}"
        assert storage.size(key) == entry.size


def test_a_superseded_attempt_removes_what_it_stored(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    storage.before = lambda: run("two")
    run("one")
    done = jobs.get("t", merge.id)
    assert (done.state, done.attempt, done.attempts) == ("succeeded", "two", 2)
    assert stored(storage, merge) == {"two"}


def test_the_winner_removes_what_killed_attempts_stored(
    run: Callable[[str], None], merge: MergeRecord, storage: Watched
) -> None:
    storage.put_json(f"{attempts_prefix('t', merge.id)}/killed/adapter_config.json", {})
    run("one")
    assert stored(storage, merge) == {"one"}


def test_a_finished_merge_is_not_run_again(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    run("one")
    before = jobs.get("t", merge.id)
    run("two")
    assert jobs.get("t", merge.id) == before
    assert stored(storage, merge) == {"one"}


def test_a_merge_that_is_to_stop_stops_and_leaves_nothing(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched, connection: redis.Redis
) -> None:
    storage.before = lambda: connection.hset(merge_key("t", merge.id), "state", "cancelling") and None
    run("one")
    done = jobs.get("t", merge.id)
    assert done.state == "cancelled"
    assert done.error is not None
    assert done.error["code"] == "cancelled"
    assert stored(storage, merge) == set()


def test_a_full_disk_is_left_to_the_next_attempt(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    storage.before = full
    with pytest.raises(OSError, match="No space"):
        run("one")
    assert jobs.get("t", merge.id).state == "running"
    run("two")
    assert jobs.get("t", merge.id).state == "succeeded"


def test_a_defect_ends_the_merge_without_its_inner_words(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    def defect() -> None:
        raise RuntimeError("secret detail")

    storage.before = defect
    run("one")
    done = jobs.get("t", merge.id)
    assert done.state == "failed"
    assert done.error is not None
    assert done.error["code"] == "internal_error"
    assert "secret" not in str(done.error)


def test_an_input_that_was_deleted_ends_the_merge(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    storage.delete_prefix("models")
    run("one")
    done = jobs.get("t", merge.id)
    assert done.state == "failed"
    assert done.error is not None
    assert done.error["code"] == "revision_not_found"


def test_content_that_was_lost_is_named(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    storage.delete_prefix("blobs")
    run("one")
    error = jobs.get("t", merge.id).error
    assert error is not None
    assert (error["code"], error["errors"][0]["file"]) == ("content_missing", "adapter_config.json")


def test_a_result_that_is_published_twice_stays(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched
) -> None:
    """So it happens when the answer of Redis is lost, or when two workers complete the same split merge."""
    run("one")
    done = jobs.get("t", merge.id)
    assert done.result is not None
    Task("t", merge.id, "one", jobs, storage).publish(done.result)
    for entry in done.result.files:
        assert storage.size(f"{attempts_prefix('t', merge.id)}/one/{entry.path}") == entry.size
    assert jobs.get("t", merge.id) == done


def test_the_last_job_of_a_split_merge_starts_the_push_that_a_killed_one_owes(
    run: Callable[[str], None], jobs: Jobs, merge: MergeRecord, storage: Watched, tmp_path: Path
) -> None:
    started: list[str] = []

    class Recorder(Pushes):
        def start_waiting(self, tenant: str, merge_id: str) -> None:
            started.append(merge_id)

    run("one")  # which has no pushes, as if it was killed before it came to that
    last = Attempt("t", merge.id, "one", jobs, storage, Recorder(jobs._redis, jobs))
    last.guarded(lambda: last.advance("merge", 0.0, "again"), tmp_path)
    assert started == [merge.id]
