"""What the work costs at the least, written plainly: the yardstick of the speed table.

``rank_space``: read 8 adapters, QR of the stacked factors, SVD of the small core, cut to rank 16, write.
``read_write``: read the inputs and write an output of the same size as the merged adapter.
``full_space``: TIES on the dense deltas, module by module, and an adapter of rank 16 from the result.
All in float32 (the small core too), one thread.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.inputs import ALPHA, RANK

SCALE = math.sqrt(ALPHA / RANK)
DENSITY = 0.2
BLOCK = 1 << 20
"""Entries per task that are worked on at a time in full space."""


def modules(paths: list[Path]) -> list[str]:
    """Module names of the first adapter."""
    with safe_open(paths[0] / "adapter_model.safetensors", "pt") as file:
        return sorted(key.removesuffix(".lora_A.weight") for key in file.keys() if ".lora_A." in key)  # noqa: SIM118


def rank_space(paths: list[Path], out: Path) -> None:
    """The exact truncated sum of the adapters."""
    files = [safe_open(path / "adapter_model.safetensors", "pt") for path in paths]
    merged = {}
    for name in modules(paths):
        B = torch.cat([file.get_tensor(f"{name}.lora_B.weight") for file in files], 1) * SCALE
        A = torch.cat([file.get_tensor(f"{name}.lora_A.weight") for file in files], 0) * SCALE
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        root = S[:RANK].sqrt()
        merged[f"{name}.lora_B.weight"] = Q_B @ (U[:, :RANK] * root)
        merged[f"{name}.lora_A.weight"] = (root[:, None] * Vh[:RANK]) @ Q_A.T
    save_file(merged, out)


def read_write(paths: list[Path], out: Path) -> None:
    """Every input tensor in memory once; the tensors of the last adapter on disk."""
    kept = {}
    for path in paths:
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            kept = {key: file.get_tensor(key) * SCALE for key in file.keys()}  # noqa: SIM118
    save_file(kept, out)


def full_space(paths: list[Path], out: Path, limit: int | None = None) -> None:
    """TIES of the dense deltas, ``limit`` modules at most; at most two dense matrices in memory."""
    files = [safe_open(path / "adapter_model.safetensors", "pt") for path in paths]
    merged = {}
    for name in modules(paths)[:limit]:
        Bs = [file.get_tensor(f"{name}.lora_B.weight") * SCALE for file in files]
        As = [file.get_tensor(f"{name}.lora_A.weight") * SCALE for file in files]
        B, A = range_finder(ties(Bs, As))
        merged[f"{name}.lora_B.weight"], merged[f"{name}.lora_A.weight"] = B, A
    save_file(merged, out)


def ties(Bs: list[Tensor], As: list[Tensor]) -> Tensor:
    """Trim to the largest entries, elect signs by the sum, average what agrees; ``(m, n)``."""
    cuts = [threshold(B @ A) for B, A in zip(Bs, As, strict=True)]
    m, n = Bs[0].shape[0], As[0].shape[1]
    merged = torch.empty(m, n)
    step = max(1, BLOCK // n)
    for start in range(0, m, step):
        rows = torch.stack([B[start : start + step] @ A for B, A in zip(Bs, As, strict=True)])
        for task, cut in zip(rows, cuts, strict=True):
            task.masked_fill_(task.abs() < cut, 0.0)
        sign = rows.sum(0).sign_()
        kept = (rows * sign).relu_()
        merged[start : start + step] = kept.sum(0) * sign / (kept > 0).sum(0).clamp_min_(1)
    return merged


def threshold(delta: Tensor) -> float:
    """The magnitude of the ``DENSITY``-th largest entry, exactly, from two histograms of the float bits."""
    bits = delta.view(torch.int32) & 0x7FFFFFFF
    wanted = math.ceil(DENSITY * delta.numel())
    top, wanted = _bin(bits >> 16, 1 << 15, wanted)
    low, _ = _bin(bits[(bits >> 16) == top] & 0xFFFF, 1 << 16, wanted)
    return float(torch.tensor((top << 16) | low, dtype=torch.int32).view(torch.float32))


def _bin(values: Tensor, bins: int, wanted: int) -> tuple[int, int]:
    """The bin of the ``wanted``-th largest value, and how many are still wanted inside it."""
    above = torch.bincount(values.flatten(), minlength=bins).flip(0).cumsum(0)
    place = int((above >= wanted).int().argmax())
    return bins - 1 - place, wanted - (int(above[place - 1]) if place else 0)


def range_finder(matrix: Tensor, power_steps: int = 2) -> tuple[Tensor, Tensor]:
    """Factors of rank 16 by randomised subspace iteration (Halko, Martinsson, Tropp 2011)."""
    start = torch.randn(matrix.shape[1], 2 * RANK, generator=torch.Generator().manual_seed(0))
    Q, _ = torch.linalg.qr(matrix @ start)
    for _ in range(power_steps):
        P, _ = torch.linalg.qr(matrix.T @ Q)
        Q, _ = torch.linalg.qr(matrix @ P)
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    root = S[:RANK].sqrt()
    return Q @ (U[:, :RANK] * root), (root[:, None] * Vh[:RANK]).contiguous()
