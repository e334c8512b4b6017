"""Adapters into a checkpoint: merge them into one exact adapter first, then add that to the base.

So every method for adapters can write a whole model, in any space, and its result is the adapter's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from merging import catalog
from merging.dense.inputs import Resolve, open_base
from merging.dense.merge import Say, merge_dense
from merging.dense.plan import Origin
from merging.dense.table import base_required, build_table
from merging.formats.adapter import open_adapter
from merging.formats.guard import ITEM_BYTES
from merging.formats.result_dir import scratch_beside
from merging.planning import Plan
from merging.recipe import ModelEntry, Recipe

MergeAdapters = Callable[[Recipe, Path], dict[str, Any]]
"""Merges a recipe whose output is an adapter into a folder and returns the report."""

_ADAPTER = "the merged adapter"


def adapter_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the adapter; float32, so that only the checkpoint rounds.

    Raises what :func:`merging.catalog.resolve` does, such as ``output_not_supported``.
    """
    catalog.resolve(recipe)
    output = recipe.output.model_copy(update={"format": "lora", "dtype": "float32"})
    return recipe.model_copy(update={"output": output})


def describe_fused(recipe: Recipe, *, resolve: Resolve, plan: Callable[..., Plan]) -> Plan:
    """The plan of the adapter, checked against the base, with the size of the checkpoint."""
    inner = plan(adapter_recipe(recipe), resolve=resolve)
    base = open_base(recipe, resolve)
    if base is None:
        raise base_required("a checkpoint")
    adapters = [open_adapter(resolve(entry.model), label=entry.model) for entry in recipe.models]
    full = "drop" if recipe.modules_to_save == "drop" else "replace"
    try:
        table = build_table(base, adapters, missing="error", full_modules=full)
        size = sum(job.numel * ITEM_BYTES[job.dtype] for job in table.jobs)
    finally:
        base.close()
        for adapter in adapters:
            adapter.close()
    estimate = {**inner.estimate, "output_bytes": size, "seconds": inner.estimate["seconds"] + size / 5.0e8}
    return replace(inner, output={**inner.output, "format": "checkpoint"}, estimate=estimate)


def merge_fused(
    recipe: Recipe,
    out: Path,
    *,
    merge_adapters: MergeAdapters,
    resolve: Resolve,
    threads: int,
    say: Say,
    overwrite: bool = False,
    memory_budget: int | None = None,
    shard_bytes: int | None = None,
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """As :func:`~merging.dense.merge.merge_dense`; ``merge_adapters`` makes the adapter."""
    if recipe.base_model is None:
        raise base_required("a checkpoint")
    with scratch_beside(out) as scratch:
        folder = scratch / "adapter"
        report = merge_adapters(adapter_recipe(recipe), folder)
        written = Recipe.load(folder / "merge.yaml").model_copy(update={"output": recipe.output})
        outer = Recipe(
            merge_method="linear",
            base_model=recipe.base_model,
            models=(ModelEntry(model=_ADAPTER),),
            parameters={"lambda": 1.0},
            output=recipe.output.model_copy(update={"rank": None, "energy": None, "max_rank": None}),
            allow_base_mismatch=recipe.allow_base_mismatch,
        )
        return merge_dense(
            outer,
            out,
            resolve=lambda name: folder if name == _ADAPTER else resolve(name),
            threads=threads,
            say=say,
            overwrite=overwrite,
            memory_budget=memory_budget,
            shard_bytes=shard_bytes,
            origin=Origin(written, report),
        )
