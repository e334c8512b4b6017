"""Uploads that are no models: samples, statistics, heads; and the references to them in recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging import catalog
from merging.calibration.dataset import TENSORS, count_rows, open_dataset
from merging.calibration.heads import NAMES, open_head
from merging.calibration.statistics_file import METADATA_KEY, StatisticsFile
from merging.errors import MergeError
from merging.formats.guard import check_safetensors
from merging.recipe import Recipe
from service.names import WEIGHTS

DATASET, STATISTICS, HEAD = "dataset", "statistics", "head"
LINES = ".jsonl"


def inspect_data(folder: Path) -> dict[str, Any] | None:
    """What the manifest says of samples, statistics or a head in ``folder``; None when it is something else.

    Raises the errors of opening it.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (LINES, WEIGHTS))
    if len(files) != 1 or any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return None
    path = files[0]
    if path.suffix == LINES:
        return _facts(DATASET, samples=count_rows(path))
    header = check_safetensors(path)
    names = set(header.tensors)
    if METADATA_KEY in header.metadata:
        with StatisticsFile(path) as file:
            return _facts(STATISTICS, modules=len(file.info.modules), base_model=file.info.base_model)
    if names and names <= set(TENSORS):
        return _facts(DATASET, samples=len(open_dataset(path)))
    if names and names <= {*NAMES, "bias"}:
        open_head(path)
        return _facts(HEAD)
    return None


def _facts(
    format_: str, *, samples: int | None = None, modules: int = 0, base_model: str | None = None
) -> dict[str, Any]:
    notes = () if samples is None else (f"{samples} samples",)
    return {"format": format_, "modules": modules, "rank": 0, "base_model": base_model, "warnings": notes}


def looks_at_data(recipe: Recipe) -> bool:
    """Whether the recipe's method runs a base model or reads statistics."""
    try:
        return catalog.get(recipe.merge_method).contract.data
    except MergeError:
        return False


def starts_from_nothing(recipe: Recipe) -> bool:
    """Whether the models of the recipe are only names of tasks."""
    return looks_at_data(recipe) and catalog.get(recipe.merge_method).contract.initial
