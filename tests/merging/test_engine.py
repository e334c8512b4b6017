"""A recipe in, a result directory out: exactness, reproducibility, refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import MODULES, products, write_adapter
from safetensors import safe_open

import merging
from merging.engine import Progress
from merging.errors import Cancelled, InputError


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of different ranks, scales and one with rsLoRA."""
    return [
        write_adapter(tmp_path / "a", seed=1, rank=4, alpha=8),
        write_adapter(tmp_path / "b", seed=2, rank=2, alpha=3, use_rslora=True),
        write_adapter(tmp_path / "c", seed=3, rank=6, alpha=6),
    ]


def recipe(paths: list[Path], method: str = "linear", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": str(path)} for path in paths], **more}


def test_linear_is_the_sum_of_the_scaled_products(three: list[Path], tmp_path: Path) -> None:
    data = recipe(three)
    data["models"][1]["parameters"] = {"weight": -0.5}
    result = merging.merge(data, tmp_path / "out")
    a, b, c = (products(path) for path in three)
    merged = products(tmp_path / "out")
    assert sorted(merged) == sorted(MODULES)
    for name, delta in merged.items():
        torch.testing.assert_close(delta, a[name] - 0.5 * b[name] + c[name], rtol=1e-5, atol=1e-6)
    assert result.report["summary"]["max_rank"] == 12
    assert result.report["summary"]["discarded_energy"] == 0.0


def test_the_result_directory_is_complete_and_says_what_happened(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merging.merge(recipe(three, "svd", output={"rank": 3}), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(result.files)
    assert sorted(result.files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge.yaml",
        "report.json",
    ]
    with safe_open(str(out / "adapter_model.safetensors"), "pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"
    assert metadata["merganser.recipe_digest"] == result.recipe_digest
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["base_model_name_or_path"] == "org/base"
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    inputs = {entry["model"]: entry for entry in report["summary"]["inputs"]}
    merged = products(out)
    for path in three:
        delta = products(path)
        dot = sum(float((merged[n] * delta[n]).sum()) for n in merged)
        own = sum(float((delta[n] ** 2).sum()) for n in merged)
        size = sum(float((merged[n] ** 2).sum()) for n in merged)
        entry = inputs[str(path)]
        assert entry["retention"] == pytest.approx(dot / own, rel=1e-4)
        assert entry["cosine"] == pytest.approx(dot / (own * size) ** 0.5, rel=1e-4)
    front = (out / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(front)["base_model"] == "org/base"


def test_the_discarded_energy_is_that_of_the_dense_truncation(three: list[Path], tmp_path: Path) -> None:
    result = merging.merge(recipe(three, "svd", output={"rank": 3}), tmp_path / "out")
    deltas = [products(path) for path in three]
    for name, entry in result.report["modules"].items():
        S2 = torch.linalg.svdvals(sum(d[name] for d in deltas)) ** 2  # type: ignore[arg-type]
        assert entry["discarded_energy"] == pytest.approx(float(S2[3:].sum() / S2.sum()), rel=1e-4)
        assert entry["rank"] == 3


METHODS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("linear", None, {}),
    ("svd", None, {}),
    ("ties", "core", {"density": 0.4}),
    ("ties", "knots", {"density": 0.4}),
    ("ties", "full", {"density": 0.4}),
    ("ties", "full", {"density": 0.4, "compat": "paper"}),
    ("magnitude_prune", "core", {"density": 0.4}),
    ("dare_ties", "full", {}),
    ("dare_linear", "core", {}),
]


@pytest.mark.parametrize(("method", "space", "parameters"), METHODS)
def test_same_bytes_in_any_order_and_for_any_number_of_threads(
    three: list[Path], tmp_path: Path, method: str, space: str | None, parameters: dict[str, Any]
) -> None:
    data = recipe(three, method, space=space, parameters=parameters, output={"rank": 5}, seed=7)
    data["models"][0]["parameters"] = {"weight": 0.7}
    first = merging.merge(data, tmp_path / "one", threads=1)
    data["models"] = data["models"][::-1]
    second = merging.merge(data, tmp_path / "two", threads=3)
    third = merging.merge(tmp_path / "one" / "merge.yaml", tmp_path / "three", threads=2)
    assert first.files == second.files == third.files
    assert first.recipe_digest == second.recipe_digest == third.recipe_digest


def test_another_seed_gives_other_random_masks(three: list[Path], tmp_path: Path) -> None:
    results = [
        merging.merge(recipe(three, "dare_linear", seed=seed), tmp_path / str(seed)) for seed in (0, 1)
    ]
    name = "adapter_model.safetensors"
    assert results[0].files[name] != results[1].files[name]


def test_one_adapter_merges_into_itself(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", seed=5, use_rslora=True)
    for method, parameters in (("linear", {}), ("svd", {}), ("ties", {"density": 1.0, "lambda": 1.0})):
        merging.merge(recipe([path], method, parameters=parameters), tmp_path / method, overwrite=True)
        before, after = products(path), products(tmp_path / method)
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def test_auto_lambda_reaches_the_documented_norm(three: list[Path], tmp_path: Path) -> None:
    report = merging.merge(recipe(three, "ties", space="core"), tmp_path / "out").report["summary"]
    assert report["norm_ratio"] == pytest.approx(1.7, rel=1e-6)
    total = sum(float((delta**2).sum()) for delta in products(tmp_path / "out").values()) ** 0.5
    mean = sum(entry["norm"] for entry in report["inputs"]) / 3
    assert total / mean == pytest.approx(1.7, rel=1e-3)


def test_an_overlong_update_is_announced_with_the_remedy(three: list[Path], tmp_path: Path) -> None:
    long = merging.merge(recipe(three, parameters={"lambda": 3.0}), tmp_path / "long").report
    assert [w["code"] for w in long["warnings"]] == ["large_merged_norm"]
    auto = merging.merge(recipe(three, parameters={"lambda": "auto"}), tmp_path / "auto").report
    assert auto["warnings"] == []


def test_a_number_for_lambda_means_exactly_that_number(three: list[Path], tmp_path: Path) -> None:
    for value in (1.0, 0.25):
        merging.merge(
            recipe(three, "ties", space="core", parameters={"lambda": value}), tmp_path / str(value)
        )
    one, quarter = products(tmp_path / "1.0"), products(tmp_path / "0.25")
    for name in one:
        torch.testing.assert_close(quarter[name], 0.25 * one[name], rtol=1e-5, atol=1e-7)


def test_equalised_inputs_enter_with_the_mean_norm(three: list[Path], tmp_path: Path) -> None:
    merging.merge(recipe(three, prepare={"equalize_norms": True}), tmp_path / "out")
    deltas = [products(path) for path in three]
    norms = [sum(float((d**2).sum()) for d in delta.values()) ** 0.5 for delta in deltas]
    mean = sum(norms) / 3
    for name, delta in products(tmp_path / "out").items():
        expected = sum(mean / norm * d[name] for norm, d in zip(norms, deltas, strict=True))
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_balancing_makes_every_method_blind_to_the_gauge(three: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(three[0] / "adapter_model.safetensors"))
    for key in tensors:
        tensors[key] *= 4.0 if "lora_A" in key else 0.25
    other = write_adapter(tmp_path / "other", seed=1, rank=4, alpha=8)
    save_file(tensors, str(other / "adapter_model.safetensors"), metadata={"format": "pt"})
    for balance in (True, False):
        merged = []
        for i, first in enumerate((three[0], other)):
            data = recipe(
                [first, three[1]],
                "ties",
                space="core",
                parameters={"core_gauge": "asis"},
                prepare={"balance": balance},
            )
            merging.merge(data, tmp_path / f"{balance}{i}")
            merged.append(products(tmp_path / f"{balance}{i}"))
        apart = max(float((merged[0][n] - merged[1][n]).norm() / merged[0][n].norm()) for n in merged[0])
        assert (apart < 1e-4) is balance


def test_zero_adapters_merge_to_zero(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / str(i), seed=i, zero=True) for i in range(2)]
    for method in ("linear", "svd", "ties"):
        merging.merge(recipe(paths, method, space="core"), tmp_path / method)
        assert not any(delta.any() for delta in products(tmp_path / method).values())


def test_uniform_rank_pads_every_module_to_one_rank(three: list[Path], tmp_path: Path) -> None:
    exact = merging.merge(recipe(three, "svd", output={"energy": 0.8}), tmp_path / "ragged")
    padded = merging.merge(
        recipe(three, "svd", output={"energy": 0.8, "uniform_rank": True}), tmp_path / "even"
    )
    config = json.loads((tmp_path / "even" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    assert config["r"] == exact.report["summary"]["max_rank"] == padded.report["summary"]["max_rank"]
    ragged, even = products(tmp_path / "ragged"), products(tmp_path / "even")
    for name in ragged:
        torch.testing.assert_close(even[name], ragged[name])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6)])
def test_the_output_dtype_is_what_was_asked_for(
    three: list[Path], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    merging.merge(recipe(three), tmp_path / "exact")
    merging.merge(recipe(three, output={"dtype": dtype}), tmp_path / "out")
    with safe_open(str(tmp_path / "out" / "adapter_model.safetensors"), "pt") as handle:
        assert {str(handle.get_tensor(key).dtype) for key in handle.keys()} == {f"torch.{dtype}"}  # noqa: SIM118
    exact, stored = products(tmp_path / "exact"), products(tmp_path / "out")
    for name in exact:
        assert (stored[name] - exact[name]).norm() <= tolerance * exact[name].norm()


def test_auto_dtype_is_that_of_the_inputs(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / str(i), seed=i, dtype=torch.bfloat16) for i in range(2)]
    merging.merge(recipe(paths), tmp_path / "out")
    with safe_open(str(tmp_path / "out" / "adapter_model.safetensors"), "pt") as handle:
        assert {handle.get_tensor(key).dtype for key in handle.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_dense_task_vector_is_the_same_update(three: list[Path], tmp_path: Path) -> None:
    merging.merge(recipe(three), tmp_path / "lora")
    merging.merge(recipe(three, output={"format": "delta"}), tmp_path / "delta")
    lora = products(tmp_path / "lora")
    with safe_open(str(tmp_path / "delta" / "delta.safetensors"), "pt") as handle:
        assert handle.metadata()["merge.kind"] == "task_vector"
        for name, delta in lora.items():
            torch.testing.assert_close(
                handle.get_tensor(f"{name}.weight").double(), delta, rtol=1e-5, atol=1e-6
            )


def test_missing_modules_count_as_zero_only_when_asked(tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "whole", seed=1)
    part = write_adapter(
        tmp_path / "part", seed=2, modules={k: v for k, v in MODULES.items() if "q_proj" in k}
    )
    with pytest.raises(InputError) as caught:
        merging.merge(recipe([whole, part]), tmp_path / "out")
    assert caught.value.code == "missing_modules"
    merging.merge(recipe([whole, part], missing_modules="zero"), tmp_path / "out")
    merged, a, b = products(tmp_path / "out"), products(whole), products(part)
    for name in MODULES:
        expected = a[name] + b[name] if name in b else a[name]
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_progress_ends_at_its_total_and_never_goes_back(three: list[Path], tmp_path: Path) -> None:
    seen: list[Progress] = []
    merging.merge(
        recipe(three, "ties", parameters={"compat": "paper"}), tmp_path / "out", progress=seen.append
    )
    steps = [step.done for step in seen]
    assert steps == sorted(steps)
    assert seen[-1].done == seen[-1].total


def test_a_cancelled_merge_leaves_nothing(three: list[Path], tmp_path: Path) -> None:
    def stop(step: Progress) -> None:
        if step.phase == "merge":
            raise Cancelled

    before = sorted(tmp_path.iterdir())
    with pytest.raises(Cancelled):
        merging.merge(recipe(three), tmp_path / "out", progress=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_result_is_not_overwritten_unasked(three: list[Path], tmp_path: Path) -> None:
    merging.merge(recipe(three), tmp_path / "out")
    with pytest.raises(InputError) as caught:
        merging.merge(recipe(three, "svd"), tmp_path / "out")
    assert caught.value.code == "output_exists"
    merging.merge(recipe(three, "svd"), tmp_path / "out", overwrite=True)
    assert merging.Recipe.load(tmp_path / "out" / "merge.yaml").merge_method == "svd"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:1", "cuda:x"])
def test_unknown_devices_are_refused(three: list[Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        merging.merge(recipe(three), tmp_path / "out", device=name)
    assert caught.value.code in ("unknown_device", "device_unavailable")


def test_weights_that_cancel_cannot_be_normalised(three: list[Path], tmp_path: Path) -> None:
    data = recipe(three[:2], parameters={"normalize": True})
    data["models"][1]["parameters"] = {"weight": -1.0}
    with pytest.raises(InputError) as caught:
        merging.merge(data, tmp_path / "out")
    assert caught.value.code == "zero_weight_sum"


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "space", "parameters"), METHODS)
def test_a_gpu_gives_the_products_of_the_cpu(
    three: list[Path], tmp_path: Path, method: str, space: str | None, parameters: dict[str, Any]
) -> None:
    data = recipe(three, method, space=space, parameters=parameters)
    merging.merge(data, tmp_path / "cpu", device="cpu")
    merging.merge(data, tmp_path / "gpu", device="cuda")
    cpu, gpu = products(tmp_path / "cpu"), products(tmp_path / "gpu")
    for name in cpu:
        assert (cpu[name] - gpu[name]).norm() <= 1e-4 * cpu[name].norm()


def test_slerp_counts_a_module_that_one_model_lacks_as_zero(tmp_path: Path) -> None:
    name, *others = MODULES
    first = write_adapter(tmp_path / "a", seed=1)
    second = write_adapter(tmp_path / "b", seed=2, modules={key: MODULES[key] for key in others})
    data = recipe([first, second], "slerp", parameters={"t": 0.25})
    with pytest.raises(InputError, match="missing_modules"):
        merging.merge(data, tmp_path / "refused")
    merging.merge({**data, "missing_modules": "zero"}, tmp_path / "out")
    alone, merged = products(first)[name], products(tmp_path / "out")[name]
    torch.testing.assert_close(merged, 0.75 * alone, rtol=1e-5, atol=1e-6)


def test_lambda_auto_does_not_magnify_what_rounding_leaves_of_updates_that_cancel(
    three: list[Path], tmp_path: Path
) -> None:
    cancelling = recipe([three[0], three[1], three[0]], parameters={"lambda": "auto"})
    cancelling["models"][1]["parameters"] = {"weight": 0.0}
    cancelling["models"][2]["parameters"] = {"weight": -1.0}
    cancelling["output"] = {"rank": 2}
    report = merging.merge(cancelling, tmp_path / "nothing").report
    assert report["summary"]["lambda"] == 1.0
    assert report["summary"]["norm_ratio"] < 1e-6
    assert "updates_cancel" in [warning["code"] for warning in report["warnings"]]
    faint = recipe(three, parameters={"lambda": "auto", "weight": 1e-9})
    report = merging.merge(faint, tmp_path / "faint").report
    assert report["summary"]["norm_ratio"] == pytest.approx(1.2)
