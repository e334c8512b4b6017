"""A recipe with its inputs opened and checked, before any tensor is read. No torch here.

``prepare`` opens the inputs, checks them against each other and against the method's contract, and groups
the modules into batches of equal shape.
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
from merging.catalog import Resolved
from merging.errors import InputError
from merging.formats.adapter import Adapter, Module, open_adapter
from merging.formats.compatible import Compatibility, check_compatible
from merging.recipe import Recipe

Resolve = Callable[[str], Path]

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
    # Elsewhere a module that a model lacks counts as a zero update, if the recipe lets it be absent at all.
    if contract.data and contract.min_models > 1:
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
