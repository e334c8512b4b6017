"""Running entry-wise methods on stacks, and their settings in the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from dense_entrywise import METHODS, Problem
from torch import Tensor

from merging import catalog, spaces
from merging.kernels import Context, Kernel
from merging.lowrank import ThinSVD
from merging.masks import MaskStream
from merging.recipe import Recipe
from merging.updates import UpdateStack

SPACES = ("full", "knots", "core")
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude_prune": {"density": 0.4},
    "ties": {"density": 0.4},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.1},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "della": {"density": 0.5, "epsilon": 0.2},
    "sce": {"select_topk": 0.5},
    "consensus": {"mask_lambda": 0.4, "min_agree": 2},
}
VOTING = ("ties", "breadcrumbs_ties", "dare_ties", "della", "sce")
ADDING = ("magnitude_prune", "breadcrumbs", "dare_linear", "della_linear", "consensus")

NEUTRAL: dict[str, dict[str, Any]] = {
    "magnitude_prune": {"density": 1.0},
    "ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": {"density": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della_linear": {"density": 1.0, "epsilon": 0.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "sce": {"select_topk": 1.0},
    "consensus": {"min_agree": 0},
}


def kernel_and_context(
    method: str,
    T: int,
    parameters: dict[str, Any] | None = None,
    *,
    space: str = "full",
    per_model: list[dict[str, Any]] | None = None,
    digests: list[str] | None = None,
    seed: int = 0,
    budget: int = 1 << 28,
) -> tuple[Kernel, Context]:
    models = [{"model": f"t{t}", "parameters": (per_model or [{}] * T)[t]} for t in range(T)]
    data = {"merge_method": method, "space": space, "models": models}
    resolved = catalog.resolve(
        Recipe.load({**data, "parameters": SETTINGS.get(method, {}) if parameters is None else parameters})
    )
    context = Context(
        resolved.params,
        resolved.per_model,
        tuple(digests or [f"digest-{t}" for t in range(T)]),
        space=space,
        seed=seed,
        budget=budget,
    )
    return catalog.load_kernel(resolved.method), context


def dense(update: Any) -> Tensor:
    """``(G, m, n)``."""
    if isinstance(update, ThinSVD):
        return (update.U * update.S.to(update.U.dtype).unsqueeze(-2)) @ update.Vh
    result: Tensor = update.dense()
    return result


def merged(
    method: str, stack: UpdateStack, parameters: dict[str, Any] | None = None, **options: Any
) -> Tensor:
    """The merged updates of a batch as matrices ``(G, m, n)``, ``lambda`` not applied."""
    kernel, context = kernel_and_context(method, stack.T, parameters, **options)
    for index in range(kernel.surveys(context)):
        shared = kernel.reduce(index, [kernel.survey(index, stack, context)], context)
        context = replace(context, shared=shared)
    return dense(kernel.merge(stack, context).update)


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    scale = max(float(expected.abs().max()), 1e-300)
    return bool(torch.isfinite(actual).all()) and float((actual - expected).abs().max()) <= tolerance * scale


def written_out(method: str, stack: UpdateStack, context: Context, space: str) -> Tensor:
    """The reference on the coordinates of the space, lifted back."""
    place = spaces.place(stack, space)
    coordinates = place.coordinates.rows(0, place.coordinates.m)
    parts = []
    for g in range(stack.G):

        def keep(chance: Tensor, g: int = g) -> Tensor:
            every = torch.zeros_like(coordinates)
            every[g] = chance
            fresh = MaskStream(stack, context, place.widths.tolist())
            return fresh.keep(coordinates, every)[g]

        problem = Problem(
            coordinates[g],
            [params.weight for params in context.of(stack)],
            [params.model_dump() for params in context.of(stack)],
            int(place.entries[g]),
            int(place.widths[g]),
            keep,
        )
        parts.append(METHODS[method](problem))
    return dense(place.lift(torch.stack(parts)))


def fixed_stack(seed: int = 0, m: int = 20, n: int = 16, ranks: tuple[int, ...] = (3, 3, 3)) -> UpdateStack:
    g = torch.Generator().manual_seed(seed)
    B = tuple(torch.randn(1, m, r, generator=g, dtype=torch.float64) for r in ranks)
    A = tuple(torch.randn(1, r, n, generator=g, dtype=torch.float64) for r in ranks)
    return UpdateStack(("m",), tuple(range(len(ranks))), B, A)
