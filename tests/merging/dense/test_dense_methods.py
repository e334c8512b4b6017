"""Every method on whole checkpoints against a dense float64 reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import NORM, Q, base_tensors, read_all, recipe, tuned, write_checkpoint
from dense_entrywise import METHODS, Problem
from entrywise_tools import SETTINGS
from torch import Tensor

import merging
from merging import Recipe
from merging.catalog import names
from merging.dense.blocks import open_stack
from merging.dense.plan import prepare_dense
from merging.dense.runner import DenseRunner
from merging.errors import InputError
from merging.masks import MaskStream
from merging.preparing import local_path

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21, torch.float64: 1e-14}
"""How far a correctly computed and rounded number may lie off, relative to its size; with the wider types
relative to the largest number of the tensor, since there the arithmetic and the file have one precision."""


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[str(request.param)]


def inputs(tmp_path: Path, dtype: torch.dtype, count: int = 3) -> tuple[Path, list[Path]]:
    base = base_tensors(dtype)
    models = [write_checkpoint(tmp_path / f"m{i}", tuned(base, i + 1), shards=i + 1) for i in range(count)]
    return write_checkpoint(tmp_path / "base", base, shards=2), models


def expected(data: dict[str, Any], method: str) -> dict[str, Tensor]:
    """``base + merged`` per tensor in float64, on the deltas that the merge sees."""
    found = {}
    with prepare_dense(Recipe.load(data), resolve=local_path) as plan:
        context = DenseRunner(plan).context
        assert plan.base is not None
        for job in plan.jobs:
            stack: Any = open_stack(plan, job)
            x = stack.rows(0, stack.m).double()

            def keep(chance: Tensor, stack: Any = stack, x: Tensor = x) -> Tensor:
                fresh = MaskStream(stack, context, [stack.n])
                return fresh.keep(x, chance.to(stack.like.dtype).unsqueeze(0))[0]

            problem = Problem(
                x[0],
                [params.weight for params in context.of(stack)],
                [params.model_dump() for params in context.of(stack)],
                x[0, 0].numel(),
                stack.n,
                keep,
            )
            merged = METHODS[method](problem)
            found[job.name] = (stack.base_rows(0, stack.m).double() + merged).reshape(job.shape)
    return found


def close(actual: Tensor, reference: Tensor, largest: float) -> bool:
    rounded = actual.dtype in (torch.bfloat16, torch.float16)
    size = reference.abs().clamp_min(largest * (1e-3 if rounded else 1.0))
    return bool(((actual.double() - reference).abs() <= UNIT[actual.dtype] * size).all())


@pytest.mark.parametrize("method", [*SETTINGS, "slerp"])
def test_entry_wise_methods_equal_the_reference(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, models = inputs(tmp_path, dtype, 2 if method == "slerp" else 3)
    data = recipe(base, models, method, parameters=SETTINGS.get(method, {"t": 0.3}), seed=5)
    data["models"][0]["parameters"] = {"weight": 0.7}
    merging.merge(data, tmp_path / "out", device="cpu", threads=1)
    reference = expected(data, method)
    result = read_all(tmp_path / "out")
    assert list(result)
    assert set(result) == set(reference)
    for name, wanted in reference.items():
        assert result[name].dtype == dtype
        assert close(result[name], wanted, float(wanted.abs().max())), name


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)])
def test_linear_is_the_weighted_sum_of_the_differences(
    tmp_path: Path, dtype: torch.dtype, weights: tuple[float, ...]
) -> None:
    base, models = inputs(tmp_path, dtype)
    data = recipe(base, models, parameters={"lambda": 0.6})
    for entry, weight in zip(data["models"], weights, strict=True):
        entry["parameters"] = {"weight": weight}
    merging.merge(data, tmp_path / "out", device="cpu", threads=1)
    first, others = read_all(base), [read_all(path) for path in models]
    for name, tensor in read_all(tmp_path / "out").items():
        b = first[name].double()
        change = sum(w * (other[name].double() - b) for w, other in zip(weights, others, strict=True))
        assert close(tensor, b + 0.6 * change, float(b.abs().max())), name


def test_task_arithmetic_is_another_name_of_linear(tmp_path: Path) -> None:
    base, models = inputs(tmp_path, torch.bfloat16)
    one = merging.merge(recipe(base, models), tmp_path / "one", device="cpu")
    two = merging.merge(recipe(base, models, "task_arithmetic"), tmp_path / "two", device="cpu")
    assert one.files["model.safetensors"] == two.files["model.safetensors"]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_weighted_mean_of_checkpoints_needs_no_base(tmp_path: Path, normalize: bool) -> None:
    _, models = inputs(tmp_path, torch.float32)
    weight = 2.0 if normalize else 1.0 / 3.0
    data = recipe(None, models, parameters={"normalize": normalize, "weight": weight})
    merging.merge(data, tmp_path / "out", device="cpu")
    others = [read_all(path) for path in models]
    for name, tensor in read_all(tmp_path / "out").items():
        mean = torch.stack([other[name].double() for other in others]).mean(0)
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "parameters"), [("ties", {}), ("linear", {}), ("linear", {"normalize": True, "lambda": 0.5})]
)
def test_everything_else_without_a_base_is_refused(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    _, models = inputs(tmp_path, torch.float32)
    for act in (merging.plan, lambda d: merging.merge(d, tmp_path / "out")):
        with pytest.raises(InputError) as caught:
            act(recipe(None, models, method, parameters=parameters))
        assert caught.value.code == "base_model_required"


def test_methods_on_the_factors_of_adapters_are_refused_with_the_reason(tmp_path: Path) -> None:
    base, models = inputs(tmp_path, torch.float32, 2)
    contracts = {name: merging.catalog.get(name).contract for name in names()}
    refused = [name for name, it in contracts.items() if not it.dense_inputs and not it.data]
    assert {"drm_h", "lora_lego", "lore", "rmm", "core_space", "knots"} <= set(refused)
    for name in refused:
        with pytest.raises(InputError) as caught:
            merging.plan(recipe(base, models, name, output={"format": "lora", "rank": 2}))
        assert caught.value.code == "dense_inputs_unsupported"


@pytest.mark.parametrize("space", ["core", "knots"])
def test_spaces_made_of_factors_are_refused(tmp_path: Path, space: str) -> None:
    base, models = inputs(tmp_path, torch.float32, 2)
    with pytest.raises(InputError) as caught:
        merging.plan(recipe(base, models, "ties", space=space))
    assert caught.value.code == "space_not_supported"


def deltas(base: Path, models: list[Path], name: str) -> list[Tensor]:
    first = read_all(base)[name].float()
    return [(read_all(path)[name].float() - first).double() for path in models]


def iso_c(x: list[Tensor]) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(x, torch.zeros_like(x[0])), full_matrices=False)
    return S.mean() * U @ Vh


def tsv(x: list[Tensor]) -> Tensor:
    k = min(x[0].shape) // len(x)
    parts = [torch.linalg.svd(one, full_matrices=False) for one in x]
    U = torch.cat([part[0][:, :k] for part in parts], 1)
    V = torch.cat([part[2][:k] for part in parts], 0)
    S = torch.cat([part[1][:k] for part in parts])
    P, _, Qh = torch.linalg.svd(U, full_matrices=False)
    R, _, Th = torch.linalg.svd(V, full_matrices=False)
    return (P @ Qh) * S @ (R @ Th)


def cart(x: list[Tensor]) -> Tensor:
    mean = torch.stack(x).mean(0)
    rank = -(-min(mean.shape) * 8 // 100)
    total = mean.clone()
    for one in x:
        U, S, Vh = torch.linalg.svd(one - mean, full_matrices=False)
        total += U[:, :rank] * S[:rank] @ Vh[:rank]
    return total


def svd(x: list[Tensor]) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(x, torch.zeros_like(x[0])), full_matrices=False)
    return U[:, :3] * S[:3] @ Vh[:3]


@pytest.mark.parametrize(
    ("method", "reference", "output"),
    [("iso_c", iso_c, {}), ("tsv", tsv, {}), ("cart", cart, {}), ("svd", svd, {"rank": 3})],
)
def test_spectral_methods_equal_the_dense_algorithm(
    tmp_path: Path, method: str, reference: Any, output: dict[str, Any]
) -> None:
    base, models = inputs(tmp_path, torch.float32)
    data = recipe(base, models, method, output={"format": "delta", **output})
    merging.merge(data, tmp_path / "out", device="cpu", threads=1)
    result = read_all(tmp_path / "out")
    for name in (Q, "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        wanted = reference(deltas(base, models, name))
        assert float((result[name].double() - wanted).norm()) <= 1e-4 * float(wanted.norm()), name


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv", "cart"])
def test_spectral_methods_give_vectors_the_mean(tmp_path: Path, method: str) -> None:
    base, models = inputs(tmp_path, torch.float32)
    data = recipe(base, models, method, output={"format": "delta"}, parameters={"lambda": 2.0})
    merging.merge(data, tmp_path / "out", device="cpu", threads=1)
    mean = torch.stack(deltas(base, models, NORM)).mean(0)
    assert torch.allclose(read_all(tmp_path / "out")[NORM].double(), 2.0 * mean, rtol=1e-5, atol=1e-8)


def test_large_matrices_are_reduced_first_and_the_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.dense.spectral.EXACT_NUMEL", 10)
    monkeypatch.setattr("merging.dense.spectral.REDUCED_RANK", 4)
    base, models = inputs(tmp_path, torch.float32)
    done = merging.merge(recipe(base, models, "iso_c"), tmp_path / "out", device="cpu", threads=1)
    assert [entry["code"] for entry in done.report["warnings"]] == ["spectrum_cut"]
    lost = 0.0
    for delta in deltas(base, models, Q):
        lost += float((torch.linalg.svdvals(delta)[4:] ** 2).sum())
    entry = done.report["modules"][Q]
    assert entry["discarded_energy"] * entry["norm"] ** 2 == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "slerp"])
def test_lambda_is_one_unless_it_is_asked_for(tmp_path: Path, method: str) -> None:
    base, models = inputs(tmp_path, torch.float32, 2)
    done = merging.merge(recipe(base, models, method), tmp_path / "out", device="cpu")
    assert done.report["summary"]["lambda"] == 1.0


@pytest.mark.parametrize("method", ["ties", "iso_c", "linear"])
def test_lambda_auto_brings_the_update_to_the_documented_norm(tmp_path: Path, method: str) -> None:
    base, models = inputs(tmp_path, torch.float32)
    data = recipe(base, models, method, parameters={"lambda": "auto"})
    done = merging.merge(data, tmp_path / "out", device="cpu")
    wanted = merging.catalog.get(method).auto_norm
    assert done.report["summary"]["norm_ratio"] == pytest.approx(wanted, rel=1e-6)
    first, result = read_all(base), read_all(tmp_path / "out")
    norm = sum(float((result[name].double() - first[name].double()).square().sum()) for name in first) ** 0.5
    assert norm == pytest.approx(done.report["summary"]["norm"], rel=1e-4)


def test_thresholds_over_the_whole_model(tmp_path: Path) -> None:
    base, models = inputs(tmp_path, torch.float64)
    settings = {"density": 0.3, "trim_scope": "global"}
    data = recipe(base, models, "magnitude_prune", parameters=settings, output={"format": "delta"})
    merging.merge(data, tmp_path / "out", device="cpu", threads=2)
    total = {name: torch.zeros_like(x) for name, x in read_all(base).items()}
    for path in models:
        own = {name: read_all(path)[name] - read_all(base)[name] for name in total}
        flat = torch.cat([x.flatten() for x in own.values()]).abs()
        limit = flat.sort(descending=True).values[int(0.3 * flat.numel()) - 1]
        for name, x in own.items():
            total[name] += torch.where(x.abs() >= limit, x, 0.0)
    for name, x in read_all(tmp_path / "out").items():
        assert torch.allclose(x, total[name], rtol=0, atol=1e-15)


def test_equal_norms_before_the_merge(tmp_path: Path) -> None:
    base, models = inputs(tmp_path, torch.float64, 2)
    first = read_all(base)
    tripled = {name: first[name] + 3 * (x - first[name]) for name, x in read_all(models[0]).items()}
    models[0] = write_checkpoint(tmp_path / "tripled", tripled)
    data = recipe(base, models, prepare={"equalize_norms": True}, output={"format": "delta"})
    merging.merge(data, tmp_path / "out", device="cpu")
    x = [{name: read_all(path)[name] - first[name] for name in first} for path in models]
    norms = [sum(float(one.square().sum()) for one in model.values()) ** 0.5 for model in x]
    mean = sum(norms) / 2
    for name, tensor in read_all(tmp_path / "out").items():
        wanted = sum(model[name] * (mean / norm) for model, norm in zip(x, norms, strict=True))
        assert torch.allclose(tensor, wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", ["linear", *SETTINGS, "tsv", "iso_cts"])
def test_same_bytes_for_any_threads_shards_and_order(tmp_path: Path, method: str) -> None:
    base, models = inputs(tmp_path, torch.bfloat16)
    data = recipe(base, models, method, parameters=SETTINGS.get(method, {}), seed=3)
    data["models"][1]["parameters"] = {"weight": 1.5}
    one = merging.merge(data, tmp_path / "one", threads=1, device="cpu")
    turned = {**data, "models": data["models"][::-1]}
    two = merging.merge(turned, tmp_path / "two", threads=3, device="cpu", memory_budget=1 << 40)
    assert one.recipe_digest == two.recipe_digest
    assert one.files == two.files
    merging.merge(data, tmp_path / "three", threads=2, device="cpu", shard_bytes=2000)
    first, second = read_all(tmp_path / "one"), read_all(tmp_path / "three")
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_the_memory_budget_limits_the_threads(tmp_path: Path) -> None:
    from merging.dense.runner import thread_limit

    base, models = inputs(tmp_path, torch.bfloat16)
    with prepare_dense(Recipe.load(recipe(base, models, "ties")), resolve=local_path) as plan:
        assert thread_limit(plan, 8, None) == 8
        assert thread_limit(plan, 8, 1) == 1
        assert thread_limit(replace(plan), 8, 560 << 20) == 4  # the process itself counts


@pytest.mark.parametrize(
    "method", ["linear", "magnitude_prune", "ties", "breadcrumbs", "dare_ties", "della", "consensus"]
)
@pytest.mark.parametrize("dtype", ["bf16", "f64"])
def test_same_bytes_for_any_size_of_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    base, models = inputs(tmp_path, DTYPES[dtype])
    data = recipe(base, models, method, parameters=SETTINGS.get(method, {}), seed=3)
    one = merging.merge(data, tmp_path / "one", threads=1, device="cpu")
    for size in (1, 700):
        monkeypatch.setattr("merging.kernels.CACHE_BYTES", size)
        monkeypatch.setattr("merging.dense.blocks.STREAM_BUDGET", 6 * size)
        small = merging.merge(data, tmp_path / str(size), threads=1, device="cpu")
        assert small.files["model.safetensors"] == one.files["model.safetensors"]


def test_rows_of_any_length_are_ranked_alike() -> None:
    from merging.rules import RADIX_COLUMNS, row_ranks

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, RADIX_COLUMNS, generator=generator).bfloat16().float()  # with many ties
    wanted = torch.argsort(torch.argsort(x.abs(), dim=-1, stable=True), dim=-1).float() + 1
    assert torch.equal(row_ranks(x), wanted)
