"""Layers that the base stores transposed, whatever the one flag of an adapter's configuration says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from formats.build import write_adapter
from safetensors.torch import load_file, save_file

import merging
from merging.formats.adapter import open_adapter
from merging.formats.conv1d import doubtful, oriented
from merging.formats.peft_keys import weight_key

SHAPES = {"h.0.c_attn": (12, 4), "h.0.c_proj": (4, 4), "lm_head": (9, 4), "h.0.gate": (4, 4)}
"""As nn.Linear would store them: (out, in)."""
STORED = {**SHAPES, "h.0.c_attn": (4, 12)}


def adapter(folder: Path, *, flag: bool) -> Path:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (m, n) in SHAPES.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (2, n)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (m, 2)
    write_adapter(folder, shapes, r=2, lora_alpha=2, target_modules=list(SHAPES), fan_in_fan_out=flag)
    generator = torch.Generator().manual_seed(0)
    path = folder / "adapter_model.safetensors"
    tensors = {key: torch.randn(value.shape, generator=generator) for key, value in load_file(path).items()}
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("model_type", "square"), [("gpt2", True), ("llama", None), (None, None)])
def test_the_shape_decides_and_for_square_weights_the_kind_of_model(
    tmp_path: Path, flag: bool, model_type: str | None, square: bool | None
) -> None:
    with open_adapter(adapter(tmp_path / "a", flag=flag)) as opened:
        found = oriented(opened.modules, STORED, model_type)
    assert {name: module.weight_shape for name, module in found.items()} == STORED
    assert found["h.0.c_attn"].fan_in_fan_out
    assert not found["lm_head"].fan_in_fan_out
    assert found["h.0.c_proj"].fan_in_fan_out == (flag if square is None else square)
    assert found["h.0.gate"].fan_in_fan_out == (flag if square is None else not square)


@pytest.mark.parametrize("flag", [False, True])
def test_a_checkpoint_gets_every_update_as_its_base_stores_it(tmp_path: Path, flag: bool) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {f"{name}.weight": torch.zeros(shape) for name, shape in STORED.items()}, base / "model.safetensors"
    )
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    folder = adapter(tmp_path / "a", flag=flag)
    data = {"merge_method": "linear", "base_model": str(base), "models": [{"model": str(folder)}]}
    merging.merge({**data, "output": {"format": "checkpoint"}}, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(folder / "adapter_model.safetensors")
    for name in SHAPES:
        A, B = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        delta = (B @ A).mT if name.startswith("h.0.c_") else B @ A
        torch.testing.assert_close(written[f"{name}.weight"], delta)


def test_a_task_vector_of_both_kinds_comes_with_a_warning(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", flag=False)
    data = {"merge_method": "linear", "models": [{"model": str(folder)}], "output": {"format": "delta"}}
    report = merging.merge(data, tmp_path / "out").report
    assert "orientation_doubtful" in [entry["code"] for entry in report["warnings"]]
    assert not doubtful(["h.0.c_attn", "h.1.c_proj"])
    assert not doubtful(["layers.0.q_proj", "lm_head"])


def test_weights_have_the_names_of_the_base() -> None:
    names = ("a.mha", "a.mha.base_layer.out_proj", "a.q")
    assert [weight_key(name, names) for name in names] == [
        "a.mha.in_proj_weight",
        "a.mha.out_proj.weight",
        "a.q.weight",
    ]
