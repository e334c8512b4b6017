"""DRM, Decom-Renorm-Merge (arXiv 2505.23117): TIES on renormalised singular vectors of the stacked deltas.

DRM-H, on the deltas side by side, ``[delta_1 ... delta_T] = U S [V_1 ... V_T]`` (``V_t (k, n)``):

1. cut singular values up to ``rank_rtol`` times the largest;
2. divide row ``j`` of ``V_t`` by its norm ``nu_tj``, which moves into the value ``S_j nu_tj``;
3. prune: over all ``T k n`` normalised entries of a module keep the ``round(density L) + 1`` largest;
4. multiply by the values and elect the sign of each entry by the sum over tasks (a sum of zero takes the
   majority sign of the module); entries that disagree are dropped;
5. multiply by the weights, take the mean over the non-zero entries (or over all tasks) and map back by ``U``.

DRM-V is DRM-H of the transposed deltas. The SVD comes from the ``R x R`` matrix ``[Q_B^T B_t R_t^T]_t`` with
``A_t^T = Q_t R_t``; only the ``T k n`` pruned entries are ever formed. The result ``U @ merged (G, k, n)`` is
low-rank already, ``k <= min(m, R)``, and comes as an SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.named import DrmParams
from merging.kernels import Context, Local, Merged, module_chunks
from merging.lowrank import ProductSVD, joint_frame, one_sided_svd, rank_rtol, transposed
from merging.selection import batched_kth_largest, kth_largest
from merging.thresholds import Search, bracket
from merging.updates import UpdateStack

CACHED = 1 << 19
"""Entries per block that stay in the cache of a CPU through several passes."""

SAMPLE_COLUMNS = 64


def merge_horizontal(stack: UpdateStack, ctx: Context) -> Merged:
    """DRM-H. Cost ``O((m + n) R^2 + T k n)``."""
    frame = joint_frame(stack)
    per_module = 2 * stack.T * min(stack.m, stack.R) * stack.n * stack.like.element_size()
    pieces = zip(
        module_chunks(stack, per_module, ctx.budget),
        module_chunks(frame.cores, per_module, ctx.budget),
        strict=True,
    )
    parts = [_merge(piece, cores, ctx) for piece, cores in pieces]
    turn, merged = (torch.cat(found) for found in zip(*parts, strict=True))
    return Merged(one_sided_svd(frame.columns, turn, merged))


def merge_vertical(stack: UpdateStack, ctx: Context) -> Merged:
    """DRM-V: the transpose of DRM-H on the transposed deltas."""
    update = merge_horizontal(transposed(stack), ctx).update
    assert isinstance(update, ProductSVD)
    return Merged(update.transposed())


def _merge(stack: UpdateStack, cores: UpdateStack, ctx: Context) -> tuple[Tensor, Tensor]:
    """``U`` in the joint frame ``(G, p, k)``, and the merged rows ``(G, k, n)``."""
    params = ctx.params
    assert isinstance(params, DrmParams)
    turn, rows, values, ranks = decompose(stack, cores, params.rank_rtol)
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
    return turn, merged


def decompose(stack: UpdateStack, cores: UpdateStack, rtol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 1 and 2: ``U``, unit rows ``V_t`` as ``(G, T, k, n)``, values ``(G, T, k)``, ranks ``(G,)``.

    ``U (G, p, k)`` is in the joint frame of ``cores``. Directions beyond the numerical rank are zero, and
    rows in which a task has nothing.
    """
    like = stack.like
    right = [torch.linalg.qr(A.mT) for A in stack.A]
    small = torch.cat([B @ R.double().mT for B, (_, R) in zip(cores.B, right, strict=True)], dim=2)
    U, S, Wh = torch.linalg.svd(small, full_matrices=False)
    alive = (S > rtol * S[:, :1]) & (S > 0)
    widths = [Q.shape[-1] for Q, _ in right]
    rows = like.new_empty((stack.G, stack.T, S.shape[-1], stack.n))
    values = like.new_empty((stack.G, stack.T, S.shape[-1]))
    for t, (W, (Q, _)) in enumerate(zip(torch.split(Wh, widths, dim=2), right, strict=True)):
        norm = W.norm(dim=-1)
        present = alive & (norm > rank_rtol(like.dtype))
        inverse = torch.where(present, 1.0 / norm, torch.zeros_like(norm))
        torch.matmul((W * inverse.unsqueeze(-1)).to(like.dtype), Q.mT, out=rows[:, t])
        values[:, t] = S * norm * present
    return U * alive.unsqueeze(1), rows, values, alive.sum(-1)


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
