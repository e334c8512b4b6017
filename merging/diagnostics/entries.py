"""Sign conflict and cancellation, which live in the entries: estimated on a sampled grid of them.

The grid is ``s`` rows times ``s / 2`` columns drawn without replacement from a stream keyed by seed and
module, so that its entries cost two gathers and one small product per task. A module that is no larger is
measured in full. On real adapters the standard error of both shares from ``s = 128`` is below 0.01 per
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.rules import task_generator
from merging.updates import UpdateStack


@dataclass(frozen=True)
class Grid:
    """Sampled places: ``rows (G, s)`` and ``columns (G, s')``, ascending, with the factors there:
    ``B[t] (G, s, r_t)`` and ``A[t] (G, r_t, s')``.
    """

    rows: Tensor
    columns: Tensor
    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]


def draw_grid(stack: UpdateStack, *, seed: int, sample: int) -> Grid:
    """At most ``sample`` rows and half as many columns of every module of the stack, by its name."""
    generators = [task_generator(seed, "diagnostics", name) for name in stack.names]
    rows, columns = (places.to(stack.like.device) for places in draw(stack.m, stack.n, sample, generators))
    return Grid(
        rows,
        columns,
        tuple(B.take_along_dim(rows.unsqueeze(-1), 1) for B in stack.B),
        tuple(A.take_along_dim(columns.unsqueeze(1), 2) for A in stack.A),
    )


def draw(m: int, n: int, sample: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The rows ``(G, s)`` and columns ``(G, s')`` of the grid of ``m x n`` matrices, ascending."""
    return _places(m, sample, generators), _places(n, sample // 2, generators)


def _places(size: int, sample: int, generators: Sequence[torch.Generator]) -> Tensor:
    if size <= sample:
        return torch.arange(size).expand(len(generators), size)
    return torch.stack([torch.randperm(size, generator=g)[:sample].sort().values for g in generators])


@dataclass(frozen=True)
class Conflicts:
    """``conflict (G,)``: the share of entries on which two tasks have opposite signs; ``pairs (G, T, T)``:
    the same for each pair. ``of_sum``, ``of_parts (G,)``: mean ``|sum_t delta_t|`` and mean
    ``sum_t |delta_t|``; cancellation is ``1 - of_sum / of_parts``.
    """

    conflict: Tensor
    pairs: Tensor
    of_sum: Tensor
    of_parts: Tensor


def conflicts(grid: Grid) -> Conflicts:
    """Measure the entries of a grid; float64."""
    return conflicts_of(torch.stack([B @ A for B, A in zip(grid.B, grid.A, strict=True)], dim=1).flatten(2))


def conflicts_of(entries: Tensor) -> Conflicts:
    """The same of entries ``(G, T, q)`` that are there."""
    count = entries.shape[-1]
    opposite = (entries > 0).to(entries) @ (entries < 0).to(entries).mT
    return Conflicts(
        conflict=((entries.amax(1) > 0) & (entries.amin(1) < 0)).double().mean(-1),
        pairs=(opposite + opposite.mT).double() / count,
        of_sum=entries.sum(1).abs().double().mean(-1),
        of_parts=entries.abs().sum(1).double().mean(-1),
    )
