"""What ``merging.plan`` says of a dense merge. No torch here."""

from __future__ import annotations

import math
from typing import Any

from merging.dense.inputs import Model, Resolve
from merging.dense.jobs import FLOATS, TensorJob
from merging.dense.plan import DensePlan, prepare_dense
from merging.dense.table import EXACT_NUMEL, REDUCED_RANK
from merging.formats.adapter import Adapter
from merging.formats.guard import ITEM_BYTES
from merging.planning import Plan
from merging.recipe import Recipe

BLOCK_BYTES = 96 << 20
"""What a thread needs for the blocks of a tensor."""

IDLE_BYTES = 160 << 20
"""What a process has before it merges, by measurement."""

_PROCESS_BYTES = 350 << 20
_RATES = {"linear": 4.0e8, "slerp": 3.0e8}
_ENTRY_RATE = 6.0e7
_SPECTRAL_RATE = 1.0e10
SPECTRAL = ("tsv", "iso_c", "iso_cts", "cart")
SPECTRAL_COPIES = 42
"""Of a square matrix, for each model, by measurement; fewer of others."""


def job_bytes(plan: DensePlan) -> int:
    """The working memory of the largest tensor beside the blocks of a thread."""
    largest = max((job.numel for job in plan.jobs if job.inputs), default=0)
    name = plan.resolved.method.name
    copies = {"linear": 0, "slerp": 0, "sce": 2, "svd": 4}.get(name, 1)
    if plan.recipe.output.format == "lora":
        copies += 3
    found = 4 * copies * largest
    if name in SPECTRAL:
        found += max((_spectral(job, len(job.inputs)) for job in plan.jobs if job.inputs), default=0)
    return BLOCK_BYTES + found


def _spectral(job: TensorJob, tasks: int) -> int:
    """What a spectral method holds at once for a matrix: of the large ones their leading part."""
    if len(job.shape) != 2:
        return 0
    if job.numel <= EXACT_NUMEL:
        return 4 * SPECTRAL_COPIES * tasks * job.numel
    return 4 * (8 * job.numel + SPECTRAL_COPIES * tasks * REDUCED_RANK * sum(job.matrix))


def describe_dense(recipe: Recipe, *, resolve: Resolve) -> Plan:
    """Validate a dense merge and estimate it; reads headers only."""
    with prepare_dense(recipe, resolve=resolve, canonical=False) as plan:
        return _described(plan)


def _described(plan: DensePlan) -> Plan:
    output = plan.recipe.output
    bound = [limit for limit in (output.rank, output.max_rank) if limit is not None]
    modules = []
    for job in plan.jobs:
        if not job.inputs:
            continue
        m, n = job.matrix
        modules.append(
            {
                "name": job.name,
                "kind": "tensor",
                "m": m,
                "n": n,
                "models": list(job.tasks),
                "ranks": [_rank(plan.models[entry.model], entry.key, m, n) for entry in job.inputs],
                "output_rank": min([m, n, *(bound if output.format == "lora" else ())]),
            }
        )
    warnings = [{"code": "inputs_warning", "message": text} for text in plan.table.warnings]
    return Plan(
        method=plan.resolved.method.name,
        space=plan.resolved.space,
        parameters=plan.resolved.params.model_dump(mode="json", by_alias=True),
        models=[_model(plan, index, model) for index, model in enumerate(plan.models)],
        modules=sorted(modules, key=lambda module: str(module["name"])),
        output={
            "format": output.format,
            "family": "checkpoint" if output.format == "checkpoint" else "peft",
            "dtype": _dtype(plan),
            "rank": max((int(module["output_rank"]) for module in modules), default=0),
            "files": [shard.file for shard in plan.shards] if output.format != "lora" else [],
        },
        estimate=_estimate(plan),
        warnings=warnings,
    )


def _rank(model: Model, key: str, m: int, n: int) -> int:
    return model.modules[key].rank if isinstance(model, Adapter) else min(m, n)


def _model(plan: DensePlan, index: int, model: Model) -> dict[str, Any]:
    count = len(model.modules) if isinstance(model, Adapter) else len(model.infos)
    ranks = (
        [module.rank for module in model.modules.values()]
        if isinstance(model, Adapter)
        else [min(job.matrix) for job in plan.jobs if index in job.tasks]
    )
    return {
        "model": model.label,
        "parameters": dict(plan.recipe.models[index].parameters),
        "format": model.format,
        "base_model": model.base_model,
        "modules": count,
        "min_rank": min(ranks, default=0),
        "max_rank": max(ranks, default=0),
    }


def _dtype(plan: DensePlan) -> str:
    found = sorted({plan.dtype(job) for job in plan.jobs if job.dtype in FLOATS})
    return found[0] if len(found) == 1 else "mixed"


def _estimate(plan: DensePlan) -> dict[str, Any]:
    name = plan.resolved.method.name
    numbers = sum(job.numel * len(job.inputs) for job in plan.jobs)
    if name in SPECTRAL or name == "svd" or plan.recipe.output.format == "lora":
        work = sum(
            20.0 * job.numel * min(job.matrix) * len(job.inputs) for job in plan.jobs if len(job.shape) == 2
        )
        seconds = work / _SPECTRAL_RATE
    else:
        seconds = numbers / _RATES.get(name, _ENTRY_RATE)
    read = sum(
        info.end - info.begin
        for model in (*plan.models, *([plan.base] if plan.base is not None else []))
        if not isinstance(model, Adapter)
        for info in model.infos.values()
    )
    written = sum(shard.nbytes for shard in plan.shards)
    if plan.recipe.output.format == "lora":
        rank = plan.recipe.output.rank or plan.recipe.output.max_rank
        written = sum(
            min([*job.matrix, *([rank] if rank else ())]) * sum(job.matrix) * ITEM_BYTES[plan.dtype(job)]
            for job in plan.jobs
        )
    seconds += (read + written) / 1.0e9
    return {
        "output_bytes": int(written),
        "read_bytes": int(read),
        "shards": len(plan.shards),
        "seconds": math.ceil(10 * (seconds + 2.0)) / 10,
        "memory_bytes": _PROCESS_BYTES + job_bytes(plan),
    }
