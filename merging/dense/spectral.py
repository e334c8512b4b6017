"""Spectral methods on whole matrices: each task vector as a product with an identity, or its leading part.

A full-rank ``delta (m, n)`` is the low-rank update ``delta @ I`` of rank ``min(m, n)``, so the kernels for
adapters give the dense algorithm exactly. Where that is too dear (more than ``EXACT_NUMEL`` entries), each
task vector is first replaced by its best approximation of rank ``REDUCED_RANK`` (randomised subspace
iteration); the energy given up is known exactly and reported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merging.compress import RankRule, compress
from merging.dense.stack import DenseStack
from merging.dense.table import EXACT_NUMEL, REDUCED_RANK
from merging.kernels import Context, Merged
from merging.lowrank import ThinSVD
from merging.methods.linear import task_weights
from merging.updates import LowRank, UpdateStack

METHODS = ("svd", "tsv", "iso_c", "iso_cts", "cart")


def merge(stack: DenseStack, kernel: Any, method: str, ctx: Context) -> tuple[Tensor, float]:
    """The merged matrix ``(m, n)`` and the squared norm that was given up."""
    if method == "svd":
        return _truncated(stack, ctx)
    discarded = 0.0
    if stack.m * stack.n <= EXACT_NUMEL:
        factors = [_with_identity(stack.task(t)) for t in range(stack.T)]
    else:
        factors = []
        for t in range(stack.T):
            rule = RankRule(rank=REDUCED_RANK)
            cut = compress(Merged(LowRank(None, stack.task(t))), rule, seed=ctx.seed, names=stack.names)
            factors.append(cut.update.factors())
            discarded += float(cut.discarded[0])
        ctx.warn(
            "spectrum_cut",
            f"matrices of more than {EXACT_NUMEL} entries were cut to rank {REDUCED_RANK} before the merge; "
            "the report has the energy given up",
        )

    def warn(code: str, message: str) -> None:
        # Whole matrices never fit side by side; that tsv takes its even share of each is its plain rule here.
        if code != "tsv_truncated":
            ctx.warn(code, message)

    quiet = replace(ctx, rank=None, warn=warn)
    whole = UpdateStack(stack.names, stack.tasks, *zip(*factors, strict=True))
    done: Merged = kernel.merge(whole, quiet)
    update = done.update.balanced() if isinstance(done.update, ThinSVD) else done.update
    return update.dense()[0].to(stack.like.dtype), discarded


def _with_identity(delta: Tensor) -> tuple[Tensor, Tensor]:
    """``B (1, m, k)`` and ``A (1, k, n)`` with ``k`` the smaller side."""
    return (
        LowRank(None, delta).factors()
        if delta.shape[-2] <= delta.shape[-1]
        else LowRank(delta, None).factors()
    )


def _truncated(stack: DenseStack, ctx: Context) -> tuple[Tensor, float]:
    some: Any = stack
    total = torch.zeros(1, stack.m, stack.n, dtype=stack.like.dtype)
    for t, weight in enumerate(task_weights(some, ctx).tolist()):
        total.add_(stack.task(t), alpha=weight)
    if ctx.rank is None:
        return total[0], 0.0
    cut = compress(Merged(LowRank(None, total)), RankRule(rank=ctx.rank), seed=ctx.seed, names=stack.names)
    return cut.update.dense()[0].to(total.dtype), float(cut.discarded[0])
