"""LoRA files of image models in every spelling, each with the dense update that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One layer: B (m, r[, 1, 1]), A (r, n[, k, k]) and, as LoCon has it, a Tucker core (r, r, k, k)."""

    B: Tensor
    A: Tensor
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self, scale: float) -> Tensor:
        """The dense update in float64, one row per output."""
        B, A = self.B.double(), self.A.double()
        if self.mid is not None:
            full = torch.einsum("nmkl,in,mj->ijkl", self.mid.double(), B[:, :, 0, 0], A[:, :, 0, 0])
            return scale * full.flatten(1)
        if A.ndim == 4:
            return scale * torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A).flatten(1)
        return scale * B @ A


def layer(m: int, n: int, rank: int, *, kernel: int = 0, tucker: bool = False, seed: int = 0) -> Layer:
    """Random factors; with ``kernel`` those of a convolution."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    if tucker:
        return Layer(random(m, rank, 1, 1), random(rank, n, 1, 1), random(rank, rank, kernel, kernel))
    if kernel:
        return Layer(random(m, rank, 1, 1), random(rank, n, kernel, kernel))
    return Layer(random(m, rank), random(rank, n))


def kohya_layers(seed: int = 0, rank: int = 4) -> dict[str, Layer]:
    """A little of everything that a U-Net and two text encoders have."""
    return {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": layer(12, 8, rank, seed=seed),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": layer(12, 8, rank, seed=seed + 1),
        "lora_unet_down_blocks_0_attentions_0_proj_in": layer(6, 10, rank, kernel=1, seed=seed + 2),
        "lora_unet_down_blocks_0_resnets_0_conv1": layer(6, 10, rank, kernel=3, seed=seed + 3),
        "lora_unet_down_blocks_0_to_out_0": layer(10, 10, rank, seed=seed + 4),
    }


def write_kohya(
    path: Path,
    layers: Mapping[str, Layer],
    *,
    alpha: float | None = 2.0,
    dtype: torch.dtype = torch.float32,
    alpha_dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A file as kohya's scripts write it; ``alpha`` None leaves the alpha tensors out."""
    tensors: dict[str, Tensor] = {}
    for name, own in layers.items():
        tensors[f"{name}.lora_down.weight"] = own.A.to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = own.B.to(dtype).contiguous()
        if own.mid is not None:
            tensors[f"{name}.lora_mid.weight"] = own.mid.to(dtype).contiguous()
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=alpha_dtype or dtype)
    save_file(tensors, str(path), metadata=dict(metadata or {}))
    return path


def write_named(
    path: Path,
    layers: Mapping[str, Layer],
    *,
    tails: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
    alpha: float | None = None,
    config: Mapping[str, object] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A file with dotted names; ``tails`` are appended for A and B, ``config`` goes into the header."""
    tensors: dict[str, Tensor] = {}
    for name, own in layers.items():
        tensors[name + tails[0]] = own.A
        tensors[name + tails[1]] = own.B
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    header = dict(metadata or {})
    if config is not None:
        header["lora_adapter_metadata"] = json.dumps(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata={"format": "pt", **header})
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """What our reader makes of a file: the dense update of each module in float64."""
    from merging.formats.adapter import open_adapter

    found = {}
    with open_adapter(path) as adapter:
        for name in adapter.modules:
            B, A = adapter.factors(name, dtype=torch.float64)
            found[name] = B @ A
    return found
