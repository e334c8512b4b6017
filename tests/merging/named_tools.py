"""Running the methods with coordinates of their own on stacks of updates."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from torch import Tensor

from merging import catalog
from merging.kernels import Context, Kernel
from merging.lowrank import ThinSVD
from merging.recipe import Recipe
from merging.updates import UpdateStack

quick = settings(max_examples=40, deadline=None)


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
