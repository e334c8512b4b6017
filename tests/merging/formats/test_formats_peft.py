"""The reader and the writer against PEFT itself, on small models with every kind of layer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from merging.formats.adapter import Adapter, open_adapter
from merging.formats.compatible import check_compatible
from merging.formats.guard import check_safetensors
from merging.formats.peft_out import (
    ResultModule,
    adapter_config,
    factor_specs,
    factor_tensors,
    result_ranks,
    write_adapter_config,
)
from merging.formats.writer import write_safetensors


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 10)
        self.fc = nn.Linear(6, 6)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.layers = nn.ModuleList([Block() for _ in range(12)])
        self.conv = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 4, 1)
        self.wide = nn.Conv2d(3, 5, (1, 4))
        self.mha = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(6, 4)
        self.head = nn.Linear(6, 3)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Conv1D(10, 6) for _ in range(3)])


TARGETS = ["emb", "q", "conv", "point", "wide", "mha", "fc"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"layers.1.*": 2, "q": 4, "layers.3.fc": 5, "^fc": 1},
        "alpha_pattern": {"layers.2.q": 7, r"layers\.\d.q": 9, "conv|point": 2.5, "mha": 1},
        "use_rslora": True,
    },
    "negative": {"r": 2, "lora_alpha": -4},
}


def trained(base: nn.Module, **settings: Any) -> PeftModel:
    """A PEFT model whose factors are random, as after training."""
    model = get_peft_model(base, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """Module path -> what PEFT would add to the base weight, as stored."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach()
    return found


def our_delta(adapter: Adapter, name: str) -> Tensor:
    module = adapter.modules[name]
    B, A = adapter.factors(name)
    delta = B @ A
    transposed = module.kind == "embedding" or module.fan_in_fan_out
    return (delta.T if transposed else delta).reshape(module.weight_shape)


def write_back(adapter: Adapter, folder: Path, *, dtype: str = "F32", extra_rank: int = 0) -> None:
    """What an engine does: factors in, a complete adapter folder out."""
    folder.mkdir()
    ranks = result_ranks({name: module.rank + extra_rank for name, module in adapter.modules.items()})
    modules = [
        ResultModule(name, module.kind, module.m, module.n, ranks[name], module.weight_shape)
        for name, module in adapter.modules.items()
    ]
    write_safetensors(
        folder / "adapter_model.safetensors",
        [spec for module in modules for spec in factor_specs(module, dtype)],
        (t for module in modules for t in factor_tensors(module, *adapter.factors(module.name))),
        {"format": "pt"},
    )
    flag = any(module.fan_in_fan_out for module in adapter.modules.values())
    anchored = check_compatible([adapter], modules_to_save="drop").anchored_targets
    config = adapter_config(modules, fan_in_fan_out=flag, anchored_targets=anchored)
    write_adapter_config(folder, config)


def load_strictly(base: nn.Module, folder: Path) -> PeftModel:
    """Load with PEFT; any missing or unexpected key fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(base, str(folder))
    result = model.load_adapter(str(folder), adapter_name="again")
    assert not [key for key in result.missing_keys if "lora" in key]
    assert not result.unexpected_keys
    model.delete_adapter("again")
    return model


@pytest.fixture(params=sorted(SETTINGS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PeftModel, Path]:
    model = trained(Toy(), target_modules=TARGETS, **SETTINGS[request.param])
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_products_equal_those_of_peft(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    expected = deltas(model)
    with open_adapter(folder) as adapter:
        assert list(adapter.modules) == sorted(expected)
        for name, delta in expected.items():
            assert our_delta(adapter, name).shape == delta.shape
            torch.testing.assert_close(our_delta(adapter, name), delta, rtol=1e-5, atol=1e-5)


def test_what_is_written_loads_in_peft_with_the_same_products(
    saved: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    model, folder = saved
    with open_adapter(folder) as adapter:
        write_back(adapter, tmp_path / "out")
    expected, found = deltas(model), deltas(load_strictly(Toy(), tmp_path / "out"))
    assert sorted(found) == sorted(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-5)


def test_only_the_modules_of_the_adapter_are_targeted(tmp_path: Path) -> None:
    """``fc`` at the top is adapted, the ``fc`` of most blocks is not, so no list of endings can say it."""
    model = trained(Toy(), target_modules=r"fc|layers\.1\.q|layers\.11\.fc", r=2)
    model.save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        assert list(adapter.modules) == ["fc", "layers.1.q", "layers.11.fc"]
        assert check_compatible([adapter]).anchored_targets
        write_back(adapter, tmp_path / "out")
    loaded = deltas(load_strictly(Toy(), tmp_path / "out"))
    assert sorted(loaded) == ["fc", "layers.1.q", "layers.11.fc"]


def test_targets_are_a_plain_list_where_that_is_exact(tmp_path: Path) -> None:
    trained(Toy(), target_modules=["q", "emb"], r=2).save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        assert not check_compatible([adapter]).anchored_targets
        long = _results(adapter, [name for name in adapter.modules if "." in name])
        assert adapter_config(_results(adapter, ["emb"]))["target_modules"] == ["emb"]
        assert adapter_config(long, anchored_targets=True)["target_modules"] == [m.name for m in long]


def _results(adapter: Adapter, names: list[str]) -> list[ResultModule]:
    modules = [adapter.modules[name] for name in names]
    return [ResultModule(m.name, m.kind, m.m, m.n, m.rank, m.weight_shape) for m in modules]


def test_transposed_linear_layers(tmp_path: Path) -> None:
    settings = {"target_modules": ["layers.0", "layers.2"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True}
    model = trained(Transposed(), **settings)
    model.save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        assert adapter.modules["layers.0"].weight_shape == (6, 10)
        assert (adapter.modules["layers.0"].m, adapter.modules["layers.0"].n) == (10, 6)
        write_back(adapter, tmp_path / "out")
        loaded = deltas(load_strictly(Transposed(), tmp_path / "out"))
        for name, delta in deltas(model).items():
            torch.testing.assert_close(our_delta(adapter, name), delta)
            torch.testing.assert_close(loaded[name], delta)


def test_padding_to_a_higher_rank_changes_nothing(tmp_path: Path) -> None:
    model = trained(Toy(), target_modules=TARGETS, r=2, rank_pattern={"mha": 1})
    model.save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        write_back(adapter, tmp_path / "out", extra_rank=3)
    found = deltas(load_strictly(Toy(), tmp_path / "out"))
    for name, delta in deltas(model).items():
        torch.testing.assert_close(found[name], delta)


def test_both_projections_of_an_attention_get_one_rank() -> None:
    ranks = result_ranks({"mha": 0, "mha.base_layer.out_proj": 4, "other": 0})
    assert ranks == {"mha": 4, "mha.base_layer.out_proj": 4, "other": 1}


def test_the_written_configuration_has_scale_one_everywhere(tmp_path: Path) -> None:
    model = trained(Toy(), target_modules=TARGETS, **SETTINGS["patterns"])
    model.save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        write_back(adapter, tmp_path / "out")
    with open_adapter(tmp_path / "out") as result:
        assert {module.scale for module in result.modules.values()} == {1.0}
        assert result.config is not None
        assert result.config.rank_pattern == result.config.alpha_pattern
        assert result.config.r == result.config.lora_alpha
        assert not result.warnings


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_output_dtype_loads(dtype: str, tmp_path: Path) -> None:
    model = trained(Toy(), target_modules=["q", "emb"], r=2)
    model.save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        write_back(adapter, tmp_path / "out", dtype=dtype)
    header = check_safetensors(tmp_path / "out/adapter_model.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {dtype}
    found = deltas(load_strictly(Toy(), tmp_path / "out"))
    for name, delta in deltas(model).items():
        torch.testing.assert_close(found[name], delta, rtol=0.03, atol=0.03)


def test_fully_trained_modules_are_collected(tmp_path: Path) -> None:
    model = trained(Toy(), target_modules=["q"], modules_to_save=["head"], r=2)
    model.save_pretrained(tmp_path / "saved")
    with open_adapter(tmp_path / "saved") as adapter:
        assert sorted(adapter.full_tensors) == ["head.bias", "head.weight"]
        assert adapter.full_tensors["head.weight"].shape == (3, 6)
        expected = model.base_model.model.head.modules_to_save["default"].weight
        torch.testing.assert_close(adapter.full_tensor("head.weight"), expected.detach())


def test_raw_state_dicts_with_adapter_names_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = trained(Toy(), target_modules=["q", "emb", "conv"], modules_to_save=["head"], r=2)
    model.save_pretrained(tmp_path / "saved")
    keys = ("lora_", "modules_to_save")
    raw = {k: v.contiguous() for k, v in model.state_dict().items() if any(part in k for part in keys)}
    save_file(raw, tmp_path / "saved/adapter_model.safetensors")
    with open_adapter(tmp_path / "saved") as adapter:
        assert sorted(adapter.full_tensors) == ["head.bias", "head.weight"]
        for name, delta in deltas(model).items():
            torch.testing.assert_close(our_delta(adapter, name), delta)
