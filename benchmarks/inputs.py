"""Seeded adapter sets with the shapes of Llama models, written as PEFT directories.

``small``, ``big``: 8 adapters of rank 16 and alpha 32 in float32 on 4 layers of 7 linear layers.
``8b``: the shapes of ``big`` on 32 layers, the adapters of a whole 8B model (1.3 GB).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 16
ALPHA = 32
ADAPTERS = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model."""

    hidden: int
    inner: int
    kv: int
    layers: int

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, out and in features of every linear layer."""
        h, f, k = self.hidden, self.inner, self.kv
        for layer in range(self.layers):
            for name, m, n in (
                ("self_attn.q_proj", h, h),
                ("self_attn.k_proj", k, h),
                ("self_attn.v_proj", k, h),
                ("self_attn.o_proj", h, h),
                ("mlp.gate_proj", f, h),
                ("mlp.up_proj", f, h),
                ("mlp.down_proj", h, f),
            ):
                yield f"model.layers.{layer}.{name}", m, n


SETS = {
    "small": Shape(1024, 2816, 256, 4),
    "big": Shape(4096, 14336, 1024, 4),
    "8b": Shape(4096, 14336, 1024, 32),
}


def factors(seed: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """``B (m, 16)`` and ``A (16, n)`` with a decaying spectrum, as trained adapters have."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.85 ** torch.arange(RANK, dtype=torch.float32)
    B = torch.randn(m, RANK, generator=generator) * decay * (0.1 / math.sqrt(m))
    A = torch.randn(RANK, n, generator=generator) / math.sqrt(n)
    return B, A


def write_adapter(folder: Path, shape: Shape, index: int) -> None:
    """One adapter directory."""
    folder.mkdir(parents=True)
    tensors = {}
    for number, (name, m, n) in enumerate(shape.linears()):
        B, A = factors(1_000_003 * (index + 1) + number, m, n)
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "benchmark/llama",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name, _, _ in shape.linears()}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def adapter_set(scratch: Path, name: str) -> list[Path]:
    """The folders of a set below ``scratch``; made on first use, atomically, and kept."""
    folder = scratch / "inputs" / name
    paths = [folder / f"task-{index}" for index in range(ADAPTERS)]
    if not folder.exists():
        part = folder.with_name(f".{name}.part")
        for index in range(ADAPTERS):
            write_adapter(part / f"task-{index}", SETS[name], index)
        part.rename(folder)
    return paths
