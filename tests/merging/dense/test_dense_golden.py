"""Whole models, file to file, against reference outputs of mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import read_all, recipe, write_checkpoint
from golden import Golden

import merging

SETS, LAYERS = ("hom4", "het246"), ("q", "v")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "task_arithmetic.d1.0.w111": ("linear", {}),
    "task_arithmetic_normalized.wmix": ("linear", {"normalize": True}),
    "ties.d0.2.w111": ("ties", {"density": 0.2}),
    "ties.d0.5.wmix": ("ties", {"density": 0.5}),
    "ties_rescaleL1.d0.5.wmix": ("ties", {"density": 0.5, "rescale": True}),
    "ties_nonorm_lambda0.7.d0.5.wmix": (
        "ties",
        {"density": 0.5, "normalize": False, "agg": "sum", "lambda": 0.7},
    ),
    "breadcrumbs.d0.5.g0.01.wmix": ("breadcrumbs", {"density": 0.5, "gamma": 0.01}),
    "sce.k0.5": ("sce", {"select_topk": 0.5}),
    "sce.k1.0": ("sce", {"select_topk": 1.0}),
}
WEIGHTS = {"w111": (1.0, 1.0, 1.0), "wmix": (0.7, 0.3, -0.2)}


@pytest.fixture(scope="module")
def reference(golden_dir: Path) -> Golden:
    return Golden(golden_dir / "mergekit.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SETS)
def test_mergekit_rules_on_checkpoints(reference: Golden, tmp_path: Path, name: str, case: str) -> None:
    stacks = {f"{layer}.weight": reference.stack(name, layer) for layer in LAYERS}
    base = {key: torch.zeros(stack.m, stack.n, dtype=torch.float64) for key, stack in stacks.items()}
    models = [
        write_checkpoint(tmp_path / f"m{t}", {key: stack.task(t)[0] for key, stack in stacks.items()})
        for t in range(3)
    ]
    method, parameters = CASES[case]
    data = recipe(
        write_checkpoint(tmp_path / "base", base),
        models,
        method,
        parameters={"compat": "mergekit", **parameters},
    )
    for entry, weight in zip(data["models"], WEIGHTS.get(case.rpartition(".")[2], (1.0,) * 3), strict=True):
        entry["parameters"] = {"weight": weight}
    merging.merge(data, tmp_path / "out", device="cpu")
    result = read_all(tmp_path / "out")
    for layer in LAYERS:
        expected = reference.tensors[f"out.{name}.{layer}.{case}"]
        error = float((result[f"{layer}.weight"] - expected).norm())
        assert error <= 1e-9 * float(expected.norm())
