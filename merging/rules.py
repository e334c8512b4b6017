"""Entry-wise rules as pure functions.

Every function takes the entries of the tasks as ``x (..., T, rows, cols)`` and treats each position on its
own. Thresholds, masks and weights come in as arguments, so a rule never needs the whole tensor at once.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

SignMethod = Literal["total", "frequency"]
Aggregate = Literal["mean", "sum", "max"]


def trim(x: Tensor, threshold: Tensor) -> Tensor:
    """Zero what is smaller in magnitude than ``threshold (..., T, 1, 1)``; equal magnitudes stay."""
    return torch.where(x.abs() >= threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))


def kept_count(entries: int, density: float, *, inclusive: bool = False) -> int:
    """How many entries a density keeps: ``int(density * entries)``, at least one.

    ``inclusive`` is the counting of the TIES reference code, which keeps one more.
    """
    if density >= 1.0:
        return entries
    return min(entries, max(1, int(density * entries) + int(inclusive)))


def elect(x: Tensor, method: SignMethod, zero: Tensor | float) -> Tensor:
    """The sign of each position over the tasks, ``(..., 1, rows, cols)``.

    ``total`` takes the sign of the sum, ``frequency`` the sign of the sum of signs. ``zero`` replaces a sign
    of zero (+1 in PEFT and mergekit, the majority sign of the tensor in the TIES paper's code).
    """
    votes = x if method == "total" else x.sign()
    sign = votes.sum(-3, keepdim=True).sign()
    filler = torch.as_tensor(zero, dtype=x.dtype, device=x.device)
    return torch.where(sign == 0, filler, sign)


def agreeing(x: Tensor, sign: Tensor) -> Tensor:
    """Where an entry is non-zero and has the elected sign; a sign of zero counts as negative."""
    return torch.where(sign > 0, x > 0, x < 0)


def disjoint(x: Tensor, sign: Tensor, agg: Aggregate, divisor_weights: Tensor | None = None) -> Tensor:
    """Combine the entries that agree with ``sign``; ``(..., rows, cols)``.

    ``mean`` divides by the number of agreeing tasks, or by the sum of their ``divisor_weights (T, 1, 1)``;
    ``max`` is the largest magnitude times the sign.
    """
    keep = agreeing(x, sign)
    kept = torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))
    if agg == "max":
        return kept.abs().amax(-3) * sign.squeeze(-3)
    total = kept.sum(-3)
    if agg == "sum":
        return total
    if divisor_weights is None:
        return total / keep.sum(-3).clamp_min(1)
    divisor = (keep * divisor_weights).sum(-3)
    return total / torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)


def task_generator(seed: int, digest: str, module: str) -> torch.Generator:
    """The random stream of one task in one module: independent of order, layer and worker."""
    key = hashlib.sha256(f"{seed}\0{digest}\0{module}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return generator
