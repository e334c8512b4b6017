"""Results in the hands of the libraries that users load them with, and on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import VOCAB, Q, base_tensors, read_all, recipe, tuned, write_checkpoint
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import merging

TOKENS = torch.arange(VOCAB).unsqueeze(0)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("shard_bytes", [None, 1500])
@pytest.mark.parametrize("tie", [False, True])
def test_a_merged_checkpoint_loads_in_transformers(
    tmp_path: Path, shard_bytes: int | None, tie: bool
) -> None:
    tensors = base_tensors()
    if tie:
        del tensors["lm_head.weight"]
    base = write_checkpoint(tmp_path / "base", tensors, tie_word_embeddings=tie)
    models = [
        write_checkpoint(tmp_path / f"m{i}", tuned(tensors, i), tie_word_embeddings=tie) for i in range(3)
    ]
    merging.merge(recipe(base, models, "ties"), tmp_path / "out", device="cpu", shard_bytes=shard_bytes)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    merged = read_all(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_an_extracted_adapter_brings_the_fine_tune_back(tmp_path: Path) -> None:
    tensors = base_tensors(torch.float32)
    base = write_checkpoint(tmp_path / "base", tensors, torch_dtype="float32")
    tune = write_checkpoint(tmp_path / "tuned", tuned(tensors, 1), torch_dtype="float32")
    output = {"format": "lora", "energy": 1.0}
    data = recipe(base, [tune], output=output, modules_to_save="average")
    merging.merge(data, tmp_path / "adapter", device="cpu")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    wanted = logits(AutoModelForCausalLM.from_pretrained(tune))
    assert torch.allclose(logits(adapted), wanted, atol=1e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert float((plain - wanted).abs().max()) > 1e-2


def real(quality_dir: Path, tmp_path: Path, count: int) -> tuple[Path, list[Path], list[Path]]:
    """The real base in float32, adapters of it, and these folded into it."""
    tensors = {
        name: tensor.float()
        for name, tensor in load_file(quality_dir / "base/minilm_l6_pruned_fp16.safetensors").items()
        if tensor.is_floating_point()
    }
    base = write_checkpoint(tmp_path / "base", tensors, model_type="bert")
    adapters = sorted((quality_dir / "public/adapters/r16").iterdir())[:count]
    folded = []
    for path in adapters:
        whole = dict(tensors)
        with merging.load_adapter(path) as adapter:
            for name in adapter.modules:
                B, A = adapter.factors(name, dtype=torch.float64)
                whole[f"{name}.weight"] = (whole[f"{name}.weight"].double() + B @ A).float()
        folded.append(write_checkpoint(tmp_path / path.name, whole, model_type="bert"))
    return base, adapters, folded


@pytest.mark.parametrize(("method", "parameters"), [("linear", {"weight": 0.5}), ("ties", {"lambda": 1.0})])
def test_real_full_fine_tunes_equal_the_route_of_the_adapters(
    quality_dir: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    base, adapters, folded = real(quality_dir, tmp_path, 2)
    settings = {"parameters": parameters, "output": {"format": "delta", "dtype": "float32"}}
    merging.merge(recipe(base, folded, method, **settings), tmp_path / "dense", device="cpu")
    merging.merge(recipe(None, adapters, method, **settings), tmp_path / "lora", device="cpu")
    dense, lora = read_all(tmp_path / "dense"), read_all(tmp_path / "lora")
    assert set(lora) < set(dense)
    for name, tensor in dense.items():
        if name not in lora:
            assert not tensor.any(), name  # what no adapter touches stays
            continue
        # Entries at a threshold may fall on the other side; weights of float32 round the fine-tunes.
        far = (tensor - lora[name]).abs() > 1e-6
        assert float(far.double().mean()) < 1e-3, name
    assert Q not in dense
