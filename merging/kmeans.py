"""Deterministic k-means on a Gram matrix.

Distances need inner products only: for a cluster with member shares ``z (sum 1)``,
``|x_i - c|^2 = G_ii - 2 (G z)_i + z^T G z``. Many clusterings of ``R`` points in a space of any dimension
then cost ``O(R^2 k)`` per round. All problems ``(modules, restarts)`` run as one batch in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESTARTS = 10
ROUNDS = 300


def kmeans(gram: Tensor, weights: Tensor, k: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Labels ``(G, R)`` of the best of ten runs of Lloyd's algorithm from k-means++ seeds.

    ``gram (G, R, R)`` float64, ``weights (G, R)`` non-negative sample weights, ``k <= R``, one generator per
    module. Clusters are numbered by their first member; some stay empty when fewer than ``k`` points are
    distinct. Points are visited by norm, so that their order hardly ever matters.
    """
    G, R = weights.shape
    if not 1 <= k <= R:
        raise ValueError(f"k must be in 1..{R}, got {k}")
    if k == R:  # one cluster per point has inertia zero, and duplicates need not share a cluster
        return torch.arange(R, device=gram.device).expand(G, R)
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, stable=True)
    gram = gram.gather(1, order.unsqueeze(-1).expand_as(gram))
    gram = gram.gather(2, order.unsqueeze(1).expand_as(gram)).unsqueeze(1)
    weights = weights.gather(1, order).unsqueeze(1)
    draws = torch.stack([torch.rand(RESTARTS, k, generator=g, dtype=torch.float64) for g in generators])
    labels = _nearest(_seed_distances(gram, _seeds(gram, weights, draws.to(gram.device))))
    for _ in range(ROUNDS):
        updated = _nearest(_distances(gram, weights, labels, k))
        if torch.equal(updated, labels):
            break
        labels = updated
    errors = _distances(gram, weights, labels, k).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    best = (errors * weights).nan_to_num(posinf=0.0).sum(-1).argmin(dim=1)
    chosen = labels.gather(1, best.view(G, 1, 1).expand(G, 1, R)).squeeze(1)
    return _numbered(torch.empty_like(chosen).scatter_(1, order, chosen), k)


def shares(labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """Each member's share of its cluster's centroid, ``(..., R, k)``; zero columns for empty clusters."""
    member = torch.nn.functional.one_hot(labels, k).to(weights.dtype) * weights.unsqueeze(-1)
    total = member.sum(-2, keepdim=True)
    return member / torch.where(total > 0, total, torch.ones_like(total))


def _seeds(gram: Tensor, weights: Tensor, draws: Tensor) -> Tensor:
    """k-means++: each seed is drawn with probability ``weight * distance^2``; ``(G, restarts, k)``."""
    G, restarts, k = draws.shape
    R = weights.shape[-1]
    chance = weights.expand(G, restarts, R)
    nearest = torch.full_like(chance, float("inf"))
    seeds = []
    for step in range(k):
        reach = chance.cumsum(-1)
        target = draws[..., step : step + 1] * reach[..., -1:]
        seed = torch.searchsorted(reach, target, right=True).clamp_max(R - 1)
        seeds.append(seed)
        nearest = torch.minimum(nearest, _seed_distances(gram, seed).squeeze(-1))
        nearest = nearest.scatter(-1, seed, 0.0)
        chance = nearest * weights
    return torch.cat(seeds, dim=-1)


def _seed_distances(gram: Tensor, seeds: Tensor) -> Tensor:
    """Squared distances of all points to the points ``seeds``, ``(G, restarts, R, k)``."""
    G, restarts, k = seeds.shape
    R = gram.shape[-1]
    columns = gram.expand(G, restarts, R, R).gather(-1, seeds.unsqueeze(-2).expand(G, restarts, R, k))
    squares = gram.diagonal(dim1=-2, dim2=-1)
    own = squares.expand(G, restarts, R).gather(-1, seeds)
    return (squares.unsqueeze(-1) - 2.0 * columns + own.unsqueeze(-2)).clamp_min(0.0)


def _distances(gram: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """Squared distances of all points to the centroids; infinite to an empty cluster."""
    share = shares(labels, weights.expand_as(labels), k)
    products = gram @ share
    centre = (share * products).sum(-2, keepdim=True)
    squares = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    empty = share.sum(-2, keepdim=True) == 0
    return (squares - 2.0 * products + centre).masked_fill(empty, float("inf"))


def _nearest(distances: Tensor) -> Tensor:
    return distances.argmin(dim=-1)


def _numbered(labels: Tensor, k: int) -> Tensor:
    """The same partition with clusters in the order of their first members."""
    G, R = labels.shape
    at = torch.arange(R, device=labels.device).expand(G, R)
    first = torch.full((G, k), R, dtype=torch.long, device=labels.device)
    first = first.scatter_reduce(1, labels, at, reduce="amin")
    return first.argsort(dim=1, stable=True).argsort(dim=1).gather(1, labels)
