"""Diagnostics of a whole model, and their place in ``report.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import products, write_adapter
from measuring import (
    build_stack,
    mean_update,
    measured,
    module_of,
    told,
)

import merging
from merging.diagnostics import measure
from merging.diagnostics.telling import Measured, inputs_data, module_data
from merging.diagnostics.whole import whole_model
from merging.updates import LowRank, UpdateStack


def test_the_whole_model_is_the_block_diagonal_matrix_of_its_modules() -> None:
    shapes = [(12, 9), (7, 14)]
    stacks = [build_stack((3, 3), m, n, seed=i) for i, (m, n) in enumerate(shapes)]
    modules = [module_of(stack) for stack in stacks]
    deltas = [torch.block_diag(*(stack.task(t)[0] for stack in stacks)) for t in range(2)]
    whole = whole_model(modules, 2)
    cosine = float((deltas[0] * deltas[1]).sum() / deltas[0].norm() / deltas[1].norm())
    assert whole.summary["cosine"][0][1] == pytest.approx(cosine, rel=1e-5)
    for t, entry in enumerate(whole.inputs):
        values = torch.linalg.svdvals(deltas[t])
        assert entry["spectral_norm"] == pytest.approx(float(values[0]), rel=1e-5)
        assert entry["nuclear_norm"] == pytest.approx(float(values.sum()), rel=1e-5)
    total = sum(delta for delta in deltas)
    parts = sum(delta.abs() for delta in deltas)
    assert whole.summary["cancellation"] == pytest.approx(
        1 - float(total.abs().sum() / parts.sum()), rel=1e-5
    )
    assert whole.summary["sti"] == pytest.approx(sum(module_data(m)["sti"] for m in modules), rel=1e-5)
    merged = torch.linalg.svdvals(total / 2)
    assert whole.summary["merged"]["nuclear_norm"] == pytest.approx(float(merged.sum()), rel=1e-5)
    assert whole.summary["merged"]["spectral_norm"] == pytest.approx(float(merged[0]), rel=1e-5)


def test_models_without_a_module_take_no_part_in_it() -> None:
    first, second = build_stack((3, 2), 12, 9), build_stack((2,), 7, 14, seed=1)
    modules = [module_of(first), Measured((1,), 7, 14, measured(second))]
    whole = whole_model(modules, 2)
    assert whole.inputs[0] == inputs_data(modules[0])[0]
    assert whole.summary["row_overlap"][0][1] == module_data(modules[0])["row_overlap"][0][1]
    squares = float((first.task(1) ** 2).sum()), float((second.task(0) ** 2).sum())
    ranks = inputs_data(modules[0])[1]["stable_rank"], inputs_data(modules[1])[0]["stable_rank"]
    expected = sum(s * r for s, r in zip(squares, ranks, strict=True)) / sum(squares)
    assert whole.inputs[1]["stable_rank"] == pytest.approx(expected, rel=1e-5)


def test_lambda_scales_the_merged_norms_and_moves_the_gap() -> None:
    stack = build_stack((3, 4), 20, 16)
    plain, doubled = told(stack), told(stack, factor=-2.0)
    for name in ("spectral_norm", "nuclear_norm"):
        assert doubled["merged"][name] == pytest.approx(2 * plain["merged"][name], rel=1e-5)
    assert doubled["merged"]["stable_rank"] == plain["merged"]["stable_rank"]
    assert doubled["inputs"][0]["subspace_alignment"] == plain["inputs"][0]["subspace_alignment"]
    B, A = mean_update(stack).factors()
    assert doubled["inputs"][0]["l1_gap"] == told(stack, LowRank(-2.0 * B, A))["inputs"][0]["l1_gap"]


# In a report


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed=i, rank=4) for i, name in enumerate("abc")]


def merge(paths: list[Path], out: Path, method: str = "svd", **more: Any) -> dict[str, Any]:
    recipe = {"merge_method": method, "models": [{"model": str(path)} for path in paths], **more}
    merging.merge(recipe, out, threads=1)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    return report


def stack_of(paths: list[Path], module: str) -> UpdateStack:
    factors = []
    for path in paths:
        with merging.load_adapter(path) as adapter:
            factors.append(adapter.factors(module))
    B, A = zip(*factors, strict=True)
    tasks = tuple(range(len(paths)))
    return UpdateStack((module,), tasks, tuple(b[None] for b in B), tuple(a[None] for a in A))


def test_every_merge_reports_its_diagnostics(three: list[Path], tmp_path: Path) -> None:
    report = merge(three, tmp_path / "out", "ties", space="core", parameters={"lambda": 0.7}, seed=3)
    models = [Path(entry["model"]) for entry in report["inputs"]]
    for name, entry in report["modules"].items():
        stack = stack_of(models, name)
        merged = products(tmp_path / "out")[name].to(torch.float32)
        expected = told(stack, LowRank(None, merged[None]))
        assert entry["diagnostics"]["cosine"] == expected["cosine"]
        assert entry["diagnostics"]["sign_conflict"] == expected["sign_conflict"]
        for got, wanted in zip(entry["inputs"], expected["inputs"], strict=True):
            assert got["l1_gap"] == pytest.approx(wanted["l1_gap"], rel=1e-4)
            assert 0.0 < got["subspace_alignment"] <= 1.0
    summary = report["summary"]["diagnostics"]
    assert summary["cosine"][0][0] == 1.0
    assert summary["sampled_entries"] == 4 * 24 * 16 - 2 * 12 * 16
    values = [float(torch.linalg.svdvals(delta)[0]) for delta in products(tmp_path / "out").values()]
    assert summary["merged"]["spectral_norm"] == pytest.approx(max(values), rel=1e-4)


def test_norms_and_retention_are_those_of_the_written_adapter(three: list[Path], tmp_path: Path) -> None:
    report = merge(three, tmp_path / "out", output={"rank": 3})
    written = products(tmp_path / "out")
    norm = math.sqrt(sum(float((delta**2).sum()) for delta in written.values()))
    assert report["summary"]["norm"] == pytest.approx(norm, rel=1e-5)
    for entry in report["summary"]["inputs"]:
        task = products(Path(entry["model"]))
        square = sum(float((delta**2).sum()) for delta in task.values())
        product = sum(float((delta * written[name]).sum()) for name, delta in task.items())
        error = sum(float(((delta - written[name]) ** 2).sum()) for name, delta in task.items())
        assert entry["retention"] == pytest.approx(product / square, rel=1e-4)
        assert entry["relative_error"] == pytest.approx(math.sqrt(error / square), rel=1e-4)


def test_the_order_of_the_recipe_does_not_reach_the_report(three: list[Path], tmp_path: Path) -> None:
    one, other = merge(three, tmp_path / "one"), merge(three[::-1], tmp_path / "other")
    assert one["modules"] == other["modules"]
    assert one["summary"] == other["summary"]


def test_a_split_merge_tells_how_its_inputs_relate(three: list[Path], tmp_path: Path) -> None:
    report = merge(three, tmp_path / "out", "rmm", parameters={"basis_size": 4})
    models = [Path(entry["model"]) for entry in report["inputs"]]
    for name, entry in report["modules"].items():
        expected = module_data(Measured((0, 1, 2), 1, 1, measure(stack_of(models, name), None)[0]))
        assert entry["diagnostics"] == expected
    assert len(report["summary"]["diagnostics"]["cosine"]) == 3
    assert "merged" not in report["summary"]["diagnostics"]
