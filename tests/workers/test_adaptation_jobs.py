"""Methods that look at data as jobs: uploads of data, checkpoints, a killed attempt that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from obstore.store import LocalStore
from tiny_models import world, write_head

from merging.errors import InputError
from merging.recipe import Recipe
from service.broker import merge_key
from service.documents import MergeRecord, attempts_prefix
from service.jobs import Jobs
from service.registry import Registry
from service.sources import Sources
from service.storage import Blob, Storage, blob_key
from workers.progress_file import NAME
from workers.tasks import Task


class Killed(BaseException):
    """What no handler of errors catches, as if the process were gone."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    (tmp_path / "storage").mkdir()
    return Storage(LocalStore(prefix=tmp_path / "storage"), tmp_path / "storage")


@pytest.fixture
def registry(connection: redis.Redis, storage: Storage, tmp_path: Path) -> Registry:
    return Registry(storage, connection, tmp_path / "scratch")


@pytest.fixture
def sources(registry: Registry, storage: Storage, jobs: Jobs) -> Sources:
    return Sources(registry, jobs, storage)


@pytest.fixture
def upload(registry: Registry, storage: Storage) -> Callable[[Path, str], str]:
    """Makes the file or folder a model of the registry; its format."""

    def upload(path: Path, model: str) -> str:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            data = file.read_bytes()
            blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
            storage.put_file(blob_key("t", blob.sha256), file)
            registry.stage("t", model, file.name, blob)
        return registry.commit("t", model).format

    return upload


@pytest.fixture
def recipe(upload: Callable[[Path, str], str], tmp_path: Path) -> dict[str, Any]:
    """A recipe of uploads for two tasks."""
    local = world(tmp_path / "world", tasks=2)
    formats = [upload(Path(local["base_model"]), "my/base")]
    models = []
    for t, entry in enumerate(local["models"]):
        head = write_head(tmp_path / f"head{t}.safetensors", classes=3, seed=t)
        formats += [
            upload(Path(entry["model"]), f"my/task{t}"),
            upload(Path(entry["data"]), f"my/samples{t}"),
            upload(head, f"my/head{t}"),
        ]
        models.append({"model": f"my/task{t}", "data": f"my/samples{t}", "head": f"my/head{t}"})
    assert formats == ["checkpoint", *["peft", "dataset", "head"] * 2]
    return {
        "merge_method": "adarank",
        "base_model": "my/base",
        "models": models,
        "parameters": {"steps": 12, "lr": 0.03, "batch_size": 8, "checkpoint_every": 3},
    }


@pytest.fixture
def create(jobs: Jobs, sources: Sources) -> Callable[[dict[str, Any]], MergeRecord]:
    return lambda recipe: jobs.create("t", sources.pin("t", Recipe.load(recipe)))


@pytest.fixture
def run(jobs: Jobs, storage: Storage, sources: Sources, tmp_path: Path) -> Callable[[MergeRecord, str], None]:
    def run(merge: MergeRecord, attempt: str) -> None:
        folder = tmp_path / f"{merge.id}-{attempt}"
        folder.mkdir()
        Task("t", merge.id, attempt, jobs, storage).run(sources, folder)

    return run


def weights(jobs: Jobs, merge: MergeRecord) -> str:
    """sha256 of the merged weights."""
    result = jobs.get("t", merge.id).result
    assert result is not None
    return next(entry.sha256 for entry in result.files if entry.path == "adapter_model.safetensors")


def test_everything_a_recipe_names_is_pinned(
    recipe: dict[str, Any], create: Callable[[dict[str, Any]], MergeRecord]
) -> None:
    pinned = create(recipe).recipe
    assert pinned["base_model"].startswith("my/base@")
    for t, entry in enumerate(pinned["models"]):
        assert entry["data"].startswith(f"my/samples{t}@")
        assert entry["head"].startswith(f"my/head{t}@")


def test_a_local_path_is_no_reference(recipe: dict[str, Any], sources: Sources) -> None:
    recipe["models"][0]["data"] = "/etc/passwd"
    with pytest.raises(InputError) as caught:
        sources.pin("t", Recipe.load(recipe))
    assert caught.value.code == "model_reference_invalid"
    assert caught.value.where["field"] == "models[0].data"


def test_a_killed_adaptation_goes_on_and_ends_with_the_same_weights(
    recipe: dict[str, Any],
    create: Callable[[dict[str, Any]], MergeRecord],
    run: Callable[[MergeRecord, str], None],
    jobs: Jobs,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = create(recipe)
    run(whole, "one")
    assert jobs.get("t", whole.id).state == "succeeded"

    seen: list[str] = []
    plain = Task._progress

    def until_killed(task: Task, progress: Any) -> None:
        plain(task, progress)
        seen.append(progress.message)
        if progress.message.startswith("step 8 of") and task._attempt == "first":
            raise Killed

    monkeypatch.setattr(Task, "_progress", until_killed)
    merge = create(recipe)
    with pytest.raises(Killed):
        run(merge, "first")
    key = f"{attempts_prefix('t', merge.id)}/{NAME}"
    assert storage.size(key) is not None
    seen.clear()
    run(merge, "second")
    assert jobs.get("t", merge.id).state == "succeeded"
    steps = [message for message in seen if message.startswith("step")]
    assert sum("from the checkpoint" in message for message in steps) == 6
    assert weights(jobs, merge) == weights(jobs, whole)
    assert storage.size(key) is None


def test_an_adaptation_is_cancelled_between_steps(
    recipe: dict[str, Any],
    create: Callable[[dict[str, Any]], MergeRecord],
    run: Callable[[MergeRecord, str], None],
    jobs: Jobs,
    storage: Storage,
    connection: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    plain = Task._progress

    def cancel(task: Task, progress: Any) -> None:
        seen.append(progress.message)
        if progress.message.startswith("step 4 of"):
            connection.hset(merge_key("t", merge.id), "state", "cancelling")
            task._reported = 0.0  # as if the last report were long ago
        plain(task, progress)

    monkeypatch.setattr(Task, "_progress", cancel)
    merge = create(recipe)
    run(merge, "one")
    assert jobs.get("t", merge.id).state == "cancelled"
    assert seen[-1].startswith("step 4 of")
    assert list(storage.keys(attempts_prefix("t", merge.id))) == []


def test_starts_for_training_and_statistics_are_jobs_too(
    recipe: dict[str, Any],
    create: Callable[[dict[str, Any]], MergeRecord],
    run: Callable[[MergeRecord, str], None],
    upload: Callable[[Path, str], str],
    jobs: Jobs,
    tmp_path: Path,
) -> None:
    from merging.calibration.write import write_statistics

    for entry in recipe["models"]:
        del entry["head"]
    del recipe["parameters"]
    names = [{**entry, "model": f"task-{t}"} for t, entry in enumerate(recipe["models"])]
    start = create({**recipe, "merge_method": "osrm_init", "models": names, "parameters": {"r": 2}})
    run(start, "one")
    result = jobs.get("t", start.id).result
    assert result is not None
    assert "task-1/adapter_model.safetensors" in {entry.path for entry in result.files}

    local = {**world(tmp_path / "again", tasks=2), "merge_method": "regmean"}
    for t, path in enumerate(write_statistics(local, tmp_path / "stats")):
        assert upload(path, f"my/stats{t}") == "statistics"
    models = [{"model": f"my/task{t}", "statistics": f"my/stats{t}"} for t in range(2)]
    merge = create({"merge_method": "regmean", "models": models})
    run(merge, "one")
    assert jobs.get("t", merge.id).state == "succeeded"


def test_a_bad_row_is_found_when_samples_are_committed(
    upload: Callable[[Path, str], str], tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "w1"}\n{"text": 3}\n')
    with pytest.raises(InputError) as caught:
        upload(path, "my/samples")
    assert caught.value.code == "dataset_row_invalid"
    assert "line 2" in caught.value.message
