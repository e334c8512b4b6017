"""Spectral methods written down plainly on dense float64 matrices, to test the factored code against.

Inputs are task vectors of full precision; singular values below ``NULL`` of the largest count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NULL = 1e-9
REPEATED = 1e-6


def rank_of(matrix: Tensor, rtol: float) -> int:
    values = torch.linalg.svdvals(matrix)
    return int((values > rtol * values[0]).sum())


def leading(matrix: Tensor, count: int, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``count`` singular triplets that are not null compared to ``scale`` (default: the first)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    count = min(count, int((S > NULL * (S[0] if scale is None else scale)).sum()))
    return U[:, :count], S[:count], Vh[:count]


def polar(columns: Tensor) -> Tensor:
    """The nearest partial isometry, without directions that repeat others."""
    if columns.shape[1] == 0:
        return columns
    P, D, Qh = torch.linalg.svd(columns, full_matrices=False)
    keep = int((REPEATED * D[0] < D).sum())
    return P[:, :keep] @ Qh[:keep]


def reach(deltas: Sequence[Tensor]) -> int:
    """Directions that the updates reach: the smaller of their joint column and row ranks."""
    alive = [delta / torch.linalg.matrix_norm(delta, 2) for delta in deltas if float(delta.norm()) > 0]
    if not alive:
        return 0
    return min(rank_of(torch.cat(alive, 1), REPEATED), rank_of(torch.cat(alive, 0), REPEATED))


def tsv(deltas: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """TSV-Merge with the ranks of the factors, cut evenly where they do not fit."""
    size = min(deltas[0].shape)
    ranks = [min(rank, size) for rank in ranks]
    cut = max(k for k in range(1, size + 1) if k == 1 or sum(min(r, k) for r in ranks) <= size)
    parts = [leading(delta, min(r, cut)) for delta, r in zip(deltas, ranks, strict=True)]
    U = torch.cat([part[0] for part in parts], 1)
    S = torch.cat([part[1] for part in parts])
    V = torch.cat([part[2] for part in parts], 0).mT
    return polar(U) * S @ polar(V).mT


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """Isotropic sum, on its support."""
    total = torch.stack(list(deltas)).sum(0)
    U, S, Vh = leading(total, min(total.shape))
    return U @ Vh * (S.mean() if len(S) else 0.0)


def iso_cts(deltas: Sequence[Tensor], fraction: float) -> Tensor:
    """Iso-CTS over the directions the updates reach, on their support."""
    d, T = reach(deltas), len(deltas)
    s = min(round((d - int(d * fraction)) / T), d // T)
    U, S, Vh = leading(torch.stack(list(deltas)).sum(0), d - T * s)
    left, values, right = [U], [S], [Vh]
    for delta in deltas:
        X, x, Yh = leading(delta - U @ (U.mT @ delta), s, float(torch.linalg.matrix_norm(delta, 2)))
        left.append(X)
        values.append(x)
        right.append(Yh)
    spectrum = torch.cat(values)
    mean = spectrum.mean() if len(spectrum) else 0.0
    return polar(torch.cat(left, 1)) @ polar(torch.cat(right, 0).mT).mT * mean


def cart(deltas: Sequence[Tensor], share: float, scale: float) -> Tensor:
    """Average plus ``scale`` times the rank-limited deviations from it."""
    average = torch.stack(list(deltas)).mean(0)
    rank = math.ceil(share * reach(deltas))
    total = average.clone()
    for delta in deltas:
        U, S, Vh = torch.linalg.svd(delta - average, full_matrices=False)
        total += scale * (U[:, :rank] * S[:rank] @ Vh[:rank])
    return total
