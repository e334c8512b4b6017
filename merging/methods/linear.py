"""Weighted sums of task vectors (task arithmetic, arXiv 2212.04089).

``delta = sum_t w_t delta_t``; with ``normalize`` the weights are divided by their sum. For low-rank
inputs the sum is exact without arithmetic: ``B = [w_1 B_1 ... w_T B_T]``, ``A = [A_1; ...; A_T]`` of rank
``R``. ``svd`` is the same sum truncated to the output rank through the SVD of its ``R x R`` core in the
joint frame, the best approximation of that rank (Eckart-Young). Shapes: ``B (G, m, R)``, ``A (G, R, n)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.linear import LinearParams
from merging.errors import InputError
from merging.kernels import Context, Local, Merged
from merging.lowrank import core_svd, joint_frame
from merging.updates import LowRank, UpdateStack


def weighted_sum(stack: UpdateStack, ctx: Context) -> Merged:
    """The exact sum as concatenated factors. Raises ``zero_weight_sum`` if it cannot normalise."""
    weights = task_weights(stack, ctx)
    B, A = stack.scaled(weights).joined()
    return Merged(LowRank(B, A), weights=weights)


def truncated_sum(stack: UpdateStack, ctx: Context) -> Merged:
    """The sum cut to ``ctx.rank``; only the leading directions are lifted out of the frame."""
    frame = joint_frame(stack)
    B, A = frame.cores.scaled(task_weights(stack, ctx)).joined()
    core = core_svd(B @ A)
    rank = min(ctx.rank or core.S.shape[-1], core.S.shape[-1])
    return Merged(frame.lift(core.head(rank)), (core.S[..., rank:] ** 2).sum(-1))


def task_weights(stack: UpdateStack, ctx: Context) -> Tensor:
    """The weights of the tasks of a stack, ``(T,)``, normalised if the recipe says so."""
    weights = ctx.weights(stack)
    assert isinstance(ctx.params, LinearParams)
    if not ctx.params.normalize:
        return weights
    total = float(weights.sum())
    if abs(total) < 1e-8:
        raise InputError(
            "zero_weight_sum",
            f"the weights of the models that have {stack.names[0]} sum to zero",
            remedy="Set `normalize: false` or change the weights.",
            where={"module": stack.names[0], "field": "parameters.normalize"},
        )
    return weights / torch.tensor(total, dtype=weights.dtype)


linear = Local(weighted_sum)
svd = Local(truncated_sum)
