"""Merges take no more room than there is: on the disk of their worker, and of what their tenant may store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from adapters import write_adapter

from service.documents import FileEntry, MergeResult
from service.errors import NoSpace, TooLarge
from service.jobs import MAX_RETRIES, Jobs
from service.quota import Reservations
from service.storage import Storage
from tests.redis_server import RECIPE
from tests.running import Up, push
from workers.attempt import Attempt

ROOM = 1000


def fail_with(error: Exception) -> NoReturn:
    raise error


@pytest.fixture
def room(connection: redis.Redis) -> Reservations:
    return Reservations(connection, ROOM)


@pytest.fixture
def attempt(jobs: Jobs, storage: Storage, room: Reservations) -> Attempt:
    """The first attempt of a merge, claimed."""
    merge = jobs.create("t", RECIPE)
    assert jobs.claim("t", merge.id, "one") == "claimed"
    return Attempt("t", merge.id, "one", jobs, storage, room=room)


def ended(jobs: Jobs, attempt: Attempt) -> tuple[str, str | None]:
    record = jobs.get("t", attempt._id)
    return record.state, record.error["code"] if record.error else None


class TestQuota:
    def test_a_result_counts_from_when_it_is_stored_and_once(
        self, jobs: Jobs, attempt: Attempt, room: Reservations, tmp_path: Path
    ) -> None:
        seen = []

        def work() -> None:
            for _ in range(2):
                attempt.reserve(400)
                seen.append(room.used("t"))
            file = FileEntry(path="a", sha256="0" * 64, size=350)
            attempt.publish(MergeResult(attempt="one", recipe_digest="0", seconds=1.0, files=(file,)))

        attempt.guarded(work, tmp_path)
        assert seen == ["400", "400"]
        assert ended(jobs, attempt) == ("succeeded", None)
        assert room.used("t") == "350"

    def test_what_does_not_fit_is_not_stored_and_gives_back_its_room(
        self, jobs: Jobs, attempt: Attempt, room: Reservations, tmp_path: Path
    ) -> None:
        room.reserve("t", "other", 700)
        stored = []

        def work() -> None:
            attempt.reserve(100)
            attempt.reserve(400)
            stored.append(True)

        attempt.guarded(work, tmp_path)
        assert ended(jobs, attempt) == ("failed", "quota_exceeded")
        assert stored == []
        assert room.used("t") == "700"

    def test_the_room_of_a_killed_attempt_is_given_back_after_a_while(
        self, attempt: Attempt, room: Reservations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.quota.LEASE_SECONDS", -1)
        attempt.reserve(900)  # and then its process dies
        assert room.reserve("t", "another", 900)

    def test_a_merge_whose_result_cannot_fit_is_not_taken(self, connection: redis.Redis) -> None:
        room = Reservations(connection, ROOM)
        room.reserve("t", "models", 600)
        room.demand("t", 400)
        with pytest.raises(TooLarge, match="up to 401 bytes") as raised:
            room.demand("t", 401)
        assert raised.value.code == "quota_exceeded"


class TestDisk:
    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded"),
                  NoSpace("scratch_full", "full")], ids=["ENOSPC", "EDQUOT", "foreseen"],
    )  # fmt: skip
    def test_other_workers_try_and_the_last_says_why(
        self, jobs: Jobs, storage: Storage, tmp_path: Path, error: Exception
    ) -> None:
        merge = jobs.create("t", RECIPE)
        for number in range(MAX_RETRIES):
            assert jobs.claim("t", merge.id, f"a{number}") == "claimed"
            with pytest.raises(type(error)):
                Attempt("t", merge.id, f"a{number}", jobs, storage).guarded(
                    lambda: fail_with(error), tmp_path
                )
        assert jobs.claim("t", merge.id, "last") == "claimed"
        last = Attempt("t", merge.id, "last", jobs, storage)
        last.guarded(lambda: fail_with(error), tmp_path)
        assert ended(jobs, last) == ("failed", "scratch_full")

    def test_a_merge_stops_before_the_disk_is_full(self, jobs: Jobs, tmp_path: Path) -> None:
        free = shutil.disk_usage(tmp_path).free
        storage = Storage.open((tmp_path / "storage").as_uri(), keep_free=free + (1 << 40))
        merge = jobs.create("t", RECIPE)
        assert jobs.claim("t", merge.id, "one") == "claimed"
        attempt = Attempt("t", merge.id, "one", jobs, storage)
        went_on = []

        def work() -> None:
            attempt.advance("merge", 0.5, "")
            went_on.append(True)

        with pytest.raises(NoSpace) as raised:
            attempt.guarded(work, tmp_path)
        assert raised.value.code == "scratch_full"
        assert went_on == []

    @pytest.mark.parametrize("act", ["put_file", "fetch"])
    def test_nothing_is_copied_onto_a_full_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
    ) -> None:
        monkeypatch.setattr("service.storage.files.linked", lambda source, target: False)  # another volume
        plenty = Storage.open((tmp_path / "s").as_uri())
        (tmp_path / "a").write_bytes(b"x")
        plenty.put_file("there", tmp_path / "a")
        full = Storage.open((tmp_path / "s").as_uri(), keep_free=shutil.disk_usage(tmp_path).free + (1 << 40))
        with pytest.raises(NoSpace) as raised:
            full.put_file("new", tmp_path / "a") if act == "put_file" else full.fetch("there", tmp_path / "b")
        assert raised.value.code == {"put_file": "storage_full", "fetch": "scratch_full"}[act]
        assert not (tmp_path / "b").exists()
        assert full.size("new") is None


def test_a_merge_on_a_worker_without_room_fails_and_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("room")
    up = Up(folder)
    try:
        with up.client() as client:
            model = push(client, write_adapter(folder / "a", seed=1), "room/a")
        assert up.stop() == 0
        up.settings["min_free_bytes"] = str(shutil.disk_usage(folder).free + (1 << 40))
        up.start()
        with up.client() as client:
            done = client.wait(client.submit({"merge_method": "linear", "models": [{"model": model}]})["id"])
        assert (done["state"], done["error"]["code"]) == ("failed", "scratch_full")
        assert "MERGANSER_MIN_FREE_BYTES" in done["error"]["remedy"]
    finally:
        up.stop()
