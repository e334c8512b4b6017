"""``merganser stats``: files and a recipe that uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import world

from service import cli


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data: dict[str, Any] = {**world(tmp_path, tasks=2), "merge_method": "regmean"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_stats_writes_files_and_a_recipe_that_merges(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats"
    assert cli.main(["stats", str(recipe), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "recipe.yaml")
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "task0.safetensors", "task1.safetensors"}
    assert cli.main(["merge", str(out / "recipe.yaml"), "--out", str(tmp_path / "merged"), "--quiet"]) == 0
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


def test_stats_refuses_a_recipe_that_needs_none(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load(recipe.read_text())
    for entry in data["models"]:
        del entry["data"]
    recipe.write_text(yaml.safe_dump({**data, "merge_method": "ties"}))
    assert cli.main(["stats", str(recipe), "--out", str(tmp_path / "stats")]) == 2
    assert "statistics_not_used" in capsys.readouterr().err
    assert not (tmp_path / "stats").exists()
