"""Figures of a spectrum. Singular values come as ``S (..., k)``, descending, zero where there are none.

The ranks have the shape ``(...)`` and are NaN for a zero matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.lowrank import rank_for_energy

NAN = float("nan")

NORMS = ("spectral_norm", "nuclear_norm")
"""The figures that grow with the update; the others do not change when it is scaled."""

ENERGIES = (0.9, 0.95, 0.99)


def figures(S: Tensor) -> dict[str, Tensor]:
    """All figures, ``(...)`` each; NaN where there is no spectrum (``k = 0``)."""
    known = S.shape[-1] > 0
    if not known:
        S = S.new_zeros(*S.shape[:-1], 1)
    found = {
        "spectral_norm": S[..., 0],
        "nuclear_norm": S.sum(-1),
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        "participation_ratio": participation_ratio(S),
        **{f"energy_rank_{round(100 * share)}": energy_rank(S, share) for share in ENERGIES},
    }
    return found if known else {key: torch.full_like(value, NAN) for key, value in found.items()}


def effective_rank(S: Tensor) -> Tensor:
    """``exp(-sum p ln p)`` with ``p = S / sum S`` (Roy and Vetterli 2007)."""
    p = S / S.sum(-1, keepdim=True)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


def stable_rank(S: Tensor) -> Tensor:
    """``|D|_F^2 / sigma_1^2``."""
    return (S**2).sum(-1) / S[..., 0] ** 2


def participation_ratio(S: Tensor) -> Tensor:
    """``(sum S^2)^2 / sum S^4``: how many directions share the energy."""
    p = S**2 / (S**2).sum(-1, keepdim=True)
    return 1.0 / (p**2).sum(-1)


def energy_rank(S: Tensor, energy: float) -> Tensor:
    """The smallest rank that keeps the fraction ``energy`` of ``sum S^2``."""
    return torch.where(S[..., 0] > 0, rank_for_energy(S, energy).to(S.dtype), NAN)
