"""The real client: PEFT loads every result, and its own exact merges agree with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import MODULES, products, write_adapter

import merging

peft = pytest.importorskip("peft")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(16, 24, bias=False)
        self.v_proj = torch.nn.Linear(16, 12, bias=False)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def load(path: Path) -> Any:
    """The adapter in PEFT; fails on missing or unexpected keys."""
    model = peft.PeftModel.from_pretrained(Model(), str(path))
    from safetensors.torch import load_file

    outcome = peft.set_peft_model_state_dict(model, load_file(str(path / "adapter_model.safetensors")))
    assert not outcome.unexpected_keys
    assert not [key for key in outcome.missing_keys if "lora" in key]
    return model


def deltas(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """PEFT's own idea of the update of each module."""
    found = {}
    for name in MODULES:
        layer = model.get_submodule(f"base_model.model.{name}")
        found[name] = layer.get_delta_weight(adapter).detach().double()
    return found


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [
        write_adapter(tmp_path / "a", seed=1, rank=4, alpha=8),
        write_adapter(tmp_path / "b", seed=2, rank=2, alpha=3),
        write_adapter(tmp_path / "c", seed=3, rank=6, alpha=6),
    ]


@pytest.mark.parametrize(
    ("method", "space", "output"),
    [
        ("linear", None, {}),
        ("svd", None, {"energy": 0.7}),
        ("ties", "core", {}),
        ("ties", "full", {"rank": 5}),
        ("dare_ties", "knots", {"uniform_rank": True}),
    ],
)
def test_peft_loads_what_we_write_and_sees_the_same_update(
    adapters: list[Path], tmp_path: Path, method: str, space: str | None, output: dict[str, Any]
) -> None:
    recipe = {
        "merge_method": method,
        "space": space,
        "models": [{"model": str(path)} for path in adapters],
        "output": output,
    }
    merging.merge(recipe, tmp_path / "out")
    theirs, ours = deltas(load(tmp_path / "out")), products(tmp_path / "out")
    for name in MODULES:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "kind"), [("linear", "cat"), ("svd", "svd")])
def test_exact_and_svd_merges_equal_those_of_peft(
    adapters: list[Path], tmp_path: Path, method: str, kind: str
) -> None:
    weights = [0.6, 1.0, -0.3]
    model = peft.PeftModel.from_pretrained(Model(), str(adapters[0]), adapter_name="m0")
    for i, path in enumerate(adapters[1:], start=1):
        model.load_adapter(str(path), adapter_name=f"m{i}")
    model.base_model.add_weighted_adapter(["m0", "m1", "m2"], weights, "merged", combination_type=kind)
    theirs = deltas(model, "merged")
    models = [
        {"model": str(path), "parameters": {"weight": w}} for path, w in zip(adapters, weights, strict=True)
    ]
    merging.merge({"merge_method": method, "models": models}, tmp_path / "out")
    ours = products(tmp_path / "out")
    for name in MODULES:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm()
