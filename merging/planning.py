"""From a recipe to a plan: everything that headers can tell, before any tensor is read. No torch here.

``prepare`` opens the inputs, checks them against each other and against the method's contract, and groups
the modules into batches of equal shape. ``plan`` turns that into plain data with estimates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging import catalog, hub
from merging.calibration.checks import check_inputs
from merging.calibration.inputs import Inputs, find_inputs, refuse_data
from merging.calibration.outlook import outlook
from merging.catalog import Resolved
from merging.dense.inputs import wants_dense, wants_fusing
from merging.errors import InputError
from merging.formats.adapter import Adapter, Module, open_adapter
from merging.formats.compatible import Compatibility, check_compatible
from merging.mergekit.detect import claimed
from merging.recipe import ModelEntry, Recipe

Resolve = Callable[[str], Path]

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Batch:
    """Modules of equal shape and ranks: ``tasks`` are the models that have them, with ``ranks``."""

    names: tuple[str, ...]
    m: int
    n: int
    tasks: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def R(self) -> int:
        return sum(self.ranks)


@dataclass(frozen=True)
class Prepared:
    """A checked merge. Models, adapters and per-model parameters share one order."""

    recipe: Recipe
    resolved: Resolved
    adapters: tuple[Adapter, ...]
    table: Compatibility
    batches: tuple[Batch, ...]
    dtype: str
    inputs: Inputs | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(entry.model for entry in self.recipe.models)

    def module(self, name: str) -> Module:
        """Some model's description of a module; the checks made them agree."""
        return next(adapter.modules[name] for adapter in self.adapters if name in adapter.modules)


def local_path(reference: str) -> Path:
    """Resolve a model reference to a local folder, or ``hf://org/name``. Raises ``model_not_found``."""
    if reference.startswith(hub.SCHEME):
        return hub.snapshot(reference)
    path = Path(reference)
    if path.exists():
        return path
    raise InputError(
        "model_not_found",
        f"there is no model at {reference!r}",
        remedy="Give the path of an adapter directory.",
        where={"model": reference, "field": "models"},
    )


@contextmanager
def prepare(recipe: Recipe, *, resolve: Resolve | None = None, canonical: bool = True) -> Iterator[Prepared]:
    """Open and check the inputs of a recipe; they are closed on exit.

    With ``canonical`` the models are put into an order that depends on their content and parameters only
    (this reads and hashes the files), so that the order in the recipe never reaches the result.
    """
    resolved = catalog.resolve(recipe)
    recipe = _spelled_out(recipe, resolved)
    adapters: list[Adapter] = []
    inputs: Inputs | None = None
    find = resolve or local_path
    refuse_data(recipe, resolved.method)
    try:
        if resolved.method.contract.data:
            inputs = find_inputs(recipe, resolved.method, find)
        if resolved.method.contract.initial:
            adapters = _blank(recipe, resolved, inputs, run=canonical)
        for entry in recipe.models[len(adapters) :]:
            adapters.append(open_adapter(find(entry.model), label=entry.model))
        if inputs is not None:
            inputs = inputs.with_heads(recipe, adapters, find)
        if canonical and not resolved.method.contract.ordered:
            recipe, resolved, adapters, order = _sorted(recipe, resolved, adapters, inputs)
            inputs = None if inputs is None else inputs.permuted(order)
        table = check_compatible(
            adapters,
            missing_modules=recipe.missing_modules,
            allow_base_mismatch=recipe.allow_base_mismatch,
            modules_to_save="own" if resolved.method.contract.multi_output else recipe.modules_to_save,
        )
        _check_family(resolved, recipe, table)
        batches = _batches(table, adapters)
        _check_method(resolved, recipe, batches)
        if inputs is not None:
            check_inputs(inputs, adapters, table.modules, whole=canonical)
        yield Prepared(recipe, resolved, tuple(adapters), table, batches, _dtype(recipe, adapters), inputs)
    finally:
        if inputs is not None:
            inputs.close()
        for adapter in adapters:
            adapter.close()


def _spelled_out(recipe: Recipe, resolved: Resolved) -> Recipe:
    """The recipe with its defaults written out, so that it keeps its meaning and its digest."""
    return recipe.model_copy(
        update={
            "merge_method": resolved.method.name,
            "space": resolved.space,
            "parameters": resolved.params.model_dump(mode="json", by_alias=True),
        }
    )


def _blank(recipe: Recipe, resolved: Resolved, inputs: Inputs | None, *, run: bool) -> list[Adapter]:
    """Adapters to start from. A plan names layers as the files do: the names in memory need torch."""
    from merging.calibration.blank import blank_adapters
    from merging.catalog.data import OsrmInitParams

    assert inputs is not None
    assert isinstance(resolved.params, OsrmInitParams)
    labels = tuple(entry.model for entry in recipe.models)
    if not run:
        return blank_adapters(labels, resolved.params, inputs, recipe.base_model)
    from merging.calibration.base import names_in_memory

    return blank_adapters(labels, resolved.params, inputs, recipe.base_model, names_in_memory)


def _sorted(
    recipe: Recipe, resolved: Resolved, adapters: list[Adapter], inputs: Inputs | None
) -> tuple[Recipe, Resolved, list[Adapter], list[int]]:
    digests = inputs.references if inputs is not None else {}

    def key(index: int) -> tuple[str, ...]:
        entry = recipe.models[index]
        parameters = json.dumps(entry.parameters, sort_keys=True)
        named = (entry.data or "", entry.statistics or "", entry.head or "")
        return adapters[index].digest, parameters, *(digests.get(name, name) for name in named)

    order = sorted(range(len(adapters)), key=key)
    models = tuple(recipe.models[i] for i in order)
    return (
        recipe.model_copy(update={"models": models}),
        replace(resolved, per_model=tuple(resolved.per_model[i] for i in order)),
        [adapters[i] for i in order],
        order,
    )


def _batches(table: Compatibility, adapters: list[Adapter]) -> tuple[Batch, ...]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, present in table.modules.items():
        some = adapters[present[0]].modules[name]
        ranks = tuple(adapters[t].modules[name].rank for t in present)
        groups.setdefault((some.m, some.n, tuple(present), ranks), []).append(name)
    return tuple(Batch(tuple(names), m, n, tasks, ranks) for (m, n, tasks, ranks), names in groups.items())


def _check_method(resolved: Resolved, recipe: Recipe, batches: tuple[Batch, ...]) -> None:
    contract = resolved.method.contract
    if contract.equal_ranks:
        for batch in batches:
            if len(set(batch.ranks)) > 1:
                raise InputError(
                    "unequal_ranks",
                    f"{resolved.method.name} needs equal ranks; {batch.names[0]} has {list(batch.ranks)}",
                    remedy="Merge adapters of one rank, or choose another method.",
                    where={"module": batch.names[0]},
                )
    if contract.min_models > 1:
        for batch in batches:
            if len(batch.tasks) < contract.min_models:
                raise InputError(
                    "too_few_models",
                    f"{resolved.method.name} needs {contract.min_models} models with {batch.names[0]}",
                    remedy="Leave out the adapters that lack it, or choose another method.",
                    where={"module": batch.names[0]},
                )
    if contract.needs_base and recipe.base_model is None:
        raise InputError(
            "base_model_required",
            f"{resolved.method.name} needs a base model",
            remedy="Set `base_model` in the recipe.",
            where={"field": "base_model"},
        )


def _check_family(resolved: Resolved, recipe: Recipe, table: Compatibility) -> None:
    """What needs the layers' names in the base is for PEFT adapters of layers only."""
    if table.family == "peft" and not table.target_parameters:
        return
    what = "PEFT adapters of bare parameters" if table.family == "peft" else f"{table.family} files"
    if recipe.output.format != "lora":
        raise InputError(
            "family_output_unsupported",
            f"{what} can only be merged into a LoRA, not into a {recipe.output.format}",
            remedy="Set output.format to lora.",
            where={"field": "output.format"},
        )
    if resolved.method.contract.multi_output:
        raise InputError(
            "family_method_unsupported",
            f"{resolved.method.name} is for PEFT adapters of layers; these are {what}",
            remedy="Choose a method with one result.",
            where={"field": "merge_method"},
        )


def _dtype(recipe: Recipe, adapters: list[Adapter]) -> str:
    if recipe.output.dtype != "auto":
        return DTYPES[recipe.output.dtype]
    found = sorted({module.dtype for adapter in adapters for module in adapter.modules.values()})
    return found[0] if len(found) == 1 and found[0] in ("F16", "BF16", "F32") else "F32"


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
