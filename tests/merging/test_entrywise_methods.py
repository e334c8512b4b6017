"""What single entry-wise methods promise: counts, ties, randomness, ends of the arc, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from entrywise_tools import (
    SETTINGS,
    SPACES,
    dense,
    fixed_stack,
    kernel_and_context,
    merged,
    same,
    written_out,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import copies
from torch import Tensor

from merging.entrywise import elected
from merging.errors import InputError
from merging.updates import UpdateStack

every_method = pytest.mark.parametrize("method", SETTINGS)
every_space = pytest.mark.parametrize("space", SPACES)
few = settings(max_examples=8, deadline=None)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(
    shape=st.sampled_from([(5, 7), (64, 33), (301, 129)]),
    density=st.sampled_from([0.01, 0.2, 0.9]),
    seed=st.integers(0, 99),
    budget=st.sampled_from([20_000, 1 << 28]),
)
def test_a_density_keeps_exactly_its_share(
    method: str, dtype: torch.dtype, shape: tuple[int, int], density: float, seed: int, budget: int
) -> None:
    stack = copies(fixed_stack(seed, *shape), 1).to(dtype)
    entries = shape[0] * shape[1]
    for compat, kept in ((None, int(density * entries)), ("paper", int(density * entries) + 1)):
        if method == "magnitude_prune" and compat:
            kept = entries - int((1 - density) * entries + 1e-9)
        parameters = {"density": density, "trim_scope": "tensor", "compat": compat}
        result = merged(method, stack, parameters, budget=budget)
        assert int((result != 0).sum()) == max(1, kept)


@few
@given(
    shape=st.sampled_from([(5, 7), (64, 33), (301, 129)]),
    density=st.sampled_from([0.01, 0.2, 0.9]),
    gamma=st.sampled_from([0.0, 0.001, 0.05, 0.6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_breadcrumbs_keeps_its_share_however_few_are_the_largest(
    shape: tuple[int, int], density: float, gamma: float, dtype: torch.dtype
) -> None:
    stack = copies(fixed_stack(3, *shape), 1).to(dtype)
    result = merged("breadcrumbs", stack, {"density": density, "gamma": gamma})
    entries = shape[0] * shape[1]
    kept = max(1, int(density * entries))
    assert int((result != 0).sum()) == kept
    ordered = stack.task(0).abs().flatten().sort(descending=True).values
    top = min(int(gamma * entries), entries - kept)
    assert float(result.abs().max()) == pytest.approx(float(ordered[top]), rel=1e-5)


def test_breadcrumbs_by_rows_keeps_its_share_of_every_row() -> None:
    stack = copies(fixed_stack(3, 9, 40), 1)
    result = merged("breadcrumbs", stack, {"trim_scope": "row", "density": 0.3, "gamma": 0.1})
    assert (result != 0).sum(-1).tolist() == [[12] * 9]
    crowded = merged("breadcrumbs", stack, {"trim_scope": "row", "density": 0.9, "gamma": 0.5})
    assert (crowded != 0).sum(-1).tolist() == [[20] * 9]


def whole_numbers(seed: int, T: int = 3, m: int = 12, n: int = 15) -> UpdateStack:
    """Factors of small whole numbers: exact in bfloat16 and full of equal magnitudes and zero sums."""
    g = torch.Generator().manual_seed(seed)
    B = tuple(torch.randint(-2, 3, (1, m, 2), generator=g).double() for _ in range(T))
    A = tuple(torch.randint(-2, 3, (1, 2, n), generator=g).double() for _ in range(T))
    return UpdateStack(("m",), tuple(range(T)), B, A)


@every_method
@few
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    budget=st.sampled_from([2000, 1 << 28]),
)
def test_equal_magnitudes_live_or_die_together(
    method: str, seed: int, dtype: torch.dtype, budget: int
) -> None:
    stack = whole_numbers(seed)
    assert torch.equal(stack.to(torch.bfloat16).B[0].double(), stack.B[0])
    _, context = kernel_and_context(method, stack.T)
    expected = written_out(method, stack, context, "full")
    assert same(merged(method, stack.to(dtype), budget=budget).double(), expected, 1e-6)
    if method in ("ties", "magnitude_prune", "breadcrumbs", "sce", "consensus"):  # no masks by position
        g = torch.Generator().manual_seed(seed)
        rows, cols = torch.randperm(stack.m, generator=g), torch.randperm(stack.n, generator=g)
        shuffled = UpdateStack(
            stack.names,
            stack.tasks,
            tuple(B[:, rows] for B in stack.B),
            tuple(A[:, :, cols] for A in stack.A),
        )
        assert same(merged(method, shuffled), expected[:, rows][:, :, cols], 1e-12)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_leaves_a_constant_tensor_alone(method: str) -> None:
    ones = UpdateStack(("m",), (0,), (torch.ones(1, 4, 1),), (torch.ones(1, 1, 6),))
    for gamma in (0.0, 0.1, 0.5):
        assert bool((merged(method, ones, {"density": 0.5, "gamma": gamma}) == 1.0).all())


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
@every_space
def test_the_mean_over_seeds_is_the_sum(method: str, space: str) -> None:
    stack = fixed_stack(1, 8, 9, (2, 2))
    count = 400
    total = torch.zeros(1, 8, 9, dtype=torch.float64)
    for seed in range(count):
        total += merged(method, stack, space=space, seed=seed)
    expected = stack.dense().sum(1)
    least = 0.5 if method == "dare_linear" else 0.3
    # Var of a kept-or-dropped entry is x^2 (1/p - 1); summed over entries, spaces keep it.
    spread = (float((stack.dense() ** 2).sum()) * (1 / least - 1) / count) ** 0.5
    assert float((total / count - expected).norm()) < 1.5 * spread


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_another_seed_drops_other_entries(method: str) -> None:
    stack = fixed_stack()
    first = merged(method, stack, seed=1)
    assert torch.equal(first, merged(method, stack, seed=1))
    assert not same(first, merged(method, stack, seed=2), 0.1)


def test_della_keeps_large_entries_more_often() -> None:
    stack = copies(fixed_stack(2, 40, 300), 1)
    parameters = {"density": 0.5, "epsilon": 0.45, "rescale": False}
    kept = torch.stack([merged("della_linear", stack, parameters, seed=seed) != 0 for seed in range(40)])
    order = stack.task(0).abs().argsort(-1)
    share = kept.double().mean(0).gather(-1, order).mean((0, 1))
    assert share[:30].mean().item() == pytest.approx(0.05 + 0.9 * 14.5 / 299, abs=0.01)
    assert share[-30:].mean().item() == pytest.approx(0.95 - 0.9 * 14.5 / 299, abs=0.01)
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)


def test_della_without_a_range_is_dare() -> None:
    stack = fixed_stack()
    della = merged("della_linear", stack, {"density": 0.5, "epsilon": 0.0})
    assert same(della, merged("dare_linear", stack, {"density": 0.5}))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("magnitude_prune", {"density": 0.3, "rescale": True}),
        ("breadcrumbs", {"density": 0.3, "rescale": True}),
        ("dare_linear", {"density": 0.3, "compat": "mergekit"}),
        ("della_linear", {"density": 0.3, "compat": "mergekit"}),
    ],
)
@pytest.mark.parametrize("budget", [3000, 1 << 28])
def test_rescaling_keeps_the_sum_of_magnitudes_of_each_model(
    method: str, parameters: dict[str, Any], budget: int
) -> None:
    stack = copies(fixed_stack(), 1)
    result = merged(method, stack, parameters, budget=budget)
    assert float(result.abs().sum()) == pytest.approx(float(stack.task(0).abs().sum()), rel=1e-9)


def test_consensus_asks_for_as_many_models_as_have_the_module() -> None:
    stack = copies(fixed_stack(), 1)
    assert same(merged("consensus", stack, {"min_agree": 3}), stack.task(0))
    kernel, context = kernel_and_context("consensus", 2, {"min_agree": 3})
    heard: list[str] = []
    kernel.merge(copies(fixed_stack(), 2), replace(context, warn=lambda code, message: heard.append(code)))
    assert heard == ["min_agree_lowered"]


def test_sce_of_equal_models_is_that_model_whatever_it_selects() -> None:
    stack = copies(fixed_stack(), 3)
    assert same(merged("sce", stack, {"select_topk": 0.1}), stack.task(0))


@settings(max_examples=40, deadline=None)
@given(t=st.floats(0.0, 1.0), angle=st.floats(0.01, 3.1), length=st.floats(0.1, 10.0))
def test_slerp_keeps_the_length_and_divides_the_angle(t: float, angle: float, length: float) -> None:
    def vector(at: float) -> tuple[Tensor, Tensor]:
        direction = torch.tensor([[at]], dtype=torch.float64)
        return torch.cat([direction.cos(), direction.sin()]).unsqueeze(0) * length, torch.ones(
            1, 1, 1, dtype=torch.float64
        )

    (B0, A0), (B1, A1) = vector(0.0), vector(angle)
    result = merged("slerp", UpdateStack(("m",), (0, 1), (B0, B1), (A0, A1)), {"t": t})
    assert same(result, vector(t * angle)[0], 1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_of_parallel_models_is_the_straight_line(factor: float, dtype: torch.dtype) -> None:
    one = copies(fixed_stack(ranks=(2,)), 1)
    stack = UpdateStack(("m",), (0, 1), (one.B[0], one.B[0] * factor), (one.A[0],) * 2).to(dtype)
    result = merged("slerp", stack, {"t": 0.25})
    expected = one.task(0) * (0.75 + 0.25 * factor)
    assert float((result.double() - expected).norm()) <= 1e-6 * float(one.task(0).norm())


def test_slerp_counts_a_missing_module_as_zero() -> None:
    one = fixed_stack(ranks=(2,))
    second = UpdateStack(("m",), (1,), one.B, one.A)
    kernel, context = kernel_and_context("slerp", 2, {"t": 0.3})
    assert same(dense(kernel.merge(one, context).update), 0.7 * one.task(0))
    assert same(dense(kernel.merge(second, context).update), 0.3 * one.task(0))


def test_slerp_under_compat_is_a_line_for_small_angles() -> None:
    one = fixed_stack(ranks=(1,), m=2, n=1)
    angle = 0.02
    turn = torch.tensor([[1.0, -angle], [angle, 1.0]], dtype=torch.float64)
    stack = UpdateStack(("m",), (0, 1), (one.B[0], turn @ one.B[0]), (one.A[0],) * 2)
    line = 0.5 * stack.dense().sum(1)
    assert same(merged("slerp", stack, {"t": 0.5, "compat": "mergekit"}), line, 1e-12)
    assert not same(merged("slerp", stack, {"t": 0.5}), line, 1e-6)


@every_method
def test_unknown_spaces_are_refused(method: str) -> None:
    with pytest.raises(InputError) as caught:
        kernel_and_context(method, 2, space="knots_v")
    assert caught.value.where["field"] == "space"


@pytest.mark.parametrize(
    ("method", "parameters", "field"),
    [
        ("della", {"density": 0.9, "epsilon": 0.2}, "epsilon"),
        ("della_linear", {"density": 0.1, "epsilon": 0.1}, "epsilon"),
        ("breadcrumbs", {"gamma": 1.0}, "gamma"),
        ("breadcrumbs", {"compat": "peft"}, "compat"),
        ("sce", {"select_topk": 0.0}, "select_topk"),
        ("consensus", {"min_agree": -1}, "min_agree"),
        ("slerp", {"t": 1.5}, "t"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(
    method: str, parameters: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError) as caught:
        kernel_and_context(method, 2, parameters)
    assert caught.value.code == "invalid_parameter"
    assert caught.value.where["field"] == f"parameters.{field}"


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_exactly_two_models(count: int) -> None:
    with pytest.raises(InputError) as caught:
        kernel_and_context("slerp", count)
    assert caught.value.code in ("too_few_models", "too_many_models")


@every_method
def test_isotropize_flattens_what_the_method_found(method: str) -> None:
    stack = fixed_stack()
    for space in ("knots", "core"):
        result = merged(method, stack, {**SETTINGS[method], "isotropize": True}, space=space)
        S = torch.linalg.svdvals(result[0])
        alive = S[S > 1e-8 * S[0]]
        assert float(alive.max() - alive.min()) <= 1e-10 * float(S[0])
        plain = torch.linalg.svdvals(merged(method, stack, space=space)[0])
        assert float(S.sum()) == pytest.approx(float(plain.sum()), rel=1e-9)
    with pytest.raises(InputError) as caught:
        merged(method, stack, {**SETTINGS[method], "isotropize": True}, space="full")
    assert caught.value.code == "isotropize_in_full_space"


@pytest.mark.parametrize("votes", ["total", "frequency", "normfrac", "normmass"])
@pytest.mark.parametrize("space", ["knots", "core"])
def test_votes_turn_with_the_arbitrary_signs_of_singular_vectors(space: str, votes: str) -> None:
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(1, 4, 6, 5, generator=generator, dtype=torch.float64)
    y *= y.abs() > 0.5
    _, context = kernel_and_context("ties", 4, {"majority_sign_method": votes}, space=space)
    squares = y.square().sum((-2, -1), keepdim=True)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    flips = signs[torch.arange(6) % 2].view(6, 1) * signs[torch.arange(5) // 2 % 2]
    straight, turned = (elected(x, context, 1.0, squares) for x in (y, y * flips))
    some = (y != 0).any(1, keepdim=True)
    assert torch.equal((turned * flips)[some], straight[some])
    counts = y.sign().sum(1, keepdim=True)
    assert int((some & (counts == 0)).sum()) > 3


def test_a_tie_between_counts_is_positive_in_full_space_and_goes_to_the_sum_elsewhere() -> None:
    y = torch.tensor([3.0, -5.0], dtype=torch.float64).view(1, 2, 1, 1)
    for space, sign in (("full", 1.0), ("knots", -1.0), ("core", -1.0)):
        _, context = kernel_and_context("ties", 2, {"majority_sign_method": "frequency"}, space=space)
        assert float(elected(y, context, 1.0)) == sign
