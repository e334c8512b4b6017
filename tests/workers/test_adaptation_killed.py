"""An adaptation whose process is killed goes on from its checkpoint, over the whole service."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import world, write_head

import merging
from service.client import Client
from tests.running import Up, push, until
from workers.progress_file import NAME

pytestmark = pytest.mark.slow

STEPS = 400
WEIGHTS = "adapter_model.safetensors"


def uploaded(client: Client, folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """A recipe of uploads for two tasks, with steps enough to be killed among them, and what lies where."""
    local = world(folder / "world", tasks=2)
    known: dict[str, Path] = {}

    def upload(path: Path, model: str) -> str:
        if path.is_file():
            alone = folder / "alone" / model
            alone.mkdir(parents=True)
            shutil.copy(path, alone)
            path = alone
        name = push(client, path, model)
        known[name] = path
        return name

    models = []
    for t, entry in enumerate(local["models"]):
        head = write_head(folder / f"head{t}.safetensors", classes=3, seed=t)
        paths = {"model": Path(entry["model"]), "data": Path(entry["data"]), "head": head}
        models.append({key: upload(path, f"my/{key}{t}") for key, path in paths.items()})
    recipe = {
        "merge_method": "adarank",
        "base_model": upload(Path(local["base_model"]), "my/base"),
        "models": models,
        "parameters": {"steps": STEPS, "lr": 0.03, "batch_size": 8, "checkpoint_every": 5},
    }
    return recipe, known


def test_a_killed_adaptation_goes_on_to_the_same_weights(start: Callable[..., Up], tmp_path: Path) -> None:
    up = start()
    told: list[str] = []
    with up.client() as client:
        recipe, known = uploaded(client, tmp_path)
        merge_id = client.submit(recipe)["id"]
        checkpoint = up.storage / "merges" / "local" / merge_id / "attempts" / NAME
        until(checkpoint.exists, what="there is a checkpoint")
        os.kill(up.horse(), signal.SIGKILL)
        done = client.wait(merge_id, lambda _, data: told.append(data.get("message", "")))
    assert (done["state"], done["attempts"]) == ("succeeded", 2), done
    assert any("from the checkpoint" in message for message in told)
    alone = merging.merge(recipe, tmp_path / "out", resolve=known.__getitem__, device="cpu")
    sums = {entry["path"]: entry["sha256"] for entry in done["result"]["files"]}
    assert sums[WEIGHTS] == alone.files[WEIGHTS]
