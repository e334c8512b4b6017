"""RegMean and OSRM through the engine, and the invariants of their kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import products, write_adapter
from golden import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stacks import stacks
from tiny_models import MODULES, write_base, write_texts
from torch import Tensor

import merging
from merging.calibration.statistics_file import StatisticsFile
from merging.calibration.write import write_statistics
from merging.catalog.data import OsrmInitParams, OsrmProjectParams, RegmeanParams
from merging.errors import InputError, MergeFailure
from merging.kernels import Context
from merging.methods import osrm_init, osrm_project, regmean
from merging.updates import UpdateStack

Recipe = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"
quick = settings(max_examples=30, deadline=None)


class Given:
    """Statistics by task, the same for every module."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def gram(self, name: str, task: int) -> Tensor:
        return self.rows[task].T @ self.rows[task] / len(self.rows[task])

    def mean(self, name: str, task: int) -> Tensor:
        return self.rows[task].mean(0)


def rows_for(stack: UpdateStack, seed: int = 0, count: int = 60) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, stack.n, generator=generator, dtype=torch.float64) for _ in stack.tasks]


def context(params: Any, data: Given, count: int, weights: list[float] | None = None) -> Context:
    weights = weights or [1.0] * count
    own = tuple(params.model_copy(update={"weight": weight}) for weight in weights)
    return Context(params, own, tuple(f"digest-{t}" for t in range(count)), data=data)


# RegMean


@quick
@given(stack=stacks())
def test_regmean_is_least_squares_on_the_inputs_of_all_tasks(stack: UpdateStack) -> None:
    rows = rows_for(stack)
    params = RegmeanParams(off_diagonal=1.0, ridge=0.0)
    merged = regmean.merge_regmean(stack, context(params, Given(rows), stack.T)).update
    X = torch.cat(rows)
    for g in range(stack.G):
        wanted = torch.cat([rows[t] @ stack.task(t)[g].T for t in range(stack.T)])
        solution = torch.linalg.lstsq(X, wanted).solution.T
        error = float((merged.dense()[g] - solution).norm())
        assert error <= 1e-8 * max(1.0, float(solution.norm()))


@quick
@given(stack=stacks())
def test_regmean_with_equal_inputs_is_the_mean(stack: UpdateStack) -> None:
    rows = rows_for(stack)[:1] * stack.T
    merged = regmean.merge_regmean(stack, context(RegmeanParams(), Given(rows), stack.T)).update
    mean = stack.dense().mean(1)
    assert float((merged.dense() - mean).norm()) <= 1e-9 * max(1.0, float(mean.norm()))


@quick
@given(stack=stacks(min_tasks=2))
def test_in_directions_without_samples_regmean_is_the_mean(stack: UpdateStack) -> None:
    rows = rows_for(stack, count=8)
    blind = torch.zeros(stack.n, dtype=torch.float64)
    blind[0] = 1.0
    rows = [X - (X @ blind)[:, None] * blind for X in rows]
    rows = [X * (rows[0].norm() / X.norm()) for X in rows]  # equal ridges
    merged = regmean.merge_regmean(stack, context(RegmeanParams(ridge=1e-6), Given(rows), stack.T)).update
    mean = stack.dense().mean(1) @ blind
    assert float((merged.dense() @ blind - mean).norm()) <= 1e-6 * max(1.0, float(mean.norm()))


def test_a_large_weight_leaves_one_model() -> None:
    stack = UpdateStack(
        ("m",), (0, 1), (torch.randn(1, 5, 2).double(),) * 2, (torch.randn(1, 2, 4).double(),) * 2
    ).scaled(torch.tensor([1.0, 3.0]))
    found = context(RegmeanParams(), Given(rows_for(stack)), 2, [1e6, 1e-6])
    merged = regmean.merge_regmean(stack, found).update
    assert_close(merged.dense()[0], stack.task(0)[0], 1e-6)


def test_too_few_samples_without_a_ridge_are_an_error() -> None:
    stack = UpdateStack(("layer",), (0,), (torch.ones(1, 5, 1).double(),), (torch.ones(1, 1, 9).double(),))
    rows = [torch.zeros(8, 9, dtype=torch.float64)]
    with pytest.raises(MergeFailure) as caught:
        regmean.merge_regmean(stack, context(RegmeanParams(ridge=0.0), Given(rows), 1))
    assert caught.value.code == "gram_singular"
    assert caught.value.where["module"] == "layer"


def test_a_model_without_a_module_counts_with_its_base_weight(tiny: Recipe, tmp_path: Path) -> None:
    few = dict(list(MODULES.items())[:-1])
    last = list(MODULES)[-1]
    tiny["models"][0]["model"] = str(write_adapter(tmp_path / "few", seed=0, rank=2, modules=few))
    recipe = {**tiny, "merge_method": "regmean", "missing_modules": "zero"}
    write_statistics(recipe, tmp_path / "stats")
    merging.merge(recipe, tmp_path / "out")
    total, right = torch.zeros(24, 24), torch.zeros(16, 24)
    for entry in tiny["models"]:
        file = StatisticsFile(tmp_path / "stats" / f"{Path(entry['model']).name}.safetensors")
        C = regmean.conditioned(file.gram(last), 0.9, 1e-6)
        total = total + C
        if last in products(Path(entry["model"])):
            right = right + products(Path(entry["model"]))[last] @ C
    assert_close(products(tmp_path / "out")[last], right @ torch.linalg.inv(total), 1e-4)


# OSRM before training


@quick
@given(stack=stacks(min_tasks=2), r=st.integers(1, 3))
def test_a_start_is_orthonormal_and_no_other_reads_less(stack: UpdateStack, r: int) -> None:
    rows = rows_for(stack)
    params = OsrmInitParams(r=r)
    split = osrm_init.split(stack, context(params, Given(rows), stack.T))
    shares = [X.T @ X / X.square().sum() for X in rows]
    for t, update in enumerate(split.updates):
        B, A = update.factors()
        assert float(B.abs().max()) == 0.0
        others = sum((share for s, share in enumerate(shares) if s != t), torch.zeros_like(shares[0]))
        least = float(torch.linalg.eigvalsh(others)[:r].sum())
        for g in range(stack.G):
            assert_close(A[g] @ A[g].T, torch.eye(r, dtype=A.dtype), 1e-9)
            assert float((A[g] @ others @ A[g].T).trace()) == pytest.approx(least, abs=1e-9)
            chance = float(split.facts["interference_of_chance"][g, t])
            assert float(split.facts["interference"][g, t]) <= chance + 1e-9


@pytest.mark.parametrize("statistic", ["covariance", "mean"])
def test_adapters_to_start_from_change_nothing_yet(tiny: Recipe, tmp_path: Path, statistic: str) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    for t, entry in enumerate(tiny["models"]):
        entry["model"] = f"task-{t}"  # there is no such adapter
    parameters = {"r": 3, "statistic": statistic}
    recipe = {**tiny, "merge_method": "osrm_init", "parameters": parameters}
    result = merging.merge(recipe, tmp_path / "out")
    assert {file.partition("/")[0] for file in result.files if "/" in file} == {"task-0", "task-1", "task-2"}
    base = AutoModel.from_pretrained(tiny["base_model"]).eval()
    ids = torch.arange(2, 12).reshape(2, 5)
    with torch.no_grad():
        before = base(ids).last_hidden_state
        model = PeftModel.from_pretrained(base, tmp_path / "out" / "task-1", is_trainable=True)
        after = model(ids).last_hidden_state
    assert torch.equal(before, after)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4  # query and value of both layers
    tensors = load_file(tmp_path / "out" / "task-1" / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_A" in key:
            assert_close(tensor @ tensor.T, torch.eye(3), 1e-5)


def test_a_start_needs_layers_that_exist(tiny: Recipe) -> None:
    recipe = {**tiny, "merge_method": "osrm_init", "parameters": {"target_modules": ["w1"]}}
    with pytest.raises(InputError) as caught:
        merging.plan(recipe)
    assert caught.value.code == "target_modules_missing"


def test_a_rank_beyond_the_layer_is_refused(tiny: Recipe) -> None:
    recipe = {**tiny, "merge_method": "osrm_init", "parameters": {"r": 17}}
    with pytest.raises(InputError) as caught:
        merging.plan(recipe)
    assert caught.value.code == "rank_too_large"


# OSRM after training


@quick
@given(stack=stacks(min_tasks=2), beta=st.sampled_from([0.0, 0.3, 3.0]))
def test_a_projection_is_the_minimum_of_its_objective(stack: UpdateStack, beta: float) -> None:
    rows = rows_for(stack, count=20)
    params = OsrmProjectParams(beta=beta, normalize=False)
    split = osrm_project.split(stack, context(params, Given(rows), stack.T))
    grams = [X.T @ X / len(X) for X in rows]
    for t, update in enumerate(split.updates):
        B, after = update.factors()
        assert torch.equal(B, stack.B[t])
        others = sum((G for s, G in enumerate(grams) if s != t), torch.zeros_like(grams[0]))
        rho = 1e-3 * float((grams[t] + beta * others).diagonal().mean())
        gradient = (after - stack.A[t]) @ grams[t] + beta * after @ others + rho * (after - stack.A[t])
        assert float(gradient.norm()) <= 1e-9 * max(1.0, float(stack.A[t].norm()))
        if beta == 0.0:
            assert_close(after, stack.A[t], 1e-12)


def test_projected_adapters_merge_with_any_method(tiny: Recipe, tmp_path: Path) -> None:
    recipe = {**tiny, "merge_method": "osrm_project"}
    report = merging.merge(recipe, tmp_path / "parts").report
    for module in report["modules"].values():
        assert all(
            after < before
            for before, after in zip(module["interference_before"], module["interference_after"], strict=True)
        )
    models = [{"model": str(tmp_path / "parts" / name)} for name in report["tasks"]]
    for entry in tiny["models"]:
        task = products(tmp_path / "parts" / Path(entry["model"]).name)
        assert {name: product.shape for name, product in task.items()} == MODULES
    merging.merge({"merge_method": "ties", "models": models}, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "report.json").read_text())["method"] == "ties"


def test_nothing_is_read_from_the_order_of_the_models(tiny: Recipe, tmp_path: Path) -> None:
    for method in ("regmean", "osrm_project"):
        merging.merge({**tiny, "merge_method": method}, tmp_path / method / "one")
        turned = {**tiny, "models": tiny["models"][::-1], "merge_method": method}
        merging.merge(turned, tmp_path / method / "two")
        files = sorted((tmp_path / method / "one").rglob(WEIGHTS))
        for path in files:
            other = tmp_path / method / "two" / path.relative_to(tmp_path / method / "one")
            assert path.read_bytes() == other.read_bytes()


def test_the_digest_of_a_recipe_knows_the_base_and_the_samples(tiny: Recipe, tmp_path: Path) -> None:
    def digest(recipe: Recipe, name: str) -> str:
        return merging.merge({**recipe, "merge_method": "regmean"}, tmp_path / name).recipe_digest

    before = digest(tiny, "one")
    moved = tmp_path / "moved"
    shutil.copytree(tiny["base_model"], moved)
    assert digest({**tiny, "base_model": str(moved)}, "two") == before
    other = write_base(tmp_path / "other", seed=9)
    assert digest({**tiny, "base_model": str(other)}, "three") != before
    tiny["models"][0]["data"] = str(write_texts(tmp_path / "data.jsonl", seed=55))
    assert digest(tiny, "four") != before
