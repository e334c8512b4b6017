"""From a recipe to a plan of shards: everything that headers can tell about a dense merge. No torch here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from merging.catalog import Resolved
from merging.dense.checks import check_models, check_output, resolve_dense, stand_in
from merging.dense.inputs import Model, Resolve, is_dense, open_base, open_model
from merging.dense.jobs import BUFFERS, FLOATS, TensorJob
from merging.dense.table import Table, build_table
from merging.formats.adapter import Adapter
from merging.formats.guard import ITEM_BYTES
from merging.formats.shards import shard_names
from merging.formats.task_vector import STEM
from merging.formats.tensor_set import TensorSet
from merging.recipe import Recipe

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_BYTES = 2_000_000_000
STEMS = {"checkpoint": "model", "delta": STEM, "lora": "lora"}


@dataclass(frozen=True)
class ShardPlan:
    """One unit of work: the tensors of one output file. ``file`` is its name, ``nbytes`` their size."""

    index: int
    file: str
    jobs: tuple[TensorJob, ...]
    nbytes: int


@dataclass(frozen=True)
class Origin:
    """Where the one adapter that is added to a base comes from: the recipe and report of its merge."""

    recipe: Recipe
    report: dict[str, Any]


@dataclass(frozen=True)
class DensePlan:
    """A checked dense merge. Models and per-model parameters share one order.

    ``sums`` gives the content digests of the models where the caller knows them (they are found by reading
    every file otherwise), by the reference in the recipe.
    """

    recipe: Recipe
    resolved: Resolved
    base: TensorSet | None
    models: tuple[Model, ...]
    table: Table
    shard_bytes: int = SHARD_BYTES
    sums: Mapping[str, str] | None = None
    origin: Origin | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(entry.model for entry in self.recipe.models)

    @cached_property
    def jobs(self) -> tuple[TensorJob, ...]:
        """The tensors that are written: all for a checkpoint, the merged ones otherwise."""
        if self.recipe.output.format == "checkpoint":
            return self.table.jobs
        return tuple(job for job in self.table.jobs if job.inputs)

    def dtype(self, job: TensorJob) -> str:
        """The dtype in which a tensor is written."""
        if job.dtype not in FLOATS or job.name.endswith(BUFFERS):
            return job.dtype
        output = self.recipe.output
        if output.dtype != "auto":
            return DTYPES[output.dtype]
        # small differences are subnormal in float16
        return "F32" if output.format != "checkpoint" and job.dtype == "F16" else job.dtype

    def digest_of(self, model: Model) -> str:
        """The content digest of a model or of the base."""
        known = (self.sums or {}).get(model.label)
        return known if known is not None else model.digest

    @cached_property
    def digest(self) -> str:
        """The digest of the recipe with all its inputs, the base included. Reads every file."""
        if self.origin is not None:
            return self._fused_digest(self.origin)
        found = {model.label: self.digest_of(model) for model in self.models}
        recipe = self.recipe
        if self.base is not None and recipe.base_model is not None:
            recipe = recipe.model_copy(update={"base_model": self.digest_of(self.base)})
        return recipe.digest(found, ordered=self.resolved.method.contract.ordered)

    def _fused_digest(self, origin: Origin) -> str:
        assert self.base is not None
        parts = [origin.report["recipe_digest"], self.digest_of(self.base), self.recipe.output.model_dump()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The output files, in the order of the tensors of the base."""
        groups: list[list[TensorJob]] = []
        sizes: list[int] = []
        for job in self.jobs:
            size = job.numel * ITEM_BYTES[self.dtype(job)]
            if not groups or (sizes[-1] and sizes[-1] + size > self.shard_bytes):
                groups.append([])
                sizes.append(0)
            groups[-1].append(job)
            sizes[-1] += size
        names = shard_names(STEMS[self.recipe.output.format], len(groups))
        parts = zip(names, groups, sizes, strict=True)
        return tuple(ShardPlan(i, name, tuple(jobs), size) for i, (name, jobs, size) in enumerate(parts))

    def close(self) -> None:
        """Close every file."""
        for model in (*self.models, *([] if self.base is None else [self.base])):
            model.close()


def shards(plan: DensePlan) -> list[ShardPlan]:
    """The units of work of a plan; each can be made on its own, anywhere."""
    return list(plan.shards)


@contextmanager
def prepare_dense(
    recipe: Recipe,
    *,
    resolve: Resolve,
    canonical: bool = True,
    shard_bytes: int | None = None,
    sums: Mapping[str, str] | None = None,
    origin: Origin | None = None,
    threads: int = 1,
) -> Iterator[DensePlan]:
    """Open and check the inputs of a dense merge; they are closed on exit.

    With ``canonical`` the models are put into an order that depends on their content only, which reads every
    file (as many models at once as there are ``threads``) unless ``sums`` gives its digest (by the
    reference in the recipe).
    """
    resolved = resolve_dense(recipe, whole=any(is_dense(resolve(entry.model)) for entry in recipe.models))
    recipe = _spelled_out(recipe, resolved)
    opened: list[TensorSet | Adapter] = []
    try:
        models: list[Model] = []
        for entry in recipe.models:
            models.append(open_model(resolve(entry.model), entry.model))
            opened.append(models[-1])
        base = open_base(recipe, resolve)
        if base is not None:
            opened.append(base)
        if canonical:
            _hash([model for model in opened if model.label not in (sums or {})], threads)
        if canonical and not resolved.method.contract.ordered:
            recipe, resolved, models = _sorted(recipe, resolved, models, sums or {})
        base = base or stand_in(recipe, resolved, models)
        check_models(recipe, base, models, sums or {}, hashed=canonical)
        table = build_table(
            base,
            models,
            missing=recipe.missing_modules,
            full_modules=_full_modules(recipe, origin),
            allow_base_mismatch=recipe.allow_base_mismatch,
        )
        plan = DensePlan(
            recipe, resolved, base, tuple(models), table, shard_bytes or SHARD_BYTES, sums, origin
        )
        check_output(recipe, resolved, base, table)
        yield plan
    finally:
        for one in opened:
            one.close()


def _hash(models: list[TensorSet | Adapter], threads: int) -> None:
    """Find the digests, which the models then keep."""
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        for _ in pool.map(lambda model: model.digest, models):
            pass


def _full_modules(recipe: Recipe, origin: Origin | None) -> str:
    """What becomes of the tensors that an adapter holds in full."""
    if origin is not None:
        return "replace"  # they were merged with the adapter
    return recipe.modules_to_save if isinstance(recipe.modules_to_save, str) else "take"


def _spelled_out(recipe: Recipe, resolved: Resolved) -> Recipe:
    return recipe.model_copy(
        update={
            "merge_method": resolved.method.name,
            "space": resolved.space,
            "parameters": resolved.params.model_dump(mode="json", by_alias=True),
        }
    )


def _sorted(
    recipe: Recipe, resolved: Resolved, models: list[Model], sums: Mapping[str, str]
) -> tuple[Recipe, Resolved, list[Model]]:
    def key(index: int) -> tuple[str, str]:
        parameters = json.dumps(recipe.models[index].parameters, sort_keys=True)
        return sums.get(models[index].label) or models[index].digest, parameters

    order = sorted(range(len(models)), key=key)
    entries = tuple(recipe.models[i] for i in order)
    return (
        recipe.model_copy(update={"models": entries}),
        replace(resolved, per_model=tuple(resolved.per_model[i] for i in order)),
        [models[i] for i in order],
    )
