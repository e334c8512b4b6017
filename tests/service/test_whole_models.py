"""Checkpoints and task vectors over HTTP: uploaded, described, merged, and merged further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoint_inputs import Shape, write_checkpoints
from merging import merge
from service.client import Client
from tests.running import push

SHAPE = Shape(hidden=16, inner=24, heads=2, kv_heads=1, layers=1, vocab=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it, each in two files."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), SHAPE, dtype="float32")


def finished(client: Client, recipe: dict[str, Any]) -> dict[str, Any]:
    done = client.wait(client.submit(recipe)["id"])
    assert done["state"] == "succeeded", done
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()
    }


def test_a_checkpoint_is_described_by_its_headers(
    client: Client, http: httpx.Client, folders: list[Path]
) -> None:
    push(client, folders[0], "whole/described")
    found = http.get("/v1/models/whole/described").json()
    assert (found["format"], found["modules"], found["rank"]) == ("checkpoint", len(weights(folders[0])), 0)


def test_a_checkpoint_without_one_of_its_files_is_refused(http: httpx.Client, folders: list[Path]) -> None:
    for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        data = (folders[0] / name).read_bytes()
        assert http.put(f"/v1/models/whole/partial/files/{name}", content=data).status_code == 201
    answer = http.post("/v1/models/whole/partial/commit")
    assert answer.status_code == 422
    assert "model-00002-of-00002.safetensors" in answer.json()["detail"]


def test_a_quantised_checkpoint_is_refused_by_name(
    client: Client, http: httpx.Client, folders: list[Path], tmp_path: Path
) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("config.json", "model.safetensors"):
        http.put(f"/v1/models/whole/small/files/{name}", content=(tmp_path / name).read_bytes())
    answer = http.post("/v1/models/whole/small/commit")
    assert (answer.status_code, answer.json()["code"]) == (422, "quantised_base")


def test_fine_tunes_are_merged_into_a_checkpoint(client: Client, folders: list[Path], tmp_path: Path) -> None:
    names = [push(client, folder, f"whole/{folder.name}") for folder in folders]
    recipe = {
        "merge_method": "ties",
        "base_model": names[0].partition("@")[0],  # the newest revision, pinned by the service
        "models": [{"model": name} for name in names[1:]],
        "output": {"format": "checkpoint"},
    }
    planned = client.plan(recipe)
    assert planned["output"]["format"] == "checkpoint"
    done = finished(client, recipe)
    assert done["recipe"]["base_model"] == names[0]
    client.download_result(done["id"], tmp_path / "got")
    pinned = {**recipe, "base_model": names[0]}
    known = dict(zip(names, folders, strict=True))
    merge(pinned, tmp_path / "alone", resolve=known.__getitem__, device="cpu")
    got, expected = weights(tmp_path / "got"), weights(tmp_path / "alone")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert (tmp_path / "got" / "tokenizer.json").exists()

    # the result is a model itself: its difference from the base is a task vector, which can be added again
    delta = finished(
        client,
        {
            "merge_method": "linear",
            "base_model": names[0],
            "models": [{"model": f"merges/{done['id']}"}],
            "output": {"format": "delta"},
        },
    )
    client.download_result(delta["id"], tmp_path / "delta")
    again = finished(
        client,
        {
            "merge_method": "linear",
            "base_model": names[0],
            "models": [{"model": push(client, tmp_path / "delta", "whole/difference")}],
            "output": {"format": "checkpoint"},
        },
    )
    client.download_result(again["id"], tmp_path / "again")
    restored = weights(tmp_path / "again")
    for key, value in got.items():
        torch.testing.assert_close(restored[key], value, rtol=1e-6, atol=1e-7)


def test_a_merge_that_needs_the_base_says_which_is_missing(
    client: Client, http: httpx.Client, folders: list[Path]
) -> None:
    name = push(client, folders[1], "whole/orphan")
    recipe = {
        "merge_method": "ties",
        "base_model": "whole/nowhere",
        "models": [{"model": name}],
        "output": {"format": "checkpoint"},
    }
    answer = http.post("/v1/merges", json=recipe)
    assert (answer.status_code, answer.json()["code"]) == (422, "model_not_found")
    assert "base_model" in answer.json()["detail"]
