"""Consensus task arithmetic (TALL masks, arXiv 2405.07813): the sum, where enough models care.

With the weighted task vectors ``x_t`` and their sum ``tau``, model ``t`` claims an entry if
``|x_t| > mask_lambda_t |tau - x_t|``. The result is ``tau`` on entries that at least ``min_agree`` models
claim, zero elsewhere: 1 removes what no model needs, 2 also what only one needs, 0 is plain task arithmetic.
A module that fewer than ``min_agree`` models have asks for all of those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.sparse import ConsensusParams
from merging.entrywise import finished, in_blocks, placed, weighting
from merging.kernels import Context, Local, Merged
from merging.sparsify import per_task
from merging.updates import UpdateStack


def merge(stack: UpdateStack, ctx: Context) -> Merged:
    """One pass over row blocks."""
    params = ctx.params
    assert isinstance(params, ConsensusParams)
    if params.min_agree > len(ctx.per_model):
        ctx.warn(
            "min_agree_lowered",
            f"min_agree is {params.min_agree}, but there are {len(ctx.per_model)} models; it counts as that",
        )
    needed = min(params.min_agree, stack.T)
    place = placed(stack, ctx)
    weighted = weighting(ctx, stack, place.coordinates.like)
    strictness = place.coordinates.like.new_tensor(per_task(stack, ctx, "mask_lambda")).view(-1, 1, 1)
    merged = in_blocks(place.coordinates, ctx, lambda x, start: agreed(weighted(x), strictness, needed))
    return finished(place, merged, ctx)


def agreed(x: Tensor, strictness: Tensor, needed: int) -> Tensor:
    """``(..., rows, n)`` from ``x (..., T, rows, n)``, which is used up; ``strictness`` is ``(T, 1, 1)``."""
    total = x.sum(-3)
    others = torch.sub(total.unsqueeze(-3), x).abs_().mul_(strictness)
    claims = x.abs_().gt_(others).sum(-3)
    return total.mul_(claims.ge_(float(needed)))


consensus = Local(merge)
