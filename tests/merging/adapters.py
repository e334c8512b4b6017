"""Small PEFT adapters for tests, written as real files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULES = {
    "layers.0.q_proj": (24, 16),
    "layers.0.v_proj": (12, 16),
    "layers.1.q_proj": (24, 16),
    "layers.1.v_proj": (12, 16),
}


def write_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    dtype: torch.dtype = torch.float32,
    zero: bool = False,
    **config: Any,
) -> Path:
    """A LoRA adapter with random factors; ``config`` overrides fields of adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n) in modules.items():
        prefix = f"base_model.model.{name}"
        B = torch.randn(m, rank, generator=generator) / m**0.5
        tensors[f"{prefix}.lora_B.weight"] = (torch.zeros_like(B) if zero else B).to(dtype)
        A = torch.randn(rank, n, generator=generator) / n**0.5
        tensors[f"{prefix}.lora_A.weight"] = A.to(dtype)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "base_model_name_or_path": "org/base",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder


def products(folder: Path) -> dict[str, torch.Tensor]:
    """``scale * B @ A`` per module in float64, read by our own reader."""
    from merging import load_adapter

    with load_adapter(folder) as adapter:
        found = {}
        for name in adapter.modules:
            B, A = adapter.factors(name, dtype=torch.float64)
            found[name] = B @ A
        return found
