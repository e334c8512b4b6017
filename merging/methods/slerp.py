"""Spherical linear interpolation (Shoemake 1985) between two task vectors, per module.

With the angle ``theta`` between ``x_0`` and ``x_1``,
``delta = sin((1 - t) theta) / sin(theta) x_0 + sin(t theta) / sin(theta) x_1``: ``t = 0`` is the first model,
``t = 1`` the second. It acts on deltas, where mergekit acts on whole weights. A combination of two low-rank
updates is low-rank: ``B = [c_0 B_0, c_1 B_1]``, ``A = [A_0; A_1]``, exactly, the same in every space.

Where the angle says nothing the result is the straight line ``(1 - t) x_0 + t x_1``: a zero vector, vectors
of the same or of opposite direction (mergekit: cosines beyond 0.9995). A module that only one model has
counts as zero in the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.linear import SlerpParams
from merging.kernels import Context, Local, Merged
from merging.lowrank import inner
from merging.updates import LowRank, UpdateStack

COLLINEAR = 1.0 - 5e-9
"""Beyond this cosine the arc is the line, or (opposite vectors) its middle is rounding noise made large."""
MERGEKIT_COLLINEAR = 0.9995


def merge(stack: UpdateStack, ctx: Context) -> Merged:
    """Two coefficients per module from three inner products."""
    params = ctx.params
    assert isinstance(params, SlerpParams)
    t = params.t
    stack = stack.scaled(ctx.weights(stack))
    line = torch.tensor([1.0 - t, t], dtype=torch.float64, device=stack.like.device)
    if stack.T == 1:
        coefficients = line[list(stack.tasks)].expand(stack.G, 1)
    else:
        limit = MERGEKIT_COLLINEAR if params.compat == "mergekit" else COLLINEAR
        coefficients = arc(_cosine(stack.to(torch.float64)), t, line, limit)[:, list(stack.tasks)]
    factors = zip(stack.B, coefficients.unbind(-1), strict=True)
    B = torch.cat([B * c.to(B).view(-1, 1, 1) for B, c in factors], dim=2)
    return Merged(LowRank(B, torch.cat(stack.A, dim=1)))


def arc(cosine: Tensor, t: float, line: Tensor, limit: float) -> Tensor:
    """The coefficients ``(G, 2)`` for the cosines ``(G,)``; ``line`` where ``|cosine| > limit``."""
    usable = cosine.abs() <= limit
    theta = torch.where(usable, cosine, torch.zeros_like(cosine)).acos()
    curved = torch.stack([((1.0 - t) * theta).sin(), (t * theta).sin()], dim=-1) / theta.sin().unsqueeze(-1)
    return torch.where(usable.unsqueeze(-1), curved, line)


def _cosine(stack: UpdateStack) -> Tensor:
    """``(G,)`` in float64; 2, beyond every limit, where a vector is zero."""
    first, second = (LowRank(B, A) for B, A in zip(stack.B, stack.A, strict=True))
    norms = inner(first, first).clamp_min(0.0).sqrt() * inner(second, second).clamp_min(0.0).sqrt()
    ratio = inner(first, second) / torch.where(norms > 0, norms, torch.ones_like(norms))
    return torch.where(norms > 0, ratio.clamp(-1.0, 1.0), torch.full_like(ratio, 2.0))


slerp = Local(merge)
