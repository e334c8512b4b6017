"""What a merge did: collected module by module, told in ``report.json``."""

from __future__ import annotations

import math
import platform
from typing import Any

from merging.catalog.spec import MethodParams
from merging.diagnostics.telling import Measured, inputs_data, module_data, relation
from merging.diagnostics.whole import whole_model
from merging.formats.conv1d import doubtful
from merging.outcomes import Outcome
from merging.preparing import Prepared

CANCELLED = 1e-6
"""A merged update shorter than this fraction of its weighted inputs may be nothing but rounding."""


class Findings:
    """Collects outcomes (without their tensors) and warnings; settles ``lambda``.

    ``tasks`` are the models it speaks of: all of them, or the one of a part of a multi-output merge.
    """

    def __init__(self, prepared: Prepared, tasks: tuple[int, ...] | None = None) -> None:
        self.prepared = prepared
        self.tasks = tuple(range(len(prepared.adapters))) if tasks is None else tasks
        self.modules: list[dict[str, Any]] = []
        self.warnings: list[dict[str, str]] = []
        self.lambda_ = 1.0
        self.calibration: dict[str, Any] = {}
        self._squares = [0.0] * len(prepared.adapters)
        self._inner = [0.0] * len(prepared.adapters)
        self._norm2 = 0.0
        self._discarded = 0.0
        for task in self.tasks:
            adapter = prepared.adapters[task]
            for text in adapter.warnings:
                self.warn("adapter_warning", f"{adapter.label}: {text}")
        if prepared.recipe.output.format == "delta" and doubtful(prepared.table.modules):
            self.warn(
                "orientation_doubtful",
                "PEFT notes fan_in_fan_out once for all layers; if the base has both Conv1D and Linear "
                "layers, as GPT-2 with its head, some updates in this file are transposed. Write a "
                "checkpoint instead: there the base decides.",
            )
        for text in prepared.table.warnings:
            self.warn("inputs_warning", text)

    def warn(self, code: str, message: str) -> None:
        """Note something the user should know; repeated messages count once. Any thread may call."""
        entry = {"code": code, "message": message}
        if entry not in self.warnings:
            self.warnings.append(entry)

    def add(self, outcome: Outcome) -> None:
        """Note one merged module."""
        self.modules.append(
            {
                "name": outcome.name,
                "m": outcome.m,
                "n": outcome.n,
                "rank": outcome.rank,
                "norm": outcome.norm,
                "discarded": outcome.discarded,
                "tasks": outcome.tasks,
                "ranks": outcome.ranks,
                "input_norms": outcome.input_norms,
                "inner": outcome.inner,
                "measured": Measured(
                    tuple(map(self.tasks.index, outcome.tasks)), outcome.m, outcome.n, outcome.facts
                ),
            }
        )
        self._norm2 += outcome.norm**2
        self._discarded += outcome.discarded
        for task, norm, product in zip(outcome.tasks, outcome.input_norms, outcome.inner, strict=True):
            self._squares[task] += norm**2
            self._inner[task] += product

    def settle_lambda(self) -> float:
        """The number that ``lambda`` stands for.

        ``auto`` makes the norm of the merged update (over the whole model) the method's documented
        multiple of the mean norm of the inputs.
        """
        self.modules.sort(key=lambda module: str(module["name"]))
        params: MethodParams = self.prepared.resolved.params
        wanted = self.prepared.resolved.auto_norm
        if params.lambda_ != "auto":
            self.lambda_ = float(params.lambda_)
        elif wanted is None or self._norm2 == 0.0:
            self.lambda_ = 1.0
        elif math.sqrt(self._norm2) < CANCELLED * self._mean_weighted_norm():
            self.lambda_ = 1.0
            self.warn(
                "updates_cancel",
                "the updates cancel each other, and what is left may be rounding: `lambda: auto` is 1 here",
            )
        else:
            self.lambda_ = wanted * self.mean_input_norm() / math.sqrt(self._norm2)
        self._warn_if_too_long(params)
        return self.lambda_

    def _warn_if_too_long(self, params: MethodParams) -> None:
        """A merged update far longer than any input usually hurts more than the merge helps."""
        wanted = self.prepared.resolved.auto_norm
        ratio = _ratio(math.sqrt(self._norm2) * abs(self.lambda_), self.mean_input_norm())
        if wanted is None or params.lambda_ == "auto" or len(self.tasks) < 2 or ratio <= 2.0 * wanted:
            return
        self.warn(
            "large_merged_norm",
            f"the merged update is {ratio:.1f} times as long as the inputs are on average; about {wanted:g} "
            "times works best on our benchmark. Use `lambda: auto` or smaller weights.",
        )

    def mean_input_norm(self) -> float:
        """The mean over the models of the Frobenius norm of their whole update."""
        return sum(math.sqrt(self._squares[task]) for task in self.tasks) / len(self.tasks)

    def _mean_weighted_norm(self) -> float:
        weights = self.prepared.resolved.per_model
        norms = [abs(weights[task].weight) * math.sqrt(self._squares[task]) for task in self.tasks]
        return sum(norms) / len(norms)

    def summary(self) -> dict[str, Any]:
        """The whole model in one place; norms and inner products add up over modules."""
        factor = self.lambda_
        norm = math.sqrt(self._norm2) * abs(factor)
        ranks = [module["rank"] for module in self.modules]
        total = self._norm2 + self._discarded
        whole = whole_model([module["measured"] for module in self.modules], len(self.tasks), factor)
        return {
            "modules": len(self.modules),
            "lambda": factor,
            "norm": norm,
            "norm_ratio": _ratio(norm, self.mean_input_norm()),
            "min_rank": min(ranks, default=0),
            "max_rank": max(ranks, default=0),
            "discarded_energy": _ratio(self._discarded, total),
            "inputs": [
                {
                    "model": self.prepared.labels[task],
                    "norm": math.sqrt(self._squares[task]),
                    **relation(norm, self._squares[task], factor * self._inner[task]),
                    **data,
                }
                for task, data in zip(self.tasks, whole.inputs, strict=True)
            ],
            "diagnostics": whole.summary,
        }

    def module_entries(self) -> dict[str, dict[str, Any]]:
        """Per module: shapes, ranks, norms, discarded energy, and the relation to each input."""
        return {module["name"]: self._entry(module) for module in self.modules}

    def _entry(self, module: dict[str, Any]) -> dict[str, Any]:
        norm = module["norm"] * abs(self.lambda_)
        labels = self.prepared.labels
        return {
            "m": module["m"],
            "n": module["n"],
            "rank": module["rank"],
            "norm": norm,
            "discarded_energy": _ratio(module["discarded"], module["norm"] ** 2 + module["discarded"]),
            "inputs": [
                {
                    "model": labels[task],
                    "rank": rank,
                    "norm": input_norm,
                    **relation(norm, input_norm**2, self.lambda_ * product),
                    **data,
                }
                for task, rank, input_norm, product, data in zip(
                    module["tasks"],
                    module["ranks"],
                    module["input_norms"],
                    module["inner"],
                    inputs_data(module["measured"], self.lambda_),
                    strict=True,
                )
            ],
            "diagnostics": module_data(module["measured"], self.lambda_),
        }


def build_report(findings: Findings, digest: str, device: str) -> dict[str, Any]:
    """The content of ``report.json``: the same for the same recipe, inputs, seed, device and versions."""
    prepared = findings.prepared
    return {
        "recipe_digest": digest,
        "method": prepared.resolved.method.name,
        "space": prepared.resolved.space,
        "seed": prepared.recipe.seed,
        "device": device,
        "versions": versions(),
        "inputs": [_input(prepared, task) for task in findings.tasks],
        "summary": findings.summary(),
        "modules": findings.module_entries(),
        **({"calibration": findings.calibration} if findings.calibration else {}),
        "warnings": sorted(findings.warnings, key=lambda entry: (entry["code"], entry["message"])),
    }


def _input(prepared: Prepared, task: int) -> dict[str, Any]:
    adapter = prepared.adapters[task]
    return {
        "model": adapter.label,
        "digest": adapter.digest,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "base_revision": adapter.base_revision,
        "parameters": prepared.resolved.per_model[task].model_dump(mode="json", by_alias=True),
    }


def versions() -> dict[str, str]:
    """Versions that can change bytes."""
    import numpy as np
    import torch

    from merging import __version__

    return {
        "merganser": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0
