"""OSRM (arXiv 2505.22934): start each adapter in the input directions that the other tasks use least.

The rows of ``A`` of a task are orthonormal and minimise ``|A H^T|^2`` for the features ``H (k, n)`` of
the other tasks: the eigenvectors of ``H^T H`` with the ``r`` smallest eigenvalues (section 3). ``B`` is
zero. Where the others leave more than ``r`` directions untouched the choice is open; here it falls on
those that carry most energy of the own task (``own_energy``), which makes it unique and keeps the
adapter trainable. With few feature rows the same answer comes from ``H`` without an ``n x n`` matrix,
``O(n k^2)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.catalog.data import OsrmInitParams
from merging.kernels import Context, LocalSplit, MultiMerged
from merging.rules import task_generator
from merging.updates import LowRank, UpdateStack

NULL_RTOL = 1e-9
"""Eigenvalues up to this fraction of the largest count as zero."""


def from_grams(others: Tensor, own: Tensor | None, r: int) -> Tensor:
    """``A (r, n)`` from Gram matrices ``(n, n)``; ``own=None`` leaves ties as the decomposition has them."""
    values, vectors = torch.linalg.eigh(others.double())
    free = int((values <= NULL_RTOL * values[-1].clamp_min(0.0)).sum())
    if own is None or free <= r:
        lowest: Tensor = vectors[:, :r].mT.contiguous()
        return lowest
    null = vectors[:, :free]
    inside = torch.linalg.eigh(null.mT @ own.double() @ null).eigenvectors
    chosen: Tensor = null @ inside[:, -r:].flip(-1)
    return chosen.mT.contiguous()


def from_rows(others: Tensor, own: Tensor | None, r: int, generator: torch.Generator) -> Tensor:
    """The same from feature rows ``others (k, n)`` and ``own (k', n)``; exact if they leave ``r`` directions.

    Directions that neither reaches are drawn from ``generator``.
    """
    n = others.shape[1]
    reached = _row_space(others.double())
    if n - len(reached) < r:
        gram = others.double().mT @ others.double()
        return from_grams(gram, None if own is None else own.double().mT @ own.double(), r)
    rows = torch.empty(0, n, dtype=torch.float64)
    if own is not None:
        rows = _row_space(_without(own.double(), reached))[:r]
    missing = r - len(rows)
    if missing:
        drawn = torch.randn(missing, n, generator=generator, dtype=torch.float64)
        rows = torch.cat([rows, _row_space(_without(drawn, torch.cat([reached, rows])))])
    return rows


def interference(A: Tensor, others: Tensor) -> Tensor:
    """Share of the energy of the other tasks that ``A`` reads: ``tr(A G A^T) / tr(G)``; a tensor of one."""
    A, others = A.double(), others.double()
    return ((A @ others) * A).sum() / others.diagonal().sum().clamp_min(1e-300)


def split(stack: UpdateStack, ctx: Context) -> MultiMerged:
    """One start per task; facts: the interference of it and of a random orthonormal ``A``, ``(G, T)``."""
    params = ctx.params
    assert isinstance(params, OsrmInitParams)
    own_energy = params.tie_break == "own_energy"
    starts: list[list[Tensor]] = [[] for _ in stack.tasks]
    read = torch.zeros(stack.G, stack.T, dtype=torch.float64)
    for g, name in enumerate(stack.names):
        grams = [_shares(ctx.data.gram(name, task)) for task in stack.tasks]
        total = sum(grams[1:], grams[0])
        for t, task in enumerate(stack.tasks):
            own = grams[t]
            others = total - own
            if params.statistic == "mean":
                means = [ctx.data.mean(name, other) for other in stack.tasks if other != task]
                generator = task_generator(ctx.seed, ctx.digests[task], name)
                A = from_rows(torch.stack(means), _root(own) if own_energy else None, params.r, generator)
            else:
                A = from_grams(others, own if own_energy else None, params.r)
            starts[t].append(A)
            read[g, t] = interference(A, others)
    updates = []
    for t in range(stack.T):
        A = (params.a_scale * torch.stack(starts[t])).to(stack.like)
        updates.append(LowRank(A.new_zeros(stack.G, stack.m, params.r), A))
    chance = torch.full_like(read, params.r / stack.n)
    return MultiMerged(tuple(updates), {}, {"interference": read, "interference_of_chance": chance})


def _shares(gram: Tensor) -> Tensor:
    """A Gram matrix in units of its trace, so that tasks count alike; float64."""
    gram = gram.double()
    return gram / gram.trace().clamp_min(1e-300)


def _row_space(rows: Tensor) -> Tensor:
    """Orthonormal rows that span those given, leading directions first."""
    if not len(rows):
        return rows
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    found: Tensor = Vh[S > 1e-10 * S[0].clamp_min(1e-300)]
    return found


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - (rows @ basis.mT) @ basis


def _root(gram: Tensor) -> Tensor:
    """Rows whose Gram matrix this is."""
    values, vectors = torch.linalg.eigh(gram)
    rows: Tensor = values.clamp_min(0.0).sqrt().unsqueeze(-1) * vectors.mT
    return rows


osrm_init = LocalSplit(split)
