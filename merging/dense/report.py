"""``report.json`` of a dense merge: per tensor and for the whole model, from what the shards measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from merging.dense import watch
from merging.dense.inputs import Model
from merging.dense.plan import DensePlan, Origin
from merging.dense.runner import ShardResult
from merging.dense.settled import Settled
from merging.diagnostics.telling import relation
from merging.report import versions

SHOWN = 5
"""Warnings of one kind that are spelled out; tensors are many."""


def dense_report(plan: DensePlan, parts: Sequence[ShardResult], settled: Settled) -> dict[str, Any]:
    """The same for the same recipe, inputs, seed and versions, however the shards were made."""
    if plan.origin is not None:
        return _fused(plan, plan.origin, parts)
    tensors = [tensor for part in parts for tensor in part.tensors]
    summary = _summary(plan, tensors, settled.lambda_)
    return {
        "recipe_digest": plan.digest,
        "method": plan.resolved.method.name,
        "space": plan.resolved.space,
        "seed": plan.recipe.seed,
        "device": "cpu",
        "versions": versions(),
        "base": _base(plan),
        "inputs": [_input(plan, index, model) for index, model in enumerate(plan.models)],
        "summary": summary,
        "modules": {tensor["name"]: _entry(plan, tensor, settled.lambda_) for tensor in tensors},
        "files": {part.file: part.sha256 for part in parts},
        "warnings": [*_warnings(plan, parts), *_too_long(plan, summary["norm_ratio"])],
    }


def _fused(plan: DensePlan, origin: Origin, parts: Sequence[ShardResult]) -> dict[str, Any]:
    """The report of the adapter that was added to the base, with what became of it."""
    found = {
        **origin.report,
        "recipe_digest": plan.digest,
        "base": _base(plan),
        "files": {part.file: part.sha256 for part in parts},
    }
    found["warnings"] = [*origin.report["warnings"], *_warnings(plan, parts)]
    return found


def _base(plan: DensePlan) -> dict[str, str] | None:
    return None if plan.base is None else {"model": plan.base.label, "digest": plan.digest_of(plan.base)}


def _input(plan: DensePlan, index: int, model: Model) -> dict[str, Any]:
    return {
        "model": model.label,
        "digest": plan.digest_of(model),
        "format": model.format,
        "base_model": model.base_model,
        "base_revision": getattr(model, "base_revision", None),
        "parameters": plan.resolved.per_model[index].model_dump(mode="json", by_alias=True),
    }


def _summary(plan: DensePlan, tensors: Sequence[dict[str, Any]], factor: float) -> dict[str, Any]:
    T = len(plan.models)
    squares, products = [0.0] * T, [0.0] * T
    for tensor in tensors:
        for task, square, product in zip(tensor["tasks"], tensor["inputs2"], tensor["inner"], strict=True):
            squares[task] += square
            products[task] += product
    merged = sum(tensor["norm2"] for tensor in tensors)
    discarded = sum(tensor["discarded"] for tensor in tensors)
    norm = math.sqrt(merged) * abs(factor)
    mean = sum(math.sqrt(square) for square in squares) / T
    ranks = [tensor["rank"] for tensor in tensors if tensor["rank"] is not None]
    diagnostics, gaps = watch.whole_data(tensors, T)
    return {
        "modules": len(tensors),
        "copied": len(plan.jobs) - len(tensors),
        "lambda": factor,
        "norm": norm,
        "norm_ratio": norm / mean if mean > 0.0 else 0.0,
        "min_rank": min(ranks, default=None),
        "max_rank": max(ranks, default=None),
        "discarded_energy": discarded / merged if merged > 0.0 else 0.0,
        "inputs": [
            {
                "model": label,
                "norm": math.sqrt(squares[task]),
                **relation(norm, squares[task], factor * products[task]),
                "l1_gap": gaps[task],
            }
            for task, label in enumerate(plan.labels)
        ],
        "diagnostics": diagnostics,
    }


def _entry(plan: DensePlan, tensor: dict[str, Any], factor: float) -> dict[str, Any]:
    norm = math.sqrt(tensor["norm2"]) * abs(factor)
    return {
        "m": tensor["m"],
        "n": tensor["n"],
        "rank": tensor["rank"],
        "norm": norm,
        "discarded_energy": tensor["discarded"] / tensor["norm2"] if tensor["norm2"] > 0.0 else 0.0,
        "inputs": [
            {
                "model": plan.labels[task],
                "norm": math.sqrt(square),
                **relation(norm, square, factor * product),
                "l1_gap": gap,
            }
            for task, square, product, gap in zip(
                tensor["tasks"],
                tensor["inputs2"],
                tensor["inner"],
                watch.gaps(tensor),
                strict=True,
            )
        ],
        "diagnostics": watch.module_data(tensor),
    }


def _warnings(plan: DensePlan, parts: Sequence[ShardResult]) -> list[dict[str, str]]:
    found = {(entry["code"], entry["message"]) for part in parts for entry in part.warnings}
    found |= {("inputs_warning", text) for text in plan.table.warnings}
    for model in plan.models:
        found |= {("inputs_warning", f"{model.label}: {text}") for text in model.warnings}
    if plan.base is not None and plan.recipe.output.format == "checkpoint":
        code = (plan.base.config or {}).get("auto_map") or list(plan.base.path.glob("*.py"))
        if code:
            found.add(("remote_code_left", "the base brings code of its own, which was not copied"))
    shown: list[dict[str, str]] = []
    for code in sorted({code for code, _ in found}):
        messages = sorted(message for other, message in found if other == code)
        shown += [{"code": code, "message": message} for message in messages[:SHOWN]]
        if len(messages) > SHOWN:
            shown.append({"code": code, "message": f"and {len(messages) - SHOWN} more of this kind"})
    return shown


def _too_long(plan: DensePlan, ratio: float) -> list[dict[str, str]]:
    """A merged update far longer than any input usually hurts more than the merge helps."""
    wanted = plan.resolved.auto_norm
    if (
        wanted is None
        or plan.resolved.params.lambda_ == "auto"
        or len(plan.models) < 2
        or ratio <= 2.0 * wanted
    ):
        return []
    text = (
        f"the merged difference is {ratio:.1f} times as long as the inputs' are on average; about {wanted:g} "
        "times is usual. Use `lambda: auto` or smaller weights."
    )
    return [{"code": "large_merged_norm", "message": text}]
