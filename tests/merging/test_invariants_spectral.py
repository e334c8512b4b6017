"""What must hold for the spectral methods, over shapes, ranks and degenerate stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dense_reference
import pytest
import torch
from golden import assert_close, dense, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging import catalog
from merging.kernels import Context, Merged
from merging.lowrank import ThinSVD
from merging.recipe import Recipe
from merging.updates import UpdateStack

METHODS = ("tsv", "iso_c", "iso_cts", "cart")
CASES = settings(max_examples=40, deadline=None, derandomize=True)


def kernel_and_context(
    method: str, count: int, weights: Sequence[float] | None = None, **parameters: Any
) -> tuple[Any, Context]:
    models = [{"model": f"t{i}", "parameters": {"weight": w}} for i, w in enumerate(weights or [1.0] * count)]
    recipe = Recipe.load({"merge_method": method, "models": models, "parameters": parameters})
    resolved = catalog.resolve(recipe)
    digests = tuple(f"digest-{i}" for i in range(count))
    context = Context(resolved.params, resolved.per_model, digests, space=resolved.space)
    return catalog.load_kernel(resolved.method), context


def merge(
    method: str, stack: UpdateStack, weights: Sequence[float] | None = None, **parameters: Any
) -> Tensor:
    """The merged update of a stack of one module, as a matrix."""
    kernel, context = kernel_and_context(method, stack.T, weights, **parameters)
    return dense(kernel.merge(stack, context).update)


def as_stack(factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float64) -> UpdateStack:
    return UpdateStack(
        ("layer",),
        tuple(range(len(factors))),
        tuple(B.to(dtype).unsqueeze(0) for B, _ in factors),
        tuple(A.to(dtype).unsqueeze(0) for _, A in factors),
    )


@dataclass(frozen=True)
class Adapters:
    """Factors of the tasks in float64, and a source of further randomness."""

    factors: tuple[tuple[Tensor, Tensor], ...]
    random: torch.Generator

    @property
    def ranks(self) -> list[int]:
        return [B.shape[1] for B, _ in self.factors]

    def deltas(self, weights: Sequence[float] | None = None) -> list[Tensor]:
        """The updates times the weights; what is zero up to rounding is zero."""
        weights = weights or [1.0] * len(self.factors)
        deltas = [w * (B @ A) for (B, A), w in zip(self.factors, weights, strict=True)]
        sizes = [float(B.norm() * A.norm()) for B, A in self.factors]
        return [
            delta * (float(delta.norm()) > 1e-12 * size) for delta, size in zip(deltas, sizes, strict=True)
        ]

    def mapped(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Adapters:
        return replace(self, factors=tuple(change(B, A) for B, A in self.factors))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.random)

    def orthogonal(self, size: int) -> Tensor:
        return torch.linalg.qr(self.normal(size, size)).Q


DEGENERATE = ("none", "duplicate", "zero", "deficient", "shared-left", "cancelled")


@st.composite
def adapters(
    draw: st.DrawFn,
    kinds: Sequence[str] = DEGENERATE,
    most: int = 4,
    room: int = 0,
    scales: tuple[int, int] = (-2, 2),
) -> Adapters:
    """Random adapters; ``room=k`` leaves at least ``k`` times as many rows and columns as ranks."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=most))
    kind = draw(st.sampled_from(kinds))
    low = max(3, room * (sum(ranks) + max(ranks)))
    m, n = draw(st.integers(low, low + 14)), draw(st.integers(low, low + 14))

    def normal(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, dtype=torch.float64, generator=random)

    factors = [(normal(m, r), normal(r, n) * 10.0 ** draw(st.integers(*scales))) for r in ranks]
    B, A = factors[0]
    if kind == "duplicate":
        factors.append((B.clone(), A.clone()))
    elif kind == "zero":
        factors.append((torch.zeros_like(B), A))
    elif kind == "deficient":
        factors[0] = (torch.cat([B, B[:, :1]], 1), torch.cat([A, A[:1]], 0))
    elif kind == "shared-left":
        factors.append((B.clone(), normal(*A.shape)))
    elif kind == "cancelled":  # factors that are not zero with a product that is
        factors.append((torch.cat([B, B], 1), torch.cat([A, -A], 0)))
    return Adapters(tuple(factors), random)


PARAMETERS: dict[str, dict[str, object]] = {
    "tsv": {},
    "iso_c": {},
    "iso_cts": {"common_space_fraction": 0.6},
    "cart": {"cart_rank": 0.3, "cart_scale": 0.5},
}


def reference(method: str, inputs: Adapters, weights: Sequence[float] | None = None) -> Tensor:
    """The dense computation with the same parameters."""
    deltas = inputs.deltas(weights)
    if method == "tsv":
        return dense_reference.tsv(deltas, inputs.ranks)
    if method == "iso_c":
        return dense_reference.iso_c(deltas)
    if method == "iso_cts":
        return dense_reference.iso_cts(deltas, 0.6)
    return dense_reference.cart(deltas, 0.3, 0.5)


def result(method: str, inputs: Adapters, weights: Sequence[float] | None = None) -> Tensor:
    return merge(method, as_stack(inputs.factors), weights, **PARAMETERS[method])


def assert_same(actual: Tensor, expected: Tensor, inputs: Adapters, tolerance: float = 1e-7) -> None:
    """Equal up to ``tolerance`` of the largest input."""
    scale = max(float(delta.norm()) for delta in inputs.deltas())
    error = float((actual - expected).norm())
    assert error <= tolerance * max(scale, 1e-300), f"error {error:.2e} at inputs of norm {scale:.2e}"


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    @CASES
    @given(inputs=adapters())
    def test_is_its_dense_definition(self, method: str, inputs: Adapters) -> None:
        assert_same(result(method, inputs), reference(method, inputs), inputs)

    @CASES
    @given(inputs=adapters(), data=st.data())
    def test_weights_multiply_the_updates(self, method: str, inputs: Adapters, data: st.DataObject) -> None:
        weight = st.sampled_from([-2.0, -0.5, 0.3, 1.0, 4.0])
        count = len(inputs.factors)
        weights = data.draw(st.lists(weight, min_size=count, max_size=count))
        assert_same(result(method, inputs, weights), reference(method, inputs, weights), inputs)

    @CASES
    @given(inputs=adapters())
    def test_depends_on_the_products_alone(self, method: str, inputs: Adapters) -> None:
        def regauged(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
            G = inputs.orthogonal(B.shape[1]) * torch.logspace(-1, 1, B.shape[1], dtype=torch.float64)
            return B @ torch.linalg.inv(G), G @ A

        assert_same(result(method, inputs.mapped(regauged)), result(method, inputs), inputs)

    @CASES
    @given(inputs=adapters())
    def test_turns_with_its_inputs(self, method: str, inputs: Adapters) -> None:
        m, n = inputs.factors[0][0].shape[0], inputs.factors[0][1].shape[1]
        left, right = inputs.orthogonal(m), inputs.orthogonal(n)
        turned = inputs.mapped(lambda B, A: (left @ B, A @ right))
        assert_same(result(method, turned), left @ result(method, inputs) @ right, inputs)

    @CASES
    @given(inputs=adapters(), data=st.data())
    def test_the_order_of_the_models_is_immaterial(
        self, method: str, inputs: Adapters, data: st.DataObject
    ) -> None:
        order = data.draw(st.permutations(range(len(inputs.factors))))
        shuffled = replace(inputs, factors=tuple(inputs.factors[i] for i in order))
        assert_same(result(method, shuffled), result(method, inputs), inputs)

    @CASES
    @given(inputs=adapters(), factor=st.sampled_from([-1.0, 1e-6, 0.5, 1e4]))
    def test_scales_with_its_inputs(self, method: str, inputs: Adapters, factor: float) -> None:
        scaled = inputs.mapped(lambda B, A: (factor * B, A))
        assert_same(result(method, scaled), factor * result(method, inputs), scaled)

    @CASES
    @given(inputs=adapters(room=2))
    def test_zero_columns_in_the_factors_change_nothing(self, method: str, inputs: Adapters) -> None:
        B, A = inputs.factors[0]
        padded = (torch.cat([B, B.new_zeros(len(B), 1)], 1), torch.cat([A, inputs.normal(1, A.shape[1])], 0))
        changed = replace(inputs, factors=(padded, *inputs.factors[1:]))
        assert_same(result(method, changed), result(method, inputs), inputs)

    @CASES
    @given(inputs=adapters())
    def test_weight_zero_means_absent(self, method: str, inputs: Adapters) -> None:
        stranger = (inputs.normal(*inputs.factors[0][0].shape), inputs.normal(*inputs.factors[0][1].shape))
        more = replace(inputs, factors=(*inputs.factors, stranger))
        weights = [1.0] * len(inputs.factors) + [0.0]
        assert_same(result(method, more, weights), result(method, inputs), inputs)

    @CASES
    @given(inputs=adapters())
    def test_the_outcome_is_a_singular_value_decomposition(self, method: str, inputs: Adapters) -> None:
        stack = as_stack(inputs.factors)
        kernel, context = kernel_and_context(method, stack.T, **PARAMETERS[method])
        svd = kernel.merge(stack, context).update
        assert isinstance(svd, ThinSVD)
        U, S, Vh = svd.U[0], svd.S[0], svd.Vh[0]
        assert len(S) <= min(stack.m, stack.n)
        assert torch.equal(S, S.sort(descending=True).values)
        alive = S > 1e-12 * S[:1]
        assert int(alive.sum()) <= stack.R
        eye = torch.eye(int(alive.sum()), dtype=torch.float64)
        torch.testing.assert_close(U[:, alive].mT @ U[:, alive], eye, rtol=0, atol=1e-9)
        torch.testing.assert_close(Vh[alive] @ Vh[alive].mT, eye, rtol=0, atol=1e-9)

    @CASES
    @given(inputs=adapters(), rank=st.integers(1, 6))
    def test_a_rank_asked_for_is_the_best_approximation(
        self, method: str, inputs: Adapters, rank: int
    ) -> None:
        stack = as_stack(inputs.factors)
        kernel, context = kernel_and_context(method, stack.T, **PARAMETERS[method])
        exact = dense(kernel.merge(stack, context).update)
        cut: Merged = kernel.merge(stack, replace(context, rank=rank))
        assert isinstance(cut.update, ThinSVD)
        assert cut.update.S.shape[-1] <= rank
        tail = torch.linalg.svdvals(exact)[rank:]
        assert cut.discarded is not None
        assert_same((exact - dense(cut.update)).norm(), tail.norm(), inputs)
        assert_same(cut.discarded[0].sqrt(), tail.norm(), inputs)

    @CASES
    @given(inputs=adapters(room=2, scales=(0, 1)))
    def test_float32_factors_give_float32_accuracy(self, method: str, inputs: Adapters) -> None:
        """Also where models repeat each other: rounding must not become a direction."""
        rounded = inputs.mapped(lambda B, A: (B.float().double(), A.float().double()))
        stack = as_stack(rounded.factors, torch.float32)
        actual = merge(method, stack, **PARAMETERS[method]).double()
        assert_same(actual, reference(method, rounded), inputs, 1e-4)

    def test_bfloat16_factors(self, method: str) -> None:
        """As the engine passes them on: upcast to float32 first."""
        random = torch.Generator().manual_seed(5)
        factors = [
            (torch.randn(40, 4, generator=random), torch.randn(4, 56, generator=random)) for _ in range(5)
        ]
        rounded = [(B.bfloat16().double(), A.bfloat16().double()) for B, A in factors]
        inputs = Adapters(tuple(rounded), random)
        actual = merge(method, as_stack(rounded, torch.float32), **PARAMETERS[method])
        assert torch.isfinite(actual).all()
        assert_close(actual, reference(method, inputs), 1e-5)

    def test_modules_of_a_batch_do_not_touch_each_other(self, method: str) -> None:
        random = torch.Generator().manual_seed(3)
        B = [torch.randn(4, 12, 3, dtype=torch.float64, generator=random) for _ in range(3)]
        A = [torch.randn(4, 3, 15, dtype=torch.float64, generator=random) for _ in range(3)]
        B[1][1], A[1][1] = B[0][1], A[0][1]  # module 1: two equal models
        B[2][2] = 0.0  # module 2: one model does nothing
        for factor in B:
            factor[3] = 0.0  # module 3: none does anything
        stack = UpdateStack(("a", "b", "c", "d"), (0, 1, 2), tuple(B), tuple(A))
        kernel, context = kernel_and_context(method, 3, **PARAMETERS[method])
        batch = kernel.merge(stack, context).update
        together = batch.U * batch.S.unsqueeze(-2) @ batch.Vh
        for g in range(4):
            alone = as_stack([(b[g], a[g]) for b, a in zip(B, A, strict=True)])
            torch.testing.assert_close(
                together[g], merge(method, alone, **PARAMETERS[method]), rtol=0, atol=1e-11
            )

    def test_nothing_in_gives_nothing_out(self, method: str) -> None:
        factors = [(torch.zeros(6, 2), torch.randn(2, 5)), (torch.randn(6, 3), torch.zeros(3, 5))]
        assert torch.equal(merge(method, as_stack(factors), **PARAMETERS[method]), torch.zeros(6, 5).double())

    def test_the_space_makes_no_difference(self, method: str) -> None:
        random = torch.Generator().manual_seed(4)
        stack = as_stack([(torch.randn(9, 2, generator=random), torch.randn(2, 8, generator=random))] * 2)
        plain = merge(method, stack)
        for space in ("full", "knots", "core"):
            assert torch.equal(run(method, [stack], space=space)[0], plain)


@CASES
@given(inputs=adapters(most=1, kinds=["none", "deficient"]))
@pytest.mark.parametrize("method", ["tsv", "cart"])
def test_one_model_is_returned_as_it_is(method: str, inputs: Adapters) -> None:
    assert_same(merge(method, as_stack(inputs.factors)), inputs.deltas()[0], inputs)


@CASES
@given(inputs=adapters(most=1, kinds=["none", "deficient"]))
@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_one_model_is_flattened_and_keeps_its_nuclear_norm(method: str, inputs: Adapters) -> None:
    U, S, Vh = dense_reference.leading(inputs.deltas()[0], 99)
    merged = (
        merge(method, as_stack(inputs.factors), common_space_fraction=1.0)
        if method == "iso_cts"
        else (merge(method, as_stack(inputs.factors)))
    )
    assert_same(merged, U @ Vh * S.mean(), inputs)
    assert_same(torch.linalg.svdvals(merged).sum(), S.sum(), inputs)


@CASES
@given(inputs=adapters(most=1, kinds=["none", "deficient"]), copies=st.integers(2, 4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_of_one_model(inputs: Adapters, copies: int, dtype: torch.dtype) -> None:
    delta = inputs.deltas()[0]
    stack = as_stack(inputs.factors * copies, dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    flat = dense_reference.iso_c([delta] * copies)
    k = inputs.ranks[0]
    assert_same(merge("tsv", stack, k=k).double(), delta, inputs, tolerance)
    assert_same(merge("cart", stack).double(), delta, inputs, tolerance)
    assert_same(merge("iso_c", stack).double(), flat, inputs, tolerance)
