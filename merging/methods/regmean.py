"""RegMean (arXiv 2212.09849) and MaTS (arXiv 2312.04339): merging as least squares on the tasks' inputs.

With ``C_t = X_t^T X_t / count`` of the inputs of a layer, off-diagonal entries scaled by ``off_diagonal``,

    RegMean: argmin_D sum_t |X_t (D - delta_t)^T|^2   =>   D = (sum_t delta_t C_t) (sum_t C_t)^-1

which is linear in the deltas and needs no ``m x n`` matrix: ``B = [B_1 .. B_T]``,
``A = [A_1 C_1; ..; A_T C_T] (sum C_t)^-1``. Cost ``O(n^3 + n^2 R)``. (On weights instead of deltas the base
weight cancels.) MaTS adds Grams ``G_t (m, m)`` of the gradients at the outputs: ``sum_t G_t D C_t = sum_t G_t
delta_t C_t``, solved by conjugate gradient from the mean of the deltas; ``O(T (m n^2 + m^2 n))`` a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from merging.catalog.data import MatsParams, RegmeanParams
from merging.errors import MergeFailure
from merging.kernels import Context, Local, Merged
from merging.updates import LowRank, UpdateStack


def conditioned(gram: Tensor, off_diagonal: float, ridge: float) -> Tensor:
    """A Gram ``(n, n)`` with damped off-diagonal entries and ``ridge`` mean diagonals added; float64."""
    gram = gram.double()
    diagonal = gram.diagonal()
    damped = gram * off_diagonal
    damped.diagonal().copy_(diagonal + ridge * diagonal.mean())
    return damped


def solve_rows(left: Tensor, metric: Tensor, module: str) -> Tensor:
    """``left @ metric^-1`` for a symmetric positive definite ``metric (n, n)``. Raises ``gram_singular``."""
    factor, info = torch.linalg.cholesky_ex(metric)
    if int(info) != 0:
        raise MergeFailure(
            "gram_singular",
            f"the Gram matrices of {module} do not determine the merge: too few samples for its inputs",
            remedy="Use more samples, or a larger `ridge`.",
            where={"module": module, "field": "parameters.ridge"},
        )
    solved: Tensor = torch.cholesky_solve(left.mT, factor).mT
    return solved


def regmean_factors(
    B: Sequence[Tensor], A: Sequence[Tensor | None], grams: Iterable[Tensor], module: str
) -> tuple[Tensor, Tensor]:
    """``B (m, R)`` and ``A (R, n)`` of one module; a task without it has a Gram matrix and no factors.

    The Gram matrices are taken one at a time: of a wide layer each is large.
    """
    total: Tensor | None = None
    right = []
    for a, gram in zip(A, grams, strict=True):
        total = gram.clone() if total is None else total.add_(gram)
        if a is not None:
            right.append(a.double() @ gram)
    assert total is not None
    return torch.cat(list(B), dim=1), solve_rows(torch.cat(right), total, module).to(B[0].dtype)


def conjugate_gradient(
    deltas: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, list[float]]:
    """The MaTS solution ``(m, n)`` and the residuals relative to the right side, the starting one first."""

    def apply(X: Tensor) -> Tensor:
        total = torch.zeros_like(X)
        for C, G in zip(inputs, outputs, strict=True):
            total += G @ X @ C
        return total

    rhs = torch.zeros_like(deltas[0])
    for delta, C, G in zip(deltas, inputs, outputs, strict=True):
        rhs += G @ delta @ C
    X = torch.stack(list(deltas)).mean(0)
    size = float(rhs.norm())
    residual = rhs - apply(X)
    direction = residual
    square = float((residual * residual).sum())
    found = [square**0.5 / size if size else 0.0]
    for _ in range(iterations):
        if found[-1] <= tolerance:
            break
        image = apply(direction)
        step = square / float((direction * image).sum())
        X = X + step * direction
        residual = residual - step * image
        before, square = square, float((residual * residual).sum())
        direction = residual + (square / before) * direction
        found.append(square**0.5 / size)
    return X, found


def merge_regmean(stack: UpdateStack, ctx: Context) -> Merged:
    """RegMean of a batch, rank ``R``. A model without the module counts with a zero update there."""
    params = ctx.params
    assert isinstance(params, RegmeanParams)

    def grams(name: str) -> Iterator[Tensor]:
        for task, own in enumerate(ctx.per_model):
            gram = ctx.data.gram(name, task).to(stack.like.device)
            yield own.weight * conditioned(gram, params.off_diagonal, params.ridge)

    place = {task: index for index, task in enumerate(stack.tasks)}
    parts = []
    for g, name in enumerate(stack.names):
        right = [stack.A[place[task]][g] if task in place else None for task in range(len(ctx.per_model))]
        parts.append(regmean_factors([b[g] for b in stack.B], right, grams(name), name))
    return Merged(LowRank(torch.stack([B for B, _ in parts]), torch.stack([A for _, A in parts])))


def merge_mats(stack: UpdateStack, ctx: Context) -> Merged:
    """MaTS of a batch; the update is dense."""
    params = ctx.params
    assert isinstance(params, MatsParams)
    merged = []
    for g, name in enumerate(stack.names):
        inputs, outputs, deltas = [], [], []
        for task, own in enumerate(ctx.per_model):
            gram = ctx.data.gram(name, task).to(stack.like.device)
            gradients = ctx.data.output_gram(name, task).to(stack.like.device)
            inputs.append(own.weight * conditioned(gram, params.off_diagonal, params.ridge))
            outputs.append(conditioned(gradients, 1.0, params.ridge))
            here = stack.tasks.index(task) if task in stack.tasks else None
            delta = stack.like.new_zeros(stack.m, stack.n) if here is None else stack.task(here)[g]
            deltas.append(delta.double())
        solved, residuals = conjugate_gradient(
            deltas, inputs, outputs, iterations=params.iterations, tolerance=params.tolerance
        )
        if residuals[-1] > params.tolerance:
            ctx.warn(
                "not_converged",
                f"{name}: the residual is {residuals[-1]:.1e} after {params.iterations} steps",
            )
        merged.append(solved.to(stack.like.dtype))
    return Merged(LowRank(None, torch.stack(merged)))


regmean = Local(merge_regmean)
mats = Local(merge_mats)
