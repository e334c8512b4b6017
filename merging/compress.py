"""From a merged update to the factors that are written: rank, energy, and what was given up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merging.kernels import Merged
from merging.lowrank import ThinSVD, numerical_rank, rank_for_energy, rank_rtol, squared_norm, thin_svd
from merging.rules import task_generator
from merging.updates import LowRank

EXACT_SVD_SIZE = 1024
"""Dense matrices whose smaller side is at most this get an exact SVD."""

OVERSAMPLE = 16
POWER_STEPS = 2


@dataclass(frozen=True)
class RankRule:
    """What the recipe asks of the output rank; all ``None`` means exact."""

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None

    @property
    def exact(self) -> bool:
        return self.rank is None and self.energy is None and self.max_rank is None

    @property
    def ceiling(self) -> int | None:
        """The largest rank that can come out, if there is one."""
        limits = [limit for limit in (self.rank, self.max_rank) if limit is not None]
        return min(limits) if limits else None


@dataclass(frozen=True)
class Compressed:
    """``update`` with the rank of each module ``ranks (G,)`` and the energy given up ``discarded (G,)``.

    Directions beyond a module's rank are to be cut off; they are null or given up. ``svd`` is that of the
    update, where it was made from one.
    """

    update: LowRank
    ranks: Tensor
    discarded: Tensor
    svd: ThinSVD | None = None


def compress(merged: Merged, rule: RankRule, *, seed: int, names: tuple[str, ...]) -> Compressed:
    """Bring a merged update to the rank asked for; the best approximation in Frobenius norm.

    Dense updates larger than ``EXACT_SVD_SIZE`` are truncated by randomised subspace iteration (Halko,
    Martinsson, Tropp 2011) from a stream keyed by ``seed`` and the module; ``discarded`` is exact for it too.
    """
    update = merged.update
    before = merged.discarded
    if isinstance(update, LowRank):
        m, n = _shape(update)
        ceiling = rule.ceiling
        fits = rule.energy is None and (ceiling is None or update.rank <= ceiling)
        if fits and update.rank <= min(m, n):
            ranks = torch.full((update.any.shape[0],), max(1, update.rank), dtype=torch.long)
            return _result(update, ranks, torch.zeros(len(ranks), dtype=torch.float64), before)
        if update.B is None or update.A is None:
            return _dense(update, rule, seed, names, before)
        return _from_svd(thin_svd(update), rule, before)
    return _from_svd(update, rule, before)


def _from_svd(svd: ThinSVD, rule: RankRule, before: Tensor | None) -> Compressed:
    ranks = numerical_rank(svd.S, rank_rtol(svd.dtype))
    if rule.energy is not None:
        ranks = torch.minimum(ranks, rank_for_energy(svd.S, rule.energy))
    if rule.ceiling is not None:
        ranks = ranks.clamp_max(rule.ceiling)
    ranks = ranks.clamp_min(1).cpu()
    kept = torch.arange(svd.S.shape[-1], device=svd.S.device) < ranks.to(svd.S.device).unsqueeze(-1)
    discarded = (svd.S.double() ** 2 * ~kept).sum(-1)
    head = svd.head(int(ranks.max()))
    cut = head.with_values((head.S * kept[:, : head.S.shape[-1]]).to(head.dtype))
    return replace(_result(cut.balanced(), ranks, discarded, before), svd=cut)


def _dense(
    update: LowRank, rule: RankRule, seed: int, names: tuple[str, ...], before: Tensor | None
) -> Compressed:
    parts = [
        _dense_one(matrix, rule, task_generator(seed, "range-finder", name))
        for matrix, name in zip(update.any, names, strict=True)
    ]
    width = max(int(part.ranks[0]) for part in parts)
    B = torch.cat([_pad(part.update.B, width, dim=2) for part in parts])
    A = torch.cat([_pad(part.update.A, width, dim=1) for part in parts])
    ranks = torch.cat([part.ranks for part in parts])
    return _result(LowRank(B, A), ranks, torch.cat([part.discarded for part in parts]), before)


def _dense_one(matrix: Tensor, rule: RankRule, generator: torch.Generator) -> Compressed:
    size = min(matrix.shape)
    rank = rule.ceiling or 64
    while size > EXACT_SVD_SIZE and (rank + OVERSAMPLE) * 4 <= size:
        svd = _range_finder(matrix, rank + OVERSAMPLE, generator)
        total = (matrix.double() ** 2).sum() if matrix.numel() < 1 << 24 else _chunked_norm(matrix)
        enough = rule.energy is None or rule.ceiling is not None
        enough = enough or float((svd.S[:, :rank] ** 2).sum()) >= float(rule.energy or 1.0) * float(total)
        if enough:
            return _truncated(svd, rule, total, rank)
        rank *= 2
    U, S, Vh = torch.linalg.svd(matrix.unsqueeze(0), full_matrices=False)
    return _from_svd(ThinSVD(U, S.double(), Vh), rule, None)


def _truncated(svd: ThinSVD, rule: RankRule, total: Tensor, limit: int) -> Compressed:
    """Ranks by ``rule`` from the leading part of a spectrum whose total energy is ``total``."""
    S = svd.S[:, :limit]
    ranks = numerical_rank(S, rank_rtol(svd.U.dtype)).clamp(1, limit)
    if rule.energy is not None:
        reached = (S**2).cumsum(-1) >= rule.energy * total
        needed = torch.where(reached.any(-1), reached.long().argmax(-1) + 1, limit)
        ranks = torch.minimum(ranks, needed)
    rank = int(ranks[0])
    head = svd.head(rank)
    kept = (head.S**2).sum(-1)
    balanced = head.with_values(head.S.to(head.dtype)).balanced()
    return Compressed(balanced, ranks.cpu(), (total - kept).clamp_min(0.0).cpu())


def _range_finder(matrix: Tensor, width: int, generator: torch.Generator) -> ThinSVD:
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32)
    Q, _ = torch.linalg.qr(matrix @ start.to(matrix))
    for _ in range(POWER_STEPS):
        P, _ = torch.linalg.qr(matrix.mT @ Q)
        Q, _ = torch.linalg.qr(matrix @ P)
    return thin_svd(LowRank(Q.unsqueeze(0), (Q.mT @ matrix).unsqueeze(0)))


def _chunked_norm(matrix: Tensor) -> Tensor:
    return torch.stack([(rows.double() ** 2).sum() for rows in torch.split(matrix, 512)]).sum()


def _pad(factor: Tensor | None, width: int, dim: int) -> Tensor:
    assert factor is not None
    missing = width - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


def _shape(update: LowRank) -> tuple[int, int]:
    if update.B is None or update.A is None:
        return update.any.shape[-2], update.any.shape[-1]
    return update.B.shape[-2], update.A.shape[-1]


def _result(update: LowRank, ranks: Tensor, discarded: Tensor, before: Tensor | None) -> Compressed:
    discarded = discarded.double().cpu()
    return Compressed(update, ranks, discarded if before is None else discarded + before.double().cpu())


def merged_norm(update: LowRank) -> Tensor:
    """Frobenius norms of what is written, ``(G,)``."""
    return squared_norm(update).sqrt()
