"""AdaRank (arXiv 2503.22178): learn which singular components of each task's update to keep.

    delta = origin + sum_t lambda_t U_t diag(b_t * s_t) V_t^T,     b_t in {0, 1}

per module, where ``U_t diag(s_t) V_t^T`` is the SVD of ``delta_t`` (origin ``task_arithmetic``: 0) or of
``delta_t - mean`` (origin ``cart``: the mean). Mask logits ``z`` and coefficients ``lambda`` minimise the
entropy of predictions on unlabeled samples; ``b = [sigmoid(z / temperature) > 1/2]`` forward, the sigmoid
backward.

Everything lives in the joint frame: the components of a module are columns and rows of ``p x q`` cores,
so that a forward pass costs ``x V C^T U^T`` beside the frozen layer, and only the numbers ``z`` and
``lambda`` get a gradient. The training itself is :mod:`merging.calibration.adapting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.catalog.data import AdarankParams
from merging.kernels import Context, Merged
from merging.lowrank import core_svd, joint_frame, rank_rtol
from merging.spectral import lifted
from merging.updates import UpdateStack

ON = 0.1
"""The mask logit of a component that is on at the start; minus this where it is off."""


@dataclass(frozen=True)
class Components:
    """The singular components of all tasks of one module, in its joint frame.

    ``U (m, p)`` and ``V (q, n)`` are the frame. Component ``k``, of task ``task[k]``, is ``S[k]`` times
    ``left[:, k]`` times ``right[k]``; ``left`` is ``(p, K)``, ``right (K, q)``. ``fixed (p, q)`` is what is
    always there (the mean), or None. ``start (K,)`` holds the mask logits at the start, ``prior (T,)`` the
    coefficients, for all tasks of the merge.
    """

    name: str
    U: Tensor
    V: Tensor
    left: Tensor
    S: Tensor
    right: Tensor
    task: Tensor
    fixed: Tensor | None
    start: Tensor
    prior: Tensor

    def core(self, factors: Tensor) -> Tensor:
        """``(p, q)`` with component ``k`` times ``factors[k]`` and its singular value."""
        core = (self.left * (factors * self.S)) @ self.right
        return core if self.fixed is None else core + self.fixed

    def to(self, device: torch.device, dtype: torch.dtype) -> Components:
        """The same elsewhere; logits and coefficients keep their precision."""
        fixed = None if self.fixed is None else self.fixed.to(device, dtype)
        tensors = (self.U, self.V, self.left, self.S, self.right)
        U, V, left, S, right = (tensor.to(device, dtype) for tensor in tensors)
        return Components(
            self.name, U, V, left, S, right, self.task.to(device), fixed, self.start, self.prior
        )


class _Step(torch.autograd.Function):
    """One where the argument is above one half, else zero; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:  # noqa: ARG004
        return (p > 0.5).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]


def kept(logits: Tensor, temperature: float) -> Tensor:
    """The mask, zeros and ones, with the gradient of the sigmoid."""
    mask: Tensor = _Step.apply(torch.sigmoid(logits / temperature))  # type: ignore[no-untyped-call]
    return mask


def decompose(stack: UpdateStack, params: AdarankParams, weights: Sequence[float]) -> list[Components]:
    """The components of every module of a batch; those that are rounding noise are left out."""
    cart = params.origin == "cart"
    frame = joint_frame(stack)
    tasks = frame.cores.dense()  # (G, T, p, q)
    mean = tasks.mean(1, keepdim=True) if cart else None
    U, S, Vh = torch.linalg.svd(tasks if mean is None else tasks - mean, full_matrices=False)
    # the floor is that of the task itself: subtracting the mean cannot be more accurate
    floor = rank_rtol(stack.like.dtype) * torch.linalg.matrix_norm(tasks, 2)
    prior = params.prior if params.prior is not None else (1.0 if cart else 0.3)
    lam = torch.zeros(len(weights), dtype=torch.float64)
    for task in stack.tasks:
        lam[task] = prior * weights[task]
    found = []
    for g, name in enumerate(stack.names):
        left, values, right, task_of, start = [], [], [], [], []
        for t, task in enumerate(stack.tasks):
            count = int((S[g, t] > floor[g, t]).sum())
            left.append(U[g, t, :, :count])
            values.append(S[g, t, :count])
            right.append(Vh[g, t, :count])
            task_of.append(torch.full((count,), task, dtype=torch.long))
            logits = torch.full((count,), -ON, dtype=torch.float64)
            logits[: initial_rank(params, count)] = ON
            start.append(logits)
        found.append(
            Components(
                name,
                frame.left[g],
                frame.right[g],
                torch.cat(left, 1),
                torch.cat(values),
                torch.cat(right),
                torch.cat(task_of),
                None if mean is None else mean[g, 0],
                torch.cat(start),
                lam,
            )
        )
    return found


def initial_rank(params: AdarankParams, count: int) -> int:
    """How many of ``count`` components are on at the start."""
    wanted = params.init_rank
    if wanted is None:
        wanted = 0.16 if params.origin == "cart" else count
    return min(count, int(wanted if wanted >= 1 or wanted == 0 else max(1.0, wanted * count)))


class AdaRank:
    """The kernel: a survey collects all components, ``reduce`` learns, ``merge`` writes."""

    def surveys(self, ctx: Context) -> int:
        return 1

    def survey(self, index: int, stack: UpdateStack, ctx: Context) -> list[Components]:
        assert isinstance(ctx.params, AdarankParams)
        return decompose(stack, ctx.params, [own.weight for own in ctx.per_model])

    def reduce(self, index: int, partials: Sequence[list[Components]], ctx: Context) -> dict[str, Tensor]:
        """Learn; the merged core ``(p, q)`` of every module in float64."""
        assert isinstance(ctx.params, AdarankParams)
        components = sorted((part for parts in partials for part in parts), key=lambda part: part.name)
        factors: dict[str, Tensor] = ctx.data.adapt(components, ctx.params, ctx.seed, ctx.warn)
        return {part.name: part.core(factors[part.name].to(part.S)) for part in components}

    def merge(self, stack: UpdateStack, ctx: Context) -> Merged:
        cores = torch.stack([ctx.shared[name] for name in stack.names])
        return lifted(joint_frame(stack), core_svd(cores), ctx)


adarank = AdaRank()
