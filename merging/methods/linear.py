"""Weighted sums of task vectors (task arithmetic, arXiv 2212.04089).

``delta = sum_t w_t delta_t``; with ``normalize`` the weights are divided by their sum. For low-rank
inputs the sum is exact without arithmetic: ``B = [w_1 B_1 ... w_T B_T]``, ``A = [A_1; ...; A_T]`` of rank
``R``. ``svd`` is the same sum; the engine truncates it to the output rank by the SVD of the ``R x R`` core,
which is the best approximation of that rank (Eckart-Young). Shapes: ``B (G, m, R)``, ``A (G, R, n)``.
"""

from __future__ import annotations

from merging.catalog.linear import LinearParams
from merging.errors import InputError
from merging.kernels import Context, Local, Merged
from merging.updates import LowRank, UpdateStack


def weighted_sum(stack: UpdateStack, ctx: Context) -> Merged:
    """The exact sum as concatenated factors. Raises ``zero_weight_sum`` if it cannot normalise."""
    weights = ctx.weights(stack)
    assert isinstance(ctx.params, LinearParams)
    if ctx.params.normalize:
        total = float(weights.sum())
        if abs(total) < 1e-8:
            raise InputError(
                "zero_weight_sum",
                f"the weights of the models that have {stack.names[0]} sum to zero",
                remedy="Set `normalize: false` or change the weights.",
                where={"module": stack.names[0], "field": "parameters.normalize"},
            )
        weights = weights / total
    B, A = stack.scaled(weights).joined()
    return Merged(LowRank(B, A))


linear = Local(weighted_sum)
svd = Local(weighted_sum)
