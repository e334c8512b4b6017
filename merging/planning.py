"""From a prepared recipe to a plan: what a merge will do and cost, as plain data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merging.calibration.outlook import outlook
from merging.dense.inputs import wants_dense, wants_fusing
from merging.formats.adapter import Adapter
from merging.mergekit.detect import claimed
from merging.preparing import Batch, Prepared, Resolve, local_path, prepare
from merging.recipe import ModelEntry, Recipe

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def rank_bound(prepared: Prepared, batch: Batch) -> int:
    """The largest rank a module of the batch can have in the output."""
    output = prepared.recipe.output
    dense = prepared.resolved.space == "full" and prepared.resolved.method.name not in ("linear", "svd")
    bound = min(batch.m, batch.n) if dense else min(batch.R, batch.m, batch.n)
    if output.rank is not None:
        bound = min(bound, output.rank)
    elif prepared.resolved.method.name == "svd" and output.energy is None:
        bound = min(bound, max(batch.ranks))
    return min(bound, output.max_rank) if output.max_rank is not None else bound


@dataclass(frozen=True)
class Plan:
    """What a merge will do and cost. Estimates are upper bounds but for the time."""

    method: str
    space: str | None
    parameters: dict[str, Any]
    models: list[dict[str, Any]]
    modules: list[dict[str, Any]]
    output: dict[str, Any]
    estimate: dict[str, Any]
    warnings: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "method": self.method,
            "space": self.space,
            "parameters": self.parameters,
            "models": self.models,
            "modules": self.modules,
            "output": self.output,
            "estimate": self.estimate,
            "warnings": self.warnings,
        }


def plan(recipe: Any, *, resolve: Resolve | None = None) -> Plan:
    """Validate a recipe and its inputs and estimate the merge; only headers and configurations are read.

    Raises :class:`InputError` for whatever makes the merge impossible.
    """
    config = claimed(recipe, resolve or local_path)
    if config is not None:
        from merging.mergekit.describe import describe

        return describe(config[0], name=config[1], resolve=resolve or local_path)
    loaded = Recipe.load(recipe)
    if wants_fusing(loaded, resolve or local_path):
        from merging.dense.fuse import describe_fused

        return describe_fused(loaded, resolve=resolve or local_path, plan=plan)
    if wants_dense(loaded, resolve or local_path):
        from merging.dense.describe import describe_dense

        return describe_dense(loaded, resolve=resolve or local_path)
    with prepare(loaded, resolve=resolve, canonical=False) as prepared:
        return _describe(prepared)


def _describe(prepared: Prepared) -> Plan:
    resolved = prepared.resolved
    recipe = prepared.recipe
    item = ITEM_SIZE[prepared.dtype]
    modules: list[dict[str, Any]] = []
    numbers = 0
    for batch in prepared.batches:
        bound = rank_bound(prepared, batch)
        numbers += len(batch.names) * (
            bound * (batch.m + batch.n) if recipe.output.format == "lora" else batch.m * batch.n
        )
        modules += [
            {
                "name": name,
                "kind": prepared.module(name).kind,
                "m": batch.m,
                "n": batch.n,
                "models": list(batch.tasks),
                "ranks": list(batch.ranks),
                "output_rank": bound,
            }
            for name in batch.names
        ]
    warnings = [
        {"code": "adapter_warning", "message": f"{adapter.label}: {text}"}
        for adapter in prepared.adapters
        for text in adapter.warnings
    ]
    return Plan(
        method=resolved.method.name,
        space=resolved.space,
        parameters=resolved.params.model_dump(mode="json", by_alias=True),
        models=[
            _model(entry, adapter) for entry, adapter in zip(recipe.models, prepared.adapters, strict=True)
        ],
        modules=sorted(modules, key=lambda module: str(module["name"])),
        output={
            "format": recipe.output.format,
            "family": prepared.table.family,
            "dtype": prepared.dtype,
            "rank": max((int(module["output_rank"]) for module in modules), default=0),
        },
        estimate={"output_bytes": numbers * item, **_with_data(prepared, _costs(prepared))},
        warnings=warnings + _full_rank_warning(prepared),
    )


def _model(entry: ModelEntry, adapter: Adapter) -> dict[str, Any]:
    ranks = [module.rank for module in adapter.modules.values()]
    return {
        "model": entry.model,
        "parameters": dict(entry.parameters),
        "format": adapter.format,
        "base_model": adapter.base_model,
        "modules": len(ranks),
        "min_rank": min(ranks, default=0),
        "max_rank": max(ranks, default=0),
    }


def _full_rank_warning(prepared: Prepared) -> list[dict[str, str]]:
    recipe = prepared.recipe
    limited = recipe.output.rank or recipe.output.max_rank or recipe.output.energy
    dense = prepared.resolved.space == "full" and prepared.resolved.method.name not in ("linear", "svd")
    if recipe.output.format != "lora" or limited or not dense:
        return []
    return [
        {
            "code": "full_rank_output",
            "message": "an entry-wise merge in full space has full rank; the exact LoRA is larger than the "
            "dense update. Set output.rank, or use space: core",
        }
    ]


def _with_data(prepared: Prepared, costs: dict[str, Any]) -> dict[str, Any]:
    """The estimate with what looking at the data adds to it."""
    if prepared.inputs is None:
        return costs
    modules = {name: prepared.module(name) for name in prepared.table.modules}
    data = outlook(prepared.inputs, modules, prepared.resolved.params)
    return {
        **costs,
        "seconds": round(costs["seconds"] + data["seconds"], 2),
        "memory_bytes": costs["memory_bytes"] + data["memory_bytes"],
        "calibration": data,
    }


# Rates of one core of a current server, in operations per second; the time is an estimate, not a promise.
_FACTOR_RATE = 1.5e10
_ENTRY_RATE = 1.0e8


def _costs(prepared: Prepared) -> dict[str, Any]:
    seconds = 0.2
    memory = 0
    for batch in prepared.batches:
        size = batch.m + batch.n
        T = len(batch.tasks)
        work = len(batch.names) * (6.0 * size * batch.R**2 + 40.0 * batch.R**3) / _FACTOR_RATE
        peak = 4 * size * batch.R * 4
        if prepared.resolved.space == "full" and prepared.resolved.method.name not in ("linear", "svd"):
            work += len(batch.names) * T * batch.m * batch.n * 4.0 / _ENTRY_RATE
            peak += 4 * batch.m * batch.n * 4
        elif prepared.resolved.space == "knots":
            work += len(batch.names) * T * batch.R * batch.n * 2.0 / _ENTRY_RATE
            peak += 4 * T * batch.R * batch.n * 4
        seconds += work
        memory = max(memory, peak)
    return {"seconds": round(seconds, 2), "memory_bytes": memory + (300 << 20)}
