"""Order statistics and thresholds are those of a full sort, whatever the sample, the size or the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging import selection, thresholds
from merging.selection import batched_kth_largest, kth_largest
from merging.updates import UpdateStack


def values_of(kind: str, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Non-negative numbers: smooth, with few distinct values, mostly zero, constant, or sorted."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    if kind == "ties":
        x = (x * 4).round() / 4
    elif kind == "zeros":
        x = x * (x > 1.5)
    elif kind == "constant":
        x = torch.full_like(x, 0.5)
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "periodic":
        x = x * (1 + torch.arange(size) % 7)
    return x.to(dtype)


KINDS = ("smooth", "ties", "zeros", "constant", "sorted", "periodic")


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 100, selection.SMALL, selection.SMALL + 1, 3 * selection.SMALL + 17]),
    place=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_kth_largest_is_that_of_a_sort(
    kind: str, size: int, place: float, seed: int, dtype: torch.dtype
) -> None:
    values = values_of(kind, size, seed, dtype)
    k = 1 + int(place * (size - 1))
    before = values.clone()
    assert float(kth_largest(values, k)) == float(values.sort(descending=True).values[k - 1])
    assert torch.equal(values, before)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_rank_outside_the_tensor_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        kth_largest(torch.ones(4), k)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 7, 300, selection.SORTABLE + 3]),
    places=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_batched_kth_largest_is_that_of_a_sort(
    kind: str, size: int, places: list[float], dtype: torch.dtype
) -> None:
    values = torch.stack([values_of(kind, size, seed, dtype) for seed in range(2)]).unsqueeze(0)
    k = torch.tensor([[1 + int(place * (size - 1)) for place in places]])
    found = batched_kth_largest(values, k)
    ordered = values.sort(dim=-1, descending=True).values
    for t in range(2):
        assert float(found[0, t]) == float(ordered[0, t, k[0, t] - 1])


@pytest.mark.parametrize("size", [10, selection.SORTABLE + 1])
def test_rank_zero_keeps_nothing(size: int) -> None:
    found = batched_kth_largest(torch.ones(1, 2, size), torch.tensor([[0, 3]]))
    assert found.tolist() == [[float("inf"), 1.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [100, selection.SORTABLE * 3])
def test_a_cuda_device_finds_the_same(kind: str, size: int) -> None:
    values = values_of(kind, size, 3)
    for k in (1, size // 5, size):
        assert float(kth_largest(values.cuda(), k)) == float(kth_largest(values, k))


def random_stack(seed: int, m: int, n: int, T: int, *, kind: str, dtype: torch.dtype) -> UpdateStack:
    """Task updates of rank 3 whose rows and columns differ in size; ``sparse`` ones are zero in most rows."""
    g = torch.Generator().manual_seed(seed)
    B = [torch.randn(1, m, 3, generator=g, dtype=torch.float64) for _ in range(T)]
    A = [torch.randn(1, 3, n, generator=g, dtype=torch.float64) for _ in range(T)]
    B = [b * torch.randn(1, m, 1, generator=g, dtype=torch.float64).exp() for b in B]
    A = [a * torch.randn(1, 1, n, generator=g, dtype=torch.float64).exp() for a in A]
    if kind == "sparse":
        B = [b * (torch.rand(1, m, 1, generator=g) < 0.05) for b in B]
    elif kind == "zero":
        B[0].zero_()
    elif kind == "integers":
        B, A = [b.sign() for b in B], [a.sign() for a in A]
    names = ("m",)
    return UpdateStack(names, tuple(range(T)), tuple(b.to(dtype) for b in B), tuple(a.to(dtype) for a in A))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["plain", "sparse", "zero", "integers"]),
    shape=st.sampled_from([(9, 14), (600, 700), (530, 1045)]),
    share=st.sampled_from([0.001, 0.2, 0.5, 0.999]),
    budget=st.sampled_from([1 << 20, 1 << 26]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_thresholds_are_those_of_the_blocks_that_are_merged(
    seed: int, kind: str, shape: tuple[int, int], share: float, budget: int, dtype: torch.dtype
) -> None:
    stack = random_stack(seed, *shape, 2, kind=kind, dtype=dtype)
    entries = shape[0] * shape[1]
    ranks = [[[max(1, int(share * entries)), 0]], [[1, entries]]]
    found = thresholds.thresholds(stack, ranks, budget)
    blocks = [block.clone() for block, _ in thresholds.entry_blocks(stack, budget)]
    ordered = torch.cat(blocks, dim=-2).abs().flatten(2).sort(dim=-1, descending=True).values
    for j, row in enumerate(ranks):
        for t, rank in enumerate(row[0]):
            assert float(found[j, 0, t]) == (float(ordered[0, t, rank - 1]) if rank else 0.0)


def test_one_task_at_a_time_finds_the_same() -> None:
    stack = random_stack(4, 300, 310, 3, kind="plain", dtype=torch.float32)
    ranks = [[[1000, 0, 93_000]], [[0, 1, 7]]]
    found = thresholds._by_task(stack, ranks, 1 << 20)
    assert torch.equal(found, thresholds.thresholds(stack, ranks, 1 << 20))


@pytest.mark.parametrize("end", ["too_low", "too_high"])
def test_a_sample_that_misleads_costs_time_only(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    stack = random_stack(1, 700, 900, 2, kind="plain", dtype=torch.float32)
    ranks = [[[1000, 200_000]]]
    expected = thresholds.thresholds(stack, ranks, 1 << 20)
    wrong = (0.0, 1e-6) if end == "too_low" else (1e6, float("inf"))
    monkeypatch.setattr(thresholds, "bracket", lambda *given, **named: wrong)
    assert torch.equal(thresholds.thresholds(stack, ranks, 1 << 20), expected)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kinds=st.lists(st.sampled_from(["plain", "sparse", "zero", "integers"]), min_size=2, max_size=3),
    density=st.sampled_from([0.001, 0.1, 0.5, 0.99]),
    method=st.sampled_from(["ties", "magnitude_prune"]),
    budget=st.sampled_from([3000, 1 << 26]),
)
def test_a_global_threshold_is_that_of_the_whole_model(
    seed: int, kinds: list[str], density: float, method: str, budget: int
) -> None:
    stacks = [
        random_stack(seed + i, 9 + 4 * i, 130 - i, 2, kind=kind, dtype=torch.float64)
        for i, kind in enumerate(kinds)
    ]
    whole = torch.cat([stack.dense().flatten(2) for stack in stacks], dim=-1)[0]
    kept = max(1, int(density * whole.shape[-1]))
    limit = whole.abs().sort(dim=-1, descending=True).values[:, kept - 1 : kept]
    trimmed = torch.where(whole.abs() >= limit * (1 - 1e-12), whole, 0.0)
    parameters: dict[str, Any] = {"trim_scope": "global", "density": density}
    if method == "ties":
        parameters |= {"agg": "max"}
        sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0).double()
        expected = sign * (trimmed * sign).clamp_min(0.0).amax(0)
    else:
        expected = trimmed.sum(0)
    merged = torch.cat([part.flatten() for part in run(method, stacks, parameters, budget=budget)])
    assert torch.allclose(merged, expected, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))
