"""What must hold for DRM, against a dense float64 reference, over random stacks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from named_tools import close, deltas, merged, quick
from stacks import copies, module, permuted, stacks, transposed
from torch import Tensor

from merging.updates import UpdateStack

DIRECTIONS = ("drm_h", "drm_v")


def dense_drm_h(
    matrices: Tensor, density: float, weights: list[float], disjoint: bool, rtol: float
) -> Tensor:
    """The published steps on dense matrices ``(T, m, n)``, with zero vectors where a task has nothing."""
    T, m, n = matrices.shape
    U, S, Vh = torch.linalg.svd(matrices.transpose(0, 1).reshape(m, T * n), full_matrices=False)
    keep = S > rtol * S[0]
    U, S, blocks = U[:, keep], S[keep], Vh[keep].reshape(-1, T, n).transpose(0, 1)
    norms = blocks.norm(dim=-1, keepdim=True)
    norms = torch.where(norms > 1e-10, norms, torch.zeros_like(norms))
    unit = torch.where(norms > 0, blocks / norms, torch.zeros_like(blocks))
    if density < 1.0 and unit.numel():
        kept = min(unit.numel(), round(unit.numel() * density) + 1)
        threshold = unit.abs().flatten().sort(descending=True).values[kept - 1]
        unit = unit * (unit.abs() >= threshold - 1e-9)  # equal but for rounding: kept together
    y = unit * norms * S.view(1, -1, 1)
    sign = y.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    y = y * (y * sign > 0) * torch.tensor(weights, dtype=y.dtype).view(-1, 1, 1)
    total = y.sum(0) / ((y != 0).sum(0).clamp_min(1) if disjoint else T)
    return U @ total


@quick
@given(
    stack=stacks(kinds=("random", "zero", "deficient", "shared")),
    density=st.sampled_from([0.1, 0.35, 0.8, 1.0]),
    disjoint=st.booleans(),
    weights=st.sampled_from([[1.0] * 4, [1.0, 0.5, -2.0, 0.0]]),
)
def test_drm_is_the_dense_algorithm(
    stack: UpdateStack, density: float, disjoint: bool, weights: list[float]
) -> None:
    weights = weights[: stack.T]
    parameters = {"density": density, "disjoint_mean": disjoint, "lambda": 1.0}
    horizontal = merged("drm_h", stack, parameters, weights=weights)
    vertical = merged("drm_v", stack, parameters, weights=weights)
    for g in range(stack.G):
        matrices = deltas(module(stack, g))
        expected = dense_drm_h(matrices, density, weights, disjoint, 0.01)
        close(horizontal[g], expected, 1e-9, matrices)
        expected = dense_drm_h(matrices.mT, density, weights, disjoint, 0.01).mT
        close(vertical[g], expected, 1e-9, matrices)


@quick
@given(stack=stacks(), density=st.sampled_from([0.2, 0.6, 1.0]))
def test_drm_horizontal_is_vertical_of_the_transposes(stack: UpdateStack, density: float) -> None:
    parameters = {"density": density, "lambda": 1.0}
    one = merged("drm_h", stack, parameters)
    other = merged("drm_v", transposed(stack), parameters)
    close(one, other.mT, 1e-10, stack.dense())


@quick
@given(
    stack=stacks(kinds=("random", "deficient")), count=st.integers(1, 4), method=st.sampled_from(DIRECTIONS)
)
def test_drm_of_one_model_or_of_copies_is_the_identity_without_pruning(
    stack: UpdateStack, count: int, method: str
) -> None:
    same = copies(stack, count)
    parameters = {"density": 1.0, "rank_rtol": 1e-9, "lambda": 1.0}
    close(merged(method, same, parameters), same.dense()[:, 0], 1e-9, same.dense())


@quick
@given(stack=stacks(kinds=("random", "zero")), method=st.sampled_from(DIRECTIONS), data=st.data())
def test_drm_does_not_depend_on_the_order_of_the_tasks(
    stack: UpdateStack, method: str, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(stack.T)))
    parameters = {"density": 0.4, "lambda": 1.0}
    close(merged(method, stack, parameters), merged(method, permuted(stack, order), parameters), 1e-9,
          stack.dense())  # fmt: skip


@quick
@given(stack=stacks(kinds=("random", "zero", "shared")), factor=st.sampled_from([1e-4, 3.0, 1e4, -1.0]))
def test_drm_scales_with_its_inputs(stack: UpdateStack, factor: float) -> None:
    scaled = UpdateStack(stack.names, stack.tasks, tuple(B * factor for B in stack.B), stack.A)
    parameters = {"density": 0.4, "lambda": 1.0}
    close(merged("drm_h", scaled, parameters), factor * merged("drm_h", stack, parameters), 1e-9,
          scaled.dense())  # fmt: skip


def test_drm_of_opposite_tasks_is_finite_and_small() -> None:
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(1, 6, 2, generator=generator, dtype=torch.float64)
    A = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    stack = UpdateStack(("m",), (0, 1), (B, -B), (A, A))
    for method in DIRECTIONS:
        result = merged(method, stack, {"density": 1.0, "lambda": 1.0})
        assert torch.isfinite(result).all()
        assert result.norm() <= (B @ A).norm() * (1 + 1e-12)  # the bound can be reached


def test_drm_of_nothing_is_nothing() -> None:
    stack = UpdateStack(("m",), (0, 1), (torch.zeros(1, 4, 2),) * 2, (torch.zeros(1, 2, 3),) * 2)
    for method in DIRECTIONS:
        assert torch.equal(merged(method, stack), torch.zeros(1, 4, 3))
