"""Adapters that PEFT itself trained and saved, of every layer kind and scale rule, through a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import InputError

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")


class Net(torch.nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(30, 8)
        self.lin = torch.nn.Linear(8, 12)
        self.pointwise = torch.nn.Conv2d(3, 6, 1)
        self.conv = torch.nn.Conv2d(6, 10, 3)
        self.classifier = torch.nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Gpt(torch.nn.Module):
    """GPT-2's Conv1D stores its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = pytorch_utils.Conv1D(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


KINDS = ("emb", "lin", "pointwise", "conv")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"lin": 2}, "alpha_pattern": {"conv": 3}},
    "wide": {"r": 16, "lora_alpha": 4},
}


def randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def trained(
    folder: Path, seed: int, net: type = Net, targets: tuple[str, ...] = KINDS, **config: Any
) -> Path:
    torch.manual_seed(0)
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=list(targets), **config))
    randomised(model, seed).save_pretrained(str(folder))
    return folder


def deltas(folder: Path, net: type = Net) -> dict[str, torch.Tensor]:
    """What PEFT adds to each base weight when it loads the adapter."""
    torch.manual_seed(0)
    base = net()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    return {
        name: (p.detach() - before[name]).double()
        for name, p in merged.named_parameters()
        if not torch.equal(p, before[name])
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_an_identity_merge_is_the_adapter_in_every_variant(tmp_path: Path, variant: str, method: str) -> None:
    path = trained(tmp_path / "a", 1, **VARIANTS[variant])
    merging.merge({"merge_method": method, "models": [{"model": str(path)}]}, tmp_path / "out")
    before, after = deltas(path), deltas(tmp_path / "out")
    assert sorted(before) == sorted(after) == sorted(f"{kind}.weight" for kind in KINDS)
    for name in before:
        assert (after[name] - before[name]).norm() <= 2e-6 * before[name].norm()


def test_a_sum_over_variants_is_the_sum_of_what_peft_adds(tmp_path: Path) -> None:
    paths = [trained(tmp_path / name, i, **VARIANTS[name]) for i, name in enumerate(VARIANTS)]
    models = [{"model": str(path)} for path in paths]
    merging.merge({"merge_method": "linear", "models": models}, tmp_path / "lora")
    recipe = {"merge_method": "linear", "models": models, "output": {"format": "delta"}}
    merging.merge(recipe, tmp_path / "delta")
    parts = [deltas(path) for path in paths]
    lora, dense = deltas(tmp_path / "lora"), load_file(str(tmp_path / "delta" / "delta.safetensors"))
    for name in parts[0]:
        expected = torch.stack([part[name] for part in parts]).sum(0)
        assert (lora[name] - expected).norm() <= 5e-6 * expected.norm()
        assert dense[name].shape == expected.shape
        assert (dense[name].double() - expected).norm() <= 5e-6 * expected.norm()


def test_weights_stored_transposed_stay_so(tmp_path: Path) -> None:
    config = {"r": 3, "lora_alpha": 6, "fan_in_fan_out": True}
    paths = [trained(tmp_path / str(i), i, Gpt, ("c_attn",), **config) for i in range(2)]
    models = [{"model": str(path)} for path in paths]
    merging.merge({"merge_method": "linear", "models": models}, tmp_path / "lora")
    merging.merge(
        {"merge_method": "linear", "models": models, "output": {"format": "delta"}}, tmp_path / "delta"
    )
    parts = [deltas(path, Gpt) for path in paths]
    dense = load_file(str(tmp_path / "delta" / "delta.safetensors"))
    for name, first in parts[0].items():
        expected = first + parts[1][name]
        torch.testing.assert_close(deltas(tmp_path / "lora", Gpt)[name], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dense[name].double(), expected, rtol=1e-4, atol=1e-6)


def heads(folder: Path) -> torch.Tensor:
    return load_file(str(folder / "adapter_model.safetensors"))["base_model.model.classifier.weight"]


@pytest.mark.parametrize("choice", ["error", "drop", "average", "take"])
def test_fully_trained_modules_follow_an_explicit_choice(tmp_path: Path, choice: str) -> None:
    paths = [
        trained(tmp_path / str(i), i, targets=("lin",), r=2, modules_to_save=["classifier"]) for i in range(2)
    ]
    recipe: dict[str, Any] = {"merge_method": "linear", "models": [{"model": str(p)} for p in paths]}
    if choice == "error":
        with pytest.raises(InputError) as caught:
            merging.merge(recipe, tmp_path / "out")
        assert caught.value.code == "modules_to_save_choice"
        return
    recipe["modules_to_save"] = {"take": str(paths[1])} if choice == "take" else choice
    merging.merge(recipe, tmp_path / "out")
    written = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    saved = [key for key in written if "classifier" in key]
    if choice == "drop":
        assert saved == []
        return
    first, second = (heads(path) for path in paths)
    expected = second if choice == "take" else (first + second) / 2
    torch.testing.assert_close(heads(tmp_path / "out"), expected)
    model = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "out"))
    torch.testing.assert_close(
        model.base_model.model.classifier.modules_to_save["default"].weight.detach(), expected
    )


def test_a_nan_in_an_adapter_is_found_and_nothing_is_written(tmp_path: Path) -> None:
    path = trained(tmp_path / "a", 1, r=2)
    weights = path / "adapter_model.safetensors"
    tensors = load_file(str(weights))
    key = next(key for key in tensors if "lin.lora_A" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, str(weights), metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        merging.merge({"merge_method": "linear", "models": [{"model": str(path)}]}, tmp_path / "out")
    assert caught.value.code == "non_finite_tensor"
    assert caught.value.where["module"] == "lin"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("config", [{"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}])
def test_each_part_of_a_reversible_merge_keeps_its_own_head(tmp_path: Path, config: dict[str, Any]) -> None:
    folders = [trained(tmp_path / name, seed, targets=("lin",), modules_to_save=["classifier"])
               for seed, name in enumerate(("one", "two"))]  # fmt: skip
    for folder in folders:  # PEFT finds the head of a classifier by the task type alone
        path = folder / "adapter_config.json"
        told = {**json.loads(path.read_text()), "modules_to_save": None, **config}
        path.write_text(json.dumps(told))
    data = {"merge_method": "rmm", "models": [{"model": str(folder)} for folder in folders]}
    result = merging.merge({**data, "output": {"dtype": "float32"}}, tmp_path / "out")
    for folder in folders:
        own = load_file(folder / "adapter_model.safetensors")
        part = load_file(tmp_path / "out" / folder.name / "adapter_model.safetensors")
        heads = [key for key in own if "classifier" in key]
        assert len(heads) == 2
        assert all(torch.equal(own[key], part[key]) for key in heads)
        merging.load_adapter(tmp_path / "out" / folder.name).close()
    warnings = [entry["message"] for entry in result.report["warnings"]]
    assert any("basis.safetensors holds no fully trained tensors" in warning for warning in warnings)
    assert not any("dropped" in warning for warning in warnings)
