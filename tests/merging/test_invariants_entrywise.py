"""What the entry-wise methods promise, for all shapes, ranks and degenerate inputs, in every space."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from entrywise_tools import (
    ADDING,
    NEUTRAL,
    SETTINGS,
    SPACES,
    VOTING,
    fixed_stack,
    kernel_and_context,
    merged,
    same,
    written_out,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import copies, permuted, stacks

from merging.updates import UpdateStack

every_method = pytest.mark.parametrize("method", SETTINGS)
every_space = pytest.mark.parametrize("space", SPACES)
few = settings(max_examples=8, deadline=None)


@every_space
@every_method
@few
@given(stack=stacks(), weights=st.lists(st.sampled_from([1.0, 0.5, -0.75]), min_size=4, max_size=4))
def test_the_kernel_is_the_method_written_out(
    method: str, space: str, stack: UpdateStack, weights: list[float]
) -> None:
    per_model = [{"weight": weight} for weight in weights[: stack.T]]
    _, context = kernel_and_context(method, stack.T, space=space, per_model=per_model)
    expected = written_out(method, stack, context, space)
    assert same(merged(method, stack, space=space, per_model=per_model), expected)


@every_space
@few
@given(stack=stacks(min_tasks=2), t=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_slerp_is_the_arc_written_out(space: str, stack: UpdateStack, t: float) -> None:
    stack = UpdateStack(stack.names, (0, 1), stack.B[:2], stack.A[:2])
    _, context = kernel_and_context("slerp", 2, {"t": t}, space=space)
    expected = written_out("slerp", stack, context, "full")
    assert same(merged("slerp", stack, {"t": t}, space=space), expected)


@pytest.mark.parametrize(
    ("method", "parameters", "per_model"),
    [
        ("ties", {}, [{"density": 0.1}, {"density": 1.0}, {"density": 0.5}]),
        ("magnitude_prune", {"density": 0.2}, [{}, {"density": 0.9}, {}]),
        ("breadcrumbs", {}, [{"gamma": 0.3, "density": 0.5}, {"gamma": 0.0}, {"density": 1.0}]),
        ("breadcrumbs_ties", {}, [{"gamma": 0.3, "density": 0.5}, {"gamma": 0.0}, {"density": 1.0}]),
        ("dare_ties", {}, [{"density": 0.1}, {"density": 1.0}, {"density": 0.5}]),
        ("della", {}, [{"density": 0.3, "epsilon": 0.1}, {"density": 1.0, "epsilon": 0.0}, {}]),
        ("consensus", {}, [{"mask_lambda": 0.0}, {"mask_lambda": 2.0}, {}]),
    ],
)
@every_space
@few
@given(stack=stacks(min_tasks=3))
def test_models_may_have_parameters_of_their_own(
    method: str, parameters: dict[str, Any], per_model: list[dict[str, Any]], space: str, stack: UpdateStack
) -> None:
    stack = UpdateStack(stack.names, (0, 1, 2), stack.B[:3], stack.A[:3])
    _, context = kernel_and_context(method, 3, parameters, space=space, per_model=per_model)
    expected = written_out(method, stack, context, space)
    assert same(merged(method, stack, parameters, space=space, per_model=per_model), expected)


@every_space
@every_method
@few
@given(stack=stacks(min_tasks=2), data=st.data())
def test_the_order_of_the_models_does_not_matter(
    method: str, space: str, stack: UpdateStack, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(stack.T)))
    per_model = [{"weight": weight} for weight in (1.0, 0.5, 2.0, 1.5)[: stack.T]]
    digests = [f"digest-{t}" for t in range(stack.T)]
    first = merged(method, stack, space=space, per_model=per_model, digests=digests)
    second = merged(
        method,
        permuted(stack, order),
        space=space,
        per_model=[per_model[t] for t in order],
        digests=[digests[t] for t in order],
    )
    assert same(second, first)


@every_space
@every_method
@few
@given(stack=stacks(), factor=st.sampled_from([-1.0, 4.0, 2.0**-20, -(2.0**30)]))
def test_scaling_the_inputs_scales_the_result(
    method: str, space: str, stack: UpdateStack, factor: float
) -> None:
    scaled = stack.scaled(torch.full((stack.T,), factor, dtype=torch.float64))
    assert same(merged(method, scaled, space=space) / factor, merged(method, stack, space=space))


def regauged(stack: UpdateStack, seed: int) -> UpdateStack:
    """The same deltas from other factors: ``B G^-1`` and ``G A`` with well-conditioned ``G``."""
    generator = torch.Generator().manual_seed(seed)
    B, A = [], []
    for b, a in zip(stack.B, stack.A, strict=True):
        r = b.shape[-1]
        Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
        gauge = Q * torch.linspace(0.5, 4.0, r, dtype=torch.float64)
        B.append(b @ torch.linalg.inv(gauge))
        A.append(gauge @ a)
    return UpdateStack(stack.names, stack.tasks, tuple(B), tuple(A))


@every_space
@every_method
@few
@given(stack=stacks(kinds=("random", "duplicates", "shared")), seed=st.integers(0, 99))
def test_only_the_products_of_the_factors_matter(
    method: str, space: str, stack: UpdateStack, seed: int
) -> None:
    first = merged(method, stack, space=space)
    assert same(merged(method, regauged(stack, seed), space=space), first, 1e-6)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce", "consensus"])
def test_core_space_with_factors_as_they_are_depends_on_the_factors(method: str) -> None:
    stack = fixed_stack()
    parameters = {**SETTINGS[method], "core_gauge": "asis"}
    first = merged(method, stack, parameters, space="core")
    second = merged(method, regauged(stack, 1), parameters, space="core")
    assert float((first - second).norm() / first.norm()) > 0.1


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs", "sce", "consensus"])
def test_core_space_turns_with_its_inputs_and_full_space_does_not(method: str) -> None:
    stack = fixed_stack()
    g = torch.Generator().manual_seed(5)
    left, _ = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))
    turned = UpdateStack(
        stack.names, stack.tasks, tuple(left @ B for B in stack.B), tuple(A @ right for A in stack.A)
    )
    expected = left @ merged(method, stack, space="core") @ right
    assert same(merged(method, turned, space="core"), expected, 1e-8)
    expected = left @ merged(method, stack, space="full") @ right
    assert not same(merged(method, turned, space="full"), expected, 1e-2)


@every_space
@every_method
@few
@given(stack=stacks())
def test_one_model_alone_comes_back_when_nothing_is_dropped(
    method: str, space: str, stack: UpdateStack
) -> None:
    one = copies(stack, 1)
    assert same(merged(method, one, NEUTRAL[method], space=space), one.task(0))


@pytest.mark.parametrize("method", ADDING)
@every_space
@few
@given(stack=stacks())
def test_adding_methods_that_drop_nothing_are_the_sum(method: str, space: str, stack: UpdateStack) -> None:
    assert same(merged(method, stack, NEUTRAL[method], space=space), stack.dense().sum(1))


@every_space
@every_method
@few
@given(stack=stacks(kinds=("random", "deficient")), count=st.integers(2, 4))
def test_copies_of_one_model(method: str, space: str, stack: UpdateStack, count: int) -> None:
    parameters = NEUTRAL[method] if method == "consensus" else SETTINGS[method]
    single = merged(method, copies(stack, 1), parameters, space=space, digests=["same"])
    many = merged(method, copies(stack, count), parameters, space=space, digests=["same"] * count)
    assert same(many, single * (count if method in ADDING else 1))


@pytest.mark.parametrize("method", [*(m for m in VOTING if m != "sce"), *ADDING])
@few
@given(stack=stacks(kinds=("random", "shared")))
def test_a_model_without_an_update_changes_nothing(method: str, stack: UpdateStack) -> None:
    B = (*stack.B, torch.zeros_like(stack.B[0]))
    more = UpdateStack(stack.names, tuple(range(stack.T + 1)), B, (*stack.A, stack.A[0]))
    parameters = {**SETTINGS[method]}
    if method == "consensus":
        parameters["min_agree"] = 1
    for space in SPACES:
        assert same(
            merged(method, more, parameters, space=space), merged(method, stack, parameters, space=space)
        )


@every_space
@pytest.mark.parametrize("method", [*SETTINGS, "slerp"])
def test_models_without_any_update_merge_to_nothing(method: str, space: str) -> None:
    stack = fixed_stack(ranks=(2, 2))
    nothing = UpdateStack(stack.names, stack.tasks, tuple(torch.zeros_like(B) for B in stack.B), stack.A)
    result = merged(method, nothing, space=space)
    assert result.shape == (1, 20, 16)
    assert bool((result == 0).all())


@every_space
@every_method
@few
@given(stack=stacks(), budget=st.sampled_from([1, 3000, 20_000]))
def test_the_size_of_the_blocks_does_not_matter(
    method: str, space: str, stack: UpdateStack, budget: int
) -> None:
    whole = merged(method, stack, space=space)
    assert same(merged(method, stack, space=space, budget=budget), whole, 1e-10)
