"""What must hold for LoRE-Merging, against a dense float64 reference, over random stacks."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close, dense
from hypothesis import assume, given
from hypothesis import strategies as st
from named_tools import close, deltas, merged, quick
from stacks import copies, module, permuted, stacks
from torch import Tensor

from merging import spaces
from merging.errors import InputError
from merging.methods import lore
from merging.updates import UpdateStack


def dense_lore(thetas: Tensor, mu: float, iters: int) -> tuple[Tensor, Tensor, list[float]]:
    """``theta_0``, ``delta_t`` and the objective after each sweep, on dense matrices ``(T, m, n)``."""
    parts = torch.zeros_like(thetas)
    base = thetas.mean(0)
    objectives = []
    for _ in range(iters):
        base = (thetas - parts).mean(0)
        U, S, Vh = torch.linalg.svd(thetas - base, full_matrices=False)
        S = (S - mu).clamp_min(0.0)
        parts = U * S.unsqueeze(-2) @ Vh
        objectives.append(float(0.5 * (base + parts - thetas).square().sum() + mu * S.sum()))
    return base, parts, objectives


def top(matrices: Tensor) -> float:
    """The largest singular value of the distances to the mean."""
    return float(torch.linalg.matrix_norm(matrices - matrices.mean(0), ord=2).max())


@quick
@given(
    stack=stacks(),
    share=st.sampled_from([0.02, 0.3, 0.8]),
    iters=st.integers(1, 8),
    scale=st.sampled_from([1.0, 0.5, 3.0]),
    weights=st.sampled_from([[1.0] * 4, [0.2, 1.5, -0.5, 2.0]]),
    data=st.data(),
)
def test_lore_is_the_dense_algorithm_on_any_base(
    stack: UpdateStack, share: float, iters: int, scale: float, weights: list[float], data: st.DataObject
) -> None:
    """Also translation equivariance: the dense run adds a common matrix and takes it off again."""
    weights = weights[: stack.T]
    w = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1) / sum(weights)
    for g in range(stack.G):
        alone = module(stack, g)
        matrices = deltas(alone)
        common = torch.full_like(matrices[0], data.draw(st.sampled_from([0.0, 0.7])))
        mu = share * top(matrices)
        assume(mu > 1e-8)
        base, parts, _ = dense_lore(matrices + common, mu, iters)
        expected = base - common + scale * (w * parts).sum(0)
        parameters = {"mu": mu, "mu_mode": "absolute", "iters": iters, "delta_scale": scale, "tol": 0.0,
                      "final": "average"}  # fmt: skip
        close(merged("lore", alone, parameters, weights=weights)[0], expected, 1e-8, matrices)


@quick
@given(stack=stacks(min_tasks=2), share=st.sampled_from([0.05, 0.4]))
def test_lore_never_raises_its_objective(stack: UpdateStack, share: float) -> None:
    place = spaces.core(stack)
    thetas = place.coordinates.rows(0, place.coordinates.m)
    largest = max(top(thetas[g]) for g in range(stack.G))
    mu = torch.tensor(max(share * largest, 1e-6), dtype=torch.float64)
    before = torch.full((stack.G,), float("inf"), dtype=torch.float64)
    for iters in range(1, 6):
        base, parts = lore.sweeps(thetas, mu, iters)
        values = torch.linalg.svdvals(parts)
        objective = 0.5 * (base.unsqueeze(1) + parts - thetas).square().sum((1, 2, 3)) + mu * values.sum(
            (1, 2)
        )
        assert (objective <= before * (1 + 1e-10) + 1e-12).all()
        before = objective


@quick
@given(stack=stacks(min_tasks=2), mode=st.sampled_from(["absolute", "relative"]), scale=st.floats(0.0, 3.0))
def test_lore_with_a_threshold_of_everything_or_nothing_is_the_mean(
    stack: UpdateStack, mode: str, scale: float
) -> None:
    mean = stack.dense().mean(1)
    large = 2.0 * stack.T if mode == "relative" else 2.0 * float(stack.dense().norm()) + 1.0
    for mu in (0.0, large):
        parameters = {"mu": mu, "mu_mode": mode, "delta_scale": scale, "final": "average", "iters": 5}
        close(merged("lore", stack, parameters), mean, 1e-7, stack.dense())


@quick
@given(stack=stacks(min_tasks=2), scale=st.floats(-2.0, 3.0), share=st.floats(0.01, 0.9))
def test_lore_of_two_models_with_equal_weights_is_their_mean(
    stack: UpdateStack, scale: float, share: float
) -> None:
    pair = UpdateStack(stack.names, (0, 1), stack.B[:2], stack.A[:2])
    warnings: list[str] = []
    for final in ("average", "ties"):
        parameters = {"mu": share, "mu_mode": "relative", "delta_scale": scale, "final": final, "iters": 5}
        result = merged("lore", pair, parameters, warnings=warnings)
        close(result, pair.dense().mean(1), 1e-8, pair.dense())
    assert set(warnings) == {"degenerate_to_mean"}


@quick
@given(
    stack=stacks(min_tasks=3, kinds=("random", "zero")),
    density=st.sampled_from([0.2, 0.7, 1.0]),
    weights=st.sampled_from([[1.0] * 4, [0.2, 1.5, 0.5, 2.0]]),
)
def test_lore_with_ties_trims_and_elects_the_parts_in_core_space(
    stack: UpdateStack, density: float, weights: list[float]
) -> None:
    share = torch.tensor(weights[: stack.T], dtype=torch.float64)
    share = stack.T * share / share.sum()
    parameters = {"mu": 0.2, "iters": 6, "tol": 0.0, "delta_scale": 1.5, "density": density}
    result = merged("lore", stack, {**parameters, "final": "ties"}, weights=weights[: stack.T])
    for g in range(stack.G):
        place = spaces.core(module(stack, g))
        thetas = place.coordinates.rows(0, place.coordinates.m)[0]
        distances = torch.linalg.matrix_norm(thetas - thetas.mean(0), ord=2)
        base, parts, _ = dense_lore(thetas, 0.2 * float(distances.mean()), 6)
        y = parts * share.view(-1, 1, 1)
        if density < 1.0:
            kept = max(1, int(density * int(place.entries)))
            ranked = y.abs().flatten(1).sort(dim=1, descending=True).values
            y = y * (y.abs() >= ranked[:, kept - 1].view(-1, 1, 1))
        agree = (y * y.sum(0).sign()) > 0
        mean = (y * agree).sum(0) / agree.sum(0).clamp_min(1)
        expected = dense(place.lift((base + 1.5 * mean).unsqueeze(0)))
        close(result[g], expected, 1e-8, stack.dense())


@quick
@given(stack=stacks(kinds=("random", "deficient")), count=st.integers(1, 4))
def test_lore_of_identical_models_is_the_model(stack: UpdateStack, count: int) -> None:
    same = copies(stack, count)
    parameters = {"mu": 0.1, "mu_mode": "relative", "delta_scale": 2.0, "final": "average"}
    close(merged("lore", same, parameters), same.dense()[:, 0], 1e-9, same.dense())


@quick
@given(
    stack=stacks(min_tasks=2),
    factor=st.sampled_from([1e-3, 7.0]),
    final=st.sampled_from(["average", "ties"]),
    data=st.data(),
)
def test_lore_scales_with_its_inputs_and_threshold_and_ignores_the_order(
    stack: UpdateStack, factor: float, final: str, data: st.DataObject
) -> None:
    assume(final == "average" or stack.T > 2)
    parameters = {"mu": 0.2, "mu_mode": "absolute", "delta_scale": 1.5, "final": final, "density": 1.0,
                  "tol": 0.0}  # fmt: skip
    plain = merged("lore", stack, parameters)
    scaled = UpdateStack(stack.names, stack.tasks, tuple(B * factor for B in stack.B), stack.A)
    again = merged("lore", scaled, {**parameters, "mu": 0.2 * factor})
    if final == "average":
        close(again, factor * plain, 1e-8, scaled.dense())
        order = data.draw(st.permutations(range(stack.T)))
        close(merged("lore", permuted(stack, order), parameters), plain, 1e-8, stack.dense())
    relative = {**parameters, "mu_mode": "relative"}
    one, other = merged("lore", stack, relative), merged("lore", scaled, relative)
    close(other, factor * one, 1e-8 if final == "average" else 1e-6, scaled.dense())


def test_lore_converges_to_the_mean_plus_a_multiple_of_the_parts_and_says_so() -> None:
    generator = torch.Generator().manual_seed(5)
    B = tuple(torch.randn(1, 12, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    A = tuple(torch.randn(1, 3, 10, generator=generator, dtype=torch.float64) for _ in range(4))
    stack = UpdateStack(("m",), (0, 1, 2, 3), B, A)
    mean = stack.dense().mean(1)
    gaps = []
    for iters in (5, 50, 500):
        warnings: list[str] = []
        parameters = {
            "mu": 0.3,
            "mu_mode": "relative",
            "iters": iters,
            "tol": 0.0,
            "final": "average",
            "delta_scale": 1.0,
        }
        gaps.append(float((merged("lore", stack, parameters, warnings=warnings) - mean).norm() / mean.norm()))
        assert warnings == ["degenerate_to_mean"]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4
    warnings = []
    merged("lore", stack, {"delta_scale": 2.0, "final": "average"}, warnings=warnings)
    merged("lore", stack, {"final": "ties"}, warnings=warnings)
    merged("lore", stack, {"final": "average"}, weights=[1.0, 2.0, 1.0, 1.0], warnings=warnings)
    assert warnings == []


def test_lore_parts_lose_rank_as_the_threshold_rises() -> None:
    generator = torch.Generator().manual_seed(6)
    thetas = torch.randn(1, 3, 8, 9, generator=generator, dtype=torch.float64)
    ranks = []
    for mu in (0.1, 1.0, 2.0, 4.0, 100.0):
        _, parts = lore.sweeps(thetas, torch.tensor(mu, dtype=torch.float64), 20)
        ranks.append(int(torch.linalg.matrix_rank(parts, rtol=1e-9).sum()))
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[2] > ranks[-1]
    assert ranks[-1] == 0


def test_lore_stops_each_module_on_its_own() -> None:
    generator = torch.Generator().manual_seed(7)
    B = [torch.randn(2, 9, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    A = [torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    for factors in (B, A):  # the second module's tasks are nearly equal: it converges sooner
        for t in (1, 2):
            factors[t][1] = factors[0][1] + 1e-3 * factors[t][1]
    stack = UpdateStack(("m0", "m1"), (0, 1, 2), tuple(B), tuple(A))
    parameters = {"mu": 0.2, "mu_mode": "relative", "tol": 1e-3, "iters": 200, "delta_scale": 2.0,
                  "final": "average"}  # fmt: skip
    together = merged("lore", stack, parameters)
    for g in range(2):
        assert_close(together[g : g + 1], merged("lore", module(stack, g), parameters), 1e-12)
    exact = merged("lore", stack, {**parameters, "tol": 0.0})
    assert 0 < float((together - exact).norm()) < 0.05 * float(exact.norm())


def test_lore_refuses_weights_without_a_sum() -> None:
    stack = UpdateStack(("m",), (0, 1), (torch.ones(1, 4, 2),) * 2, (torch.ones(1, 2, 3),) * 2)
    with pytest.raises(InputError) as caught:
        merged("lore", stack, weights=[1.0, -1.0])
    assert caught.value.code == "zero_weight_sum"
