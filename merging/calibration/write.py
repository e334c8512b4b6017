"""``merganser stats``: the statistics of a recipe's samples as files; the samples stay at home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from merging import execute
from merging.calibration import measure
from merging.engine import Progress, pick_device
from merging.errors import InputError
from merging.formats.result_dir import ResultDirectory
from merging.preparing import Resolve, prepare
from merging.recipe import Recipe

RECIPE_NAME = "recipe.yaml"


def write_statistics(
    recipe: Any,
    out_dir: str | Path,
    *,
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    resolve: Resolve | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write ``<task>.safetensors`` for every model of the recipe that brings samples, and ``recipe.yaml``.

    The recipe written is the same with ``statistics`` in the place of ``data``; with it the merge gives
    the same update. Raises what planning and measuring raise, and ``statistics_not_used`` for methods
    that need samples.
    """
    loaded = Recipe.load(recipe)
    where = pick_device(device)
    with ResultDirectory(Path(out_dir), overwrite=overwrite) as result:
        with prepare(loaded, resolve=resolve) as prepared, execute.single_threaded():
            if prepared.inputs is None or prepared.inputs.entropy:
                raise InputError(
                    "statistics_not_used",
                    f"{prepared.resolved.method.name} uses no statistics",
                    remedy="Use a recipe of regmean, osrm_project or osrm_init.",
                    where={"field": "merge_method"},
                )
            total = measure.ticks(prepared)
            done = 0

            def tick(message: str) -> None:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(Progress("calibrate", done, total, message))

            written = measure.measure(prepared, result.path, where, tick)
            names = {prepared.labels[task]: path.name for task, path in written.items()}
        text = yaml.safe_dump(_with_statistics(loaded, names, Path(out_dir)), sort_keys=False)
        (result.path / RECIPE_NAME).write_text(text, encoding="utf-8")
    return [Path(out_dir) / name for name in sorted(names.values())]


def _with_statistics(recipe: Recipe, names: dict[str, str], folder: Path) -> dict[str, Any]:
    """The recipe that takes the files in the place of the samples."""
    data = recipe.plain()
    for entry in data["models"]:
        if entry["model"] in names:
            entry.pop("data", None)
            entry["statistics"] = str(folder / names[entry["model"]])
    if "calibration" in data:
        data["calibration"]["data"] = None
    return data
