"""CART (arXiv 2412.12153): centred, low-rank task vectors around their average.

``avg = mean_t w_t delta_t``; ``delta = avg + c sum_t SVD_k(w_t delta_t - avg)`` with ``SVD_k`` the best
approximation of rank ``k`` and ``c = cart_scale``. ``k`` is ``cart_rank`` itself if that is 1 or more, else
``ceil(cart_rank d)`` for the ``d`` directions the models reach (at most ``min(m, n, R)``). The paper's
``d = min(m, n)`` would exceed the rank of low-rank updates, cut nothing, and give the plain average: the
centred updates sum to zero.

Runs on ``p x q`` cores: one small SVD per task and one for the result.
"""

from __future__ import annotations

import math

import torch

from merging.catalog.spectral import CartParams
from merging.kernels import Context, Local, Merged
from merging.lowrank import core_svd, joint_frame
from merging.spectral import core_dimension, lifted, noise_floors, task_triplets, weighted
from merging.updates import UpdateStack


def merge_cart(stack: UpdateStack, ctx: Context) -> Merged:
    """CART of a batch; rank at most ``min(m, n, R)``."""
    assert isinstance(ctx.params, CartParams)
    stack, weights = weighted(stack, ctx)
    frame = joint_frame(stack)
    cores = frame.cores.scaled(torch.tensor(weights, dtype=torch.float64))
    tasks = cores.dense()  # (G, T, p, q)
    average = tasks.mean(1)
    if stack.T == 1:
        return lifted(frame, core_svd(average), ctx)
    size = min(tasks.shape[-2:])
    rank = ctx.params.cart_rank
    most = min(size, int(rank) if rank >= 1 else math.ceil(rank * size))
    if most == size:
        ctx.warn(
            "cart_is_average",
            f"cart_rank {rank:g} keeps all {size} directions of {stack.names[0]}: the result is the average",
        )
    U, S, Vh = torch.linalg.svd(tasks - average.unsqueeze(1), full_matrices=False)
    U, S, Vh = U[..., :most], S[..., :most], Vh[..., :most, :]
    if rank < 1:
        dtype = stack.like.dtype
        reach = core_dimension(task_triplets(cores, noise_floors(cores, dtype), dtype))
        count = torch.ceil(rank * reach.double()).view(-1, 1, 1)
        S = S * (torch.arange(most, device=S.device) < count)
    centred = (U * S.unsqueeze(-2) @ Vh).sum(1)
    return lifted(frame, core_svd(average + ctx.params.cart_scale * centred), ctx)


cart = Local(merge_cart)
