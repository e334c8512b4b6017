"""Reversible merging: the published formulas position by position, and what must hold of a basis."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import module, permuted, stacks
from torch import Tensor

from merging import catalog
from merging.catalog.named import RmmParams
from merging.errors import InputError
from merging.kernels import Context, MultiKernel, MultiMerged
from merging.methods import rmm
from merging.recipe import Recipe
from merging.updates import UpdateStack

quick = settings(max_examples=40, deadline=None)
GRANULARITIES = ("position", "factor")


def padded(stack: UpdateStack) -> tuple[Tensor, Tensor]:
    """All tasks at one rank, ``(T, G, m, r)`` and ``(T, G, n, r)``."""
    r = max(stack.ranks)
    B = torch.stack([torch.nn.functional.pad(B, (0, r - B.shape[2])) for B in stack.B])
    A = torch.stack([torch.nn.functional.pad(A.mT, (0, r - A.shape[1])) for A in stack.A])
    return B, A


def recovered(basis: rmm.Basis) -> tuple[Tensor, Tensor]:
    """As :func:`padded`."""
    pairs = [rmm.recover(basis, t) for t in range(basis.T)]
    return torch.stack([B for B, _ in pairs]), torch.stack([A.mT for _, A in pairs])


def dense_reference(x: Tensor, p: int) -> Tensor:
    """The best affine approximation of dimension ``p`` of the vectors ``(T, r)`` at one position."""
    mean = x.mean(0)
    U, _, _ = torch.linalg.svd((x - mean).T, full_matrices=False)
    return mean + (x - mean) @ U[:, :p] @ U[:, :p].T


def ambiguous(x: Tensor, p: int) -> bool:
    """Whether the ``p``-th and the next singular value are equal (and not zero) at some position."""
    values = torch.linalg.svdvals((x - x.mean(0)).permute(1, 2, 3, 0))
    last, following = values[..., p - 1], values[..., p]
    return bool(((last - following < 1e-6 * values[..., 0]) & (last > 1e-9 * values.max())).any())


@quick
@given(stack=stacks(), p=st.integers(0, 3), granularity=st.sampled_from(GRANULARITIES))
def test_recovery_is_the_principal_components_of_each_position(
    stack: UpdateStack, p: int, granularity: str
) -> None:
    basis = rmm.fit(stack, RmmParams(basis_size=p, align="none", granularity=granularity))
    for x, near in zip(padded(stack), recovered(basis), strict=True):
        for g in range(stack.G):
            vectors = (
                x[:, g].transpose(0, 1) if granularity == "position" else x[:, g].flatten(1).unsqueeze(0)
            )
            found = (
                near[:, g].transpose(0, 1)
                if granularity == "position"
                else near[:, g].flatten(1).unsqueeze(0)
            )
            for own, own_near in zip(vectors, found, strict=True):
                S = torch.linalg.svdvals(own - own.mean(0))
                if p < len(S) and p > 0 and S[p - 1] - S[p] < 1e-6 * S[0]:
                    continue  # two equal singular values: either direction is best
                assert (own_near - dense_reference(own, p)).norm() <= 1e-8 * own.norm()


@quick
@given(
    stack=stacks(), granularity=st.sampled_from(GRANULARITIES), align=st.sampled_from(["none", "procrustes"])
)
def test_a_full_basis_recovers_every_update_exactly(stack: UpdateStack, granularity: str, align: str) -> None:
    basis = rmm.fit(stack, RmmParams(basis_size=100, align=align, granularity=granularity))
    if granularity == "position":
        assert basis.basis_B.shape[-1] == min(max(stack.ranks), stack.T - 1)
    for t in range(stack.T):
        B, A = rmm.recover(basis, t)
        assert (B @ A - stack.task(t)).norm() <= 1e-12 * stack.dense().norm()
    assert float(rmm.recon_error(basis, stack).max()) < 1e-12


@quick
@given(stack=stacks(), granularity=st.sampled_from(GRANULARITIES))
def test_what_is_lost_are_the_singular_values_beyond_the_basis(stack: UpdateStack, granularity: str) -> None:
    """So the error never rises with the size of the basis, and without a basis all tasks are the mean."""
    previous = float("inf")
    for p in range(4):
        basis = rmm.fit(stack, RmmParams(basis_size=p, align="none", granularity=granularity))
        lost = expected = 0.0
        for x, near in zip(padded(stack), recovered(basis), strict=True):
            if p == 0:
                assert torch.allclose(near, x.mean(0).expand_as(near), rtol=0, atol=1e-12)
            assert torch.allclose(near.mean(0), x.mean(0), rtol=0, atol=1e-12)
            centred = (x - x.mean(0)).permute(1, 2, 3, 0)
            if granularity == "factor":
                centred = centred.flatten(1, 2)
            values = torch.linalg.svdvals(centred)
            expected += float(values[..., p:].square().sum())
            lost += float((x - near).square().sum())
        total = float(stack.dense().norm()) + sum(float(x.square().sum()) for x in padded(stack))
        assert abs(lost - expected) <= 1e-10 * total
        assert lost <= previous + 1e-10 * total
        previous = lost


@quick
@given(stack=stacks(), p=st.integers(0, 3), align=st.sampled_from(["none", "procrustes"]), data=st.data())
def test_the_order_of_the_tasks_only_permutes_what_is_recovered(
    stack: UpdateStack, p: int, align: str, data: st.DataObject
) -> None:
    if align == "procrustes":
        norms = stack.dense().flatten(2).norm(dim=-1).sort(dim=1).values
        if stack.T > 1 and ((norms[:, -1] - norms[:, -2]) < 1e-6 * norms[:, -1]).any():
            return  # no largest task: the reference is the first of the largest
    order = data.draw(st.permutations(range(stack.T)))
    params = RmmParams(basis_size=p, align=align)
    basis, other = rmm.fit(stack, params), rmm.fit(permuted(stack, order), params)
    if 0 < p < min(max(stack.ranks), stack.T - 1) and any(map(ambiguous, padded(stack), (p, p))):
        return  # the last direction may be chosen freely
    for position, t in enumerate(order):
        one, two = rmm.recover(basis, t), rmm.recover(other, position)
        assert (one[0] @ one[1] - two[0] @ two[1]).norm() <= 1e-7 * stack.dense().norm()


@quick
@given(stack=stacks(), p=st.integers(0, 2))
def test_alignment_changes_no_update_and_the_error_is_that_of_the_dense_matrices(
    stack: UpdateStack, p: int
) -> None:
    basis = rmm.fit(stack, RmmParams(basis_size=p))
    error = rmm.recon_error(basis, stack)
    full = stack.dense()
    norms = full.flatten(2).norm(dim=-1)
    norms = torch.where(norms > 0, norms, norms.amax(1, keepdim=True))
    for t in range(stack.T):
        B, A = rmm.recover(basis, t)
        expected = (B @ A - full[:, t]).flatten(1).norm(dim=-1) / norms[:, t].clamp_min(1e-300)
        assert torch.allclose(error[:, t], expected, rtol=1e-6, atol=1e-9)


def test_alignment_undoes_rotated_factors() -> None:
    """Tasks that share most of their content, each in a rotation of its own."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common_B, common_A = normal(1, 40, 8), normal(1, 8, 30)
    B, A = [], []
    for _ in range(6):
        Q, _ = torch.linalg.qr(normal(8, 8))
        B.append((0.9 * common_B + 0.1 * normal(1, 40, 8)) @ Q)
        A.append(Q.mT @ (0.9 * common_A + 0.1 * normal(1, 8, 30)))
    stack = UpdateStack(("m",), tuple(range(6)), tuple(B), tuple(A))
    raw = rmm.recon_error(rmm.fit(stack, RmmParams(align="none")), stack).mean()
    aligned = rmm.recon_error(rmm.fit(stack, RmmParams()), stack).mean()
    assert raw > 0.7
    assert aligned < 0.2


@pytest.mark.parametrize(("T", "r", "p", "expected"), [(8, 16, 1, 0.3125), (5, 4, 2, 1.1), (5, 4, 0, 0.2)])
def test_storage_is_the_published_formula(T: int, r: int, p: int, expected: float) -> None:
    generator = torch.Generator().manual_seed(2)
    B = tuple(torch.randn(1, 30, r, generator=generator) for _ in range(T))
    A = tuple(torch.randn(1, r, 20, generator=generator) for _ in range(T))
    stack = UpdateStack(("m",), tuple(range(T)), B, A)
    basis = rmm.fit(stack, RmmParams(basis_size=p))
    assert expected == pytest.approx((p * (r + T) + r) / (r * T))
    assert rmm.storage_ratio(basis, stack.ranks) == pytest.approx(expected)
    whole = rmm.fit(stack, RmmParams(basis_size=p, granularity="factor"))
    assert rmm.storage_ratio(whole, stack.ranks) == pytest.approx((p + 1) / T + 2 * p / (50 * r))


@quick
@given(
    stack=stacks(kinds=("random", "deficient", "shared")),
    p=st.integers(0, 3),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_adding_a_task_that_is_in_the_basis_gives_its_coefficients_again(
    stack: UpdateStack, p: int, granularity: str
) -> None:
    basis = rmm.fit(stack, RmmParams(basis_size=p, align="none", granularity=granularity))
    extended = rmm.add_task(basis, stack.B[0], stack.A[0], align="none")
    assert extended.T == stack.T + 1
    for t in range(stack.T):
        assert all(map(torch.equal, rmm.recover(extended, t), rmm.recover(basis, t)))
    again, first = rmm.recover(extended, stack.T), rmm.recover(basis, 0)
    assert_close(again[0], first[0], 1e-7)
    assert_close(again[1], first[1], 1e-7)


def test_a_task_is_added_by_projection_in_any_rotation() -> None:
    generator = torch.Generator().manual_seed(3)
    B = [torch.randn(1, 12, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    A = [torch.randn(1, 3, 9, generator=generator, dtype=torch.float64) for _ in range(4)]
    stack = UpdateStack(("m",), (0, 1, 2), tuple(B[:3]), tuple(A[:3]))
    basis = rmm.fit(stack, RmmParams(basis_size=3, align="none"))  # three vectors span a position
    Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    one = rmm.recover(rmm.add_task(basis, B[3], A[3]), 3)
    two = rmm.recover(rmm.add_task(basis, B[3] @ Q, Q.mT @ A[3]), 3)
    assert_close(two[0] @ two[1], one[0] @ one[1], 1e-10)
    smaller = rmm.add_task(basis, B[3][:, :, :2], A[3][:, :2])
    assert torch.isfinite(smaller.coeff_A).all()
    with pytest.raises(InputError) as caught:
        rmm.add_task(
            basis, torch.ones(1, 12, 4, dtype=torch.float64), torch.ones(1, 4, 9, dtype=torch.float64)
        )
    assert caught.value.code == "rank_exceeds_basis"


def test_a_single_task_is_its_own_mean() -> None:
    stack = UpdateStack(("m",), (0,), (torch.ones(1, 4, 2),), (torch.ones(1, 2, 3),))
    basis = rmm.fit(stack, RmmParams())
    assert basis.basis_A.shape == (1, 3, 2, 0)
    assert torch.equal(rmm.recover(basis, 0)[0], stack.B[0])
    assert rmm.storage_ratio(basis, stack.ranks) == 1.0


def split(
    stack: UpdateStack, parameters: dict[str, object], warnings: list[str], budget: int = 1 << 28
) -> MultiMerged:
    """Run the kernel of the catalogue."""
    models = [{"model": f"t{t}", "parameters": {"weight": 1.0 + t}} for t in range(stack.T)]
    resolved = catalog.resolve(
        Recipe.load({"merge_method": "rmm", "models": models, "parameters": parameters})
    )
    kernel: MultiKernel = catalog.load_kernel(resolved.method)
    context = Context(
        resolved.params,
        resolved.per_model,
        tuple(f"d{t}" for t in range(stack.T)),
        budget=budget,
        warn=lambda code, message: warnings.append(code),
    )
    return kernel.split(stack, context)


@quick
@given(stack=stacks(min_tasks=2), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_the_kernel_gives_one_update_per_task_with_its_figures(
    stack: UpdateStack, dtype: torch.dtype
) -> None:
    stack = stack.to(dtype)
    warnings: list[str] = []
    done = split(stack, {"basis_size": 100}, warnings)
    assert len(done.updates) == stack.T
    assert tuple(done.artefact) == rmm.TENSORS
    for t, update in enumerate(done.updates):  # weights are factors on the updates
        tolerance = 1e-11 if dtype == torch.float64 else 1e-5
        error = (update.dense() - (1.0 + t) * stack.task(t)).norm()
        assert error <= tolerance * stack.dense().norm() * (1 + t)
    assert done.facts["recon_error"].shape == (stack.G, stack.T)
    assert done.facts["storage_ratio"].shape == (stack.G,)
    assert ("basis_not_smaller" in warnings) == (float(done.facts["storage_ratio"][0]) >= 1.0)
    small = split(stack, {"basis_size": 100}, [], budget=1)
    for g in range(stack.G):
        alone = split(module(stack, g), {"basis_size": 100}, [])
        for name, tensor in small.artefact.items():
            assert tensor[g : g + 1].shape == alone.artefact[name].shape


def test_lambda_auto_is_refused() -> None:
    recipe = {"merge_method": "rmm", "models": [{"model": "a"}], "parameters": {"lambda": "auto"}}
    with pytest.raises(InputError) as caught:
        catalog.resolve(Recipe.load(recipe))
    assert caught.value.code == "invalid_parameter"


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_cuda_device_gives_the_same_products(granularity: str) -> None:
    generator = torch.Generator().manual_seed(9)
    B = tuple(torch.randn(3, 300, 8, generator=generator) for _ in range(4))
    A = tuple(torch.randn(3, 8, 200, generator=generator) for _ in range(4))
    stack = UpdateStack(("a", "b", "c"), (0, 1, 2, 3), B, A)
    there = UpdateStack(stack.names, stack.tasks, tuple(b.cuda() for b in B), tuple(a.cuda() for a in A))
    one, other = (split(s, {"granularity": granularity}, []) for s in (stack, there))
    for near, far in zip(one.updates, other.updates, strict=True):
        assert far.any.is_cuda
        assert_close(far.dense().cpu(), near.dense(), 1e-4)
    assert torch.allclose(other.facts["recon_error"].cpu(), one.facts["recon_error"], rtol=1e-4)
