"""A small world: a base model, adapters, data and heads, made once per process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tiny_models import world, write_head


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def _made(tiny_folder: Path) -> dict[str, Any]:
    recipe = world(tiny_folder)
    for t in range(len(recipe["models"])):
        write_head(tiny_folder / "heads" / f"task{t}.safetensors", classes=3 + t, seed=t)
    return recipe


@pytest.fixture
def tiny(_made: dict[str, Any]) -> dict[str, Any]:
    """A recipe without a method; it may be changed freely, its files may not."""
    return copy.deepcopy(_made)


@pytest.fixture
def tiny_heads(tiny: dict[str, Any], tiny_folder: Path) -> dict[str, Any]:
    """The same with a head file for every model."""
    for t, entry in enumerate(tiny["models"]):
        entry["head"] = str(tiny_folder / "heads" / f"task{t}.safetensors")
    return tiny
