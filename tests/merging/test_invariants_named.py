"""What must hold for DRM, LoRA-LEGO and LoRE, against dense float64 references, over random stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import assert_close, dense
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stacks import copies, module, permuted, stacks, transposed
from torch import Tensor

from merging import catalog, spaces
from merging.catalog.named import LegoParams
from merging.errors import InputError
from merging.kernels import Context, Kernel
from merging.lowrank import ThinSVD
from merging.methods import lego, lore
from merging.recipe import Recipe
from merging.updates import UpdateStack

quick = settings(max_examples=40, deadline=None)
DIRECTIONS = ("drm_h", "drm_v")


def merged(
    method: str,
    stack: UpdateStack,
    parameters: dict[str, Any] | None = None,
    *,
    weights: list[float] | None = None,
    seed: int = 0,
    warnings: list[str] | None = None,
    budget: int = 1 << 28,
) -> Tensor:
    """The merged update of a batch as dense matrices ``(G, m, n)``."""
    weights = weights or [1.0] * stack.T
    models = [{"model": f"t{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)]
    recipe = Recipe.load({"merge_method": method, "models": models, "parameters": parameters or {}})
    resolved = catalog.resolve(recipe)
    kernel: Kernel = catalog.load_kernel(resolved.method)
    heard: list[str] = warnings if warnings is not None else []
    context = Context(
        resolved.params,
        resolved.per_model,
        tuple(f"digest-{t}" for t in range(stack.T)),
        seed=seed,
        budget=budget,
        warn=lambda code, message: heard.append(code),
    )
    update = kernel.merge(stack, context).update
    if isinstance(update, ThinSVD):
        return update.U * update.S.to(update.U).unsqueeze(-2) @ update.Vh
    return update.dense()


def deltas(stack: UpdateStack) -> Tensor:
    """``(T, m, n)`` of a batch of one."""
    return stack.dense()[0]


def close(actual: Tensor, expected: Tensor, tolerance: float, scale: Tensor) -> None:
    """Frobenius error below ``tolerance`` times the norm of ``scale`` (the inputs), which may be zero."""
    assert float((actual - expected).norm()) <= tolerance * float(scale.norm()) + 1e-300


# --- DRM ------------------------------------------------------------------------------------------------


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


# --- LoRA-LEGO ------------------------------------------------------------------------------------------


def dense_lego(
    stack: UpdateStack, labels: list[int], k: int, params: LegoParams, weights: list[float]
) -> Tensor:
    """The published steps, unit by unit, for a batch of one."""
    units, shares = [], []
    for B, A, weight in zip(stack.B, stack.A, weights, strict=True):
        for j in range(B.shape[2]):
            units.append(torch.cat([A[0, j], B[0, :, j]]))
            shares.append(weight)
    order = float("inf") if params.norm == "inf" else 2.0
    result = torch.zeros(stack.m, stack.n, dtype=torch.float64)
    for cluster in range(k):
        members = [(x, w) for x, w, label in zip(units, shares, labels, strict=True) if label == cluster]
        if not members:
            continue
        total = sum(w for _, w in members)
        centre = torch.stack([x * (w / total) for x, w in members]).sum(0)
        if params.param_reweight:
            mean = sum(float(x.norm(p=order)) * w / total for x, w in members)
            centre = centre * (mean / centre.norm(p=order))
        result += torch.outer(centre[stack.n :], centre[: stack.n])
    rank = sum(stack.ranks) / stack.T
    return result * (rank / k) ** 0.5 if params.output_reweight else result


@quick
@given(
    stack=stacks(kinds=("random", "shared")),
    norm=st.sampled_from(["inf", "l2"]),
    param=st.booleans(),
    output=st.booleans(),
    weights=st.sampled_from([[1.0] * 4, [2.0, 0.5, 1.0, 3.0]]),
    data=st.data(),
)
def test_lego_is_the_unit_by_unit_algorithm(
    stack: UpdateStack, norm: str, param: bool, output: bool, weights: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, stack.R))
    labels = data.draw(st.lists(st.integers(0, k - 1), min_size=stack.R, max_size=stack.R))
    params = LegoParams.model_validate({"norm": norm, "param_reweight": param, "output_reweight": output})
    weights = weights[: stack.T]
    for g in range(stack.G):
        alone = module(stack, g)
        units = lego.pool(alone, torch.tensor(weights))
        update = lego.rebuild(units, torch.tensor([labels]), k, params, stack.R / stack.T)
        assert update.rank == k
        close(update.dense()[0], dense_lego(alone, labels, k, params, weights), 1e-9, deltas(alone))


@quick
@given(stack=stacks(), canonicalize=st.booleans())
def test_lego_with_a_cluster_per_unit_is_the_scaled_sum(stack: UpdateStack, canonicalize: bool) -> None:
    parameters = {"k": stack.R, "canonicalize": canonicalize}
    expected = ((stack.R / stack.T) / stack.R) ** 0.5 * stack.dense().sum(1)
    close(merged("lora_lego", stack, parameters), expected, 1e-10, stack.dense())


@quick
@given(stack=stacks(kinds=("random",)), canonicalize=st.booleans())
def test_lego_of_one_adapter_is_the_identity(stack: UpdateStack, canonicalize: bool) -> None:
    one = copies(stack, 1)
    close(merged("lora_lego", one, {"canonicalize": canonicalize}), one.dense()[:, 0], 1e-10, one.dense())


@quick
@given(stack=stacks(kinds=("random",)), data=st.data())
def test_lego_of_an_adapter_and_its_permuted_copy_is_the_identity(
    stack: UpdateStack, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(stack.ranks[0])))
    B, A = stack.B[0], stack.A[0]
    pair = UpdateStack(stack.names, (0, 1), (B, B[:, :, order]), (A, A[:, order]))
    close(merged("lora_lego", pair), (B @ A), 1e-9, B @ A)


@quick
@given(stack=stacks(min_tasks=2, kinds=("random", "zero")), seed=st.integers(0, 5), data=st.data())
def test_lego_does_not_depend_on_the_order_of_ranks_or_tasks(
    stack: UpdateStack, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, stack.R))
    orders = [data.draw(st.permutations(range(rank))) for rank in stack.ranks]
    tasks = data.draw(st.permutations(range(stack.T)))
    shuffled = permuted(
        UpdateStack(
            stack.names,
            stack.tasks,
            tuple(B[:, :, order] for B, order in zip(stack.B, orders, strict=True)),
            tuple(A[:, order] for A, order in zip(stack.A, orders, strict=True)),
        ),
        tasks,
    )
    one, other = (merged("lora_lego", s, {"k": k}, seed=seed) for s in (stack, shuffled))
    close(one, other, 1e-9, stack.dense())


@quick
@given(stack=stacks(min_tasks=2, kinds=("random",)), data=st.data())
def test_lego_canonical_does_not_depend_on_how_units_are_split(
    stack: UpdateStack, data: st.DataObject
) -> None:
    """Balanced halves and signs: rescaled and flipped units of all but the reference change nothing."""
    k = data.draw(st.integers(1, stack.R))
    norms = stack.dense().flatten(2).norm(dim=-1)
    B, A = list(stack.B), list(stack.A)
    for t in range(stack.T):
        if (norms.argmax(1) == t).any():
            continue
        factor = torch.tensor(
            [data.draw(st.sampled_from([-3.0, -1.0, 0.5, 2.0])) for _ in range(stack.ranks[t])],
            dtype=torch.float64,
        )
        B[t], A[t] = B[t] * factor, A[t] / factor.unsqueeze(-1)
    other = UpdateStack(stack.names, stack.tasks, tuple(B), tuple(A))
    close(merged("lora_lego", stack, {"k": k}), merged("lora_lego", other, {"k": k}), 1e-9, stack.dense())


def test_lego_leaves_out_models_without_weight_and_without_an_update() -> None:
    generator = torch.Generator().manual_seed(3)
    B = [torch.randn(1, 7, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    A = [torch.randn(1, 3, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    both = UpdateStack(("m",), (0, 1), tuple(B[:2]), tuple(A[:2]))
    expected = merged("lora_lego", both)
    stack = UpdateStack(("m",), (0, 1, 2), tuple(B), tuple(A))
    assert_close(merged("lora_lego", stack, weights=[1.0, 1.0, 0.0]), expected, 1e-12)
    untrained = UpdateStack(("m",), (0, 1, 2), (*B[:2], torch.zeros_like(B[2])), tuple(A))
    assert_close(merged("lora_lego", untrained), expected, 1e-12)


def test_lego_refuses_more_clusters_than_units_and_no_weight_at_all() -> None:
    stack = UpdateStack(("m",), (0,), (torch.ones(1, 4, 2),), (torch.ones(1, 2, 3),))
    with pytest.raises(InputError) as caught:
        merged("lora_lego", stack, {"k": 3})
    assert caught.value.code == "k_too_large"
    assert caught.value.where == {"module": "m", "field": "parameters.k"}
    with pytest.raises(InputError) as caught:
        merged("lora_lego", stack, weights=[0.0])
    assert caught.value.code == "zero_weight_sum"


# --- LoRE -----------------------------------------------------------------------------------------------


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


# --- all ------------------------------------------------------------------------------------------------


@quick
@given(
    stack=stacks(),
    method=st.sampled_from(["drm_h", "drm_v", "lora_lego", "lore"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_a_batch_is_its_modules_whatever_the_memory(
    stack: UpdateStack, method: str, dtype: torch.dtype
) -> None:
    stack = stack.to(dtype)
    together = merged(method, stack)
    assert together.dtype == dtype
    assert torch.isfinite(together).all()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for g in range(stack.G):
        close(together[g], merged(method, module(stack, g))[0], tolerance, stack.dense())
    assert torch.equal(merged(method, stack, budget=1), merged(method, stack, budget=1))
    close(together, merged(method, stack, budget=1), tolerance, stack.dense())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["drm_h", "drm_v", "lora_lego", "lore"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cuda_device_gives_the_same_products(method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    B = tuple(torch.randn(3, 300, 8, generator=generator, dtype=dtype) for _ in range(4))
    A = tuple(torch.randn(3, 8, 200, generator=generator, dtype=dtype) for _ in range(4))
    stack = UpdateStack(("a", "b", "c"), (0, 1, 2, 3), B, A)
    there = UpdateStack(stack.names, stack.tasks, tuple(b.cuda() for b in B), tuple(a.cuda() for a in A))
    result = merged(method, there)
    assert result.is_cuda
    # A tie at the threshold of DRM may fall differently in float32.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3 if method.startswith("drm") else 1e-4
    assert_close(result.cpu(), merged(method, stack), tolerance)
