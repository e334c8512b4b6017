"""The command line on checkpoints and task vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import base_tensors, recipe, tuned, write_checkpoint, write_task_vector

from service.cli import main


@pytest.fixture
def document(tmp_path: Path) -> Path:
    tensors = base_tensors()
    base = write_checkpoint(tmp_path / "base", tensors, shards=2)
    models = [write_checkpoint(tmp_path / f"m{i}", tuned(tensors, i + 1)) for i in range(2)]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(base, models, "ties")))
    return path


def test_merge_writes_a_checkpoint(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--threads", "2", "--memory-budget", "1G", "--quiet"]
    assert main(["merge", str(document), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert (out / "model.safetensors").exists()


def test_plan_shows_the_tensors(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(document)]) == 0
    text = capsys.readouterr().out
    assert "ties in full space: 2 models, 21 modules" in text
    assert "q_proj" in text


@pytest.mark.parametrize("size", ["4X", "", "-1", "0", "nan", "1e30"])
def test_a_memory_budget_is_a_size(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(document), "--out", str(out), f"--memory-budget={size}"]) == 2
    assert "size such as 4G" in capsys.readouterr().err
    assert not out.exists()


def test_inspect_tells_what_a_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = base_tensors()
    folder = write_checkpoint(tmp_path / "m", tensors, shards=2)
    assert main(["inspect", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "checkpoint"
    assert data["model_type"] == "llama"
    assert data["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert len(data["files"]) == 2
    assert {tensor["name"] for tensor in data["tensors"]} == set(tensors)
    assert main(["inspect", str(folder)]) == 0
    assert "checkpoint of llama" in capsys.readouterr().out


def test_inspect_tells_a_task_vector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_task_vector(tmp_path / "d", {"x.weight": torch.ones(2, 3)})
    assert main(["inspect", str(folder)]) == 0
    assert "task_vector" in capsys.readouterr().out
