"""TSV-Merge (arXiv 2412.00081): whiten the singular vectors of all tasks, keep their singular values.

1. ``delta_t = U_t S_t V_t^T``, the leading ``k_t`` triplets of each task; weights multiply ``S_t``.
2. ``U = [U_1 ... U_T]`` and ``V`` likewise, ``S`` concatenated, ``K = sum k_t``.
3. Replace ``U`` and ``V`` by their nearest partial isometries ``P Q^T`` (from ``P D Q^T``).
4. ``delta = U_perp diag(S) V_perp^T``: a sum (no ``1/T``) of rank at most ``K``.

All in the joint frame of the factors: one ``r x r`` SVD per task and two ``K x K`` ones. Ranks: the paper
keeps ``min(m, n) // T`` triplets of dense updates. Low-rank updates have only ``r_t``, and filling up would
whiten against arbitrary null vectors, so ``k_t = min(r_t, k)``; without ``k`` nothing is cut unless ``K``
exceeded ``min(m, n)``. Directions that repeat others (duplicate models) are dropped from ``D``: two copies
of one model give that model, whatever their order.
"""

from __future__ import annotations

from collections.abc import Sequence

from merging.catalog.spectral import TsvParams
from merging.kernels import Context, Local, Merged
from merging.lowrank import joint_frame, rank_rtol
from merging.spectral import (
    isotropize,
    join,
    lifted,
    noise_floors,
    task_triplets,
    warn_of_overlap,
    weighted,
    whitened,
)
from merging.updates import UpdateStack

CROWDED = 0.9
"""Above this share of the smaller side even unrelated directions are nearly dependent."""


def kept_ranks(ranks: Sequence[int], wanted: Sequence[int | None], size: int) -> list[int]:
    """``k_t`` per task: ``wanted[t]``, or all of ``ranks[t]``, cut evenly so that they fit into ``size``.

    The even cut is the largest ``k`` with ``sum min(r_t, k) <= size`` (``size // T`` for large ranks).
    """
    ranks = [min(rank, size) for rank in ranks]
    even = size
    while even > 1 and sum(min(rank, even) for rank in ranks) > size:
        even -= 1
    return [min(rank, even if k is None else k) for rank, k in zip(ranks, wanted, strict=True)]


def merge_tsv(stack: UpdateStack, ctx: Context) -> Merged:
    """TSV-Merge of a batch; an SVD whose values are the concatenated ones of the tasks."""
    stack, weights = weighted(stack, ctx)
    wanted = [params.k for params in ctx.of(stack) if isinstance(params, TsvParams)]
    keep = kept_ranks(stack.ranks, wanted, min(stack.m, stack.n))
    _warn_of_cuts(stack, wanted, keep, ctx)
    dtype = stack.like.dtype
    frame = joint_frame(stack)
    parts = task_triplets(frame.cores, noise_floors(frame.cores, dtype), dtype)
    chosen = [part.head(k).scaled(w) for part, k, w in zip(parts, keep, weights, strict=True)]
    found = whitened(join(chosen))
    if sum(keep) <= CROWDED * min(stack.m, stack.n):
        warn_of_overlap(stack, found, ctx)
    svd = found.svd
    if isinstance(ctx.params, TsvParams) and ctx.params.isotropize:
        svd = isotropize(svd, rtol=rank_rtol(dtype))
    return lifted(frame, svd, ctx)


def _warn_of_cuts(
    stack: UpdateStack, wanted: Sequence[int | None], keep: Sequence[int], ctx: Context
) -> None:
    full = [min(rank, stack.m, stack.n) for rank in stack.ranks]
    cut = [k for k, r, w in zip(keep, full, wanted, strict=True) if w is None and k < r]
    if cut:
        ctx.warn(
            "tsv_truncated",
            f"the ranks {full} of the models do not fit into {stack.m} x {stack.n} matrices side by side: "
            f"tsv kept {list(keep)} singular triplets of them in {stack.names[0]}"
            + (f" and {stack.G - 1} more modules" if stack.G > 1 else ""),
        )


tsv = Local(merge_tsv)
