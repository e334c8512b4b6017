"""k-means on a Gram matrix: the right clusters, deterministic, whatever the order of the points."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.kmeans import kmeans, shares

quick = settings(max_examples=40, deadline=None)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(points: Tensor, k: int, *, seed: int = 0, weights: Tensor | None = None) -> Tensor:
    """Labels of a batch of point sets ``(G, R, d)``."""
    weights = torch.ones(points.shape[:2], dtype=torch.float64) if weights is None else weights
    generators = [torch.Generator().manual_seed(seed) for _ in points]
    return kmeans(points @ points.mT, weights, k, generators)


def inertia(points: Tensor, labels: list[int], weights: list[float]) -> float:
    total = 0.0
    for label in set(labels):
        chosen = [i for i, own in enumerate(labels) if own == label]
        w = torch.tensor([weights[i] for i in chosen], dtype=torch.float64).unsqueeze(-1)
        x = points[chosen]
        centre = (w * x).sum(0) / w.sum()
        total += float((w * (x - centre).square()).sum())
    return total


@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]], ids=["equal", "weighted"])
def test_the_best_of_all_partitions_is_found_nearly_always(weights: list[float]) -> None:
    """A local search with restarts; 60 problems of which it may miss a few by a little."""
    points = normal(0, 60, 5, 3)
    labels = run(points, 3, weights=torch.tensor([weights], dtype=torch.float64).expand(60, 5))
    ratios = []
    for problem, found in zip(points, labels.tolist(), strict=True):
        best = min(inertia(problem, [0, *other], weights) for other in itertools.product(range(3), repeat=4))
        ratios.append(inertia(problem, found, weights) / best)
    assert min(ratios) > 1.0 - 1e-9
    assert sum(ratio < 1.0 + 1e-9 for ratio in ratios) >= 54
    assert max(ratios) < 1.5


@quick
@given(seed=st.integers(0, 1 << 30), k=st.integers(2, 5))
def test_every_point_is_nearest_to_its_own_centroid(seed: int, k: int) -> None:
    points = normal(seed, 1, 20, 4)
    labels = run(points, k)
    centres = shares(labels, torch.ones(1, 20, dtype=torch.float64), k).mT @ points
    assert torch.equal(torch.cdist(points, centres).argmin(-1), labels)


@quick
@given(seed=st.integers(0, 1 << 30), data=st.data())
def test_the_partition_does_not_depend_on_the_order_of_the_points(seed: int, data: st.DataObject) -> None:
    points = normal(seed, 1, 12, 4)
    order = data.draw(st.permutations(range(12)))
    one, other = run(points, 4)[0], run(points[:, order], 4)[0]
    same = one.unsqueeze(0) == one.unsqueeze(1)
    moved = other.unsqueeze(0) == other.unsqueeze(1)
    assert torch.equal(same[order][:, order], moved)


def test_separate_groups_are_found_and_numbered_by_their_first_member() -> None:
    centres = 20.0 * torch.eye(4, dtype=torch.float64)
    groups = [2, 0, 2, 1, 3, 0, 1, 2, 3, 3]
    points = torch.stack([centres[g] + 0.1 * normal(i, 4) for i, g in enumerate(groups)])
    for seed in range(5):
        assert run(points.unsqueeze(0), 4, seed=seed)[0].tolist() == [0, 1, 0, 2, 3, 1, 2, 0, 3, 3]


def test_a_batch_is_its_parts() -> None:
    points = normal(3, 5, 16, 6)
    together = run(points, 4)
    for g in range(5):
        assert torch.equal(together[g], run(points[g : g + 1], 4)[0])


def test_points_without_weight_do_not_pull() -> None:
    points = torch.tensor([[[0.0], [1.0], [100.0], [10.0], [11.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    labels = run(points, 2, weights=weights)[0].tolist()
    assert labels == [0, 0, 1, 1, 1]
    share = shares(torch.tensor([labels]), weights, 2)
    assert (share.mT @ points)[0].flatten().tolist() == [0.5, 10.5]


def test_equal_points_leave_clusters_empty_and_all_points_may_stand_alone() -> None:
    points = torch.ones(1, 5, 2, dtype=torch.float64)
    assert run(points, 3)[0].tolist() == [0] * 5
    assert run(points, 5)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="k must be in"):
        run(points, 6)
