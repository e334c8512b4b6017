"""LoRE-Merging (arXiv 2502.10749): estimate a common base and low-rank parts, then recombine them.

Per module, from ``delta_t = 0``, repeat for ``iters`` sweeps:

    theta_0 = mean_t(theta_t - delta_t)
    delta_t = SVT(theta_t - theta_0, mu)          every singular value s becomes max(s - mu, 0)

which minimises ``sum_t 1/2 |theta_0 + delta_t - theta_t|^2 + mu |delta_t|_*`` block by block; ``mu`` is the
threshold. The result is ``theta_0 + delta_scale * sum_t w_t delta_t`` with the ``theta_0`` of the last
sweep and weights of sum 1, or with TIES of the ``delta_t`` in their place.

A common base drops out (adding ``W`` to every ``theta_t`` adds ``W`` to the result), and thresholding
commutes with orthogonal maps: the sweeps run on the ``p x q`` Core Space coordinates of the low-rank
updates, ``p, q <= R``. Cost ``O((m + n) R^2 + iters T R^3)``; the result has rank ``<= R``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging import rules, spaces
from merging.catalog.named import LoreParams
from merging.errors import InputError
from merging.kernels import Context, Local, Merged
from merging.selection import batched_kth_largest
from merging.updates import UpdateStack


def merge(stack: UpdateStack, ctx: Context) -> Merged:
    """Raises ``zero_weight_sum`` if the weights of the models present sum to zero."""
    params = ctx.params
    assert isinstance(params, LoreParams)
    weights = ctx.weights(stack)
    if abs(float(weights.sum())) < 1e-8:
        raise InputError(
            "zero_weight_sum",
            f"the weights of the models that have {stack.names[0]} sum to zero",
            remedy="Change the weights; `lore` divides by their sum.",
            where={"module": stack.names[0], "field": "parameters.weight"},
        )
    weights = weights / weights.sum()
    _warn_if_degenerate(weights, params, ctx)
    place = spaces.core(stack)
    thetas = place.coordinates.rows(0, place.coordinates.m)
    base, deltas = sweeps(thetas, threshold(thetas, params), params.iters, params.tol)
    weights = weights.to(deltas).view(-1, 1, 1)
    if params.final == "average":
        part = (deltas * weights).sum(1)
    else:
        part = _ties(deltas * (weights * stack.T), place.entries, params.density)
    return Merged(place.lift(base + params.delta_scale * part))


def threshold(thetas: Tensor, params: LoreParams) -> Tensor:
    """``mu`` in absolute units, ``(G, 1, 1)``, for ``thetas (G, T, p, q)``."""
    if params.mu_mode == "absolute":
        return thetas.new_full((thetas.shape[0], 1, 1), params.mu)
    distances = thetas - thetas.mean(1, keepdim=True)
    largest: Tensor = torch.linalg.matrix_norm(distances, ord=2)
    return params.mu * largest.mean(1).view(-1, 1, 1)


def sweeps(thetas: Tensor, mu: Tensor, iters: int, tol: float = 0.0) -> tuple[Tensor, Tensor]:
    """``theta_0 (G, p, q)`` of the last sweep and the ``delta_t (G, T, p, q)``.

    With ``tol > 0`` a module is left alone once a sweep lowers its objective by less than that fraction.
    """
    deltas = torch.zeros_like(thetas)
    base = thetas.mean(1)
    previous = thetas.new_full((thetas.shape[0],), float("inf"))
    active = torch.ones_like(previous, dtype=torch.bool)
    for _ in range(iters):
        running = active.view(-1, 1, 1)
        base = torch.where(running, (thetas - deltas).mean(1), base)
        updated, objective = singular_value_threshold(thetas - base.unsqueeze(1), mu)
        deltas = torch.where(running.unsqueeze(1), updated, deltas)
        if tol > 0.0:
            active = active & (previous - objective > tol * objective)
            previous = objective
            if not bool(active.any()):
                break
    return base, deltas


def singular_value_threshold(x: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """``SVT(x_t, mu)`` of ``x (G, T, p, q)`` and the objective of each module, ``(G,)``.

    By the eigenvectors of the smaller Gram matrix: what is kept has ``s > mu``, so squaring costs no more
    than ``eps * s_max / mu`` of relative accuracy, and an SVD twice the time.
    """
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    squares, U = torch.linalg.eigh(wide @ wide.mT)
    S = squares.clamp_min(0.0).sqrt()
    kept = (S - mu).clamp_min(0.0)
    factor = torch.where(kept > 0, kept / S, torch.zeros_like(S))
    shrunk = (U * factor.unsqueeze(-2)) @ (U.mT @ wide)
    objective = (0.5 * (S - kept) ** 2 + mu * kept).sum((-2, -1))
    return shrunk if wide is x else shrunk.mT, objective


def _ties(deltas: Tensor, entries: Tensor, density: float) -> Tensor:
    """Trim each part, elect signs, mean of what agrees; entries whose sum vanishes are left out."""
    if density < 1.0:
        counts = [[rules.kept_count(int(n), density) if n else 1] for n in entries]
        k = torch.tensor(counts, device=deltas.device).expand(deltas.shape[:2])
        deltas = rules.trim(deltas, batched_kth_largest(deltas.abs().flatten(2), k)[..., None, None])
    total, size = deltas.sum(1, keepdim=True), deltas.abs().sum(1, keepdim=True)
    cancelled = total.abs() <= 1e-12 * size
    merged = rules.disjoint(deltas, rules.elect(deltas, "total", 1.0), "mean")
    return merged.masked_fill(cancelled.squeeze(1), 0.0)


def _warn_if_degenerate(weights: Tensor, params: LoreParams, ctx: Context) -> None:
    if not bool(torch.all(weights == weights[0])) or len(weights) == 1:
        return
    if len(weights) == 2:
        message = "two models with equal weights: LoRE-Merging gives exactly their mean"
    elif params.final == "average" and params.delta_scale == 1.0:
        message = "equal weights, `final: average` and `delta_scale: 1`: LoRE-Merging tends to the plain mean"
    else:
        return
    ctx.warn("degenerate_to_mean", message)


lore = Local(merge)
