"""The entry-wise methods written out on dense float64 matrices, one module at a time, as the papers put it.

``x (T, rows, cols)`` are the weighted or unweighted task matrices; ``entries`` and ``width`` are how many
entries of a matrix and of a row can be non-zero at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Keep = Callable[[Tensor], Tensor]
"""From probabilities ``(T, rows, cols)`` to a mask of ones and zeros."""


@dataclass(frozen=True)
class Problem:
    """One module: its task matrices and everything a method may ask about."""

    x: Tensor
    weights: list[float]
    parameters: list[dict[str, Any]]
    entries: int
    width: int
    keep: Keep

    def each(self, name: str) -> list[Any]:
        return [parameters[name] for parameters in self.parameters]

    def weighted(self, x: Tensor) -> Tensor:
        return x * torch.tensor(self.weights, dtype=x.dtype).view(-1, 1, 1)


def trimmed(problem: Problem) -> Tensor:
    rows = []
    for x, density in zip(problem.x, problem.each("density"), strict=True):
        kept = problem.entries if density == 1.0 else max(1, int(density * problem.entries))
        limit = x.abs().flatten().sort(descending=True).values[max(0, kept - 1)]
        rows.append(torch.where(x.abs() >= limit, x, 0.0))
    return torch.stack(rows)


def banded(problem: Problem) -> Tensor:
    rows = []
    for x, parameters in zip(problem.x, problem.parameters, strict=True):
        N = problem.entries
        kept = max(1, int(parameters["density"] * N)) if parameters["density"] < 1.0 else N
        top = min(int(parameters["gamma"] * N), N - kept)
        ordered = x.abs().flatten().sort(descending=True).values
        high, low = ordered[max(0, min(top, N - 1))], ordered[max(0, min(top + kept, N) - 1)]
        rows.append(torch.where((x.abs() >= low) & (x.abs() <= high), x, 0.0))
    return torch.stack(rows)


def dropped(problem: Problem) -> Tensor:
    density = torch.tensor(problem.each("density"), dtype=torch.float64).view(-1, 1, 1).expand_as(problem.x)
    return problem.keep(density) * problem.x / density


def dropped_by_rank(problem: Problem) -> Tensor:
    chance = torch.zeros_like(problem.x)
    for t, parameters in enumerate(problem.parameters):
        density, epsilon = parameters["density"], parameters["epsilon"]
        for i, row in enumerate(problem.x[t].abs().tolist()):
            order = sorted(range(len(row)), key=lambda column, row=row: (row[column], column))
            for position, column in enumerate(order):
                rank = max(0, position - (len(row) - problem.width))
                share = 2.0 * rank / (problem.width - 1) - 1.0 if problem.width > 1 else 0.0
                chance[t, i, column] = density + epsilon * share
    return problem.keep(chance) * problem.x / chance


def added(problem: Problem, y: Tensor) -> Tensor:
    return problem.weighted(y).sum(0)


def voted(problem: Problem, y: Tensor) -> Tensor:
    y = problem.weighted(y)
    sign = torch.where(y.sum(0) >= 0, 1.0, -1.0)
    agrees = (y * sign) > 0
    return (y * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def sce(problem: Problem) -> Tensor:
    x = problem.weighted(problem.x)
    topk = problem.parameters[0]["select_topk"]
    if topk < 1.0:
        variance = ((x - x.mean(0)) ** 2).mean(0)
        variance = torch.where(variance > (64 * 2.0**-52 * x.abs().max()) ** 2, variance, 0.0)
        count = max(1, int(topk * int((variance > 0).sum())))
        # Variances that differ by rounding only are equal.
        x = x * (variance >= variance.flatten().sort(descending=True).values[count - 1] * (1 - 1e-14))
    energy = (x**2).sum((1, 2))
    share = energy / energy.sum() if float(energy.sum()) > 0 else torch.full_like(energy, 1.0 / len(energy))
    agrees = x * torch.where(x.sum(0) >= 0, 1.0, -1.0) > 0
    divisor = (agrees * share.view(-1, 1, 1)).sum(0)
    merged = (agrees * share.view(-1, 1, 1) * x).sum(0)
    return torch.where(divisor > 0, merged / torch.where(divisor > 0, divisor, 1.0), 0.0)


def consensus(problem: Problem) -> Tensor:
    x = problem.weighted(problem.x)
    total = x.sum(0)
    strictness = torch.tensor(problem.each("mask_lambda"), dtype=torch.float64).view(-1, 1, 1)
    claims = (x.abs() > strictness * (total - x).abs()).sum(0)
    return total * (claims >= min(problem.parameters[0]["min_agree"], len(x)))


def slerp(problem: Problem) -> Tensor:
    t = problem.parameters[0]["t"]
    first, second = problem.weighted(problem.x)
    size = float(first.norm() * second.norm())
    cosine = float((first * second).sum()) / size if size > 0 else 1.0
    if abs(cosine) > 1.0 - 5e-9:
        return (1 - t) * first + t * second
    theta = torch.tensor(cosine, dtype=torch.float64).acos()
    return (((1 - t) * theta).sin() * first + (t * theta).sin() * second) / theta.sin()


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "magnitude_prune": lambda p: added(p, trimmed(p)),
    "ties": lambda p: voted(p, trimmed(p)),
    "breadcrumbs": lambda p: added(p, banded(p)),
    "breadcrumbs_ties": lambda p: voted(p, banded(p)),
    "dare_linear": lambda p: added(p, dropped(p)),
    "dare_ties": lambda p: voted(p, dropped(p)),
    "della_linear": lambda p: added(p, dropped_by_rank(p)),
    "della": lambda p: voted(p, dropped_by_rank(p)),
    "sce": sce,
    "consensus": consensus,
    "slerp": slerp,
}
