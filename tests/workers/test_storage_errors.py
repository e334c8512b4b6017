"""An attempt that meets a storage in trouble: tried again, and in the end told what the trouble was."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from service.documents import MergeResult
from service.jobs import MAX_RETRIES, Jobs
from service.storage import Storage, StorageRefused, StorageUnavailable
from tests.redis_server import RECIPE
from workers.attempt import Attempt

TROUBLES = [
    StorageUnavailable("storage_unavailable", "away"),
    StorageRefused("storage_denied", "not let in"),
]


def fail_with(error: Exception) -> NoReturn:
    raise error


@pytest.mark.parametrize("error", TROUBLES, ids=lambda error: error.code)
def test_it_is_tried_again_and_the_last_attempt_says_why(
    jobs: Jobs, storage: Storage, tmp_path: Path, error: StorageUnavailable
) -> None:
    merge = jobs.create("t", RECIPE)
    for number in range(1, MAX_RETRIES + 1):
        name = f"attempt-{number}"
        assert jobs.claim("t", merge.id, name) == "claimed"
        with pytest.raises(type(error)):
            Attempt("t", merge.id, name, jobs, storage).guarded(lambda: fail_with(error), tmp_path)
        assert jobs.get("t", merge.id).state == "running"
    assert jobs.claim("t", merge.id, "last") == "claimed"
    Attempt("t", merge.id, "last", jobs, storage).guarded(lambda: fail_with(error), tmp_path)
    ended = jobs.get("t", merge.id)
    assert ended.state == "failed"
    assert ended.error is not None
    assert (ended.error["code"], ended.error["status"]) == (error.code, 503)


def test_an_end_that_cannot_be_written_is_written_later(
    jobs: Jobs, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = jobs.create("t", RECIPE)
    jobs.claim("t", merge.id, "one")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_json", lambda key, document: fail_with(TROUBLES[0]))
        assert jobs.fail("t", merge.id, "one", {"code": "x"}) == "finished"
    assert jobs.get("t", merge.id).state == "failed"
    stored = storage.get_json(f"merges/t/{merge.id}.json")
    assert stored is not None
    assert stored["state"] == "queued"
    assert jobs.settle("t", merge.id) is not None
    assert storage.get_json(f"merges/t/{merge.id}.json")["state"] == "failed"
    assert jobs.members("mg:unsaved") == []


def test_a_result_can_be_used_again_as_soon_as_its_end_can_be_seen(
    jobs: Jobs, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = jobs.create("t", RECIPE, digest="digest")
    jobs.claim("t", merge.id, "one")
    monkeypatch.setattr(storage, "put_json", lambda key, document: fail_with(TROUBLES[0]))
    done = MergeResult(attempt="one", recipe_digest="0", seconds=1.0, files=())
    assert jobs.publish("t", merge.id, done) == "finished"
    assert jobs.known_result("t", "digest") == merge.id
