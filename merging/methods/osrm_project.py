"""OSRM after training: turn ``A`` of each adapter away from the inputs of the other tasks; ``B`` stays.

``soft`` (our form of the idea of arXiv 2505.22934), with Grams ``G_t`` of the own, ``G_o`` of the other
tasks:

    argmin_A' |(A' - A) X_t^T|^2 + beta |A' X_o^T|^2 + rho |A' - A|^2
    =>  A' = A - beta A G_o (G_t + beta G_o + rho I)^-1

The pull towards ``A`` (not towards 0) keeps ``A`` in directions that no sample reaches. ``complement``
takes the leading eigenvectors ``P`` of ``G_o`` out: ``A' = A - (A P) P^T``. From feature rows ``Z =
[X_t; sqrt(beta) X_o]`` the soft form needs no ``n x n`` matrix: ``M (Z^T Z + rho I)^-1 = (M - M Z^T (Z
Z^T + rho I)^-1 Z) / rho``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.data import OsrmProjectParams
from merging.kernels import Context, LocalSplit, MultiMerged
from merging.methods.osrm_init import interference
from merging.methods.regmean import solve_rows
from merging.updates import LowRank, UpdateStack


def soft(A: Tensor, own: Tensor, others: Tensor, beta: float, rho: float, module: str = "") -> Tensor:
    """``A' (r, n)`` in float64 from Gram matrices ``(n, n)``; ``rho`` is absolute."""
    A, own, others = A.double(), own.double(), others.double()
    metric = own + beta * others
    metric.diagonal().add_(rho)
    return A - beta * solve_rows(A @ others, metric, module)


def soft_from_rows(A: Tensor, own: Tensor, others: Tensor, beta: float, rho: float) -> Tensor:
    """The same from feature rows ``(k, n)``; ``rho`` must be positive."""
    A, own, others = A.double(), own.double(), others.double()
    Z = torch.cat([own, beta**0.5 * others])
    M = beta * (A @ others.mT) @ others
    small = Z @ Z.mT
    small.diagonal().add_(rho)
    inner = solve_rows(M @ Z.mT, small, "")
    return A - (M - inner @ Z) / rho


def complement(A: Tensor, others: Tensor, directions: int) -> Tensor:
    """``A`` without the leading ``directions`` eigenvectors of the other tasks' Gram; float64."""
    A = A.double()
    P: Tensor = torch.linalg.eigh(others.double()).eigenvectors[:, max(0, len(others) - directions) :]
    return A - (A @ P) @ P.mT


def project(A: Tensor, own: Tensor, others: Tensor, params: OsrmProjectParams, module: str) -> Tensor:
    """``A'`` of one task and module as the parameters say."""
    if params.mode == "complement":
        return complement(A, others, params.directions)
    metric_scale = float((own.diagonal() + params.beta * others.diagonal()).double().mean())
    return soft(A, own, others, params.beta, params.ridge * metric_scale, module)


def split(stack: UpdateStack, ctx: Context) -> MultiMerged:
    """Every task projected. Facts ``(G, T)``: what the others read of it, before and after, as a share of
    their energy, and how far its own response moved.
    """
    params = ctx.params
    assert isinstance(params, OsrmProjectParams)
    stack = stack.scaled(ctx.weights(stack))
    turned: list[list[Tensor]] = [[] for _ in stack.tasks]
    names = ("interference_before", "interference_after", "own_change")
    facts = {key: torch.zeros(stack.G, stack.T, dtype=torch.float64) for key in names}
    for g, name in enumerate(stack.names):
        grams = [_statistic(ctx, name, task, params) for task in range(len(ctx.per_model))]
        total = sum(grams[1:], grams[0])
        shares = len(grams) - 1 if params.normalize else 1  # then `beta` means the same for any number
        for t, task in enumerate(stack.tasks):
            A = stack.A[t][g].cpu()
            own, others = grams[task], (total - grams[task]) / shares
            after = project(A, own, others, params, name)
            turned[t].append(after)
            facts[names[0]][g, t] = interference(A, others)
            facts[names[1]][g, t] = interference(after, others)
            moved = interference(after - A.double(), own) / interference(A, own).clamp_min(1e-300)
            facts[names[2]][g, t] = moved.sqrt()
    factors = [torch.stack(rows).to(stack.like) for rows in turned]
    updates = tuple(LowRank(B, A) for B, A in zip(stack.B, factors, strict=True))
    return MultiMerged(updates, {}, facts)


def _statistic(ctx: Context, name: str, task: int, params: OsrmProjectParams) -> Tensor:
    if params.statistic == "mean":
        mean: Tensor = ctx.data.mean(name, task).double()
        gram = torch.outer(mean, mean)
    else:
        gram = ctx.data.gram(name, task).double()
    return gram / gram.trace().clamp_min(1e-300) if params.normalize else gram


osrm_project = LocalSplit(split)
