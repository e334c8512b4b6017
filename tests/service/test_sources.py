"""What a recipe names is pinned when it is asked for and found when it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis

from merging.recipe import Recipe
from service.documents import FileEntry, MergeResult, result_key
from service.jobs import Jobs
from service.records import new_record
from service.registry import Registry
from service.sources import Sources
from service.storage import Storage


@pytest.fixture
def sources(connection: redis.Redis, storage: Storage, jobs: Jobs, tmp_path: Path) -> Sources:
    return Sources(Registry(storage, connection, tmp_path / "scratch"), jobs, storage)


def result(jobs: Jobs, storage: Storage, form: str) -> str:
    """How to name the result of a merge that wrote this format."""
    recipe = {"merge_method": "linear", "models": [{"model": "a/b"}], "output": {"format": form}}
    record = new_record("t", Recipe.load(recipe))
    storage.put_json(result_key("t", record.id, "one", "config.json"), {})
    files = (FileEntry(path="config.json", sha256="0" * 64, size=2),)
    outcome = MergeResult(attempt="one", recipe_digest="0", seconds=1.0, files=files)
    jobs.enter_ended(record.model_copy(update={"state": "succeeded", "result": outcome}))
    return f"merges/{record.id}"


@pytest.mark.parametrize(
    ("form", "output"),
    [("checkpoint", {}), ("lora", {"format": "checkpoint"})],
    ids=["whole models", "a checkpoint from adapters"],
)
def test_the_result_of_a_merge_can_be_the_base(
    sources: Sources, jobs: Jobs, storage: Storage, tmp_path: Path, form: str, output: dict[str, Any]
) -> None:
    base, model = result(jobs, storage, "checkpoint"), result(jobs, storage, form)
    recipe = Recipe.load(
        {"merge_method": "linear", "base_model": base, "models": [{"model": model}], "output": output}
    )
    find = sources.place("t", sources.pin("t", recipe), tmp_path / "inputs")
    assert (find(base) / "config.json").read_text() == "{}"
    assert set(sources.sums("t", recipe)) == {base, model}


def test_the_base_of_adapters_is_a_name_only(
    sources: Sources, jobs: Jobs, storage: Storage, tmp_path: Path
) -> None:
    model = result(jobs, storage, "lora")
    recipe = Recipe.load(
        {"merge_method": "linear", "base_model": "merges/gone", "models": [{"model": model}]}
    )
    find = sources.place("t", sources.pin("t", recipe), tmp_path / "inputs")
    assert find(model).is_dir()
