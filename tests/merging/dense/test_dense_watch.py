"""The diagnostics of dense merges against what the whole task vectors say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import base_tensors, recipe, tuned, write_checkpoint
from torch import Tensor

import merging
from merging.dense.watch import Watch, gaps, module_data, whole_data


def reference(deltas: list[Tensor]) -> dict[str, Any]:
    """All of it from the matrices themselves, float64."""
    x = torch.stack(deltas).flatten(1)
    norms = x.norm(dim=1)
    opposite = (x.unsqueeze(0) * x.unsqueeze(1) < 0).double().mean(-1)
    return {
        "cosine": (x @ x.mT / norms.outer(norms)).tolist(),
        "norm_imbalance": float(norms.max() / norms.min()),
        "sign_conflict": float(((x > 0).any(0) & (x < 0).any(0)).double().mean()),
        "cancellation": 1.0 - float(x.sum(0).abs().sum() / x.abs().sum()),
        "sign_conflict_pairs": opposite.tolist(),
    }


@pytest.mark.parametrize("output", ["checkpoint", "delta"])
def test_small_tensors_are_measured_in_full(tmp_path: Path, output: str) -> None:
    base = base_tensors(torch.float32)
    models = [tuned(base, seed + 1, 0.02 * (seed + 1)) for seed in range(3)]
    folders = [write_checkpoint(tmp_path / f"m{i}", model) for i, model in enumerate(models)]
    data = recipe(write_checkpoint(tmp_path / "base", base), folders, "linear")
    data.update(parameters={"lambda": 0.5}, output={"format": output, "dtype": "float32"})
    merging.merge(data, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    where = [next(i for i, f in enumerate(folders) if str(f) == entry["model"]) for entry in report["inputs"]]
    small = [name for name, module in report["modules"].items() if module["m"] <= 128 and module["n"] <= 64]
    assert small
    for name in small:
        module = report["modules"][name]
        deltas = [models[i][name].double() - base[name].double() for i in where]
        wanted = reference(deltas)
        for key in ("cosine", "norm_imbalance", "sign_conflict", "cancellation"):
            torch.testing.assert_close(
                torch.tensor(module["diagnostics"][key]), torch.tensor(wanted[key]), rtol=1e-4, atol=1e-5
            )
        merged = 0.5 * torch.stack(deltas).sum(0)
        for entry, delta in zip(module["inputs"], deltas, strict=True):
            rows = (merged - delta).reshape(module["m"], module["n"]).norm(dim=1)
            assert entry["l1_gap"] == pytest.approx(math.sqrt(2 / math.pi) * float(rows.mean()), rel=1e-4)
    whole = report["summary"]
    assert whole["diagnostics"]["norm_imbalance"] == pytest.approx(
        max(entry["norm"] for entry in whole["inputs"]) / min(entry["norm"] for entry in whole["inputs"]),
        rel=1e-5,
    )
    assert all(entry["l1_gap"] > 0.0 for entry in whole["inputs"])


def watched(deltas: list[Tensor], step: int) -> dict[str, Any]:
    x = torch.stack(deltas)
    m, n = deltas[0].shape
    watch = Watch("layer", (m, n), len(deltas), seed=3, factor=1.0)
    for start in range(0, m, step):
        block = x[:, start : start + step]
        watch.see(start, block.sum(0), block)
    tensor = {"m": m, "n": n, "tasks": list(range(len(deltas))), "diagnostics": watch.found()}
    return {**tensor, "inputs2": [float(delta.double().square().sum()) for delta in deltas]}


def test_large_tensors_are_sampled_alike_whatever_the_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(3000, 300, generator=generator)
    deltas = [shared + torch.randn(3000, 300, generator=generator) for _ in range(3)]
    tensor = watched(deltas, 64)
    summary, moved = whole_data([tensor], 3)
    wanted = reference([delta.double() for delta in deltas])
    assert summary["sampled_entries"] == 128 * 64
    torch.testing.assert_close(
        torch.tensor(summary["cosine"]), torch.tensor(wanted["cosine"]), rtol=0, atol=0.03
    )
    for key in ("sign_conflict", "cancellation", "sign_conflict_pairs"):
        torch.testing.assert_close(
            torch.tensor(summary[key]), torch.tensor(wanted[key]), rtol=0, atol=0.03, msg=key
        )
    again, same = whole_data([watched(deltas, 1000)], 3)
    assert again["sign_conflict_pairs"] == summary["sign_conflict_pairs"]
    assert same == pytest.approx(moved, rel=1e-5)


def test_models_that_lack_a_tensor_and_updates_that_are_zero() -> None:
    zero, one = torch.zeros(4, 4), torch.eye(4)
    tensor = watched([zero, one], 2)
    tensor["tasks"] = [0, 2]
    summary, moved = whole_data([tensor], 3)
    assert summary["cosine"][0] == [None, None, None]
    assert summary["cosine"][2] == [None, None, 1.0]
    assert summary["norm_imbalance"] is None
    assert (summary["sign_conflict"], summary["cancellation"]) == (0.0, 0.0)
    assert moved[1] is None
    assert moved[2] == 0.0


def test_shards_of_a_version_without_diagnostics_are_passed_over() -> None:
    old = {"m": 2, "n": 2, "tasks": [0, 1], "inputs2": [1.0, 1.0]}
    assert (module_data(old), gaps(old)) == (None, [None, None])
    summary, known = whole_data([old], 2)
    assert (summary["sampled_entries"], known) == (0, [None, None])
