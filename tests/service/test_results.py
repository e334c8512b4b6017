"""When two jobs are the same, and what becomes of a result that is wanted again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merging.recipe import Recipe
from service.documents import FileEntry, MergeRecord, MergeResult, result_key
from service.jobs import Jobs
from service.records import new_record
from service.results import job_digest, reuse
from service.storage import Storage

BASE: dict[str, Any] = {
    "merge_method": "ties",
    "models": [{"model": "a/b@1"}, {"model": "c/d@2", "parameters": {"weight": 2.0}}],
    "parameters": {"density": 0.5},
}


def digest(**change: Any) -> str:
    return job_digest(Recipe.load({**BASE, **change}))


def test_what_means_the_same_is_the_same() -> None:
    assert digest(models=BASE["models"][::-1]) == digest()
    assert digest(space="full") == digest()
    assert digest(parameters={"density": 0.5, "normalize": False}) == digest()


@pytest.mark.parametrize(
    "change",
    [
        {"models": BASE["models"][:1]},
        {"models": [{"model": "a/b@2"}, BASE["models"][1]]},
        {"models": [{"model": "a/b@1", "parameters": {"weight": 2.0}}, {"model": "c/d@2"}]},
        {"parameters": {"density": 0.25}},
        {"merge_method": "dare_ties"},
        {"space": "core"},
        {"output": {"rank": 4}},
        {"seed": 1},
    ],
)
def test_what_differs_is_another_job(change: dict[str, Any]) -> None:
    assert digest(**change) != digest()


def test_order_counts_where_the_method_says_so() -> None:
    models = [{"model": "a/b"}, {"model": "c/d"}]
    same = {"merge_method": "slerp", "parameters": {"t": 0.25}}
    assert digest(**same, models=models) != digest(**same, models=models[::-1])


@pytest.fixture
def source(jobs: Jobs, storage: Storage, tmp_path: Path) -> MergeRecord:
    """A merge that succeeded with one file."""
    merge = jobs.create("t", Recipe.load(BASE), digest=digest())
    jobs.claim("t", merge.id, "one")
    (tmp_path / "file").write_bytes(b"content")
    storage.put_file(result_key("t", merge.id, "one", "f.json"), tmp_path / "file")
    entry = FileEntry(path="f.json", sha256="0", size=7)
    jobs.publish("t", merge.id, MergeResult(attempt="one", recipe_digest="d", seconds=1, files=(entry,)))
    return jobs.get("t", merge.id)


def test_a_result_is_copied(jobs: Jobs, storage: Storage, source: MergeRecord) -> None:
    record = new_record("t", Recipe.load(BASE), digest=digest())
    copy = reuse(jobs, storage, record)
    assert copy is not None
    assert (copy.id, copy.state, copy.cached_from) == (record.id, "succeeded", source.id)
    assert jobs.get("t", record.id) == copy
    jobs.delete("t", source.id)
    assert storage.get_bytes(result_key("t", record.id, "one", "f.json")) == b"content"
    again = reuse(jobs, storage, new_record("t", Recipe.load(BASE), digest=digest()))
    assert again is not None
    assert again.cached_from == source.id


def test_a_result_of_another_tenant_is_not_known(jobs: Jobs, storage: Storage, source: MergeRecord) -> None:
    assert reuse(jobs, storage, new_record("u", Recipe.load(BASE), digest=digest())) is None


def test_a_result_that_was_lost_is_made_again(jobs: Jobs, storage: Storage, source: MergeRecord) -> None:
    storage.delete(result_key("t", source.id, "one", "f.json"))
    record = new_record("t", Recipe.load(BASE), digest=digest())
    assert reuse(jobs, storage, record) is None
    assert jobs.find("t", record.id) is None
