"""LoRA on the bare parameters of mixture-of-experts layers, checked against PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.build import PREFIX, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import merging
from merging.errors import InputError
from merging.formats.adapter import open_adapter

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS, WIDTH, HIDDEN = 12, 6, 5  # more than ten: names must still sort as numbers


class Experts(nn.Module):
    """Two parameters; the order of definition decides how PEFT nests them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH)
        if not transposed:
            up, down = up[::-1], down[::-1]
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *up))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *down))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(self.q(x))
        return out


def model(transposed: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"block": Block(transposed)})


def train(folder: Path, seed: int, transposed: bool, **config: Any) -> Path:
    """An adapter as PEFT saves it, with random factors."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q"], "target_parameters": PARAMETERS, **config}
    wrapped = get_peft_model(model(transposed), LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    wrapped.save_pretrained(str(folder))
    return folder


def changes(folder: Path, transposed: bool) -> dict[str, Tensor]:
    """What PEFT itself adds to the base."""
    before = {name: tensor.clone() for name, tensor in model(transposed).state_dict().items()}
    after = PeftModel.from_pretrained(model(transposed), str(folder)).merge_and_unload().state_dict()
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_a_module_with_the_delta_that_peft_adds(transposed: bool, tmp_path: Path) -> None:
    folder = train(tmp_path / "a", 1, transposed)
    wanted = changes(folder, transposed)
    stored = {
        "block.experts": "block.experts.down_proj",
        "block.experts.base_layer": "block.experts.gate_up_proj",
    }
    with open_adapter(folder) as adapter:
        assert len(adapter.modules) == 2 * EXPERTS + 1
        for name, module in adapter.modules.items():
            if module.expert is None:
                continue
            B, A = adapter.factors(name, dtype=torch.float64)
            delta = wanted[stored[module.expert.owner]][module.expert.index]
            torch.testing.assert_close(B @ A, delta.T if transposed else delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("output", [{}, {"uniform_rank": True}])
def test_peft_reads_a_merge_as_the_sum(transposed: bool, output: dict[str, Any], tmp_path: Path) -> None:
    one = train(tmp_path / "a", 1, transposed)
    two = train(tmp_path / "b", 2, transposed, r=3, use_rslora=True)
    models = [{"model": str(one)}, {"model": str(two), "parameters": {"weight": -0.5}}]
    merging.merge({"merge_method": "linear", "models": models, "output": output}, tmp_path / "out")
    first, second = changes(one, transposed), changes(two, transposed)
    for name, delta in changes(tmp_path / "out", transposed).items():
        torch.testing.assert_close(delta, first[name] - 0.5 * second[name], rtol=1e-4, atol=2e-5)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(PARAMETERS)
    assert config["target_modules"] == ["block.q"]


def test_ranks_of_experts_are_padded_to_those_of_their_layer(tmp_path: Path) -> None:
    paths = [train(tmp_path / name, seed, False) for seed, name in enumerate("ab")]
    recipe = {
        "merge_method": "svd",
        "models": [{"model": str(path)} for path in paths],
        "output": {"energy": 0.8},
    }
    result = merging.merge(recipe, tmp_path / "out")
    found = {entry["rank"] for name, entry in result.report["modules"].items() if "[" in name}
    assert len(found) > 1
    with open_adapter(tmp_path / "out") as adapter:
        ranks = {module.rank for module in adapter.modules.values() if module.expert is not None}
    assert ranks == {max(found)}
    changes(tmp_path / "out", False)  # PEFT accepts the shapes


def test_only_parameters_and_no_layers(tmp_path: Path) -> None:
    paths = [train(tmp_path / n, s, False, target_modules=[]) for s, n in enumerate("ab")]
    recipe = {"merge_method": "linear", "models": [{"model": str(path)} for path in paths]}
    merging.merge(recipe, tmp_path / "out", threads=2)
    first, second = (changes(path, False) for path in paths)
    for name, delta in changes(tmp_path / "out", False).items():
        torch.testing.assert_close(delta, first[name] + second[name], rtol=1e-4, atol=2e-5)


def refusal(paths: list[Path], **more: Any) -> str:
    recipe = {"merge_method": "linear", "models": [{"model": str(path)} for path in paths], **more}
    with pytest.raises(InputError) as caught:
        merging.plan(recipe)
    return caught.value.code


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    one = train(tmp_path / "a", 1, False)
    other = train(tmp_path / "b", 2, False, target_parameters=PARAMETERS[:1])
    assert refusal([one, other], missing_modules="zero") == "target_parameters_mismatch"
    assert refusal([one, one], output={"format": "delta"}) == "family_output_unsupported"
    assert refusal([one, one], merge_method="rmm") == "family_method_unsupported"


PAIR = {f"{PREFIX}mlp.experts.lora_A.weight": (8, 3), f"{PREFIX}mlp.experts.lora_B.weight": (4, 8)}


@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": ["down_proj"]},
        {"target_parameters": ["mlp.experts.a", "other.b"]},
        {"target_parameters": ["mlp.experts.a"], "fan_in_fan_out": True},
        {"target_parameters": ["mlp.experts.a", "experts.b"], "rank_pattern": {"experts.a": 4}},
        {"target_parameters": ["mlp.experts.a", "experts.b"], "alpha_pattern": {"experts.a": 1}},
    ],
)
def test_configurations_that_do_not_tell_enough(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_adapter(write_adapter(tmp_path / "a", PAIR, **config))
    assert caught.value.code == "target_parameters_unsupported"


def test_a_rank_that_does_not_divide_the_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_adapter(write_adapter(tmp_path / "a", PAIR, r=3, target_parameters=["mlp.experts.a"]))
    assert caught.value.code == "rank_mismatch"
