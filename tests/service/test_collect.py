"""What nothing refers to is removed, and nothing else, even while somebody uploads the same content again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from service.collect import Collector, Stopped
from service.documents import FileEntry, MergeRecord, MergeResult, record_key, result_key
from service.errors import Unavailable
from service.jobs import Jobs
from service.marks import Marks
from service.quota import Reservations
from service.registry import Registry
from service.storage import Blob, Storage, blob_key
from tests.redis_server import RECIPE
from tests.seaweed import Seaweed

DAY = 24 * 3600


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open((tmp_path / "storage").as_uri())
    server: Seaweed = request.getfixturevalue("seaweed")
    return server.storage()


@pytest.fixture
def registry(storage: Storage, connection: redis.Redis, tmp_path: Path) -> Registry:
    return Registry(storage, connection, tmp_path / "scratch")


@pytest.fixture
def collect(storage: Storage, connection: redis.Redis) -> Callable[..., dict[str, int]]:
    """Collects as if it were a minute later, so that nothing is too young."""

    def run(*, grace: float = -60.0, dry: bool = False) -> dict[str, int]:
        return Collector(storage, connection, grace=grace, dry=dry).run().objects

    return run


def put(storage: Storage, content: bytes, tenant: str = "t") -> Blob:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    return asyncio.run(storage.put_stream(tenant, chunks(), limit=1 << 30))


def there(storage: Storage) -> list[str]:
    return [key for key, _ in storage.keys("")]


def revise(registry: Registry, *blobs: Blob, model: str = "a/b") -> str:
    """A revision of these blobs; the model may not exist yet."""
    files = tuple(FileEntry(path=f"f{i}.md", sha256=b.sha256, size=b.size) for i, b in enumerate(blobs))
    made = registry.revise("t", model, None, files)
    assert made is not None
    return made.revision


def ended(jobs: Jobs, storage: Storage, state: str = "succeeded", **more: Any) -> MergeRecord:
    """A merge with one published file and, beside it, an attempt that was killed."""
    record = jobs.submit(new(jobs, **more))
    assert jobs.claim("t", record.id, "old") == "claimed"
    storage.put_json(result_key("t", record.id, "old", "f"), "left behind")
    assert jobs.claim("t", record.id, "new") == "claimed"
    storage.put_json(result_key("t", record.id, "new", "f"), "result")
    if state == "succeeded":
        file = FileEntry(path="f", sha256=hashlib.sha256(b'"result"').hexdigest(), size=8)
        result = MergeResult(attempt="new", recipe_digest="0", seconds=1.0, files=(file,))
        assert jobs.publish("t", record.id, result) == "finished"
    else:
        assert jobs.fail("t", record.id, "new", {"code": "x"}) == "finished"
    return jobs.get("t", record.id)


def new(jobs: Jobs, **more: Any) -> MergeRecord:
    from service.records import new_record

    return new_record("t", RECIPE, **more)


def test_content_of_revisions_and_of_staged_files_stays(
    storage: Storage, registry: Registry, collect: Callable[..., dict[str, int]]
) -> None:
    kept, staged, lost = put(storage, b"kept"), put(storage, b"staged"), put(storage, b"lost")
    revise(registry, kept)
    registry.stage("t", "a/c", "f.md", staged)
    assert collect() == {"blobs": 1}
    blobs = [key for key in there(storage) if key.startswith("blobs/")]
    assert blobs == sorted(blob_key("t", blob.sha256) for blob in (kept, staged))
    assert blob_key("t", lost.sha256) not in blobs
    assert collect() == {}


def test_the_content_of_a_deleted_model_goes(
    storage: Storage, registry: Registry, collect: Callable[..., dict[str, int]]
) -> None:
    from service.names import Reference

    shared, own = put(storage, b"shared"), put(storage, b"own")
    revise(registry, shared, own)
    revise(registry, shared, model="a/other")
    registry.delete("t", Reference("a", "b"))
    assert collect() == {"blobs": 1}
    assert storage.size(blob_key("t", shared.sha256)) == len(b"shared")
    assert storage.size(blob_key("t", own.sha256)) is None


def test_what_is_young_stays(storage: Storage, collect: Callable[..., dict[str, int]]) -> None:
    put(storage, b"young")
    storage.put_json("staging/t/0123", 1)
    before = there(storage)
    assert collect(grace=DAY) == {}
    assert there(storage) == before


def test_a_dry_run_only_tells(
    storage: Storage, connection: redis.Redis, collect: Callable[..., dict[str, int]]
) -> None:
    blob = put(storage, b"lost")
    before = there(storage)
    found = Collector(storage, connection, grace=-60.0, dry=True).run()
    assert (found.objects, found.size) == ({"blobs": 1}, {"blobs": blob.size})
    assert there(storage) == before
    assert not connection.keys("mg:t:marks")


def test_uploads_that_broke_off_go_and_open_sessions_stay(
    storage: Storage, collect: Callable[..., dict[str, int]]
) -> None:
    for key in (
        "staging/t/0123",
        "staging/t/upl_open/00001",
        "staging/t/upl_gone/00001",
        "uploads/t/upl_open.json",
    ):
        storage.put_json(key, 1)
    assert collect() == {"staging": 2}
    assert there(storage) == ["staging/t/upl_open/00001", "uploads/t/upl_open.json"]


def test_only_published_attempts_stay(
    storage: Storage, jobs: Jobs, collect: Callable[..., dict[str, int]]
) -> None:
    done, failed = ended(jobs, storage), ended(jobs, storage, "failed")
    running = jobs.submit(new(jobs))
    jobs.claim("t", running.id, "now")
    storage.put_json(result_key("t", running.id, "now", "f"), "under way")
    storage.put_json(result_key("t", "mrg_" + "0" * 32, "x", "f"), "of a merge that was deleted")
    assert collect() == {"attempts": 4}
    records = [record_key("t", record.id) for record in (done, failed, running)]
    results = [result_key("t", done.id, "new", "f"), result_key("t", running.id, "now", "f")]
    assert there(storage) == sorted(records + results)


def test_keys_and_unknown_things_stay(storage: Storage, collect: Callable[..., dict[str, int]]) -> None:
    for key in ("keys/0.json", "something/else", "models/t/readme"):
        storage.put_json(key, 1)
    storage.delete("models/t/readme")
    assert collect() == {}
    assert there(storage) == ["keys/0.json", "something/else"]


def test_a_tenant_pays_for_what_it_stores_and_no_more(
    storage: Storage, connection: redis.Redis, registry: Registry, jobs: Jobs
) -> None:
    counters = Reservations(connection, 1 << 30)
    kept, lost = put(storage, b"kept"), put(storage, b"lost!")
    revise(registry, kept)
    counters.correct("t", kept.size + lost.size)
    done = ended(jobs, storage)
    assert done.result is not None
    assert counters.used("t") == str(kept.size + lost.size + done.result.size)
    assert Collector(storage, connection, grace=-60.0).run().corrected == ["t"]
    assert counters.used("t") == str(kept.size + done.result.size)
    jobs.delete("t", done.id)
    assert counters.used("t") == str(kept.size)


def test_the_partial_files_of_a_killed_upload_go(tmp_path: Path, connection: redis.Redis) -> None:
    storage = Storage.open(tmp_path.as_uri())
    folder = tmp_path / "staging" / "t"
    folder.mkdir(parents=True)
    for name in ("0123#1", "0456#2"):
        (folder / name).write_bytes(b"half")
    os.utime(folder / "0123#1", (time.time() - 2 * DAY,) * 2)
    assert Collector(storage, connection).run().objects == {"partial": 1}
    assert [path.name for path in folder.iterdir()] == ["0456#2"]


def test_a_copied_result_is_young(tmp_path: Path, connection: redis.Redis) -> None:
    storage = Storage.open(tmp_path.as_uri())
    key = result_key("t", "mrg_" + "1" * 32, "x", "f")
    storage.put_json("old", 1)
    os.utime(tmp_path / "old", (time.time() - 2 * DAY,) * 2)
    storage.copy("old", key)  # and the record follows
    assert Collector(storage, connection).run().objects == {}
    assert storage.size(key) is not None


# at the same time


def test_content_uploaded_again_during_a_collection_stays(
    storage: Storage, connection: redis.Redis, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload comes at the worst moment: when the collector has read all references."""
    put(storage, b"again")
    condemn = Marks.condemn

    def late(self: Marks, tenant: str, digests: list[str]) -> list[str]:
        registry.stage("t", "a/b", "f.md", put(storage, b"again"))
        return condemn(self, tenant, digests)

    monkeypatch.setattr(Marks, "condemn", late)
    assert Collector(storage, connection, grace=-60.0).run().objects == {}
    assert storage.get_bytes(blob_key("t", hashlib.sha256(b"again").hexdigest())) == b"again"


def test_a_revision_of_content_that_is_just_being_removed_is_refused(
    storage: Storage, connection: redis.Redis, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content that is there already may be referred to without an upload; here that is too late."""
    blob = put(storage, b"known")
    seen: list[str] = []
    delete = Storage.delete

    def slow(self: Storage, *keys: str) -> None:
        if any(key.startswith("blobs/") for key in keys):
            with pytest.raises(Unavailable) as raised:
                revise(registry, blob)
            seen.append(raised.value.code)
        delete(self, *keys)

    monkeypatch.setattr(Storage, "delete", slow)
    assert Collector(storage, connection, grace=-60.0).run().objects == {"blobs": 1}
    assert seen == ["content_collected"]
    with pytest.raises(Unavailable):
        revise(registry, blob)  # it is gone now
    assert there(storage) == []


def test_uploads_and_collections_side_by_side_lose_nothing(
    storage: Storage, connection: redis.Redis, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was accepted is there in the end, however often both met."""
    for name in ("_staging", "_partial_files"):  # only their age protects uploads that have not arrived
        monkeypatch.setattr(Collector, name, lambda self, *tenant: None)
    contents = [b"content %d" % i for i in range(8)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def collect() -> None:
        try:
            while not stop.is_set():
                Collector(storage, connection, grace=-60.0).run()
        except BaseException as error:
            failures.append(error)

    refused: list[str] = []

    def send(model: str, content: bytes) -> Blob:
        """As a client does: what is refused because it was collected meanwhile is sent again."""
        patience = time.monotonic() + 60
        while True:
            try:
                blob = put(storage, content)
                registry.stage("t", model, f"{blob.sha256[:8]}.md", blob)
            except Unavailable as error:
                refused.append(error.code)
                assert time.monotonic() < patience
            else:
                return blob

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for turn in range(5):
            accepted = [send(f"a/{turn}", content) for content in contents]
            if turn < 4:
                for key in connection.scan_iter("mg:t:staging:*"):
                    connection.delete(key)  # given up: the content is to go, and comes back
    finally:
        stop.set()
        collector.join()
    assert not failures
    assert set(refused) <= {"content_collected"}
    for blob in accepted:
        assert storage.size(blob_key("t", blob.sha256)) == blob.size


def test_a_collection_can_be_stopped(storage: Storage, connection: redis.Redis) -> None:
    put(storage, b"lost")
    with pytest.raises(Stopped):
        Collector(storage, connection, grace=-60.0, stopping=lambda: True).run()
    assert len(there(storage)) == 1
