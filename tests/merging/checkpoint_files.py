"""Small llama-shaped checkpoints for tests, written as real files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INNER, VOCAB = 12, 20, 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
for _layer in range(2):
    _stem = f"model.layers.{_layer}"
    SHAPES |= {
        f"{_stem}.input_layernorm.weight": (HIDDEN,),
        f"{_stem}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{_stem}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{_stem}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        f"{_stem}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{_stem}.post_attention_layernorm.weight": (HIDDEN,),
        f"{_stem}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{_stem}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{_stem}.mlp.down_proj.weight": (HIDDEN, INNER),
    }
SHAPES |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def base_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1).to(dtype)
        for name, shape in SHAPES.items()
    }


def tuned(base: Mapping[str, Tensor], seed: int, size: float = 0.02) -> dict[str, Tensor]:
    """Every floating-point tensor with noise on it, in its own dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if not tensor.is_floating_point()
        else (
            tensor.double() + size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        ).to(tensor.dtype)
        for name, tensor in base.items()
    }


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **config: Any) -> Path:
    """A checkpoint folder; ``config`` overrides fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), str(folder / "model.safetensors"), {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, str(folder / file), {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any], **more: Any) -> None:
    data = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map), **more}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def write_task_vector(folder: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "merge.kind": "task_vector", **metadata}
    save_file(dict(tensors), str(folder / "delta.safetensors"), header)
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def recipe(base: Path | None, models: list[Path], method: str = "linear", **more: Any) -> dict[str, Any]:
    """A recipe that writes a checkpoint."""
    return {
        "merge_method": method,
        "base_model": None if base is None else str(base),
        "models": [{"model": str(path)} for path in models],
        "output": {"format": "checkpoint"},
        **more,
    }
