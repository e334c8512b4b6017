"""A merge of whole models is shared among workers: the same bytes, and a lost worker costs one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint_inputs import Shape, write_checkpoints
from merging import merge
from service.client import Client
from tests.running import Up, push, until
from tests.seaweed import Seaweed, in_bucket
from tests.workers.split import Split

pytestmark = pytest.mark.slow

SHAPE = Shape(hidden=256, inner=688, heads=4, kv_heads=2, layers=6, vocab=2000)
SHARD_BYTES = 3_000_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), SHAPE)


def submit(client: Client, folders: list[Path], **more: Any) -> tuple[str, dict[str, Any], dict[str, Path]]:
    """Upload and ask for a TIES checkpoint: the merge, its recipe with pinned models, and what they mean."""
    names = [push(client, folder, f"whole/{folder.name}") for folder in folders]
    recipe = {
        "merge_method": "ties",
        "base_model": names[0],
        "models": [{"model": name} for name in names[1:]],
        "output": {"format": "checkpoint"},
        **more,
    }
    return client.submit(recipe)["id"], recipe, dict(zip(names, folders, strict=True))


def alone(recipe: dict[str, Any], folders: dict[str, Path], out: Path) -> dict[str, str]:
    """The same merge in this process: sha256 of every file."""
    return merge(recipe, out, resolve=folders.__getitem__, shard_bytes=SHARD_BYTES, device="cpu").files


def sums(done: dict[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["sha256"] for entry in done["result"]["files"]}


def test_two_workers_over_a_bucket_make_the_bytes_of_one_process(
    split: Callable[..., Split], seaweed: Seaweed, folders: list[Path], tmp_path: Path
) -> None:
    parameters = {"lambda": "auto", "trim_scope": "global", "density": 0.2}
    more = {"parameters": parameters, "prepare": {"equalize_norms": True}}
    with in_bucket(seaweed, seaweed.url()):
        deployment = split(storage_url=seaweed.url(), shard_bytes=str(SHARD_BYTES))
        deployment.serve()
        deployment.work()
        deployment.work()
        with deployment.client() as client:
            merge_id, recipe, known = submit(client, folders, **more)
            done = client.wait(merge_id)
            assert done["state"] == "succeeded", (done, deployment.log())
            client.download_result(merge_id, tmp_path / "got")
    expected = alone(recipe, known, tmp_path / "alone")
    assert sums(done) == expected
    assert sum(path.startswith("model-") for path in expected) >= 4
    for path in expected:
        assert (tmp_path / "got" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes()


def test_a_lost_worker_costs_one_file(
    split: Callable[..., Split], folders: list[Path], tmp_path: Path
) -> None:
    deployment = split(shard_bytes=str(SHARD_BYTES))
    deployment.serve()
    worker = deployment.work()
    with deployment.client() as client:
        merge_id, recipe, known = submit(client, folders)
        attempts = deployment.storage / "merges" / "local" / merge_id / "attempts"

        def made() -> dict[str, int]:
            return {path.name: path.stat().st_ino for path in attempts.glob("parts-*/model-*")}

        until(lambda: len(made()) >= 2, what="two files are made")
        with deployment.redis() as connection:
            reserved = int(connection.hget("mg:local:reserved", merge_id) or 0)
        worker.kill()
        before = made()
        deployment.work()
        done = client.wait(merge_id)
    assert done["state"] == "succeeded", (done, deployment.log())
    assert sums(done) == alone(recipe, known, tmp_path / "alone")
    until(lambda: not list(attempts.glob("parts-*/*")), what="what was put together is removed")
    published = {path.name: path.stat().st_ino for path in attempts.glob("*/model-*")}
    assert len(before) < len(published)
    assert {name: published[name] for name in before} == before
    size = sum(entry["size"] for entry in done["result"]["files"])
    assert 0.9 * size < reserved < size, "the weights, before they were there"
    with deployment.redis() as connection:
        until(lambda: not connection.hlen("mg:local:reserved"), what="the room is given back")
        blobs = (deployment.storage / "blobs").rglob("*")
        uploads = sum(path.stat().st_size for path in blobs if path.is_file())
        until(lambda: int(connection.get("mg:local:bytes") or 0) == uploads + size, what="it is counted once")


def test_a_split_merge_stops_when_it_is_cancelled(start: Callable[..., Up], folders: list[Path]) -> None:
    up = start(shard_bytes=str(SHARD_BYTES))
    with up.client() as client:
        merge_id, _, _ = submit(client, folders)
        attempts = up.storage / "merges" / "local" / merge_id / "attempts"
        until(lambda: list(attempts.glob("parts-*/model-*")), what="a file is made")
        client.cancel(merge_id)
        done = client.wait(merge_id)
    assert done["state"] == "cancelled"
    until(lambda: not up.redis().llen("rq:queue:merges"), what="the other jobs are gone")
    assert not list(attempts.glob("[!p]*"))


def test_an_extracted_adapter_has_the_bytes_of_one_process(
    start: Callable[..., Up], folders: list[Path], tmp_path: Path
) -> None:
    up = start(shard_bytes=str(SHARD_BYTES))
    with up.client() as client:
        more = {"merge_method": "task_arithmetic", "modules_to_save": "drop"}
        merge_id, recipe, known = submit(client, folders, output={"format": "lora", "rank": 4}, **more)
        done = client.wait(merge_id)
    assert done["state"] == "succeeded", (done, up.log())
    assert f"{merge_id} is split into" in up.log()
    assert sums(done) == alone(recipe, known, tmp_path / "alone")
    attempts = up.storage / "merges" / "local" / merge_id / "attempts"
    until(lambda: not list(attempts.glob("parts-*/*")), what="what was put together is removed")


def test_a_mergekit_configuration_is_shared_out_too(
    start: Callable[..., Up], folders: list[Path], tmp_path: Path
) -> None:
    up = start(shard_bytes=str(SHARD_BYTES))
    with up.client() as client:
        names = [push(client, folder, f"whole/{folder.name}") for folder in folders[:3]]
        document = {
            "merge_method": "della",
            "base_model": names[0],
            "models": [{"model": name, "parameters": {"weight": [0.2, 0.8]}} for name in names[1:]],
            "parameters": {"density": 0.5, "epsilon": 0.1},
            "dtype": "bfloat16",
            "tokenizer_source": "union",
        }
        merge_id = client.submit(document)["id"]
        done = client.wait(merge_id)
    assert done["state"] == "succeeded", (done, up.log())
    assert f"{merge_id} is split into" in up.log()
    assert sums(done) == alone(document, dict(zip(names, folders, strict=False)), tmp_path / "alone")
