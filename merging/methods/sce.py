"""SCE (FuseChat, arXiv 2408.07990): select, calculate, erase.

1. Select: of the positions where the task vectors ``x_t`` differ at all, keep the fraction ``select_topk``
   with the largest variance over the tasks.
2. Calculate: the coefficient of a task is its mean square over the kept positions, divided by the sum of
   these over the tasks.
3. Erase: per entry, elect the sign of the sum (zero counts as +) and drop the entries that disagree.

The result is the mean of the rest weighted by the coefficients. A recipe's ``weight`` multiplies the task
vector beforehand. mergekit takes equal coefficients when the mean squares sum to less than 1e-6, which is the
rule with LoRA, and clamps the divisor at 1e-6; ``compat: mergekit`` does so too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging import rules, spaces
from merging.catalog.sparse import SceParams
from merging.entrywise import finished, in_blocks, placed, weighting
from merging.kernels import Context, Local, Merged, entry_blocks
from merging.selection import batched_kth_largest, kth_largest
from merging.updates import UpdateStack

MERGEKIT_FLOOR = 1e-6


def merge(stack: UpdateStack, ctx: Context) -> Merged:
    """Two or three passes over row blocks and one dense matrix for the variances, if they select."""
    params = ctx.params
    assert isinstance(params, SceParams)
    place = placed(stack, ctx)
    weighted = weighting(ctx, stack, place.coordinates.like)
    selected = _selected(place, stack, ctx) if params.select_topk < 1.0 else None
    floor = MERGEKIT_FLOOR if params.compat == "mergekit" else 0.0

    def kept(x: Tensor, start: int) -> Tensor:
        x = weighted(x)
        return x if selected is None else x.mul_(selected[:, start : start + x.shape[-2]].unsqueeze(1))

    energy = torch.zeros((stack.G, stack.T), dtype=torch.float64, device=place.coordinates.like.device)
    for x, start in entry_blocks(place.coordinates, ctx.budget):
        energy += kept(x, start).square_().sum((-2, -1))
    coefficients = shares(energy / place.entries.to(energy).clamp_min(1).unsqueeze(-1), floor)
    coefficients = coefficients.to(place.coordinates.like.dtype).view(stack.G, stack.T, 1, 1)
    merged = in_blocks(place.coordinates, ctx, lambda x, start: erased(kept(x, start), coefficients, floor))
    return finished(place, merged, ctx)


def shares(energy: Tensor, floor: float) -> Tensor:
    """Mean squares ``(G, T)`` divided by their sum; equal shares where the sum is zero or below ``floor``."""
    total = energy.sum(-1, keepdim=True)
    equal = torch.full_like(energy, 1.0 / energy.shape[-1])
    return torch.where(total > floor, energy / total.clamp_min(1e-300), equal)


def erased(x: Tensor, coefficients: Tensor, floor: float) -> Tensor:
    """The weighted mean of the entries of the elected sign; ``x (G, T, rows, n)`` is used up."""
    sign = rules.elect(x, "total", 1.0)
    kept = rules.agreeing_(x, sign)
    divisor = kept.sign().mul_(coefficients).sum(-3)
    total = kept.mul_(coefficients).sum(-3).mul_(sign.squeeze(-3))
    return total.div_(divisor.clamp_min_(floor) if floor else divisor.add_(divisor == 0))


def _selected(place: spaces.Placement, stack: UpdateStack, ctx: Context) -> Tensor:
    """Ones where the variance over the tasks is among the largest, ``(G, m, n)``; equal ones stay.

    Variances that rounding alone can make of equal entries count as zero, and as equal if they differ by
    rounding only.
    """
    assert isinstance(ctx.params, SceParams)
    weighted = weighting(ctx, stack, place.coordinates.like)
    eps = torch.finfo(place.coordinates.like.dtype).eps
    largest = place.coordinates.like.new_zeros(stack.G)

    def variance(x: Tensor, start: int) -> Tensor:
        x = weighted(x)
        largest.copy_(torch.maximum(largest, x.abs().amax((-3, -2, -1))))
        return x.sub_(x.mean(-3, keepdim=True)).square_().mean(-3)

    found = in_blocks(place.coordinates, ctx, variance)
    found.mul_(found.gt((64.0 * eps * largest).square_().view(-1, 1, 1)))
    flat = found.flatten(1)
    k = ((flat > 0).sum(-1).double() * ctx.params.select_topk).long().clamp_min(1)
    if flat.device.type == "cpu":
        limits = torch.stack([kth_largest(row, int(count)) for row, count in zip(flat, k, strict=True)])
    else:
        limits = batched_kth_largest(flat.unsqueeze(1), k.unsqueeze(1)).squeeze(1)
    return found.ge_((limits * (1.0 - 32.0 * eps)).view(-1, 1, 1))


sce = Local(merge)
