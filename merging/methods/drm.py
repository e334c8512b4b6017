"""DRM, Decom-Renorm-Merge (arXiv 2505.23117): TIES on renormalised singular vectors of the stacked deltas.

DRM-H, on the deltas side by side, ``[delta_1 ... delta_T] = U S [V_1 ... V_T]`` (``V_t (k, n)``):

1. cut singular values up to ``rank_rtol`` times the largest;
2. divide row ``j`` of ``V_t`` by its norm ``nu_tj``, which moves into the value ``S_j nu_tj``;
3. prune: over all ``T k n`` normalised entries of a module keep the ``round(density L) + 1`` largest;
4. multiply by the values and elect the sign of each entry by the sum over tasks (a sum of zero takes the
   majority sign of the module); entries that disagree are dropped;
5. multiply by the weights, take the mean over the non-zero entries (or over all tasks) and map back by ``U``.

DRM-V is DRM-H of the transposed deltas. The SVD comes from the ``R x R`` matrix ``[Q_B^T B_t R_t^T]_t`` with
``A_t^T = Q_t R_t``; only the ``T k n`` pruned entries are ever formed. The result is already low-rank:
``B = U (G, m, k)``, ``A = merged (G, k, n)`` with ``k <= min(m, R)`` the largest numerical rank of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.named import DrmParams
from merging.kernels import Context, Local, Merged, module_chunks
from merging.lowrank import rank_rtol
from merging.selection import batched_kth_largest, kth_largest
from merging.thresholds import Search, bracket
from merging.updates import LowRank, UpdateStack

CACHED = 1 << 19
"""Entries per block that stay in the cache of a CPU through several passes."""

SAMPLE_COLUMNS = 64


def merge_horizontal(stack: UpdateStack, ctx: Context) -> Merged:
    """DRM-H. Cost ``O((m + n) R^2 + T k n)``."""
    per_module = 2 * stack.T * min(stack.m, stack.R) * stack.n * stack.like.element_size()
    pieces = [_merge(piece, ctx) for piece in module_chunks(stack, per_module, ctx.budget)]
    B, A, ranks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    width = max(1, int(ranks.max()))
    return Merged(LowRank(B[:, :, :width], A[:, :width]))


def merge_vertical(stack: UpdateStack, ctx: Context) -> Merged:
    """DRM-V: the transpose of DRM-H on the transposed deltas."""
    flipped = UpdateStack(
        stack.names,
        stack.tasks,
        tuple(A.mT for A in stack.A),
        tuple(B.mT for B in stack.B),
    )
    B, A = merge_horizontal(flipped, ctx).update.factors()  # type: ignore[union-attr]
    return Merged(LowRank(A.mT, B.mT))


def _merge(stack: UpdateStack, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
    params = ctx.params
    assert isinstance(params, DrmParams)
    left, rows, values, ranks = decompose(stack, params.rank_rtol)
    threshold = _threshold(rows, ranks * (stack.T * stack.n), params.density)
    weights = ctx.weights(stack).to(rows).view(-1, 1, 1)
    merged = rows.new_empty((stack.G, rows.shape[2], stack.n))
    votes = rows.new_zeros((stack.G, 1, 1))
    blocks = row_blocks(rows)
    for start, stop in blocks:
        y = rows[:, :, start:stop]
        y *= y.abs().ge_(threshold)
        y *= values[:, :, start:stop].unsqueeze(-1)
        total = torch.sum(y, 1, out=merged[:, start:stop])
        votes += total.sign().sum((-2, -1), keepdim=True)
    for start, stop in blocks:
        sign = merged[:, start:stop].sign()
        sign = torch.where(sign == 0, votes.sign(), sign)
        kept = (rows[:, :, start:stop] * sign.unsqueeze(1)).relu_() * weights
        divisor = kept.sign().abs_().sum(1).clamp_min_(1) if params.disjoint_mean else stack.T
        merged[:, start:stop] = kept.sum(1) * sign / divisor
    return left, merged, ranks


def decompose(stack: UpdateStack, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 1 and 2: ``U (G, m, k)``, unit rows ``V_t`` as ``(G, T, k, n)``, values ``(G, T, k)``, ranks.

    Directions beyond the numerical rank ``(G,)`` are zero, and rows in which a task has nothing.
    """
    B, _ = stack.joined()
    left, core_B = torch.linalg.qr(B)
    right = [torch.linalg.qr(A.mT) for A in stack.A]
    blocks = stack.split(core_B.double(), dim=2)
    small = torch.cat([b @ R.double().mT for b, (_, R) in zip(blocks, right, strict=True)], dim=2)
    U, S, Wh = torch.linalg.svd(small, full_matrices=False)
    alive = (S > rtol * S[:, :1]) & (S > 0)
    widths = [Q.shape[-1] for Q, _ in right]
    rows = left.new_empty((stack.G, stack.T, S.shape[-1], stack.n))
    values = left.new_empty((stack.G, stack.T, S.shape[-1]))
    for t, (W, (Q, _)) in enumerate(zip(torch.split(Wh, widths, dim=2), right, strict=True)):
        norm = W.norm(dim=-1)
        present = alive & (norm > rank_rtol(left.dtype))
        inverse = torch.where(present, 1.0 / norm, torch.zeros_like(norm))
        torch.matmul((W * inverse.unsqueeze(-1)).to(left.dtype), Q.mT, out=rows[:, t])
        values[:, t] = S * norm * present
    U = U * alive.unsqueeze(1)
    return left @ U.to(left.dtype), rows, values, alive.sum(-1)


def row_blocks(rows: Tensor) -> list[tuple[int, int]]:
    """Ranges of ``k`` small enough for the cache of a CPU; everything at once elsewhere."""
    G, T, k, n = rows.shape
    step = k if rows.device.type != "cpu" else max(1, CACHED // max(1, G * T * n))
    return [(start, min(start + step, k)) for start in range(0, k, step)]


def _threshold(rows: Tensor, entries: Tensor, density: float) -> Tensor:
    """The ``round(density L) + 1``-th largest magnitude of each module, ``(G, 1, 1, 1)``.

    Lowered by rounding noise: the unit rows of a rank-one task are equal up to sign, and such ties must
    live or die together.
    """
    if density >= 1.0:
        return rows.new_zeros((rows.shape[0], 1, 1, 1))
    kept = torch.minimum((entries.double() * density).round().long() + 1, entries).clamp_min(1)
    if rows.device.type == "cpu":
        found = torch.stack([_kth_magnitude(module, int(k)) for module, k in zip(rows, kept, strict=True)])
    else:
        found = batched_kth_largest(rows.abs().flatten(1).unsqueeze(1), kept.unsqueeze(-1)).squeeze(-1)
    return found.view(-1, 1, 1, 1) - (1e-9 if rows.dtype == torch.float64 else 1e-7)


def _kth_magnitude(rows: Tensor, k: int) -> Tensor:
    """The ``k``-th largest magnitude of ``(T, k, n)`` on the CPU, without a second tensor of that size."""
    sample = rows[..., :: max(1, rows.shape[-1] // SAMPLE_COLUMNS)].abs().flatten(0, 1).numpy()
    search = Search(*bracket([sample], [1.0], k / rows.numel(), sigmas=3.5))
    for block in torch.split(rows.flatten(), CACHED):
        search.feed(block.abs().numpy())
    value = search.value(k)
    return kth_largest(rows.abs().flatten(), k) if value is None else torch.as_tensor(value, dtype=rows.dtype)


drm_h = Local(merge_horizontal)
drm_v = Local(merge_vertical)
