"""The low-rank algebra against dense float64 references, over shapes, ranks and degenerate stacks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.lowrank import (
    core_svd,
    inner,
    joint_frame,
    numerical_rank,
    rank_for_energy,
    squared_norm,
    thin_svd,
)
from merging.updates import LowRank, UpdateStack


def random_stack(
    seed: int, m: int, n: int, ranks: list[int], *, G: int = 1, duplicate: bool = False, zero: bool = False
) -> UpdateStack:
    """Random factors; with ``duplicate`` the last task repeats the first, with ``zero`` it is zero."""
    g = torch.Generator().manual_seed(seed)
    B = [torch.randn(G, m, r, generator=g, dtype=torch.float64) for r in ranks]
    A = [torch.randn(G, r, n, generator=g, dtype=torch.float64) for r in ranks]
    if duplicate:
        B[-1], A[-1] = B[0], A[0]
    if zero:
        B[-1] = torch.zeros_like(B[-1])
    return UpdateStack(tuple(f"m{i}" for i in range(G)), tuple(range(len(ranks))), tuple(B), tuple(A))


stacks = st.builds(
    random_stack,
    seed=st.integers(0, 10_000),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    G=st.integers(1, 3),
    duplicate=st.booleans(),
    zero=st.booleans(),
)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> bool:
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    return bool(((actual - expected).abs().max() if actual.numel() else 0.0) <= tolerance * scale)


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_the_joint_frame_is_lossless_and_orthonormal(stack: UpdateStack) -> None:
    frame = joint_frame(stack)
    eye = torch.eye(frame.left.shape[-1], dtype=torch.float64)
    assert close(frame.left.mT @ frame.left, eye.expand(stack.G, -1, -1))
    for t in range(stack.T):
        lifted = frame.left @ frame.cores.task(t) @ frame.right
        assert close(lifted, stack.task(t))


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_thin_svd_has_the_singular_values_of_the_dense_product(stack: UpdateStack) -> None:
    B, A = stack.joined()
    svd = thin_svd(LowRank(B, A))
    dense = B @ A
    reference = torch.linalg.svdvals(dense)
    count = min(svd.S.shape[-1], reference.shape[-1])
    assert close(svd.S[..., :count], reference[..., :count], 1e-10)
    assert close(svd.S[..., count:], torch.zeros_like(svd.S[..., count:]), 1e-10)
    assert close((svd.U * svd.S.unsqueeze(-2)) @ svd.Vh, dense, 1e-10)
    assert close(svd.balanced().dense(), dense, 1e-10)


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_inner_products_and_norms_never_need_the_dense_matrix(stack: UpdateStack) -> None:
    first = LowRank(stack.B[0], stack.A[0])
    last = LowRank(stack.B[-1], stack.A[-1])
    x, y = first.dense(), last.dense()
    expected = (x * y).sum((-2, -1))
    assert close(inner(first, last), expected)
    assert close(inner(first, LowRank(None, y)), expected)
    assert close(inner(LowRank(y, None), first), expected)
    assert close(inner(LowRank(None, x), LowRank(None, y)), expected)
    assert close(squared_norm(first), (x**2).sum((-2, -1)))


def test_ranks_are_counted_relative_to_the_largest_singular_value() -> None:
    S = torch.tensor([[5.0, 1.0, 1e-7, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert numerical_rank(S, 1e-6).tolist() == [2, 0]


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.9, 1), (0.95, 2), (0.9999, 3), (1.0, 3)])
def test_the_smallest_rank_that_keeps_an_energy(energy: float, rank: int) -> None:
    S = torch.tensor([[3.0, 0.9, 0.1]])
    assert int(rank_for_energy(S, energy)) == rank


def test_a_zero_matrix_needs_rank_one() -> None:
    assert int(rank_for_energy(torch.zeros(1, 4), 0.9)) == 1


def test_core_svd_works_in_float64() -> None:
    assert core_svd(torch.eye(3).unsqueeze(0)).S.dtype == torch.float64


def test_a_stack_refuses_factors_that_do_not_chain() -> None:
    with pytest.raises(ValueError, match="do not chain"):
        UpdateStack(("a",), (0,), (torch.zeros(1, 3, 2),), (torch.zeros(1, 4, 5),))
    with pytest.raises(ValueError, match="agree"):
        UpdateStack(
            ("a",),
            (0, 1),
            (torch.zeros(1, 3, 2), torch.zeros(1, 4, 2)),
            (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)),
        )
    with pytest.raises(ValueError, match="one B and one A"):
        UpdateStack(("a",), (), (), ())
