"""What ``merging.plan`` says of a mergekit configuration. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merging.mergekit.plan import MergekitPlan, Resolve, prepare
from merging.mergekit.schedule import Output
from merging.planning import Plan

_PROCESS_BYTES = 350 << 20
_BLOCK_BYTES = 64 << 20
_RATES = {"linear": 3.0e8, "passthrough": 6.0e8, "slerp": 1.5e8, "task_arithmetic": 2.5e8, "della": 3.0e7}
_RATE = 5.0e7
"""Entries per second, with a margin; only the order of magnitude is meant."""


def describe(document: Mapping[str, Any], *, name: str, resolve: Resolve) -> Plan:
    """Validate a configuration and estimate it; reads headers only."""
    with prepare(document, resolve=resolve, name=name) as plan:
        return _described(plan)


def _described(plan: MergekitPlan) -> Plan:
    outputs = plan.schedule.outputs
    dtypes = sorted({output.out_dtype for output in outputs if not output.copy})
    read = sum(info.end - info.begin for model in plan.models.values() for info in model.infos.values())
    written = sum(shard.nbytes for shard in plan.shards)
    numbers = sum(math.prod(output.shape) for output in outputs)
    seconds = numbers / _RATES.get(plan.config.method.name, _RATE) + (read + written) / 1.0e9 + 2.0
    largest = max((math.prod(output.shape) for output in outputs), default=0)
    extra = 4 * largest if plan.config.method.name in ("sce", "della", "della_linear") else 0
    modules = [_module(plan, output) for output in outputs]
    return Plan(
        method=plan.config.method.name,
        space=None,
        parameters={"compat": "mergekit"},
        models=[
            {
                "model": label,
                "parameters": {},
                "format": "checkpoint",
                "base_model": None,
                "modules": len(model.infos),
                "min_rank": min((_rank(info.shape) for info in model.infos.values()), default=0),
                "max_rank": max((_rank(info.shape) for info in model.infos.values()), default=0),
            }
            for label, model in plan.models.items()
        ],
        modules=sorted(modules, key=lambda module: str(module["name"])),
        output={
            "format": "checkpoint",
            "family": "checkpoint",
            "dtype": dtypes[0] if len(dtypes) == 1 else "mixed",
            "rank": max((module["output_rank"] for module in modules), default=0),
            "files": [shard.file for shard in plan.shards],
        },
        estimate={
            "output_bytes": written,
            "read_bytes": read,
            "shards": len(plan.shards),
            "seconds": math.ceil(10 * seconds) / 10,
            "memory_bytes": _PROCESS_BYTES + _BLOCK_BYTES + extra,
        },
        warnings=[{"code": "mergekit_note", "message": text} for text in plan.schedule.warnings],
    )


def _module(plan: MergekitPlan, output: Output) -> dict[str, Any]:
    models = list(plan.models)
    rank = _rank(output.shape)
    return {
        "name": output.name,
        "kind": "tensor",
        "m": output.shape[0] if len(output.shape) > 1 else 1,
        "n": math.prod(output.shape[1:]) if len(output.shape) > 1 else math.prod(output.shape),
        "models": [models.index(item.model) for item in output.inputs],
        "ranks": [rank for _ in output.inputs],
        "output_rank": rank,
    }


def _rank(shape: tuple[int, ...]) -> int:
    return min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 1
